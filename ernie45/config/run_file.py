"""Read how a run is set from one YAML file into nested frozen dataclasses, with every mistake told by its line.

The dataclasses are the schema: a key that is no field, a value of another type or a missing one is an error that names the line and
the nearest known key. Words of the command line (`section.key=value`) win over the file. The same fields, with the line that
stands under each in its source, are printed as a commented file by `describe`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ernie45.errors import ConfigError, NotFoundError

C = TypeVar("C")

MAX_FILE_BYTES = 1 << 20
_NONE = type(None)
_ODD_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_MAPPINGS = (dict, Mapping)


def read_run_file(path: str | Path, cls: type[C], overrides: Sequence[str] = ()) -> C:
    """A configuration of type `cls` from a YAML file.

    Args: cls: a frozen dataclass; its fields may be dataclasses, tuples, dictionaries, literals, optional.
        overrides: `section.key=value`, the value as YAML.
    Raises: NotFoundError; ConfigError with file, line and remedy.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has {len(data)} bytes, a run file has at most {MAX_FILE_BYTES}")
    return parse_run(data.decode("utf-8", errors="replace"), cls, overrides, origin=str(path))


def parse_run(text: str, cls: type[C], overrides: Sequence[str] = (), *, origin: str = "run file") -> C:
    """The same from the text of a file; `origin` begins every message."""
    root = _compose(text, origin)
    for override in overrides:
        _override(root, override)
    value: C = _Reader(origin).dataclass(root, cls, "")
    return value


def to_plain(config: Any) -> Any:
    """A configuration as dictionaries, lists and scalars: what `dump_run` writes, and JSON takes as well."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    return [to_plain(value) for value in config] if isinstance(config, tuple | list) else config


def read_yaml(path: str | Path) -> Any:
    """What a YAML or JSON file of somebody else holds, as plain values. Raises: NotFoundError, ConfigError."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no valid YAML or JSON: {error}") from error


def dump_run(config: Any) -> str:
    """YAML that `parse_run` reads back into an equal configuration; of a dataclass, or of plain values."""
    import yaml

    plain = to_plain(config)
    # PyYAML reads these back as spaces unless they are escaped.
    escapes = _ODD_BREAKS.search(json.dumps(plain, ensure_ascii=False)) is not None
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=not escapes, width=120)
    return text


def describe(cls: type) -> str:
    """Every field with its default and what it means, as a YAML file with comments."""
    return "\n".join(_described(cls, 0)) + "\n"


# --- YAML nodes, which know their lines -------------------------------------------------------------------------------------------


class _FileError(Exception):
    """What is wrong, and the node that it is wrong with."""

    def __init__(self, node: Any, message: str) -> None:
        super().__init__(message)
        self.node = node


def _compose(text: str, origin: str) -> Any:
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise ConfigError(f"{where}: no valid YAML: {getattr(error, 'problem', None) or error}") from error
    if root is None:
        return yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{origin}:1: a run file holds sections, as in `train:`, and keys within them")
    return root


def _override(root: Any, text: str) -> None:
    """Put `section.key=value` into the tree, so that it is checked like the file."""
    import yaml

    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{text!r} sets nothing: expected section.key=value")
    try:
        new = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r}: the value is no valid YAML") from error
    new = new or yaml.ScalarNode("tag:yaml.org,2002:null", "")
    for node in _all_nodes(new):
        node.start_mark = f"command line ({path.strip()})"  # instead of a line
    node = root
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        found = next((index for index, (name, _) in enumerate(node.value) if name.value == key), None)
        if found is None or (not last and not isinstance(node.value[found][1], yaml.MappingNode)):
            name = yaml.ScalarNode("tag:yaml.org,2002:str", key, start_mark=new.start_mark)
            child = new if last else yaml.MappingNode("tag:yaml.org,2002:map", [], start_mark=new.start_mark)
            node.value = [pair for index, pair in enumerate(node.value) if index != found] + [(name, child)]
            node = child
        elif last:
            node.value[found] = (node.value[found][0], new)
        else:
            node = node.value[found][1]


def _all_nodes(node: Any) -> Iterator[Any]:
    yield node
    if isinstance(node.value, list):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                yield from _all_nodes(part)


class _Reader:
    """From nodes to typed values."""

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def dataclass(self, node: Any, cls: type[Any], path: str) -> Any:
        """The one entry: every mistake below leaves as a ConfigError with its line."""
        try:
            return self._dataclass(node, cls, path)
        except _FileError as error:
            raise ConfigError(f"{self._where(error.node)}: {error}") from error

    def _where(self, node: Any) -> str:
        mark = getattr(node, "start_mark", None)
        if isinstance(mark, str):
            return mark
        return f"{self._origin}:{mark.line + 1}" if mark else self._origin

    def _dataclass(self, node: Any, cls: type[Any], path: str) -> Any:
        pairs = self._pairs(node, path or "the file")
        hints = get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {}
        for key, (name, child) in pairs.items():
            if key not in fields:
                raise _FileError(name, _unknown(key, path, fields))
            values[key] = self._value(child, hints[key], f"{path}.{key}" if path else key)
        for name, field in fields.items():
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if needed and name not in values:
                raise _FileError(node, f"{f'{path}.' if path else ''}{name} is missing and has no default")
        try:
            return cls(**values)
        except ConfigError as error:
            raise _FileError(node, f"{f'{path}: ' if path else ''}{error}") from error

    def _pairs(self, node: Any, what: str) -> dict[str, tuple[Any, Any]]:
        import yaml

        if not isinstance(node, yaml.MappingNode):
            raise _FileError(node, f"{what} is {_shown(node)}, expected keys with values")
        pairs: dict[str, tuple[Any, Any]] = {}
        for name, child in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise _FileError(name, f"a key of {what} is no word")
            if name.value in pairs:
                raise _FileError(
                    name, f"{name.value} is given twice in {what}, before at {self._where(pairs[name.value][0])}"
                )
            pairs[name.value] = (name, child)
        return pairs

    def _value(self, node: Any, hint: Any, path: str) -> Any:
        import yaml

        origin = get_origin(hint)
        if origin in (Union, types.UnionType):
            return self._union(node, get_args(hint), path)
        if dataclasses.is_dataclass(hint):
            return self._dataclass(node, hint, path)  # type: ignore[arg-type]  # a class, not an instance
        if origin is tuple:
            return self._tuple(node, get_args(hint), path)
        if origin in _MAPPINGS:
            kind = get_args(hint)[1]
            return {
                key: self._value(child, kind, f"{path}.{key}") for key, (_, child) in self._pairs(node, path).items()
            }
        if hint is Any:
            return self._anything(node, path)
        if not isinstance(node, yaml.ScalarNode):
            raise _FileError(node, f"{path} is {_shown(node)}, expected {_named(hint)}")
        return _scalar(node, hint, path)

    def _anything(self, node: Any, path: str) -> Any:
        """What a function of somebody else takes: as YAML says, a number in `1e-5`'s way too."""
        import yaml

        if isinstance(node, yaml.SequenceNode):
            return [self._anything(child, f"{path}[{i}]") for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return {key: self._anything(child, f"{path}.{key}") for key, (_, child) in self._pairs(node, path).items()}
        value = _constructed(node)
        bare = isinstance(value, str) and node.style is None and _EXPONENT.fullmatch(value)
        return float(value) if bare else value

    def _union(self, node: Any, choices: tuple[Any, ...], path: str) -> Any:
        import yaml

        if _NONE in choices and node.tag == "tag:yaml.org,2002:null":
            return None
        real = [choice for choice in choices if choice is not _NONE]
        if len(real) == 1:
            return self._value(node, real[0], path)
        if isinstance(node, yaml.ScalarNode):
            real = [choice for choice in real if not _is_branch(choice)]
        else:
            real = [choice for choice in real if _is_branch(choice)]
        for choice in real:
            try:
                return self._value(node, choice, path)
            except _FileError:
                continue
        raise _FileError(node, f"{path} is {_shown(node)}, expected {' or '.join(map(_named, choices))}")

    def _tuple(self, node: Any, kinds: tuple[Any, ...], path: str) -> tuple[Any, ...]:
        import yaml

        if not isinstance(node, yaml.SequenceNode):
            raise _FileError(node, f"{path} is {_shown(node)}, expected a list, as in [a, b]")
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(node.value)
        if len(kinds) != len(node.value):
            raise _FileError(node, f"{path} has {len(node.value)} entries, expected {len(kinds)}")
        return tuple(
            self._value(child, kind, f"{path}[{i}]")
            for i, (child, kind) in enumerate(zip(node.value, kinds, strict=True))
        )


def _is_branch(hint: Any) -> bool:
    """Whether values are sections or lists."""
    return dataclasses.is_dataclass(hint) or get_origin(hint) is tuple or get_origin(hint) in _MAPPINGS


def _scalar(node: Any, hint: Any, path: str) -> Any:
    """A plain value. YAML 1.1 reads `1e-5` as a word and `no` as false: where a number is wanted the first is a number, where a
    word is wanted the second is an error that says so.
    """
    value = _constructed(node)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value in choices and type(value) in map(type, choices):
            return value
        close = difflib.get_close_matches(str(value), map(str, choices), n=1)
        meant = f": did you mean {close[0]}?" if close else ""
        raise _FileError(node, f"{path} is {value!r}, expected one of {', '.join(map(str, choices))}{meant}")
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        value = _number(value)
    fits = isinstance(value, hint) and not (hint is not bool and isinstance(value, bool))
    if not fits or (hint is float and not math.isfinite(value)):
        quoted = f': write "{node.value}" in quotation marks' if hint is str and node.style is None else ""
        raise _FileError(node, f"{path} is {node.value!r}, expected {_named(hint)}{quoted}")
    return value


def _constructed(node: Any) -> Any:
    """The value as YAML says. Raises: _FileError for a tag, which might ask for anything."""
    import yaml

    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node)
    except yaml.constructor.ConstructorError as error:
        raise _FileError(node, f"{node.tag} is no kind of value that a run file holds: leave the tag out") from error
    except (ValueError, OverflowError):  # a date or number that there is not
        return node.value
    finally:
        loader.dispose()


def _number(value: int | str) -> float | str:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return str(value)


def _unknown(key: str, path: str, fields: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    known = f"did you mean {close[0]}?" if close else f"there are {', '.join(fields)}"
    return f"{path + '.' if path else ''}{key} is no key of a run file: {known}"


def _shown(node: Any) -> str:
    kinds = {"MappingNode": "a section", "SequenceNode": "a list"}
    return kinds.get(type(node).__name__, repr(node.value))


def _named(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_named, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list"
    if get_origin(hint) in _MAPPINGS or dataclasses.is_dataclass(hint):
        return "a section"
    if hint is Any:
        return "anything"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", _NONE: "nothing"}
    return names.get(hint, str(hint))


# --- the schema in words ----------------------------------------------------------------------------------------------------------


def _described(cls: type, depth: int) -> Iterator[str]:
    indent = "  " * depth
    hints, words = get_type_hints(cls), _field_words(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        for line in textwrap.wrap(words.get(field.name, ""), 110 - len(indent)):
            yield f"{indent}# {line}"
        section = next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)
        repeated = get_origin(hint) is tuple
        if section is None:
            yield f"{indent}{field.name}: {_default_text(field)}  # {_named(hint)}"
        else:
            optional = _NONE in get_args(hint)
            yield f"{indent}{field.name}:" + ("  # a list of" if repeated else "  # optional" if optional else "")
            yield from _described(typing.cast(type, section), depth + 1)


def _default_text(field: dataclasses.Field[Any]) -> str:
    default: Any = field.default
    if default is dataclasses.MISSING:
        factory: Any = field.default_factory
        if factory is dataclasses.MISSING:
            return "..."
        default = factory()
    import yaml

    return str(yaml.safe_dump(to_plain(default), default_flow_style=True, width=1000)).removesuffix("...\n").strip()


def _field_words(cls: type) -> dict[str, str]:
    """The text under each field, which the class's source alone knows."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    words, body = {}, getattr(tree, "body", [])
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            value = getattr(text.value, "value", None)
            if isinstance(value, str):
                words[field.target.id] = " ".join(value.split())
    return words
