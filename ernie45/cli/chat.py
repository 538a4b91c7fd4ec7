"""`ernie chat`: one answer to a prompt; without one, a conversation (`conversation.py`)."""

from __future__ import annotations

import argparse
import os
import re
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ernie45
from ernie45.cli.answer import Answer
from ernie45.cli.conversation import Conversation, limited
from ernie45.cli.output import ProgressBar, note, print_json
from ernie45.engine.defaults import PRESETS, model_defaults
from ernie45.engine.pieces import Piece
from ernie45.engine.prompts import Prompt, prompt_ids, room_for_answer
from ernie45.errors import NotFoundError, RequestError, UsageError
from ernie45.kernels.choice import kernels
from ernie45.models.build import parse_dtype
from ernie45.models.text import CausalLM
from ernie45.processing.tokenizer import Tokenizer
from ernie45.store.api import load_config
from ernie45.store.location import DEFAULT_MODEL, resolve

_MODEL_LIKE = re.compile(r"[A-Za-z0-9_./-]{1,128}|[./~].{1,1024}")


def run(options: argparse.Namespace) -> int:
    """Check what was asked for, load the model, then answer once or converse."""
    with kernels(options.kernels, why=f"--kernels {options.kernels}"):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    path, prompt = _model_and_prompt(options)
    if prompt is None and not _is_terminal():
        prompt = sys.stdin.read() if sys.stdin is not None else ""
    _check(options, prompt)
    sampling = _sampling(path, options)
    tokenizer = ernie45.load_tokenizer(path)
    # Encoding before loading: a prompt that cannot be expressed or does not fit fails at once, not after minutes of
    # reading weights.
    first = prompt if prompt is not None and options.raw else _messages(options.system, prompt or "?")
    ids = _encode(tokenizer, first, options.thinking)
    room_for_answer(len(ids), sampling.max_tokens, load_config(path).max_position_embeddings)
    model = _load(path, options)
    if prompt is None:
        return Conversation(model, tokenizer, sampling, options.system, options.thinking).run()
    answer = Answer(tokenizer, ids, sampling.stop, raw=options.raw, quiet=options.json)
    return _answer(model, tokenizer, ids, sampling, answer, as_json=options.json)


def _model_and_prompt(options: argparse.Namespace) -> tuple[Path, str | None]:
    """The model's path, and the prompt if it is an argument: a lone argument that cannot be a model is a prompt."""
    lone = options.model if options.prompt is None else None
    if lone is not None and not os.path.exists(lone) and not _MODEL_LIKE.fullmatch(lone):
        return resolve(None), lone
    try:
        return resolve(options.model), options.prompt
    except NotFoundError as error:
        if lone is None or "/" in lone:
            raise
        raise NotFoundError(f"{error}; to ask the default model: ernie chat {DEFAULT_MODEL} {lone}") from error


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _check(options: argparse.Namespace, prompt: str | None) -> None:
    """Refuse what could only be ignored. Raises: UsageError."""
    if prompt is None and (options.raw or options.json):
        raise UsageError("--raw and --json need a prompt: give it as an argument or through a pipe")
    if options.raw and (options.system is not None or options.thinking is not None):
        raise UsageError("--raw uses no chat template, so --system, --think and --no-think mean nothing: leave one out")
    if prompt is None:
        return
    if not prompt.strip():
        raise UsageError("the prompt is empty: give it as an argument or through a pipe")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        # Python keeps bytes that are no UTF-8 as halves of surrogate pairs.
        raise UsageError(f"the prompt is not UTF-8 at character {error.start}: convert it (iconv -t utf-8)") from error


def _sampling(path: Path, options: argparse.Namespace) -> ernie45.SamplingParams:
    """What was asked for, over the model's own defaults. Raises: UsageError, CheckpointError."""
    asked = {name: getattr(options, name) for name in (*PRESETS, "max_tokens", "seed")}
    asked = {name: value for name, value in asked.items() if value is not None}
    try:
        ernie45.SamplingParams(**asked, stop=tuple(options.stop))
    except RequestError as error:
        raise UsageError(str(error)) from error
    return ernie45.SamplingParams(**model_defaults(path) | asked, stop=tuple(options.stop))


def _messages(system: str | None, question: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _encode(tokenizer: Tokenizer, prompt: Prompt, thinking: bool | None) -> list[int]:
    try:
        return prompt_ids(tokenizer, prompt, thinking=thinking)
    except RequestError as error:
        if thinking is None:
            raise
        raise UsageError(f"{'--think' if thinking else '--no-think'}: {error}") from error


def _load(path: Path, options: argparse.Namespace) -> CausalLM:
    start = time.monotonic()
    with ProgressBar() as bar:
        model = ernie45.load_model(path, options.dtype, options.device, progress=bar.stage("loading"))
    if options.kv_dtype != "auto":
        model.kv_dtype = parse_dtype(options.kv_dtype)
    if sys.stderr.isatty():
        note(f"{path.name}: loaded in {time.monotonic() - start:.1f} s as {str(model.dtype).removeprefix('torch.')}")
    return model


def _answer(
    model: CausalLM,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: ernie45.SamplingParams,
    answer: Answer,
    *,
    as_json: bool,
) -> int:
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(32))  # drawn here, so that it can be told
    pieces = []
    for piece in ernie45.generate(model, tokenizer, ids, limited(sampling, model, len(ids))):
        pieces.append(piece)
        answer.add(piece)
    if as_json:
        print_json(_summary(pieces, answer, len(ids), sampling))
        return 0
    print()
    if pieces[-1].finish_reason == "length":
        note(f"[stopped after {len(pieces)} tokens, the limit: --max-tokens sets it]")
    return 0


def _summary(pieces: list[Piece], answer: Answer, num_prompt: int, sampling: ernie45.SamplingParams) -> dict[str, Any]:
    ids = [token for piece in pieces for token in piece.ids]
    return {
        "text": answer.content,
        "reasoning": answer.reasoning or None,
        "ids": ids,
        "finish_reason": pieces[-1].finish_reason,
        "stop_reason": pieces[-1].stop_reason,
        "seed": sampling.seed,
        "usage": {"prompt_tokens": num_prompt, "completion_tokens": len(ids), "total_tokens": num_prompt + len(ids)},
    }
