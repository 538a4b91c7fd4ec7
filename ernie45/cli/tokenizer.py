"""`ernie tokenizer`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ernie45.checkpoint.atomic import atomic_folder
from ernie45.cli.output import ProgressBar, note, print_facts, print_json
from ernie45.errors import CheckpointError
from ernie45.processing.sentencepiece_model import PieceType
from ernie45.processing.tokenizer import load_tokenizer
from ernie45.processing.tokenizer_training import TokenizerConfig, read_lines, tokenizer_files, train_model

_SAMPLE_CHARS = 200_000


def run(options: argparse.Namespace) -> int:
    """Train, write, and say how densely the result writes the text it was trained on."""
    config = TokenizerConfig(
        vocab_size=options.vocab_size,
        character_coverage=options.character_coverage,
        chat_format=options.chat_format,
    )
    if os.path.lexists(options.output) and not options.force:
        raise CheckpointError(f"{options.output} exists already: choose another name, or replace it with --force")
    with ProgressBar() as bar:
        texts = list(read_lines(options.files, field=options.field, progress=bar.stage("reading")))
    note(f"learning {config.vocab_size} ids from {sum(map(len, texts))} characters")
    model = train_model(texts, config)
    with atomic_folder(options.output, overwrite=options.force) as folder:
        for name, data in tokenizer_files(model, config.chat_format).items():
            (folder / name).write_bytes(data)
    kinds = [piece.type for piece in model.pieces]
    facts: dict[str, Any] = {
        "path": str(options.output),
        "ids": len(kinds),
        "learnt_pieces": kinds.count(PieceType.NORMAL),
        "special_tokens": kinds.count(PieceType.CONTROL) + kinds.count(PieceType.UNKNOWN),
        "characters": sum(map(len, texts)),
        "characters_per_token": round(_density(options.output, texts), 3),
    }
    if options.json:
        print_json(facts)
    else:
        print_facts([(name.replace("_", " "), str(value)) for name, value in facts.items()])
    return 0


def _density(folder: Path, texts: list[str]) -> float:
    """Characters per token of the written tokenizer, on the beginning of the text."""
    tokenizer = load_tokenizer(folder)
    num_chars = num_tokens = 0
    for text in texts:
        num_chars += len(text)
        num_tokens += len(tokenizer.encode(text))
        if num_chars >= _SAMPLE_CHARS:
            break
    return num_chars / num_tokens
