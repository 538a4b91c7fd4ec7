"""`ernie plot`: where the report goes, what is said, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ernie = Callable[..., Any]


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, end: str = "\n") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps({"step": step, "loss": 3 / step, "tokens": step, "time_s": 1.0}) for step in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + end)
        (folder / "run.json").write_text(json.dumps({"method": "pretrain", "config": {}, "versions": {}}))
        return folder

    return make


def test_the_report_goes_into_the_run(ernie: Ernie, run_folder: Callable[..., Path]) -> None:
    pytest.importorskip("matplotlib")
    folder = run_folder("a")
    result = ernie("plot", "a")
    assert result.code == 0
    assert result.out == f"report: {folder}/plots/report.html (3 more files beside it)\n"
    assert (folder / "plots" / "loss.png").is_file()
    assert result.err == ""


def test_or_where_it_is_told_to(ernie: Ernie, run_folder: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_folder("a")
    run_folder("b")
    result = ernie("plot", "a", "b", "-o", "out", "--json")
    assert json.loads(result.out) == {
        "report": "out/report.html",
        "files": ["out/report.html", "out/metrics.csv", "out/loss.png", "out/loss.svg"],
    }
    assert "2 runs: a, b" in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "a" / "plots").exists()


def test_what_was_left_out_is_said(ernie: Ernie, run_folder: Callable[..., Path]) -> None:
    pytest.importorskip("matplotlib")
    run_folder("a", end='\n{"step"')
    result = ernie("plot", "a")
    assert result.code == 0
    assert result.err == "a: line 4 of metrics.jsonl is cut off, as by a run that was killed: it is left out\n"


def test_what_is_refused(ernie: Ernie, run_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder("a")
    run_folder("b")
    for arguments, code, message in (
        (["a", "b"], 2, "say where the report goes with -o DIR"),
        (["none"], 4, "has no metrics.jsonl"),
        ([], 2, "required: RUN"),
    ):
        result = ernie("plot", *arguments)
        assert (result.code, result.err.count("\n")) == (code, 1)
        assert message in result.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = ernie("plot", "a")
    assert result.code == 4
    assert "pip install matplotlib" in result.err
