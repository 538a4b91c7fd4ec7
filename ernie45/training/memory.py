"""How much memory the tensors hold that a piece of code leaves behind, exactly and on every device.

It sees every operation, so it is slow: for measuring, not for running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that operations inside the block have made and that are still alive, under the name of who ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation there
        self.owner: str | int = ""
        """Who runs now."""
        self.largest_bytes = 0
        """The largest single piece of memory that was asked for."""
        self._made: dict[int, tuple[StorageWeakRef, int, str | int]] = {}

    def live_bytes(self) -> Mapping[str | int, int]:
        """By owner, what is alive now."""
        totals: dict[str | int, int] = {}
        for reference, size, owner in self._made.values():
            if not reference.expired():
                totals[owner] = totals.get(owner, 0) + size
        return totals

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note what memory it made."""
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), given)
        return out

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage._cdata in given:
            return
        reference = StorageWeakRef(storage)
        known = self._made.get(reference.cdata)
        if known is None or known[0].expired():
            self._made[reference.cdata] = (reference, storage.nbytes(), self.owner)
            self.largest_bytes = max(self.largest_bytes, storage.nbytes())
