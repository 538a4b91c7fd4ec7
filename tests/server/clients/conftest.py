"""What clients are given: an address and a key, in the variables that they all read."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.served import Served, launch

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def default_server(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Answers to the default model's name and talks as it does: it does not think, and tools are lent to its template."""
    folder = tmp_path_factory.mktemp("default") / "model"
    shutil.copytree(model_folder("ernie"), folder)
    file = folder / "tokenizer_config.json"
    stated = {**json.loads(file.read_text(encoding="utf-8")), "chat_template": _CHATML}
    del stated["ernie45_chat_format"]
    file.write_text(json.dumps(stated), encoding="utf-8")
    served = launch(folder, "--max-model-len", "4096", "--served-model-name", "smollm2-135m")
    yield served
    served.stop(signal.SIGKILL)


@pytest.fixture
def environment(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The shared server (it thinks, knows tools, has random weights), as the environment names it to clients."""
    return _named(server, monkeypatch)


@pytest.fixture
def default_environment(default_server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The server that is like the default model's, as the environment names it to clients."""
    return _named(default_server, monkeypatch)


def _named(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{served.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", served.key)
    return served
