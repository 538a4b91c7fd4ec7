"""Folders of runs as training writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ABOUT = {
    "method": "pretrain",
    "config": {"model": {"hidden_size": 256}, "optimizer": {"lr": 3e-4, "beta2": None}},
    "started": "2026-01-02T03:04:05+00:00",
    "versions": {"ernie45": "0.1.0", "torch": "2.13.0"},
    "num_parameters": 12_345_678,
    "num_active": 4_000_000,
}


def lines_of_a_run(num_steps: int, *, moe: bool = True, offset: float = 0.0) -> list[dict[str, Any]]:
    out = []
    for step in range(1, num_steps + 1):
        share = 0.25 * (1 - step / num_steps)
        line: dict[str, Any] = {
            "step": 10 * step,
            "time_s": 2.5 * step,
            "tokens": 4096 * step,
            "loss": offset + 2 + 7 / step,
            "mtp_loss": offset + 3 + 7 / step,
            "balance_loss": 2.1,
            "lr": 3e-4 * min(1, step / 5),
            "grad_norm": 1.5 + math.sin(step),
            "tokens_per_s": 1638.4,
            "mfu": None if step == 1 else 0.5,
            "memory_bytes": 3_000_000_000 + step,
            "rewards/form": 0.5,
            "rewards/total": 0.25 * step,
            "note": "text is no measurement",
        }
        if moe:
            line["router_entropy"] = [1.25, 1.0 + 0.001 * step]
            line["expert_load"] = [[0.25] * 4, [0.25, 0.25, 0.5 - share, share]]
        if step % 5 == 0:
            line["eval/loss"] = offset + 2.5
        out.append(line)
    return out


@pytest.fixture
def metrics() -> Callable[..., list[dict[str, Any]]]:
    """Lines of `metrics.jsonl`, every tenth step: the loss falls, expert 3 of layer 1 loses its tokens."""
    return lines_of_a_run


@pytest.fixture
def about() -> dict[str, Any]:
    """The `run.json` that `write_run` writes."""
    return ABOUT


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a run; `end` follows the last line."""

    def write(
        name: str, lines: Sequence[Mapping[str, Any]], *, about: Mapping[str, Any] | None = ABOUT, end: str = "\n"
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + end)
        if about is not None:
            (folder / "run.json").write_text(json.dumps(about))
        return folder

    return write
