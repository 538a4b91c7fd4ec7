"""Bring task descriptions with answers to this machine: the Natural Instructions inside of the PyPI package `bigbench` (Apache-2.0).

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
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ernie45.checkpoint.atomic import atomic_write_text
from ernie45.errors import NotFoundError, TransferError
from recipes.smollm2_sft.example import Example, UnusableError, read_example, sample

PACKAGE = "bigbench==0.0.1"
TRAIN, HELD_OUT = "train.jsonl", "heldout.jsonl"
MAX_CHARS = 1500
"""Of a question and its answer together: about 350 tokens of the model's, so that a row of 512 holds them with the system text."""

_MEMBER = re.compile(r"(?:[^/]+/)?bigbench/benchmark_tasks/natural_instructions/([^/]+)/task\.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, choose, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--package-file", type=Path, metavar="FILE", help=f"{PACKAGE} as .tar.gz or .whl that is here already")
    parser.add_argument("--per-task", type=int, default=80, metavar="N", help="most rows of each task (default 80)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        found, left_out = collect(options.package_file or download(PACKAGE, Path(scratch)))
    chosen = sample(found, options.per_task)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in ((TRAIN, False), (HELD_OUT, True)):
        rows = [json.dumps(each.as_row(), ensure_ascii=False) + "\n" for each in chosen if each.held_out is part]
        atomic_write_text(options.output / name, "".join(rows))
    print(json.dumps(summary(found, chosen, left_out), indent=2))


def download(package: str, folder: Path) -> Path:
    """Download a package as pip would, without installing or building it. Raises: TransferError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--dest", str(folder), package]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    files = [path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz", ".zip"))]
    if done.returncode or len(files) != 1:
        raise TransferError(
            f"pip download {package} failed with status {done.returncode}: {done.stderr.strip()[-500:]}; bring the file here from a "
            "machine with network, and name it with --package-file"
        )
    return files[0]


def collect(package: Path) -> tuple[list[Example], Counter[str]]:
    """Read every example of a package file; of those with the same question the first is kept.

    Returns: the examples, and how many were left out by reason. Raises: NotFoundError if there are none inside.
    """
    examples: dict[str, Example] = {}
    left_out: Counter[str] = Counter()
    for task, record in _records(package):
        try:
            example = read_example(task, record, MAX_CHARS)
        except UnusableError as reason:
            left_out[str(reason)] += 1
            continue
        if examples.setdefault(example.key, example) is not example:
            left_out["the same question as another one"] += 1
    if not examples:
        raise NotFoundError(f"{package} holds no files natural_instructions/TASK/task.json: is it {PACKAGE}?")
    return list(examples.values()), left_out


def summary(found: Sequence[Example], chosen: Sequence[Example], left_out: Counter[str]) -> Mapping[str, Any]:
    """Counts for people."""
    return {
        "tasks": len({example.task for example in found}),
        "usable": len(found),
        "chosen": len(chosen),
        "held_out": sum(example.held_out for example in chosen),
        "left_out": dict(left_out.most_common()),
    }


def _records(package: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The examples of a package file with their task's name."""
    for name, file in _members(package):
        match = _MEMBER.fullmatch(name)
        for record in json.load(file).get("examples", ()) if match else ():
            yield match[1] if match else "", record


def _members(package: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Files inside of a wheel or source package, in the order in which they lie there."""
    if zipfile.is_zipfile(package):
        with zipfile.ZipFile(package) as wheel:
            for name in wheel.namelist():
                with wheel.open(name) as file:
                    yield name, file
    elif package.is_file() and tarfile.is_tarfile(package):
        with tarfile.open(package) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content
    else:
        raise NotFoundError(f"{package} is no package file: expected the .tar.gz or .whl of {PACKAGE}")


if __name__ == "__main__":
    main()
