"""The files of a tokenizer: which there are, reading them within limits, and the declarations spread over them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie45.errors import CheckpointError, NotFoundError
from ernie45.processing.vocabulary import AddedToken

MODEL = "tokenizer.model"
DEFINITION = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"
GENERATION = "generation_config.json"
MODEL_CONFIG = "config.json"

TOKENIZER_FILES = (MODEL, DEFINITION, CONFIG, SPECIAL_MAP, ADDED, TEMPLATE, TEMPLATE_JSON)
STOP_FILES = (GENERATION, MODEL_CONFIG)
FORMAT_KEY = "ernie45_chat_format"  # our entry in tokenizer_config.json: a chat format that was chosen by hand
MAX_FILE_BYTES = 256 << 20  # the largest published tokenizer.json files have about 35 MB


@dataclass(frozen=True, kw_only=True)
class Declarations:
    """What the files beside the vocabulary say."""

    added: tuple[AddedToken, ...]
    named: dict[str, str]
    """Token text by role: `bos_token`, `eos_token`, .."""
    additional: tuple[str, ...]
    """Further special tokens, without a role."""
    eos_ids: frozenset[int] = field(default_factory=frozenset)
    """`eos_token_id` of generation_config.json and config.json."""
    templates: dict[str, str] = field(default_factory=dict)
    """Chat templates by name."""
    template_source: str = ""
    chat_format: str | None = None


def read_files(folder: str | Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files in `folder`.

    Raises: NotFoundError if there is no vocabulary, CheckpointError if a file cannot be read or is too large.
    """
    folder = Path(folder)
    files: dict[str, bytes] = {}
    for name in (*TOKENIZER_FILES, *STOP_FILES):
        path = folder / name
        if path.is_file():
            files[name] = _read(path)
    if MODEL not in files and DEFINITION not in files:
        raise NotFoundError(f"{folder} has neither {MODEL} nor {DEFINITION}: point to a folder with a tokenizer")
    return files


def parse_json(data: bytes, source: str) -> Any:
    """Parse JSON. Raises: CheckpointError naming `source`."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source} is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is no JSON: {error}") from error


def read_declarations(files: Mapping[str, bytes], folder: str | Path) -> Declarations:
    """Collect what all files but the vocabulary declare. Raises: CheckpointError with file and reason."""
    objects = {
        name: _object(files[name], str(Path(folder) / name))
        for name in (CONFIG, SPECIAL_MAP, ADDED, TEMPLATE_JSON, GENERATION, MODEL_CONFIG, DEFINITION)
        if name in files
    }
    config = objects.get(CONFIG, {})
    where = str(Path(folder) / CONFIG)
    named = _named(objects.get(SPECIAL_MAP, {}), str(Path(folder) / SPECIAL_MAP)) | _named(config, where)
    additional: list[str] = []
    for name in (SPECIAL_MAP, CONFIG):
        additional += _additional(objects.get(name, {}), str(Path(folder) / name))
    eos_ids: set[int] = set()
    for name in STOP_FILES:
        eos_ids |= _ids(objects.get(name, {}).get("eos_token_id"), f"{Path(folder) / name}: eos_token_id")
    templates, template_source = _templates(files, objects, Path(folder))
    chat_format = config.get(FORMAT_KEY)
    return Declarations(
        added=tuple(_added(objects, Path(folder))),
        named=named,
        additional=tuple(dict.fromkeys(additional)),
        eos_ids=frozenset(eos_ids),
        templates=templates,
        template_source=template_source,
        chat_format=_text(chat_format, f"{where}: {FORMAT_KEY}") if chat_format is not None else None,
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB, which is no tokenizer")
    return data


def _object(data: bytes, source: str) -> dict[str, Any]:
    value = parse_json(data, source)
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} must hold an object, not {type(value).__name__}")
    return value


def _text(value: object, where: str) -> str:
    """Return a token's or template's text, written as text or as {"content": ..}."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise CheckpointError(f"{where} must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        raise CheckpointError(f"{where} is no valid Unicode: {error.reason}") from error
    return text


def _named(config: Mapping[str, Any], source: str) -> dict[str, str]:
    return {
        role: _text(value, f"{source}: {role}")
        for role, value in config.items()
        # Some writers put flags such as add_bos_token beside the tokens.
        if role.endswith("_token") and value is not None and not isinstance(value, bool)
    }


def _additional(config: Mapping[str, Any], source: str) -> list[str]:
    out = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or []
        if isinstance(tokens, dict):
            tokens = list(tokens.values())
        if not isinstance(tokens, list):
            raise CheckpointError(f"{source}: {key} must be a list, not {type(tokens).__name__}")
        out += [_text(token, f"{source}: {key}[{idx}]") for idx, token in enumerate(tokens)]
    return out


def _added(objects: Mapping[str, dict[str, Any]], folder: Path) -> list[AddedToken]:
    """Merge the three places that declare added tokens; a token is special if one of them says so."""
    found: dict[tuple[int, str], AddedToken] = {}
    for where, token_id, token in _added_entries(objects, folder):
        special = isinstance(token, dict) and token.get("special") is True
        new = AddedToken(_id(token_id, where), _text(token, where), special, where)
        old = found.setdefault((new.id, new.text), new)
        found[new.id, new.text] = old._replace(special=old.special or special)
    return list(found.values())


def _added_entries(objects: Mapping[str, dict[str, Any]], folder: Path) -> list[tuple[str, object, object]]:
    entries: list[tuple[str, object, object]] = []
    where = f"{folder / DEFINITION}: added_tokens"
    tokens = objects.get(DEFINITION, {}).get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise CheckpointError(f"{where} must be a list of objects")
    entries += [(f"{where}[{idx}]", token.get("id"), token) for idx, token in enumerate(tokens)]
    where = f"{folder / CONFIG}: added_tokens_decoder"
    decoder = objects.get(CONFIG, {}).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{where} must be an object, not {type(decoder).__name__}")
    for key, token in decoder.items():
        if not key.isdecimal():
            raise CheckpointError(f"{where} has the key {key!r}, expected an id")
        entries.append((f"{where}[{key}]", int(key), token))
    where = str(folder / ADDED)
    entries += [(where, token_id, text) for text, token_id in objects.get(ADDED, {}).items()]
    return entries


def _id(value: object, where: str) -> int:
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{where} is {value!r}, expected a token id")
    return value


def _ids(value: object, where: str) -> set[int]:
    if value is None:
        return set()
    return {_id(item, where) for item in (value if isinstance(value, list) else [value])}


def _templates(
    files: Mapping[str, bytes], objects: Mapping[str, dict[str, Any]], folder: Path
) -> tuple[dict[str, str], str]:
    """Return the chat templates of the most specific place that has any, and its name."""
    if TEMPLATE in files:
        where = str(folder / TEMPLATE)
        try:
            return {"default": files[TEMPLATE].decode()}, where
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error
    for name in (TEMPLATE_JSON, CONFIG):
        value = objects.get(name, {}).get("chat_template")
        where = f"{folder / name}"
        if isinstance(value, str):
            return {"default": _text(value, f"{where}: chat_template")}, where
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            return {
                _text(entry.get("name"), f"{where}: chat_template name"): _text(
                    entry.get("template"), f"{where}: chat_template"
                )
                for entry in value
            }, where
        if value is not None:
            raise CheckpointError(f"{where}: chat_template must be text or a list of name and template")
    return {}, ""
