"""The snippets of docs/clients.md run as they stand, with the address and the key in the environment."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.server.served import Served

PAGE = (Path(__file__).parents[3] / "docs" / "clients.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def snippets(language: str) -> list[tuple[str, str]]:
    """The snippets of a language, each with its section."""
    fenced = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(title, found) for title, text in SECTIONS.items() for found in fenced.findall(text)]


PACKAGES = {
    "openai for Python": "openai",
    "OpenAI Agents SDK": "agents",
    "LangChain": "langchain_openai",
    "LiteLLM": "litellm",
    "huggingface_hub": "huggingface_hub",
}


@pytest.mark.parametrize(("title", "snippet"), snippets("python"))
def test_python(title: str, snippet: str, default_environment: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    pytest.importorskip(PACKAGES[title])
    before = len(default_environment.log)
    code = compile(
        snippet, f"docs/clients.md, {title}", "exec", dont_inherit=True
    )  # our __future__ is not the snippet's
    exec(code, {"__name__": "__main__"})
    # What it printed is up to a random model, which may say nothing at all; the server's log has the answer in any case.
    deadline = time.monotonic() + 5
    while not any("/chat/completions 200" in line for line in default_environment.log[before:]):
        assert time.monotonic() < deadline, default_environment.log[before:]
        time.sleep(0.02)


@pytest.mark.parametrize(("title", "snippet"), snippets("sh"))
@pytest.mark.usefixtures("default_environment")
def test_shell(title: str, snippet: str) -> None:
    if shutil.which(title) is None:
        pytest.skip(f"{title} is not installed")
    done = subprocess.run(["sh", "-c", snippet], capture_output=True, text=True, check=True, timeout=60)
    assert '"chat.completion"' in done.stdout


def test_every_link_and_every_package_has_its_section() -> None:
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in SECTIONS}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) == anchors
    assert {title for title, _ in snippets("python")} == PACKAGES.keys()


def test_named_examples_are_there() -> None:
    root = Path(__file__).parents[3]
    named = re.findall(r"`(examples/clients/\S+)`", PAGE)
    assert named
    assert all((root / name).exists() for name in named)
