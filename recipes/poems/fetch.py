"""Bring the poems to this machine: the npm package `chinese-poetry` (MIT), cleaned, one poem per row.

    python -m recipes.poems.fetch -o data/poems

Writes poems.train.jsonl and poems.heldout.jsonl, and prints what was kept and what was left out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ernie45.errors import NotFoundError, TransferError
from recipes.poems.clean import UnusableError, clean
from recipes.poems.poem import Poem, write_rows

PACKAGE = "chinese-poetry@2.0.1"
TRAIN, HELD_OUT = "poems.train.jsonl", "poems.heldout.jsonl"

_MEMBER = re.compile(r"package/dist/quantangshi/poet\.(tang|song)\.\d+\.json")
_DYNASTIES = {"tang": "唐", "song": "宋"}


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, clean, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--package-file", type=Path, metavar="FILE", help=f"{PACKAGE} as a .tgz that is here already")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        poems, left_out = collect(options.package_file or pack(PACKAGE, Path(scratch)))
    for name, part in ((TRAIN, False), (HELD_OUT, True)):
        write_rows(options.output / name, (poem.as_row() for poem in poems if poem.held_out is part))
    print(json.dumps(summary(poems, left_out), ensure_ascii=False, indent=2))


def pack(package: str, folder: Path) -> Path:
    """Download a package as the file that npm would install from. Raises: NotFoundError without npm, TransferError."""
    command = ["npm", "pack", package, "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NotFoundError("npm is not installed: install Node.js, or give the package with --package-file") from error
    files = list(folder.glob("*.tgz"))
    if done.returncode or len(files) != 1:
        raise TransferError(f"npm pack {package} failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return files[0]


def collect(package: Path) -> tuple[list[Poem], Counter[str]]:
    """Clean every record of a package file; of poems with the same characters the first is kept.

    Returns: the poems, and how many records were left out by reason. Raises: NotFoundError if there are no poems inside.
    """
    poems: dict[str, Poem] = {}
    left_out: Counter[str] = Counter()
    for dynasty, record in _records(package):
        try:
            poem = clean(record, dynasty)
        except UnusableError as reason:
            left_out[str(reason)] += 1
            continue
        if poems.setdefault(poem.key, poem) is not poem:
            left_out["the same characters as another poem"] += 1
    if not poems:
        raise NotFoundError(f"{package} holds no files poet.tang.N.json or poet.song.N.json: is it {PACKAGE}?")
    return list(poems.values()), left_out


def summary(poems: Sequence[Poem], left_out: Counter[str]) -> dict[str, Any]:
    """Counts for people."""
    return {
        "poems": len(poems),
        "held_out": sum(poem.held_out for poem in poems),
        "characters": sum(len(poem.text) for poem in poems),
        "by_form": dict(Counter(poem.form for poem in poems).most_common()),
        "by_dynasty": dict(Counter(poem.dynasty for poem in poems).most_common()),
        "left_out": dict(left_out.most_common()),
    }


def _records(package: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a package file with their dynasty, read where they are: nothing is unpacked."""
    with tarfile.open(package) as archive:
        for member in archive:
            match = _MEMBER.fullmatch(member.name)
            file = archive.extractfile(member) if match and member.isfile() else None
            if match is None or file is None:
                continue
            for record in json.load(file):
                yield _DYNASTIES[match[1]], record


if __name__ == "__main__":
    main()
