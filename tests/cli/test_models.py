"""`ernie models` and `ernie show`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import ernie45

Ernie = Callable[..., Any]


def test_an_empty_store_says_how_to_fill_it(ernie: Ernie, home: Path) -> None:
    (home / "models" / "tiny").unlink()
    code, out, err = ernie("models")
    assert (code, out) == (0, "")
    assert err == f"no models in {home / 'models'}: `ernie pull smollm2-135m` fetches the default one\n"
    assert ernie("models", "--json").out == "[]\n"
    shutil.rmtree(home)
    assert ernie("models").code == 0


def test_the_table_lists_what_is_here(ernie: Ernie) -> None:
    code, out, err = ernie("models")
    assert (code, err) == (0, "")
    header, row = out.splitlines()
    assert header.split() == ["MODEL", "KIND", "PARAMETERS", "ACTIVE", "CONTEXT", "FORMAT", "SIZE"]
    assert row.split() == ["tiny", "dense", "text", "102", "k", "87.1", "k", "256", "pt", "float32", "410", "kB"]
    assert row.index("dense") == header.index("KIND")


def test_all_adds_the_published_models(ernie: Ernie) -> None:
    listed = json.loads(ernie("models", "--all", "--json").out)
    assert [model["name"] for model in listed] == ["tiny", *ernie45.presets()]
    assert {model["path"] is None for model in listed[1:]} == {True}
    counts = {model["name"]: (model["parameters"], model["active_parameters"]) for model in listed}
    assert counts["ERNIE-4.5-21B-A3B"] == (21_825_437_888, 3_352_150_208)
    assert "not here" in ernie("models", "--all").out


def test_broken_models_are_warned_of_and_the_others_listed(
    ernie: Ernie, home: Path, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, home / "models" / "damaged")
    (home / "models" / "damaged" / "config.json").write_text("{")
    shutil.copytree(tiny, tmp_path / "moved")
    (home / "models" / "moved").symlink_to(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved")
    code, out, err = ernie("models", "--json")
    assert code == 0
    assert [model["name"] for model in json.loads(out)] == ["tiny"]
    damaged, moved = err.splitlines()
    assert damaged.startswith("warning: damaged cannot be used: ")
    assert moved == (
        f"warning: moved cannot be used: its folder {tmp_path / 'moved'} has gone; remove {home / 'models' / 'moved'}"
    )


def test_show_counts_what_is_in_the_file(ernie: Ernie, tiny: Path) -> None:
    shown = json.loads(ernie("show", "tiny", "--json").out)
    with safe_open(tiny / "model.safetensors", "pt") as file:
        values = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # no mapping
    assert shown["parameters"] == values
    assert shown["active_parameters"] == values - 320 * 48  # all but the embedding, of which one row is looked up
    assert shown["size_bytes"] == 4 * values
    # two heads of 16 values for keys and for values, in three layers, at 16 bits
    assert shown["kv_bytes_per_token"] == 2 * 2 * 16 * 3 * 2
    assert (shown["memory_tokens"], shown["memory_bytes"]) == (256, 4 * values + 256 * 2 * 2 * 16 * 3 * 4)
    assert (shown["format"], shown["dtype"], shown["context_tokens"], shown["licence"]) == (
        "pt", "float32", 256, "not stated",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "TINY", "./home/models/tiny", "tiny.gguf"])
def test_show_takes_names_in_any_case_paths_and_files(ernie: Ernie, name: str) -> None:
    if name.endswith(".gguf"):
        assert ernie("convert", "tiny", "tiny.gguf", "--to", "gguf").code == 0
    code, out, err = ernie("show", name)
    assert (code, err) == (0, "")
    assert "context           256 tokens" in out
    assert "memory needed" in out


@pytest.mark.parametrize(
    "name", ["21b-a3b", "ERNIE-4.5-21B-A3B", "baidu/ERNIE-4.5-21B-A3B-PT", "ernie-4.5-21b-a3b-paddle"]
)
def test_show_knows_published_models(ernie: Ernie, name: str) -> None:
    code, out, err = ernie("show", name)
    assert (code, err) == (0, "")
    assert "21,825,437,888 (21.8 B)" in out
    assert "64 routed, 6 active, 2 shared" in out
    assert "`ernie pull baidu/ERNIE-4.5-21B-A3B-PT` fetches it" in out
    assert json.loads(ernie("show", name, "--json").out)["name"] == "ERNIE-4.5-21B-A3B"


def test_show_names_the_nearest_model(ernie: Ernie) -> None:
    code, out, err = ernie("show", "erine-4.5-21b-a3b")
    assert (code, out) == (4, "")
    assert "did you mean 'ERNIE-4.5-21B-A3B'? `ernie pull baidu/ERNIE-4.5-21B-A3B-PT` fetches it" in err
    assert "did you mean 'tiny'?" in ernie("show", "tinyy").err
    assert "give a model name, a folder or a .gguf file" in ernie("show", "qqqqqq").err
