"""A server for the examples that ask one: a small random model that thinks and knows tools."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.server.conftest import model_folder, start  # noqa: F401  # fixtures
from tests.server.served import Served


@pytest.fixture(scope="session")
def served(start: Callable[..., Served]) -> Served:  # noqa: F811  # the fixture
    """Room for a thought of low effort, and for an answer behind it."""
    return start("ernie_thinking", "--max-model-len", "4096")
