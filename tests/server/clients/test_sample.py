"""The sample that hosted ERNIE platforms print, in Python and for curl, with no more changed than address, key and length."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.served import Served

SAMPLE = Path(__file__).parents[3] / "examples" / "clients" / "sample.py"

AS_PRINTED = b"""
{
  "model": "smollm2-135m",
  "messages": [
    {
      "role": "system",
      "content": Be a helpful assistant
    },
    {
      "role": "user",
      "content": "Hi there!"
    }
  "response_format": { "type": "text" }
}
"""
"""Broken as it stands in print: a string without quotes, a list without its end."""


@pytest.mark.parametrize("prefix", ["/v3/openai", "/v1", "/openai/v1"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_python_sample(
    default_environment: Served,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prefix: str,
    stream: bool,
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_BASE_URL", default_environment.url + prefix)
    monkeypatch.setenv("ERNIE_MAX_TOKENS", "30")
    runpy.run_path(str(SAMPLE))["main"](stream)
    assert capsys.readouterr().out.endswith("\n")  # a random model may say nothing before it


def curl(served: Served, body: bytes, key: str) -> tuple[int, str]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "-sS", f"{served.url}/v3/openai/chat/completions", "-w", "\n%{http_code}", "--data", "@-"]
    headers = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {key}"]
    done = subprocess.run([*command, *headers], input=body, capture_output=True, check=True, timeout=60)
    text, _, status = done.stdout.decode().rpartition("\n")
    return int(status), text


def test_curl_as_printed_is_told_where_its_json_breaks(default_server: Served) -> None:
    status, text = curl(default_server, AS_PRINTED, default_server.key)
    error = json.loads(text)["error"]
    assert (status, error["code"]) == (400, "invalid_json")
    found = re.fullmatch(r"the body is no JSON: expected value at line 1 column (\d+)", error["message"])
    assert found is not None, error
    sent = AS_PRINTED.replace(b"\n", b"")  # `curl -d` reads a file without its line breaks
    assert sent[int(found[1]) - 1 :].startswith(b"Be a helpful assistant")


def test_curl_without_a_key_is_told_how_to_get_one(default_server: Served) -> None:
    status, text = curl(default_server, b"{}", "")
    assert status == 401
    assert "the server printed a key when it started" in json.loads(text)["error"]["message"]


def test_curl_with_sound_json(default_server: Served) -> None:
    sound = AS_PRINTED.replace(b"Be a helpful assistant", b'"Be a helpful assistant"')
    sound = sound.replace(b'    }\n  "resp', b'    }\n  ],\n  "max_tokens": 8,\n  "resp')
    status, text = curl(default_server, sound, default_server.key)
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["role"] == "assistant"
