"""What clients are given: an address and a key, in the variables that they all read."""

from __future__ import annotations

import pytest

from tests.server.served import Served


@pytest.fixture
def environment(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The shared server (it thinks, knows tools, has random weights), as the environment names it to clients."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    return server
