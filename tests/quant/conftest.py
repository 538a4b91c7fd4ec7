"""Small checkpoints and their packed copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie45.checkpoint.source import ModuleSource
from ernie45.checkpoint.write import write_folder
from ernie45.config.model import ModelConfig, MoeConfig
from ernie45.models.build import build_model
from ernie45.models.init import initialize
from ernie45.quant.quantize import quantize_checkpoint

WIDTHS: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 96,  # no multiple of 64: padding matters
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random -PT folder: `checkpoint(moe=True, mtp=1)`."""

    def write(*, moe: bool = False, mtp: int = 0, name: str = "original", **changes: Any) -> Path:
        experts = MoeConfig(
            moe_num_experts=8, moe_k=3, moe_intermediate_size=40, moe_num_shared_experts=2, moe_layer_start_index=1
        )
        fields = WIDTHS | {"moe": experts if moe else None, "num_nextn_predict_layers": mtp} | changes
        model = build_model(ModelConfig(**fields))
        initialize(model, std=0.15, seed=1, correction_bias_std=0.05)
        folder = tmp_path / name
        write_folder(ModuleSource(model, model.config), folder, layout="pt")
        return folder

    return write


@pytest.fixture(scope="session")
def _packed_once() -> dict[str, Path]:
    return {}


@pytest.fixture
def packed(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    _packed_once: dict[str, Path],
) -> Callable[..., Path]:
    """Gives a random packed folder to do with as one likes: `packed("wint4", moe=True)`."""

    def write(scheme: str = "wint4-all", **fields: Any) -> Path:
        key = f"{scheme} {fields}"
        if key not in _packed_once:
            _packed_once[key] = tmp_path_factory.mktemp("packed") / scheme
            quantize_checkpoint(checkpoint(**fields), _packed_once[key], scheme)
        return Path(shutil.copytree(_packed_once[key], tmp_path / f"packed-{scheme}"))

    return write
