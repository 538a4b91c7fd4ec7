"""Text that every machine with Python has: the docstrings of the standard library, as rows to learn from.

    python -m recipes.ablations.text -o data/ablations

Writes texts.train.jsonl and texts.heldout.jsonl to pre-train on; to tune on, mixed.train.jsonl, in which rows with a long question
and a short answer alternate with the opposite, and each kind's held-out rows alone. The hash of a docstring decides whether it is
held out, and of equal ones the first is kept.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.checkpoint.atomic import atomic_write_text
from ernie45.errors import NotFoundError

HELD_OUT_SHARE = 0.06
MIN_MIXED_CHARS, MAX_MIXED_CHARS = 160, 640
"""Docstrings of this length become rows to tune on: long against a name, short enough to fit a packed row."""

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Something documented."""

    name: str
    """Dotted, as json.dumps."""
    head: str
    """How it is declared: the name with its parameters, or the kind and the name."""
    text: str
    """The docstring without its indentation."""

    @property
    def key(self) -> int:
        """Equal for equal docstrings; 32 bits."""
        return int(hashlib.sha256(self.text.encode()).hexdigest()[:8], 16)

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training. The text alone decides."""
        return self.key < HELD_OUT_SHARE * 2**32


def main(argv: Sequence[str] | None = None) -> None:
    """Collect, write, count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--library",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        metavar="DIR",
        help="Python files (default: its own)",
    )
    options = parser.parse_args(argv)
    found = collect(options.library)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, rows in files(found).items():
        atomic_write_text(options.output / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{len(rows)} rows: {options.output / name}")


def collect(library: Path) -> list[Entry]:
    """Everything documented below a folder, in the order of its files. Raises: NotFoundError if that is nothing."""
    entries: dict[str, Entry] = {}
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not _LEFT_OUT.intersection(inside.parts):
            for entry in _read(path, ".".join(inside.with_suffix("").parts).removesuffix(".__init__")):
                entries.setdefault(entry.text, entry)
    if not entries:
        raise NotFoundError(f"{library} holds no Python files with docstrings: name a folder of sources with --library")
    return list(entries.values())


def files(entries: Iterable[Entry]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by name of their file."""
    parts = {True: [e for e in entries if e.held_out], False: [e for e in entries if not e.held_out]}
    mixed = {
        part: [e for e in found if MIN_MIXED_CHARS <= len(e.text) <= MAX_MIXED_CHARS] for part, found in parts.items()
    }
    return {
        "texts.train.jsonl": [_text_row(entry) for entry in parts[False]],
        "texts.heldout.jsonl": [_text_row(entry) for entry in parts[True]],
        "mixed.train.jsonl": [_long(entry) if entry.key % 2 else _short(entry) for entry in mixed[False]],
        "long.heldout.jsonl": [_long(entry) for entry in mixed[True]],
        "short.heldout.jsonl": [_short(entry) for entry in mixed[True]],
    }


def _text_row(entry: Entry) -> Mapping[str, Any]:
    return {"text": f"{entry.head}\n{entry.text}\n"}


def _long(entry: Entry) -> Mapping[str, Any]:
    """A short question whose answer is the docstring."""
    return {"src": [f"What is {entry.head}?"], "tgt": [entry.text]}


def _short(entry: Entry) -> Mapping[str, Any]:
    """The docstring as a question, whose answer is a name."""
    return {"src": [f"What is this?\n{entry.text}"], "tgt": [entry.name]}


def _read(path: Path, module: str) -> Iterator[Entry]:
    """The documented parts of a file; nothing where it is not written in this Python's grammar."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    yield from _documented(tree, module, f"module {module}")


def _documented(node: _Documented, name: str, head: str) -> Iterator[Entry]:
    text = ast.get_docstring(node)
    if text and text.strip():
        # Rows are JSON: a lone surrogate, which a docstring may hold as an escape, is none of its characters.
        yield Entry(name=name, head=head, text=text.encode("utf-8", "replace").decode())
    for child in node.body:
        inner = f"{name}.{getattr(child, 'name', '')}"
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, inner, f"class {inner}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, inner, f"{inner}({ast.unparse(child.args)})")


if __name__ == "__main__":
    main()
