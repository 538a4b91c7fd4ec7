"""What a checkpoint of adapter training holds: the adapter in PEFT's format, and nothing of the frozen weights."""

from __future__ import annotations

import copy as copies
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ernie45.errors import CheckpointError
from ernie45.models.text import CausalLM
from ernie45.training.lora.adapter import adapter_of
from ernie45.training.lora.adapter_file import read_adapter
from ernie45.training.lora.read import adapter_from
from ernie45.training.lora.write import save_adapter
from ernie45.training.state import ADAPTER_FOLDER


class AdapterWeights:
    """The adapter of a network as a folder `adapter/`; see `state.Weights`."""

    def __init__(self, model: CausalLM, *, base: str, extra_files: Mapping[str, bytes]) -> None:
        """Args: base: name or absolute path of the network without it, for whoever loads the adapter. extra_files: tokenizer and
        template, which lie beside it.
        """
        self._model, self._base, self._extra_files = model, base, extra_files

    def capture(self, *, copy: bool) -> Callable[[Path], None]:
        """See `Weights`."""
        adapter = adapter_of(self._model)
        if copy:
            adapter = copies.deepcopy(adapter)

        def write(folder: Path) -> None:
            save_adapter(
                adapter, self._model.config, folder / ADAPTER_FOLDER, base=self._base, extra_files=self._extra_files
            )

        return write

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """See `Weights`. Raises: CheckpointError if the stored adapter has other parts."""
        own = adapter_of(self._model)
        stored = adapter_from(read_adapter(folder / ADAPTER_FOLDER), self._model.config)
        if own.keys() != stored.keys():
            different = sorted(own.keys() ^ stored.keys())
            raise CheckpointError(
                f"{folder}: the stored adapter fits another one: {different[0]} is in one of the two alone"
            )
        for name, part in own.items():
            part.load_state_dict(stored[name].state_dict())
