"""Checkpoints on disk for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie45.checkpoint.source import ModuleSource
from ernie45.checkpoint.write import write_folder


@pytest.fixture
def saved(tmp_path: Path, small_model: Callable[..., Any]) -> Callable[..., tuple[Any, Path]]:
    """Builds a small network and writes it: `model, folder = saved("paddle", moe=True)`."""

    def save(layout: Any = "pt", *, shard_bytes: int = 10**9, **fields: Any) -> tuple[Any, Path]:
        model = small_model(**fields)
        folder = tmp_path / f"model-{layout}"
        write_folder(ModuleSource(model, model.config), folder, layout=layout, max_shard_bytes=shard_bytes)
        return model, folder

    return save
