"""Every example of a client runs, on address and key of the environment, and prints what it promises."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples" / "clients"
NEEDS = {"sample.py": "openai", "tools.py": "openai", "handoff.py": "agents", "extract.py": "langchain_openai"}
PROMISED = {
    "sample.py": r"\n$",  # behind whatever a random model says, if anything
    "tools.py": r"^count\((apples\) = 12|pears\) = 0)\n",
    "handoff.py": r"^Billing: The invoice of (May|June) is over 12 euros and unpaid\.\n$",
    "extract.py": r"^[a-z ]{2,20}: (refund|repair|replacement|none), anger ([0-9]|10) of 10\n$",
}


@pytest.mark.parametrize("name", sorted(NEEDS))
@pytest.mark.usefixtures("default_environment")
def test_the_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(NEEDS[name])
    runpy.run_path(str(EXAMPLES / name))["main"]()
    assert re.search(PROMISED[name], capsys.readouterr().out)


@pytest.mark.usefixtures("default_environment")
def test_the_shell_script_runs() -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(["sh", str(EXAMPLES / "curl.sh")], capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout)["object"] == "chat.completion"


def test_examples_are_short_and_tested() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == NEEDS.keys() == PROMISED.keys()
    for file in EXAMPLES.rglob("*.*"):
        assert len(file.read_text(encoding="utf-8").splitlines()) < 60
