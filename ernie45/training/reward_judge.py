"""A model as judge: asks an OpenAI-compatible chat endpoint for a score, with nothing but the standard library."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ernie45.errors import ConfigError, NotFoundError, TransferError

DEFAULT_TEMPLATE = (
    "Judge the answer to the question below. How correct, complete and clear is it?\n\n[Question]\n{prompt}\n\n[Answer]\n{answer}\n\n"
    "End your reply with a line of the form: Score: n, where n is a number from 0 (useless) to 10 (perfect)."
)
_MAX_REPLY_BYTES = 1 << 20
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_FIRST_PAUSE_S = 0.5


def judge(
    *,
    url: str,
    model: str,
    template: str = DEFAULT_TEMPLATE,
    pattern: str = r"[Ss]core:\s*\**\s*(-?\d+(?:\.\d+)?)",
    low: float = 0.0,
    high: float = 10.0,
    max_tokens: int = 512,
    timeout_s: float = 60.0,
    retries: int = 3,
    key_file: str | None = None,
) -> Callable[[str, str, Mapping[str, Any]], float]:
    """A reward that asks a model.

    Args: url: of the API, such as `http://127.0.0.1:8000/v1`. model: its name there. template: the question, with `{prompt}`,
        `{answer}` and `{row[field]}`. pattern: finds the score, its group 1; the last match counts. low, high: scores that become 0 and
        1; others are cut to them. max_tokens: of the reply. timeout_s: of one attempt. retries: more attempts where the endpoint
        is busy or not there, after pauses that double from 0.5 s. key_file: file with the API key; None = no key is sent.
    The reward raises TransferError where the endpoint cannot be asked, or its reply has no score.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"reward judge: url is {url!r}, expected http:// or https://")
    if not low < high or timeout_s <= 0 or retries < 0:
        raise ConfigError(f"reward judge: low {low}, high {high}, timeout_s {timeout_s}, retries {retries} do not fit")
    found = _compiled(pattern)
    headers = {"Content-Type": "application/json", **_authorization(key_file)}

    def reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        question = template.format(prompt=prompt, answer=answer, row=row)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        reply = _content(_ask(request, timeout_s, retries))
        scores = found.findall(reply)
        if not scores:
            raise TransferError(f"the judge's reply has no score of the form {pattern!r}: {reply[-200:]!r}")
        return (min(max(float(scores[-1]), low), high) - low) / (high - low)

    return reward


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"reward judge: {pattern!r} is no regular expression: {error}") from error
    if compiled.groups != 1:
        raise ConfigError(f"reward judge: {pattern!r} has {compiled.groups} groups, expected one, around the score")
    return compiled


def _authorization(key_file: str | None) -> dict[str, str]:
    if key_file is None:
        return {}
    path = Path(key_file)
    if not path.is_file():
        raise NotFoundError(f"reward judge: there is no key file {path}")
    return {"Authorization": f"Bearer {path.read_text(encoding='utf-8').strip()}"}


def _ask(request: urllib.request.Request, timeout_s: float, retries: int) -> bytes:
    """The body of the reply, after as many attempts as it takes and may take."""
    pause_s = _FIRST_PAUSE_S
    for attempt in range(retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                return reply.read(_MAX_REPLY_BYTES)
        except (OSError, HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
            refused = isinstance(error, urllib.error.HTTPError) and error.code not in _RETRIED
            if refused or attempt == retries:
                raise TransferError(
                    f"the judge at {request.full_url} failed, attempt {attempt + 1}: {error}"
                ) from error
        time.sleep(pause_s)
        pause_s *= 2
    raise AssertionError("the last attempt returns or raises")


def _content(reply: bytes) -> str:
    try:
        return str(json.loads(reply)["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError) as error:
        raise TransferError(f"the judge's reply is no chat completion: {reply[:200]!r}") from error
