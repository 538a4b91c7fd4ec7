"""Where models lie, and what a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

import ernie45
from ernie45.errors import CapacityError, NotFoundError, UsageError
from ernie45.store.location import home as store_home
from ernie45.store.location import installed, lost_links, made, model_path, published_id, resolve


def put(home: Path, name: str, file: str = "config.json") -> Path:
    folder = home / "models" / name
    folder.mkdir(parents=True)
    (folder / file).write_text("{}")
    return folder


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ERNIE45_HOME", "~/own")
    assert store_home() == tmp_path / "me" / "own"
    monkeypatch.setenv("ERNIE45_HOME", "here")
    assert store_home() == tmp_path / "here"
    monkeypatch.setenv("ERNIE45_HOME", "")
    assert store_home() == tmp_path / "cache" / "ernie45"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store_home() == tmp_path / "me" / ".cache" / "ernie45"


@pytest.mark.parametrize("name", ["a", "A-b_c.d", "owner/name", "baidu/ERNIE-4.5-0.3B-PT"])
def test_model_names(home: Path, name: str) -> None:
    assert model_path(name) == home / "models" / name


@pytest.mark.parametrize(
    "name", ["", "..", "a/..", "../a", "a/../b", "a..b", "/etc", "a/b/c", ".hidden", "a b", "ü", "a\n"]
)
def test_what_is_no_model_name(home: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no model name"):
        model_path(name)


def test_installed_are_folders_with_weights_one_or_two_deep(home: Path) -> None:
    assert installed() == {}
    expected = {"b": put(home, "b"), "a/x": put(home, "a/x"), "g": put(home, "g", "some.gguf")}
    put(home, ".b.partial-1")
    put(home, "a/.cache")
    put(home, "c", "notes.txt")
    assert installed() == dict(sorted(expected.items()))
    assert list(installed()) == ["a/x", "b", "g"]


def test_lost_links_are_found(home: Path, tmp_path: Path) -> None:
    put(home, "a/x")
    (home / "models" / "gone").symlink_to(tmp_path / "nowhere")
    assert lost_links() == {"gone": tmp_path / "nowhere"}


def test_names_are_found_in_any_case_and_without_their_owner(home: Path) -> None:
    folder = put(home, "baidu/ERNIE-4.5-0.3B-PT")
    for name in ("baidu/ERNIE-4.5-0.3B-PT", "BAIDU/ernie-4.5-0.3b-pt", "ernie-4.5-0.3b-pt"):
        assert resolve(name) == folder
    other = put(home, "own/ERNIE-4.5-0.3B-PT")
    with pytest.raises(NotFoundError, match="could be .* or .*: name its owner"):
        resolve("ernie-4.5-0.3b-pt")
    assert resolve("own/ernie-4.5-0.3b-pt") == other
    exact = put(home, "ERNIE-4.5-0.3B-PT")
    assert resolve("ernie-4.5-0.3b-pt") == exact


def test_the_default_model(home: Path) -> None:
    with pytest.raises(NotFoundError, match="`ernie pull smollm2-135m` fetches the default model"):
        resolve()
    folder = put(home, "smollm2-135m")
    assert resolve() == resolve("SmolLM2-135M") == folder


def test_paths_go_before_names_if_they_hold_a_model(home: Path, tmp_path: Path) -> None:
    folder = put(home, "m")
    (tmp_path / "m").mkdir()
    assert resolve("m") == folder
    (tmp_path / "m" / "config.json").write_text("{}")
    assert resolve("m") == Path("m")
    assert resolve(tmp_path / "m") == tmp_path / "m"
    (tmp_path / "file.gguf").write_text("")
    assert resolve("file.gguf") == Path("file.gguf")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(NotFoundError, match=r"file.txt is no model: expected .*\.gguf"):
        resolve("file.txt")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("mine-to", "did you mean 'mine-too'"),
        ("smollm2", "did you mean 'smollm2-135m'. `ernie pull smollm2-135m` fetches it"),
        ("ERNIE-4.5-03B", "`ernie pull baidu/ERNIE-4.5-0.3B-PT` fetches it"),
        ("300b-a47b", "`ernie pull baidu/ERNIE-4.5-300B-A47B-PT` fetches it"),
        ("own/unheard-of", "`ernie pull own/unheard-of` fetches it from the hub"),
        ("~nobody-of-that-name/x", "give a model name, a folder or a .gguf file"),
        ("x" * 5000, "no model 'xxx"),
        ("a\0b", "give a model name"),
    ],
)
def test_a_name_that_is_not_here_comes_with_a_remedy(home: Path, name: str, remedy: str) -> None:
    put(home, "mine-too")
    with pytest.raises(NotFoundError, match=remedy) as caught:
        resolve(name)
    assert len(str(caught.value)) < 300


def test_published_ids() -> None:
    assert published_id("nothing") is None
    ids = {published_id(name) for name in ernie45.presets()}
    assert len(ids) == 12
    assert published_id("21b-a3b-thinking") == "baidu/ERNIE-4.5-21B-A3B-Thinking"
    assert published_id("0.3b-base") == "baidu/ERNIE-4.5-0.3B-Base-PT"


def test_a_store_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError, match="set ERNIE45_HOME to a folder that you can write"):
        made(tmp_path / "file" / "models")
    assert made(tmp_path / "a" / "b").is_dir()
