"""Where models are kept, and how a name becomes a path.

Environment: `ERNIE45_HOME` names the folder; without it, `$XDG_CACHE_HOME/ernie45` or `~/.cache/ernie45`.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from ernie45.config.presets import preset, presets
from ernie45.errors import CapacityError, NotFoundError, UsageError

DEFAULT_MODEL = "smollm2-135m"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def home() -> Path:
    """The folder that holds everything of this package."""
    stated = os.environ.get("ERNIE45_HOME")
    if stated:
        return Path(os.path.abspath(os.path.expanduser(stated)))
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ernie45"


def made(folder: Path) -> Path:
    """`folder`, created if need be. Raises: CapacityError if the store cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CapacityError(
            f"{folder} cannot be created ({error.strerror}): set ERNIE45_HOME to a folder that you can write"
        ) from error
    return folder


def model_path(name: str) -> Path:
    """Where the model of that name lies or will lie.

    Raises: UsageError for a name that is neither `name` nor `owner/name` of letters, digits, `.`, `_` and `-`.
    """
    if not is_name(name):
        raise UsageError(
            f"{name!r} is no model name: expected NAME or OWNER/NAME of letters, digits, '.', '_' and '-'; rename it"
        )
    return home() / "models" / name


def is_name(text: str) -> bool:
    """Whether `text` is `name` or `owner/name` as the store and the hub use them."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def installed() -> dict[str, Path]:
    """Models in the store by name: every folder that holds a config.json, or a GGUF file."""
    root = home() / "models"
    files = [
        file
        for pattern in ("config.json", "*.gguf")
        for depth in ("*", "*/*")
        for file in root.glob(f"{depth}/{pattern}")
    ]
    found = {}
    for folder in sorted({file.parent for file in files}):
        if not any(part.startswith(".") for part in folder.relative_to(root).parts):
            found[folder.relative_to(root).as_posix()] = folder
    return found


def lost_links() -> dict[str, Path]:
    """Names in the store whose folder has gone, with where it was."""
    root = home() / "models"
    return {
        link.relative_to(root).as_posix(): Path(os.readlink(link))
        for link in [*root.glob("*"), *root.glob("*/*")]
        if link.is_symlink() and not link.exists()
    }


def resolve(model: str | Path | None = None) -> Path:
    """The folder or file behind a path or a name; None is the default model.

    A name may leave out its owner while that is unambiguous. A folder or .gguf file of that path goes before a name.
    Raises: NotFoundError with the nearest name and how to get it.
    """
    name = str(model) if model is not None else DEFAULT_MODEL
    path = os.path.expanduser(name)
    models = installed()
    exact = [folder for known, folder in models.items() if known.lower() == name.lower()]
    if os.path.isdir(path) and not (exact and not _holds_model(Path(path))):
        return Path(path)
    if os.path.isfile(path):
        if path.endswith(".gguf"):
            return Path(path)
        raise NotFoundError(f"{name} is no model: expected a model name, a checkpoint folder or a .gguf file")
    short = [folder for known, folder in models.items() if known.lower().endswith(f"/{name.lower()}")]
    found = exact or short
    if len(found) == 1:
        return found[0]
    if found:
        raise NotFoundError(f"{name!r} could be {' or '.join(str(folder) for folder in found)}: name its owner, too")
    raise NotFoundError(f"no model {name[:80]!r} here: {_remedy(name, models)} (`ernie models --all` lists models)")


def weights_path(path: Path) -> Path:
    """The path, or the one GGUF file of a folder that holds nothing else."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    return files[0] if len(files) == 1 else path


def published_id(name: str) -> str | None:
    """The hub id of a published model under any of its names, None if there is no such model."""
    try:
        config = preset(name)
    except NotFoundError:
        return None
    key = _bare(name)
    published = next(known for known, value in presets().items() if value is config and _bare(known) == key)
    # The -Thinking repositories carry no suffix.
    return f"baidu/{published}" if published.endswith("-Thinking") else f"baidu/{published}-PT"


def _bare(name: str) -> str:
    lowered = name.lower().removeprefix("baidu/").removeprefix("ernie-4.5-")
    return lowered.removesuffix("-pt").removesuffix("-paddle")


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or any(folder.glob("*.gguf"))


def _remedy(name: str, models: dict[str, Path]) -> str:
    if name.lower() == DEFAULT_MODEL:
        return f"`ernie pull {DEFAULT_MODEL}` fetches the default model"
    if (hub_id := published_id(name)) is not None:
        return f"`ernie pull {hub_id}` fetches it"
    lowered = {known.lower(): known for known in (*presets(), DEFAULT_MODEL, *models)}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    if close:
        meant = lowered[close[0]]
        if meant in models:
            return f"did you mean {meant!r}?"
        return f"did you mean {meant!r}? `ernie pull {published_id(meant) or meant}` fetches it"
    if name.count("/") == 1 and is_name(name):
        return f"`ernie pull {name}` fetches it from the hub"
    return "give a model name, a folder or a .gguf file"
