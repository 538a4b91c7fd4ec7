"""The section `reference` of a run: a reference from a file gives the losses of a live one, is used again, and refuses other rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie45.cli.main import main
from ernie45.training import reference_cache
from ernie45.training.state import checkpoint_paths

RunFile = Callable[..., Path]
FIELDS: dict[str, Any] = {"method": "dpo", "train": {"steps": 4, "rows_per_pass": 2}, "checkpoint": {"every": 2}}


def train(*arguments: str | Path) -> int:
    return main(["train", *map(str, arguments)])


def figures(folder: Path) -> list[tuple[float, ...]]:
    """What depends on the reference, and what follows from it."""
    names = ("loss", "rewards/margin", "grad_norm")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were computed, in order."""
    paths: list[Path] = []
    write = reference_cache.write_reference_cache

    def noted(path: Path, *arguments: Any, **options: Any) -> None:
        paths.append(path)
        write(path, *arguments, **options)

    monkeypatch.setattr(reference_cache, "write_reference_cache", noted)
    return paths


def assert_same(a: Path, b: Path) -> None:
    for ours, theirs in zip(figures(a), figures(b), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_cached_gives_the_losses_of_live(
    run_file: RunFile, tmp_path: Path, computed: list[Path], lora: dict[str, Any] | None
) -> None:
    fields = FIELDS | {"lora": lora, "train": {"steps": 4, "rows_per_pass": 2, "eval_every": 2}}
    path = run_file(data={"split": [0.9, 0.1, 0]}, **fields)
    if lora is not None:
        path = adapted(run_file, tmp_path, data={"split": [0.9, 0.1, 0]}, **fields)
    assert train(path, "--run", tmp_path / "live") == 0
    assert not computed
    assert train(path, "reference.kind=cached", "--run", tmp_path / "cached") == 0
    assert computed == [tmp_path / "cached" / "reference.safetensors"]
    assert_same(tmp_path / "live", tmp_path / "cached")
    assert not (checkpoint_paths(tmp_path / "cached/checkpoints")[-1] / "reference.safetensors").exists(), (
        "no copy to keep"
    )


def adapted(run_file: RunFile, tmp_path: Path, **fields: Any) -> Path:
    """A run with an adapter over a model that another run has made."""
    assert train(run_file("base.yaml"), "--run", tmp_path / "base") == 0
    return run_file(model={"start": str(tmp_path / "base"), "network": None, "tokenizer": None}, **fields)


def test_the_file_is_used_again(run_file: RunFile, tmp_path: Path, computed: list[Path]) -> None:
    path = run_file(reference={"kind": "cached"}, **FIELDS)
    assert train(path, "--run", tmp_path / "whole") == 0
    assert train(path, "--run", tmp_path / "parts") == 0
    (checkpoint_paths(tmp_path / "parts/checkpoints")[-1] / "state.json").unlink()
    assert train(path, "--run", tmp_path / "parts") == 0
    assert len(computed) == 2
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts"), "to the bit"


def test_runs_share_a_file(run_file: RunFile, tmp_path: Path, computed: list[Path]) -> None:
    file = tmp_path / "shared" / "reference.safetensors"
    path = run_file(reference={"kind": "cached", "file": str(file)}, **FIELDS)
    assert train(path, "--run", tmp_path / "a") == 0
    assert train(path, "preference.beta=0.5", "--run", tmp_path / "b") == 0
    assert computed == [file]
    assert not (tmp_path / "a" / "reference.safetensors").exists()
    assert figures(tmp_path / "a") != figures(tmp_path / "b")


def test_other_rows_or_weights_are_refused(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(reference={"kind": "cached", "file": str(tmp_path / "sums.safetensors")}, **FIELDS)
    assert train(path, "--run", tmp_path / "a") == 0
    assert train(path, "train.seed=1", "--run", tmp_path / "b") == 1
    assert "holds reference log-probabilities of weights" in capsys.readouterr().err
    rows = tmp_path / "dpo.jsonl"
    rows.write_text(rows.read_text().replace("moon", "sun"))
    assert train(path, "--run", tmp_path / "c") == 1
    said = capsys.readouterr().err
    assert f"has no log-probabilities of {rows}:" in said
    assert "Remove the file" in said
    assert not (tmp_path / "c" / "metrics.jsonl").exists(), "before the first step"
    (tmp_path / "sums.safetensors").unlink()
    assert train(path, "--run", tmp_path / "c") == 0


def test_a_live_copy_is_refreshed(run_file: RunFile, tmp_path: Path) -> None:
    path = run_file(**FIELDS)
    assert train(path, "--run", tmp_path / "never") == 0
    assert train(path, "reference.refresh_steps=2", "--run", tmp_path / "often") == 0
    never, often = figures(tmp_path / "never"), figures(tmp_path / "often")
    assert never[:2] == often[:2]
    assert never[2] != often[2]


@pytest.mark.parametrize(
    ("method", "reference", "message"),
    [
        ("dpo", {"kind": "cached", "refresh_steps": 3}, "what is cached is computed once"),
        ("dpo", {"file": "a"}, "a live reference reads no file"),
        ("dpo", {"refresh_steps": -1}, "expected 0 (never) or more"),
        ("dpo", {"kind": "frozen"}, "reference.kind is 'frozen', expected one of live, cached"),
        (
            "kto",
            {"kind": "cached"},
            "the method is kto, which asks it about every step's prompts with answers to others",
        ),
        ("upo", {"kind": "cached"}, "the method is upo, which asks it about answers that are sampled on the way"),
        ("orpo", {"kind": "cached"}, "reference is set but the method is orpo"),
    ],
)
def test_references_that_cannot_be(
    run_file: RunFile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    reference: dict[str, Any],
    message: str,
) -> None:
    more = {"rewards": [{"function": "length"}]} if method == "upo" else {}
    assert train(run_file(method=method, reference=reference, **more), "--run", tmp_path / "run") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora={}", "reference.refresh_steps=2"], "with lora the reference is the network without its adapters"),
        (["preference.reference_free=true", "reference.kind=cached"], "asks for a loss without one"),
    ],
)
def test_references_that_nothing_reads(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert train(run_file(method="dpo"), *settings, "--run", tmp_path / "run") == 1
    assert message in capsys.readouterr().err
