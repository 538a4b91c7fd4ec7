"""The arguments of `ernie serve` and `ernie up`, FastDeploy's spellings included. Imports nothing of weight."""

from __future__ import annotations

import argparse
import json
from typing import Any

_WITHOUT_EFFECT = {
    # FastDeploy's and vLLM's options that change nothing here, each with the reason that is printed.
    "--tool-call-parser": "the parser follows from the model's chat format",
    "--tool-parser-plugin": "the parser follows from the model's chat format",
    "--reasoning-parser": "the parser follows from the model's chat format",
    "--guided-decoding-backend": "structured output is always on, through llguidance",
    "--max-logprobs": "up to 20 are always there",
    "--gpu-memory-utilization": "the engine runs on the CPU; --kv-cache-memory sets its memory",
    "--kv-cache-ratio": "--kv-cache-memory sets the memory of keys and values",
    "--num-gpu-blocks-override": "--kv-cache-memory sets the memory of keys and values",
    "--graph-optimization-config": "there is no graph to optimise",
    "--load-choices": "there is one loader",
    "--engine-worker-queue-port": "the engine's process is reached without a port",
    "--cache-queue-port": "the engine's process is reached without a port",
    "--metrics-port": "/metrics is on the server's port",
    "--max-num-partial-prefills": "prompts are always computed in chunks",
    "--max-long-partial-prefills": "prompts are always computed in chunks",
    "--long-prefill-token-threshold": "prompts are always computed in chunks",
}
_SWITCHES_WITHOUT_EFFECT = {
    "--enable-chunked-prefill": "prompts are always computed in chunks",
    "--enable-output-caching": "answers are always cached with their prompts",
    "--enable-overlap-schedule": "masks are always computed beside the network",
    "--enable-logprob": "log-probabilities are always there",
    "--enable-auto-tool-choice": "tools are always there",
    "--enable-mm": "pictures are not served yet; text is",
    "--disable-custom-all-reduce": "there is one process",
    "--trust-remote-code": "no code of a checkpoint is ever executed",
    "--use-warmup": "the engine is warm when it is ready",
}


def add_serve(parser: argparse.ArgumentParser) -> None:
    """`ernie serve`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name, folder or .gguf file (default: smollm2-135m)")
    parser.add_argument("--model", dest="model_option", metavar="MODEL", help="another spelling of MODEL")
    _add_common(parser)
    parser.add_argument("--chat-page", action="store_true", help="serve the chat page at / as `ernie up` does")


def add_up(parser: argparse.ArgumentParser) -> None:
    """`ernie up`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="name, folder or .gguf file (default: smollm2-135m, fetched if need be)",
    )
    _add_common(parser)
    parser.set_defaults(chat_page=True, model_option=None)


def ineffective(options: argparse.Namespace) -> list[str]:
    """A line for each option that was given and has no effect."""
    everything = {**_WITHOUT_EFFECT, **_SWITCHES_WITHOUT_EFFECT}
    given = (option for option in everything if getattr(options, _name(option)) not in (None, False))
    return [f"{option} has no effect: {everything[option]}" for option in given]


def _add_common(parser: argparse.ArgumentParser) -> None:
    from ernie45.cli.arguments import size_bytes

    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default 127.0.0.1)")
    network.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0 takes a free one")
    network.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="K",
        help="who knows it may use the server (repeatable; also ERNIE45_API_KEY); without one a key is made and printed",
    )
    network.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of a server on 127.0.0.1, as behind a proxy",
    )
    network.add_argument(
        "--served-model-name", action="append", nargs="+", metavar="NAME", help="default: the model's name"
    )
    network.add_argument(
        "--timeout-graceful-shutdown",
        "--drain-timeout",
        dest="drain_timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that running requests may go on after SIGTERM (default 30)",
    )
    network.add_argument(
        "--load-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds without a word after which an engine that loads is given up (default 600)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-model-len", type=int, metavar="N", help="tokens of prompt and answer (default: at most 8192)"
    )
    limits.add_argument("--max-num-seqs", type=int, default=32, metavar="N", help="answers at a time (default 32)")
    limits.add_argument(
        "--max-waiting", type=int, default=128, metavar="N", help="requests that may wait (default 128)"
    )
    limits.add_argument(
        "--max-wait",
        type=float,
        default=3600.0,
        metavar="S",
        help="refuse requests that would wait longer, as answers take now (default 3600)",
    )
    limits.add_argument("--max-concurrency", type=int, metavar="N", help="connections (default 1024)")
    limits.add_argument(
        "--request-timeout", type=float, default=3600.0, metavar="S", help="seconds per request (default 3600)"
    )
    limits.add_argument(
        "--max-body", type=size_bytes, default=8 << 20, metavar="SIZE", help="of a request (default 8MiB)"
    )
    limits.add_argument("--requests-per-minute", type=int, metavar="N", help="of each key (default: no limit)")
    limits.add_argument("--tokens-per-minute", type=int, metavar="N", help="of each key (default: no limit)")
    limits.add_argument("--concurrent-requests", type=int, metavar="N", help="of each key (default: no limit)")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--kv-cache-memory",
        type=size_bytes,
        metavar="SIZE",
        help="of keys and values (default: at most half of what is free)",
    )
    engine.add_argument("--kv-dtype", choices=("float32", "bf16", "bfloat16", "int8"), help="of keys and values")
    engine.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per page of the cache (default 16)"
    )
    engine.add_argument(
        "--max-num-batched-tokens", type=int, default=512, metavar="N", help="prompt tokens per step (default 512)"
    )
    engine.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="share known beginnings of prompts",
    )
    engine.add_argument(
        "--speculation", choices=("none", "ngram", "mtp"), help="guess tokens and verify them (default none)"
    )
    engine.add_argument("--num-speculative-tokens", type=int, metavar="N", help="most guesses per step")
    engine.add_argument(
        "--speculative-config",
        type=_speculative,
        metavar="JSON",
        help='as {"method": "ngram", "num_speculative_tokens": 4}',
    )
    engine.add_argument(
        "--quantization",
        choices=("wint8", "wint4", "wint4-all"),
        help="serve a packed copy, made on first use and kept",
    )
    engine.add_argument(
        "--chat-format", metavar="NAME", help="built-in chat format instead of the checkpoint's template"
    )
    engine.add_argument("--kernels", choices=("native", "reference"), help="reference runs everything in plain PyTorch")
    engine.add_argument("--tensor-parallel-size", type=int, default=1, metavar="1", help=argparse.SUPPRESS)
    engine.add_argument("--workers", type=int, default=1, metavar="1", help=argparse.SUPPRESS)
    for option in _WITHOUT_EFFECT:
        parser.add_argument(option, help=argparse.SUPPRESS)
    for option in _SWITCHES_WITHOUT_EFFECT:
        parser.add_argument(option, action="store_true", help=argparse.SUPPRESS)


def _speculative(text: str) -> dict[str, Any]:
    try:
        stated = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    known = {"method", "num_speculative_tokens"}
    if not isinstance(stated, dict) or not stated.keys() <= known or stated.get("method") not in ("ngram", "mtp"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected an object with method (ngram or mtp) and num_speculative_tokens"
        )
    return stated


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
