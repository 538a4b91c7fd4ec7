"""The native module, one instruction set after the other, with thread count and choice put back afterwards."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from ernie45.kernels import choice, native


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """PyTorch's own threads make the small products of references slow wherever other processes run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def extension() -> Iterator[ModuleType]:
    """The native module, in use for the test; skipped without it, or failed where ERNIE_REQUIRE_NATIVE insists on it."""
    status = native.status()
    if not status.available:
        (pytest.fail if os.environ.get("ERNIE_REQUIRE_NATIVE") else pytest.skip)(status.reason)
    module = importlib.import_module("ernie45.kernels._native")
    isa, threads = module.isa(), module.num_threads()
    with choice.kernels("native"):
        yield module
    module.set_isa(isa)
    module.set_num_threads(threads)


@pytest.fixture(params=["baseline", "avx2", "avx512", "amx"])
def isa(request: pytest.FixtureRequest, extension: ModuleType) -> str:
    """Each instruction set in turn; those that the CPU lacks are skipped visibly."""
    try:
        extension.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture
def isas(extension: ModuleType) -> list[str]:
    """All instruction sets of this CPU."""
    names = ["baseline", "avx2", "avx512", "amx"]
    return names[: names.index(extension.best_isa()) + 1]
