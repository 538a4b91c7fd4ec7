"""`ernie data`: what a training run would make of files of rows."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ernie45.cli.output import ProgressBar, note, print_facts, print_json, shown
from ernie45.errors import RequestError, UsageError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.store.api import load_tokenizer
from ernie45.store.location import resolve
from ernie45.training.batch import Document
from ernie45.training.data import stream as stream_module
from ernie45.training.data.config import DataConfig, SourceConfig
from ernie45.training.data.encoding import with_chat_format
from ernie45.training.data.kinds import told_kind
from ernie45.training.data.methods import OPENERS
from ernie45.training.data.pairs import KtoExample, PreferencePair
from ernie45.training.data.report import DataReport
from ernie45.training.data.row_formats import parse_text
from ernie45.training.data.rows import BadRow
from ernie45.training.data.sources import Source, open_source
from ernie45.training.data.stream import PackedRows
from ernie45.training.data.token_files import write_token_files

_BAR_WIDTH = 40
_SHAPING = ("rows", "max_seq_len", "long_rows", "thoughts", "chat_format")
_OPTIONS = {
    "check": _SHAPING,
    "preview": (*_SHAPING, "count"),
    "pack": (*_SHAPING, "buffer_rows"),
    "tokenize": ("output", "force"),
}
"""Which options an action knows, besides those of all."""


def run(options: argparse.Namespace) -> int:
    """Check, preview, pack or tokenize; exit code 1 if `--strict` finds bad rows."""
    _refuse_foreign(options)
    tokenizer = load_tokenizer(resolve(options.model))
    if options.action == "tokenize":
        return _tokenize(options, tokenizer)
    config = _config(options)
    kind = options.rows or told_kind(config)
    stream = OPENERS[kind](config, tokenizer)
    action = {"check": _check, "preview": _preview, "pack": _pack}[options.action]
    with _without_log():
        action(options, stream, with_chat_format(tokenizer, options.chat_format))
    return _exit_code(options, stream.report().num_bad)


def _refuse_foreign(options: argparse.Namespace) -> None:
    if options.count is not None and options.count < 1:
        raise UsageError(f"--count is {options.count}, expected 1 or more")
    known = {name for names in _OPTIONS.values() for name in names}
    for name in sorted(known - set(_OPTIONS[options.action])):
        if getattr(options, name) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} does not go with `ernie data {options.action}`: leave it out")


def _sources(options: argparse.Namespace) -> tuple[SourceConfig, ...]:
    return tuple(SourceConfig(path=path, format=options.format, text=options.text) for path in options.files)


def _config(options: argparse.Namespace) -> DataConfig:
    names = ("max_seq_len", "long_rows", "thoughts", "chat_format", "buffer_rows")
    given: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.action == "preview":
        given["packing"] = "none"
    return DataConfig(train=_sources(options), **given)


def _exit_code(options: argparse.Namespace, num_bad: int) -> int:
    return 1 if options.strict and num_bad else 0


@contextmanager
def _without_log() -> Iterator[None]:
    """The report has what the log would say."""
    logger = logging.getLogger(stream_module.__name__)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _check(options: argparse.Namespace, stream: PackedRows[Any, Any], tokenizer: Tokenizer) -> None:
    for _ in _with_bar(options, stream):
        pass
    report = stream.report()
    if options.json:
        print_json({"files": options.files, **report.summary()})
        return
    print_facts(_facts(report))
    if report.sizes:
        print("\n" + "\n".join(_histogram(report)))
    if report.bad:
        print("\nbad rows")
        print("\n".join(f"  {shown(str(row))}" for row in report.bad))
    if report.num_bad > len(report.bad):
        print(f"  and {report.num_bad - len(report.bad)} more")


def _facts(report: DataReport) -> list[tuple[str, str]]:
    rows = report.num_rows

    def share(count: int) -> str:
        return f"{count:,} ({count / rows:.1%})" if rows else "0"

    learnt = report.num_learnt / report.num_tokens if report.num_tokens else 0.0
    return [
        ("rows", f"{rows:,}, of which {report.num_used:,} can be used"),
        ("bad", share(report.num_bad)),
        ("too long, left out", share(report.too_long)),
        ("shortened", share(report.shortened)),
        ("nothing learnt", share(report.nothing_learnt)),
        ("tokens", f"{report.num_tokens:,}, of which {report.num_learnt:,} ({learnt:.0%}) are learnt"),
        ("packing", f"{report.packed_rows:,} rows of {report.room:,} tokens, {report.efficiency:.1%} filled"),
    ]


def _histogram(report: DataReport) -> list[str]:
    """A line for each power of two, as wide as it has rows."""
    most = max(report.sizes.values())
    lines = ["tokens of a row"]
    for digits in range(min(report.sizes), max(report.sizes) + 1):
        count = report.sizes[digits]
        low, high = (1 << digits) >> 1, (1 << digits) - 1
        bar = "#" * -(-count * _BAR_WIDTH // most)
        lines.append(f"  {low:>9,} - {high:<9,} {count:>9,}  {bar}".rstrip())
    return lines


def _pack(options: argparse.Namespace, stream: PackedRows[Any, Any], tokenizer: Tokenizer) -> None:
    sizes = [len(row) for row in _with_bar(options, stream)]
    report = stream.report()
    pieces, rows = sum(sizes), len(sizes)
    alone = report.num_tokens / (report.num_used * report.room) if report.num_used else 1.0
    if options.json:
        print_json({**report.summary(), "pieces": pieces, "efficiency_unpacked": alone})
        return
    facts = [
        ("rows", f"{report.num_used:,} in {rows:,} packed rows of {report.room:,} tokens"),
        ("filled", f"{report.efficiency:.2%} (one in each: {alone:.2%})"),
        ("in a packed row", f"{pieces / rows:.1f} on average, {max(sizes):,} at most" if rows else "none"),
        ("cut", f"into {pieces:,} pieces" if pieces > report.num_used else "none"),
    ]
    print_facts(facts)
    _note_bad(report)


def _preview(options: argparse.Namespace, stream: PackedRows[Any, Any], tokenizer: Tokenizer) -> None:
    wanted = options.count or 1
    items = [item for row, _ in zip(stream.once(), range(wanted), strict=False) for item in row]
    if options.json:
        print_json([{"origin": item.origin, **_runs_of(item, tokenizer)} for item in items])
    else:
        for item in items:
            print(f"--- {shown(item.origin)}")
            for name, runs in _runs_of(item, tokenizer).items():
                print(f"{name}: {''.join(_marked(run) for run in runs)}")
    _note_bad(stream.report())


def _runs_of(item: Document | PreferencePair | KtoExample, tokenizer: Tokenizer) -> dict[str, list[dict[str, Any]]]:
    """The texts of a sample, by name, in runs that are learnt or not."""
    if isinstance(item, Document):
        return {"text": _runs(item.ids, item.learnt, tokenizer)}
    prompt = _runs(item.prompt, item.prompt < 0, tokenizer)
    if isinstance(item, KtoExample):
        name = "wanted" if item.desirable else "unwanted"
        return {"prompt": prompt, name: _runs(item.completion, item.learnt, tokenizer)}
    return {
        "prompt": prompt,
        "chosen": _runs(item.chosen, item.chosen_learnt, tokenizer),
        "rejected": _runs(item.rejected, item.rejected_learnt, tokenizer),
    }


def _runs(ids: Tensor, learnt: Tensor, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    runs: list[tuple[bool, list[int]]] = []
    for token_id, mark in zip(ids.tolist(), learnt.tolist(), strict=True):
        if not runs or runs[-1][0] != mark:
            runs.append((mark, []))
        runs[-1][1].append(token_id)
    return [{"learnt": mark, "text": tokenizer.decode(run, skip_special_tokens=False)} for mark, run in runs]


def _marked(run: dict[str, Any]) -> str:
    """Learnt text in green on a terminal, between double brackets elsewhere."""
    text = shown(run["text"])
    if not run["learnt"]:
        return text
    return f"\x1b[32m{text}\x1b[0m" if sys.stdout.isatty() else f"[[{text}]]"


def _note_bad(report: DataReport) -> None:
    for row in report.bad:
        note(f"left out {shown(str(row), sys.stderr)}")


def _with_bar(options: argparse.Namespace, stream: PackedRows[Any, Any]) -> Iterator[list[Any]]:
    """All packed rows, with a bar for how many rows are read."""
    total = _size_bytes(options.files)
    with ProgressBar() as bar:
        report = bar.stage("reading")
        for row in stream.once():
            report(total * stream.num_read // stream.num_rows, total)
            yield row


def _tokenize(options: argparse.Namespace, tokenizer: Tokenizer) -> int:
    if not options.output:
        raise UsageError("say where to write the token files: -o DIR")
    bad: list[BadRow] = []
    with ProgressBar() as bar:
        sources = [open_source(source) for source in _sources(options)]
        documents = _tokenised(options, sources, tokenizer, bar, bad)
        index = write_token_files(Path(options.output), documents, tokenizer, overwrite=options.force)
    if options.json:
        print_json({"path": options.output, **index, "bad": bad})
        return 0
    print_facts(
        [
            ("folder", options.output),
            ("documents", f"{index['num_documents']:,}"),
            ("tokens", f"{index['num_tokens']:,} as {index['dtype']}"),
            ("bad rows", f"{len(bad):,}"),
        ]
    )
    for row in bad:
        note(f"left out {shown(str(row), sys.stderr)}")
    return 0


def _tokenised(
    options: argparse.Namespace, sources: list[Source], tokenizer: Tokenizer, bar: ProgressBar, bad: list[BadRow]
) -> Iterator[list[int]]:
    total, rows = _size_bytes(options.files), sum(map(len, sources))
    report = bar.stage("tokenising")
    done = 0
    for source in sources:
        for idx in range(len(source)):
            try:
                yield tokenizer.encode(parse_text(source.read(idx)))
            except RequestError as error:
                row = BadRow(origin=source.origin(idx), reason=str(error))
                if options.strict:
                    raise RequestError(f"{row}; repair the row, or leave --strict out") from error
                bad.append(row)
            done += 1
            report(total * done // rows, total)


def _size_bytes(paths: list[str]) -> int:
    files = (file for path in map(Path, paths) for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file())
