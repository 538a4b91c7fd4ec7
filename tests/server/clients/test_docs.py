"""The snippets of docs/clients.md run as they stand, with the address and the key in the environment."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
@pytest.mark.usefixtures("default_environment")
def test_python(title: str, snippet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    pytest.importorskip(PACKAGES[title])
    code = compile(
        snippet, f"docs/clients.md, {title}", "exec", dont_inherit=True
    )  # this file's __future__ is not the snippet's
    exec(code, {"__name__": "__main__"})
    assert capsys.readouterr().out


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
