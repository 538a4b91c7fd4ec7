"""Fetch a checkpoint from the Hugging Face hub: resumable, and in the store only once it is whole and can be read."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from ernie45.checkpoint.source import open_source
from ernie45.errors import CheckpointError, NotFoundError, TransferError, UsageError
from ernie45.store.location import home, made, model_path
from ernie45.store.pulled import Pulled, Stages, stage
from ernie45.store.watch import watched

_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "README.md", "mtp/*")
_TIMEOUT_S = 10


def fetch(repo_id: str, force: bool, progress: Stages | None) -> Pulled:
    """Download a repository's checkpoint files, or what is still missing of them, and check that they can be read.

    Raises: TransferError without network, NotFoundError for an unknown or closed repository, CheckpointError if what
    it holds is no checkpoint that can be read.
    """
    target = model_path(repo_id)
    if target.exists() and not force:
        open_source(target)
        return Pulled(name=repo_id, path=target, fresh=False)
    import huggingface_hub

    partial = home() / "downloads" / repo_id
    with _explained(repo_id):
        api = huggingface_hub.HfApi()
        info = api.model_info(repo_id, timeout=_TIMEOUT_S, files_metadata=True)
        files = {file.rfilename: file.size or 0 for file in info.siblings or [] if _wanted(file.rfilename)}
        if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
            raise CheckpointError(
                f"hub repository {repo_id!r} holds no config.json with safetensors files: choose a repository with "
                "such weights (their names often end in -PT)"
            )
        made(partial)
        with _without_bars(), watched(partial, sum(files.values()), stage(progress, "downloading")):
            api.snapshot_download(
                repo_id, revision=info.sha, local_dir=partial, allow_patterns=list(files), etag_timeout=_TIMEOUT_S
            )
    try:
        open_source(partial)
    except CheckpointError as error:
        raise CheckpointError(f"{repo_id} is downloaded, but cannot be used: {error}; remove {partial}") from error
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the library's notes on resuming
    _publish(partial, target)
    return Pulled(name=repo_id, path=target, fresh=True)


def _wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _FILES)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn the errors of the hub's library into ours."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.RevisionNotFoundError) as error:
        raise NotFoundError(
            f"hub repository {repo_id!r} does not exist or needs a login (HF_TOKEN): {_first_line(error)}"
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repo_id!r} is no hub id: {_first_line(error)}") from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, _transport_error(), OSError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # "not found in the cache", says the library of a lost connection
            cause = cause.__cause__
        raise TransferError(
            f"{repo_id} could not be downloaded ({_first_line(cause)}). Run the command again to resume; without "
            "network, copy the repository's files into a folder and run `ernie pull FOLDER`"
        ) from error


def _transport_error() -> type[Exception]:
    """Base of the HTTP library's errors; which library that is depends on the version of huggingface_hub."""
    import huggingface_hub

    library = importlib.import_module(type(huggingface_hub.get_session()).__module__.partition(".")[0])
    base: type[Exception] = library.HTTPError
    return base


@contextmanager
def _without_bars() -> Iterator[None]:
    """The hub's library draws a bar per file, on logs too: ours shows the whole."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _publish(partial: Path, target: Path) -> None:
    """Move the finished folder to its name, in place of an older one."""
    made(target.parent)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        old = partial.with_name(f".{partial.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
        return
    partial.rename(target)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
