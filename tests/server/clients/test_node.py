"""The `openai` package for Node and the AI SDK: our examples for them, run by a real Node.

Tests fetch nothing, so the packages are brought: `npm install openai ai @ai-sdk/openai-compatible` anywhere, and
ERNIE45_NODE_MODULES set to the node_modules that this made.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.served import Served

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[3] / "examples" / "clients" / "node"
PROMISED = {
    "chat.mjs": r'whole: (".*")\nstream: \1\ntool: get_weather (Paris|Rome)\nschema: (Paris|Rome)\n'
    r"error: true model_not_found\n",
    "ai_sdk.mjs": r'stream: ".*" (length|stop) \d+\ntool: Sunny in (Paris|Rome)\nobject: (Paris|Rome)\n',
}
PACKAGES = {"chat.mjs": ["openai"], "ai_sdk.mjs": ["ai", "@ai-sdk/openai-compatible"]}


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_the_example_runs(name: str, default_server: Served, tmp_path: Path) -> None:
    modules = Path(os.environ.get("ERNIE45_NODE_MODULES", "/nowhere"))
    if shutil.which("node") is None or not all((modules / package).is_dir() for package in PACKAGES[name]):
        pytest.skip(f"needs node, and ERNIE45_NODE_MODULES with {' and '.join(PACKAGES[name])}")
    # Node looks for packages beside the script and above it.
    shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(modules)
    address = {"OPENAI_BASE_URL": f"{default_server.url}/v1", "OPENAI_API_KEY": default_server.key}
    done = subprocess.run(
        ["node", str(tmp_path / name)],
        env={**os.environ, **address},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PROMISED[name], done.stdout), done.stdout


def test_every_example_for_node_is_run() -> None:
    assert {file.name for file in EXAMPLES.iterdir()} == PROMISED.keys() == PACKAGES.keys()
