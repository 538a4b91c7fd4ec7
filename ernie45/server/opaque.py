"""Thoughts in a form that clients keep without reading and send back: Responses' `encrypted_content`, Anthropic's `signature`.

It hides nothing and proves nothing: the caller may read the thought anyway. It only brings it back to a server that keeps none.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode

_PREFIX = "ernie45.thought."


def packed(thought: str) -> str:
    """The thought, opaque."""
    return _PREFIX + urlsafe_b64encode(thought.encode()).decode()


def unpacked(token: str | None) -> str | None:
    """The thought of `packed`; None for what another server wrote."""
    if token is None or not token.startswith(_PREFIX):
        return None
    try:
        return urlsafe_b64decode(token.removeprefix(_PREFIX)).decode()
    except (binascii.Error, ValueError):
        return None
