"""The arguments of every verb. Imports nothing of weight: this is all that help text needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable

_SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def size_bytes(text: str) -> int:
    """Parse `5GB`, `500 MB`, `2GiB` or plain bytes."""
    number = text.strip().upper().removesuffix("B").rstrip()
    unit = next((u for u in ("KIB", "MIB", "GIB") if text.strip().upper().endswith(u)), None)
    if unit is None:
        unit = number[-1:] if number[-1:] in ("K", "M", "G") else ""
        digits = number.removesuffix(unit)
    else:
        digits = text.strip().upper().removesuffix(unit)
    try:
        value = int(float(digits) * _SIZE_UNITS[unit])
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected bytes or a number with KB, MB, GB, MiB or GiB")
    return value


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print data as JSON")


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name, folder or .gguf file (default: smollm2-135m)")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="answer this and exit; read from stdin when piped")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to answer with")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy; default: the model's own setting")
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
    parser.add_argument("--json", action="store_true", help="print the whole answer with ids and usage as JSON")


def _pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="NAME|HUB-ID|DIR|FILE", help="smollm2-135m, OWNER/NAME, a folder, a .gguf file")
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
    parser.add_argument("dst", metavar="DST", help="folder, or file for gguf")
    parser.add_argument("--to", required=True, choices=("pt", "paddle", "gguf"), help="format to write")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="auto keeps every tensor as it is")
    parser.add_argument(
        "--max-shard-size", type=size_bytes, default=5 * 10**9, metavar="SIZE", help="such as 5GB (default)"
    )
    parser.add_argument("--force", action="store_true", help="replace DST")
    _json(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name, folder or .gguf file")
    parser.add_argument("--against", choices=("transformers",), help="also compare logits with this implementation")
    _json(parser)


VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "chat": ("Chat in the terminal, or answer one prompt and exit; the answer streams to stdout.", _chat),
    "pull": ("Bring a model to this machine.", _pull),
    "models": ("List the models on this machine.", _models),
    "show": ("Show what a model is and needs.", _show),
    "convert": ("Convert a checkpoint; nothing is left half-written.", _convert),
    "verify": ("Check every tensor of a checkpoint.", _verify),
    "doctor": ("Show versions, CPU, memory, kernels and what to fix.", _json),
}
