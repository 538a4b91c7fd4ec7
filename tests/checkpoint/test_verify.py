"""`verify`: what it finds in good and bad checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ernie45
from ernie45.errors import CheckpointError, UsageError


def _edit(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_a_good_checkpoint(saved: Any, layout: str) -> None:
    model, folder = saved(layout, moe=True, mtp=1)
    report = ernie45.verify(folder)
    assert report.ok
    assert report.format == layout
    assert report.values == ernie45.count_parameters(model.config).total_with_mtp
    assert not report.not_finite
    assert not report.all_zero


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(saved: Any, bad: float) -> None:
    _, folder = saved()
    name = "model.layers.1.mlp.up_proj.weight"
    _edit(folder, name, lambda t: t.index_fill(0, torch.tensor([3]), bad))
    report = ernie45.verify(folder)
    assert not report.ok
    assert report.not_finite == (name,)


def test_matrices_of_zeros_are_pointed_out(saved: Any) -> None:
    _, folder = saved(moe=True)
    name = "model.layers.1.mlp.gate.weight"
    _edit(folder, name, torch.zeros_like)
    report = ernie45.verify(folder)
    assert report.ok, "legal: a fresh transformers model has such routers"
    assert report.all_zero == (name,)


def test_comparison_with_transformers(saved: Any) -> None:
    _, folder = saved(moe=True)
    report = ernie45.verify(folder, against="transformers")
    assert report.ok
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= 2e-5
    assert report.same_best_token == 1.0


def test_comparisons_that_cannot_be_made(saved: Any) -> None:
    _, folder = saved("paddle")
    with pytest.raises(UsageError, match="paddle: convert it first"):
        ernie45.verify(folder, against="transformers")
    with pytest.raises(UsageError, match="cannot compare with 'paddle'"):
        ernie45.verify(folder, against="paddle")  # type: ignore[arg-type]


def test_missing_tensors_stop_it(saved: Any) -> None:
    _, folder = saved()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        ernie45.verify(folder)
