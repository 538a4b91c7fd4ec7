"""`ernie convert` and `ernie verify`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ernie45

Ernie = Callable[..., Any]
# A process whose files may not exceed 20 kB: what a full disk looks like to it.
FULL_DISK = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    "from ernie45.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same_tensors(first: Path, second: Path) -> bool:
    ours, theirs = tensors(first), tensors(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_format_and_back(ernie: Ernie, tiny: Path, tmp_path: Path) -> None:
    for source, target, to in (("tiny", "a", "paddle"), ("a", "b.gguf", "gguf"), ("b.gguf", "c", "pt")):
        result = ernie("convert", source, target, "--to", to)
        assert (result.code, result.err) == (0, "")
        assert result.out.endswith(f" -> {to}: {target}\n")
    assert same_tensors(tiny, tmp_path / "c")
    text = "the quick brown fox: Ünïcode 你好"
    ids = {tuple(ernie45.load_tokenizer(name).encode(text)) for name in (tiny, "a", "b.gguf", "c")}
    assert len(ids) == 1


def test_dtype_and_shard_size(ernie: Ernie, tmp_path: Path) -> None:
    result = ernie("convert", "tiny", "out", "--to", "pt", "--dtype", "bfloat16", "--max-shard-size", "30kB", "--json")
    assert json.loads(result.out) == {
        "source": str(tmp_path / "home" / "models" / "tiny"),
        "target": "out",
        "from_format": "pt",
        "to_format": "pt",
        "notes": [],
    }
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 40_000 for file in files)
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_what_is_left_out_is_said(ernie: Ernie, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    result = ernie("convert", "m", "m.gguf", "--to", "gguf")
    assert result.code == 0
    assert result.err.startswith("left out: tokenizer: the folder has none")


@pytest.mark.parametrize("target", ["out", "out.gguf"])
def test_an_existing_target_is_kept_unless_forced(ernie: Ernie, tiny: Path, tmp_path: Path, target: str) -> None:
    to = "gguf" if target.endswith(".gguf") else "pt"
    path = tmp_path / target
    if to == "gguf":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").write_text("mine")
    code, out, err = ernie("convert", "tiny", target, "--to", to)
    assert (code, out) == (1, "")
    assert err == f"error: {target} exists already: choose another name, or replace it with --force\n"
    assert (path if to == "gguf" else path / "mine").read_text() == "mine"
    assert ernie("convert", "tiny", target, "--to", to, "--force").code == 0
    assert ernie("verify", target).code == 0
    assert not (path / "mine").exists()


def test_a_folder_may_be_converted_onto_itself(ernie: Ernie, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    assert ernie("convert", "m", "m", "--to", "paddle", "--force").code == 0
    assert ernie("convert", "m", "m", "--to", "pt", "--force").code == 0
    assert same_tensors(tiny, tmp_path / "m")


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["nothing", "out", "--to", "pt"], 4, "no model 'nothing' here"),
        (["tiny", "out", "--to", "gguf"], 2, "out is no name for a GGUF file: it must end in .gguf"),
        (["tiny", "out.gguf", "--to", "gguf", "--max-shard-size", "1GB"], 2, "--max-shard-size means nothing for gguf"),
        (["tiny", "home/models/tiny/config.json/x", "--to", "pt"], 1, "config.json"),
    ],
)
def test_conversions_that_cannot_be(ernie: Ernie, argv: list[str], code: int, message: str) -> None:
    result = ernie("convert", *argv)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("target", ["out", "out.gguf"])
def test_a_full_disk_leaves_nothing_behind(home: Path, tmp_path: Path, target: str) -> None:
    to = "gguf" if target.endswith(".gguf") else "pt"
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-c", FULL_DISK, "convert", "tiny", target, "--to", to]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no room to write ")
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_verify_counts_and_says_ok(ernie: Ernie, tiny: Path) -> None:
    result = ernie("verify", "tiny")
    values = sum(value.numel() for value in tensors(tiny).values())
    assert (result.code, result.err) == (0, "")
    assert f"{len(tensors(tiny))} read, {values:,} values, none missing, none unexpected" in result.out
    assert result.out.splitlines()[-1].split() == ["verdict", "ok"]
    assert json.loads(ernie("verify", "tiny", "--json").out)["ok"] is True


@pytest.mark.parametrize("change", ["nan", "zero", "missing"])
def test_verify_finds_what_is_wrong(ernie: Ernie, tiny: Path, tmp_path: Path, change: str) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(tiny, tmp_path / "m")
    changed = tensors(tmp_path / "m")
    if change == "missing":
        del changed[name]
    else:
        changed[name].view(-1)[: 1 if change == "nan" else None] = float("nan") if change == "nan" else 0.0
    save_file(changed, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    code, out, err = ernie("verify", "m", "--json")
    if change == "missing":
        assert (code, out, err) == (1, "", f"error: m: 1 tensors are missing: {name}\n")
        return
    report = json.loads(out)
    assert (code, report["ok"]) == ((1, False) if change == "nan" else (0, True))
    assert report["not_finite" if change == "nan" else "all_zero"] == [name]
    table = ernie("verify", "m").out
    assert f"{'not finite' if change == 'nan' else 'all zero'}  {' ' if change == 'zero' else ''}" in table
    assert table.splitlines()[-1].split(maxsplit=1) == ["verdict", "NOT ok" if change == "nan" else "ok"]


def test_verify_against_transformers(ernie: Ernie, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    result = ernie("verify", "tiny", "--against", "transformers", "--json")
    report = json.loads(result.out)
    assert (result.code, report["ok"], report["same_best_token"]) == (0, True, 1.0)
    assert report["max_logit_difference"] < 2e-5
    assert "same best token at 100%" in ernie("verify", "tiny", "--against", "transformers").out
    assert ernie("convert", "tiny", "p", "--to", "paddle").code == 0
    refused = ernie("verify", "p", "--against", "transformers")
    assert (refused.code, refused.out) == (2, "")
    assert "transformers reads -PT folders only" in refused.err
