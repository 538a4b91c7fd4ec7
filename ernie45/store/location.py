"""Where models are kept, and how a name becomes a path.

Environment: `ERNIE45_HOME` names the folder; without it, `$XDG_CACHE_HOME/ernie45` or `~/.cache/ernie45`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ernie45.config.nearest import nearest
from ernie45.errors import NotFoundError, UsageError

DEFAULT_MODEL = "smollm2-135m"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def home() -> Path:
    """The folder that holds everything of this package."""
    stated = os.environ.get("ERNIE45_HOME")
    if stated:
        return Path(stated).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ernie45"


def model_path(name: str) -> Path:
    """Where the model of that name lies or will lie.

    Raises: UsageError for a name that is neither `name` nor `owner/name` of letters, digits, `.`, `_` and `-`.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(f"{name!r} is no model name: expected NAME or OWNER/NAME of letters, digits, '.', '_' and '-'")
    return home() / "models" / name


def installed() -> dict[str, Path]:
    """Models in the store by name: every folder that holds a config.json."""
    root = home() / "models"
    found = {}
    for config in sorted([*root.glob("*/config.json"), *root.glob("*/*/config.json")]):
        folder = config.parent
        if not any(part.startswith(".") for part in folder.relative_to(root).parts):
            found[folder.relative_to(root).as_posix()] = folder
    return found


def resolve(model: str | Path | None = None) -> Path:
    """The folder or file behind a path or a name; None is the default model.

    Raises: NotFoundError with the nearest installed name and how to get one.
    """
    name = str(model) if model is not None else DEFAULT_MODEL
    path = Path(name).expanduser()
    if path.exists() and (path.is_dir() or path.suffix == ".gguf"):
        return path
    models = installed()
    for known, folder in models.items():
        if known.lower() == name.lower():
            return folder
    hint = f"did you mean {nearest(name, models)!r}? " if models else ""
    pull = f"`ernie pull {name}` fetches it" if _NAME.fullmatch(name) else "give a model name, a folder or a .gguf file"
    raise NotFoundError(f"no model {name!r} here: {hint}{pull}; `ernie models` lists what is here")
