"""Pulling from a hub: a server on this machine stands in for it."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie45
from ernie45.errors import CheckpointError, NotFoundError, TransferError
from ernie45.store.pull import pull

GOOD = "own/good"


class Hub:
    """A hub with one repository; counts what is fetched and fails where it is told to."""

    def __init__(self) -> None:
        self.commit = "a" * 40
        self.files: dict[str, bytes] = {}
        self.failing: set[str] = set()
        self.fetched: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        files = self.hub.files
        if path.startswith(f"/api/models/{GOOD}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)} for name, data in files.items()
            ]
            self._answer(json.dumps(entries).encode())
        elif path == f"/api/models/{GOOD}":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            info = {"id": GOOD, "sha": self.hub.commit, "siblings": siblings, "tags": [], "private": False}
            self._answer(json.dumps(info).encode())
        elif path.startswith(f"/{GOOD}/resolve/{self.hub.commit}/") and (name := path.split("/", 5)[5]) in files:
            if name in self.hub.failing:
                self._answer(b"{}", 403)
                return
            if self.command == "GET":
                self.hub.fetched.append(name)
            self._answer(files[name], headers={"ETag": f'"{_digest(files[name])}"', "X-Repo-Commit": self.hub.commit})
        else:
            self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, data: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub whose repository holds a small checkpoint and files that nobody needs."""
    hub = Hub()
    folder = save(tmp_path / "published")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()} | {
        "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
        "pytorch_model.bin": b"a pickle",
        "figures/loss.png": b"a picture",
    }
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_repository_becomes_a_model(home: Path, hub: Hub, tmp_path: Path) -> None:
    pulled = pull(GOOD)
    assert (pulled.name, pulled.path, pulled.fresh) == (GOOD, home / "models" / "own" / "good", True)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {path.name for path in pulled.path.iterdir()} == set(hub.fetched) == names
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(ernie45.load_model("good")(ids), ernie45.load_model(tmp_path / "published")(ids))
    assert pull(GOOD).fresh is False
    assert len(hub.fetched) == len(names)


def test_an_interrupted_download_is_resumed_and_not_seen_before_it_is_whole(home: Path, hub: Hub) -> None:
    hub.failing = {"model.safetensors"}
    with pytest.raises(TransferError, match="Run the command again to resume"):
        pull(GOOD)
    assert not (home / "models").exists()
    first = set(hub.fetched)
    hub.failing = set()
    hub.fetched.clear()
    assert pull(GOOD).fresh
    assert "model.safetensors" in hub.fetched
    assert not first & set(hub.fetched)


def test_force_fetches_again_and_replaces(home: Path, hub: Hub) -> None:
    pull(GOOD)
    (home / "models" / "own" / "good" / "mine").write_text("")
    hub.commit = "b" * 40
    hub.files["LICENSE"] = b"Apache License"
    assert pull(GOOD, force=True).fresh
    names = {path.name for path in (home / "models" / "own" / "good").iterdir()}
    assert "LICENSE" in names
    assert "mine" not in names


def test_progress_counts_the_bytes_of_all_files(home: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie45.store.watch._POLL_S", 0.005)
    seen: list[tuple[int, int]] = []
    pull(GOOD, progress=lambda stage: lambda done, total: seen.append((done, total)))
    total = sum(len(data) for name, data in hub.files.items() if not name.endswith((".bin", ".png")))
    assert seen
    assert {size for _, size in seen} == {total}
    assert all(0 <= done <= total for done, _ in seen)


def test_an_unknown_repository(home: Path, hub: Hub) -> None:
    with pytest.raises(NotFoundError, match=r"'own/other' does not exist or needs a login \(HF_TOKEN\)"):
        pull("own/other")
    assert not (home / "models").exists()


def test_a_repository_without_weights_that_can_be_read(home: Path, hub: Hub) -> None:
    weights = hub.files.pop("model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no config\.json with safetensors files"):
        pull(GOOD)
    assert hub.fetched == []
    hub.files["model.safetensors"] = weights[:-1000]
    with pytest.raises(CheckpointError, match="is downloaded, but cannot be used: .*; remove "):
        pull(GOOD)
    assert not (home / "models").exists()
    shutil.rmtree(home / "downloads")
    hub.files["model.safetensors"] = weights
    assert pull(GOOD).fresh


def test_no_connection_is_said_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")  # closed by now
    with pytest.raises(TransferError, match="could not be downloaded .*ernie pull FOLDER"):
        pull(GOOD)
    assert not (home / "models").exists()


def test_offline_mode_is_respected(home: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TransferError, match="could not be downloaded"):
        pull(GOOD)
    assert hub.fetched == []


def test_the_hubs_own_bars_are_only_off_meanwhile(home: Path, hub: Hub) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    before: Any = are_progress_bars_disabled()
    pull(GOOD)
    assert are_progress_bars_disabled() == before
