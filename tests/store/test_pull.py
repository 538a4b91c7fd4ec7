"""Pulling folders and GGUF files, and telling apart what is to be pulled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie45
from ernie45.errors import CheckpointError, NotFoundError, UsageError
from ernie45.store.pull import pull
from ernie45.store.pulled import Pulled

Save = Callable[..., Path]


def test_a_folder_is_linked_not_copied(home: Path, tmp_path: Path, save: Save) -> None:
    folder = save(tmp_path / "mine")
    assert pull("mine") == Pulled(name="mine", path=home / "models" / "mine", fresh=True)
    assert (home / "models" / "mine").resolve() == folder
    assert pull(str(folder)).fresh is False
    assert pull(str(home / "models" / "mine")).fresh is False


def test_a_link_is_replaced_when_forced_or_lost_and_a_real_folder_never(home: Path, tmp_path: Path, save: Save) -> None:
    save(tmp_path / "mine")
    other = save(tmp_path / "other" / "mine")
    pull("mine")
    with pytest.raises(CheckpointError, match=r"another model 'mine' is in the store already, a link to .*--force"):
        pull(str(other))
    assert pull(str(other), force=True).fresh
    assert (home / "models" / "mine").resolve() == other
    shutil.rmtree(other)
    assert pull("mine").fresh
    (home / "models" / "mine").unlink()
    shutil.copytree(tmp_path / "mine", home / "models" / "mine")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="rename the folder, or remove that one"):
            pull("mine", force=force)


def test_a_folder_must_hold_a_model_and_have_a_name_that_can_be_one(home: Path, tmp_path: Path, save: Save) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="config.json"):
        pull("empty")
    save(tmp_path / "two words")
    with pytest.raises(UsageError, match="'two words' is no model name"):
        pull("two words")
    assert not home.exists()


def test_a_folder_with_a_gguf_file_alone_can_be_used_by_name(home: Path, tmp_path: Path, save: Save) -> None:
    ernie45.convert(save(tmp_path / "mine"), tmp_path / "g" / "file.gguf", to="gguf")
    pull("g")
    assert torch.equal(
        ernie45.load_model("g")(torch.tensor([[5, 6]])), ernie45.load_model("mine")(torch.tensor([[5, 6]]))
    )
    assert ernie45.load_tokenizer("g").encode("the quick") == ernie45.load_tokenizer("mine").encode("the quick")


def test_a_gguf_file_becomes_a_checkpoint_with_its_origin(home: Path, tmp_path: Path, save: Save) -> None:
    ernie45.convert(save(tmp_path / "mine"), tmp_path / "small.gguf", to="gguf")
    seen: list[tuple[str, int, int]] = []
    pulled = pull("small.gguf", progress=lambda stage: lambda done, total: seen.append((stage, done, total)))
    assert pulled == Pulled(name="small", path=home / "models" / "small", fresh=True)
    stages = {stage for stage, _, _ in seen}
    assert stages == {"converting"}
    assert seen[-1][1] == seen[-1][2] == sum(t.numel() * 4 for t in ernie45.load_model("small").state_dict().values())
    provenance = json.loads((pulled.path / "provenance.json").read_text())
    assert provenance["source_file"] == str(tmp_path / "small.gguf")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(ernie45.load_model("small")(ids), ernie45.load_model(tmp_path / "mine")(ids))
    assert pull("small.gguf").fresh is False
    assert pull("small.gguf", force=True).fresh


def test_another_gguf_file_of_the_same_name_is_no_silent_match(home: Path, tmp_path: Path, save: Save) -> None:
    ernie45.convert(save(tmp_path / "a"), tmp_path / "small.gguf", to="gguf")
    ernie45.convert(save(tmp_path / "b", seed=1), tmp_path / "sub" / "small.gguf", to="gguf")
    pull("small.gguf")
    with pytest.raises(CheckpointError, match=r"another model 'small' .*--force"):
        pull("sub/small.gguf")
    pull("sub/small.gguf", force=True)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(ernie45.load_model("small")(ids), ernie45.load_model(tmp_path / "b")(ids))


def test_a_gguf_file_never_replaces_a_linked_folder(home: Path, tmp_path: Path, save: Save) -> None:
    folder = save(tmp_path / "small")
    ernie45.convert(folder, tmp_path / "small.gguf", to="gguf")
    pull("small")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError, match="rename the file$"):
        pull("small.gguf", force=True)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_broken_gguf_file_leaves_the_store_as_it_was(home: Path, tmp_path: Path, save: Save) -> None:
    ernie45.convert(save(tmp_path / "mine"), tmp_path / "small.gguf", to="gguf")
    data = (tmp_path / "small.gguf").read_bytes()
    (tmp_path / "small.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"small\.gguf"):
        pull("small.gguf")
    assert not (home / "models").exists() or list((home / "models").iterdir()) == []


def test_an_installed_name_is_here_already(
    home: Path, tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(home / "models" / "own" / "Good")
    monkeypatch.setattr("ernie45.store.hub.fetch", lambda *_: pytest.fail("the hub was asked"))
    assert pull("own/good") == Pulled(name="own/Good", path=home / "models" / "own" / "Good", fresh=False)


@pytest.mark.parametrize(
    ("what", "repo_id"),
    [
        ("own/good", "own/good"),
        ("baidu/ERNIE-4.5-0.3B-PT", "baidu/ERNIE-4.5-0.3B-PT"),
        ("https://huggingface.co/own/good", "own/good"),
        ("https://huggingface.co/own/good/", "own/good"),
        ("hf.co/own/good", "own/good"),
    ],
)
def test_hub_ids(home: Path, monkeypatch: pytest.MonkeyPatch, what: str, repo_id: str) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("ernie45.store.hub.fetch", lambda *arguments: asked.append(arguments))
    pull(what, force=True)
    assert asked == [(repo_id, True, None)]


@pytest.mark.parametrize(
    "what", ["a/b/c", "./a/b", "../b", "a/../b", "own/x.gguf", "own/x.whl", "own/x y", "a/", "", "/a"]
)
def test_what_is_no_hub_id(home: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr("ernie45.store.hub.fetch", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(NotFoundError, match="is no known model, hub id"):
        pull(what)
