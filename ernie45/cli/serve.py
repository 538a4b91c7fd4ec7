"""`ernie serve`, and the part of `ernie up` that is the same."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ernie45.cli.output import ProgressBar, human_bytes, human_count, note
from ernie45.cli.serve_arguments import ineffective
from ernie45.engine.client import spawn
from ernie45.engine.wire import Launch, Loading
from ernie45.errors import CheckpointError, ConfigError, UsageError
from ernie45.server.config import Limits, RateLimits, ServerConfig, is_loopback
from ernie45.server.keys import new_key
from ernie45.server.redaction import RedactingFormatter
from ernie45.store.location import DEFAULT_MODEL, home, model_path, resolve, weights_path

if TYPE_CHECKING:
    from ernie45.server.run import Running

_KEY_VARIABLE = "ERNIE45_API_KEY"
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LIMITS = {
    "body_bytes": "max_body",
    "waiting": "max_waiting",
    "wait_s": "max_wait",
    "request_timeout_s": "request_timeout",
    "connections": "max_concurrency",
}
"""Options by the fields of `Limits` that they set."""


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop."""
    if options.model is not None and options.model_option is not None:
        raise UsageError("MODEL and --model are two spellings of one thing: give one")
    model = _quantized(resolve(options.model or options.model_option), options.quantization)
    keys = [*options.api_key, *filter(None, [os.environ.get(_KEY_VARIABLE)])]
    made = not keys
    if made:
        if not is_loopback(options.host):
            raise UsageError(
                f"--host {options.host} is reached from other machines: choose a key with --api-key or {_KEY_VARIABLE}"
            )
        keys = [new_key()]
    config = server_config(options, model, keys)
    launch = launch_of(options, model)
    for line in ineffective(options):
        note(line)
    _log(keys)
    # The engine's process imports torch while this one imports its server: that is a second, of three.
    spawned = spawn()
    from ernie45.server.run import serve

    with ProgressBar() as bar:
        report = bar.stage(f"loading {config.served_model_names[0]}")

        def on_loading(loading: Loading) -> None:
            report(loading.done, loading.total)

        asyncio.run(
            serve(
                config,
                launch,
                on_ready=lambda running: _greet(config, running, keys[0] if made else None),
                on_loading=on_loading,
                spawned=spawned,
            )
        )
    return 0


def server_config(options: argparse.Namespace, model: Path, keys: list[str]) -> ServerConfig:
    """The server's settings. Raises: UsageError, ConfigError."""
    for name in ("tensor_parallel_size", "workers"):
        if getattr(options, name) != 1:
            raise UsageError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}: one process serves, with all cores"
            )
    names = [name for names in options.served_model_name or () for name in names]
    return ServerConfig(
        host=options.host,
        port=options.port,
        api_keys=tuple(keys),
        served_model_names=tuple(names) or (_model_name(model),),
        chat_page=options.chat_page,
        allowed_hosts=tuple(options.allowed_host),
        limits=_limits(options),
        rate_limits=RateLimits(
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
            concurrent_requests=options.concurrent_requests,
        ),
        drain_timeout_s=options.drain_timeout,
        load_timeout_s=options.load_timeout,
    )


def _limits(options: argparse.Namespace) -> Limits:
    """Raises: UsageError that names the option."""
    given = {name: getattr(options, option) for name, option in _LIMITS.items()}
    try:
        return Limits(**{name: value for name, value in given.items() if value is not None})
    except ConfigError as error:
        name, _, rest = str(error).partition(" ")
        raise UsageError(f"--{_LIMITS[name].replace('_', '-')} {rest}") from error


def launch_of(options: argparse.Namespace, model: Path) -> Launch:
    """The engine's settings. Raises: UsageError, ConfigError."""
    speculation, guesses = options.speculation, options.num_speculative_tokens
    if options.speculative_config is not None:
        if speculation is not None or guesses is not None:
            raise UsageError("--speculative-config says what --speculation and --num-speculative-tokens say: give one")
        speculation = options.speculative_config["method"]
        guesses = options.speculative_config.get("num_speculative_tokens")
    launch = Launch(
        model=str(weights_path(model)),
        chat_format=options.chat_format,
        kernels=options.kernels,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        kv_cache_memory=options.kv_cache_memory,
        kv_dtype="bfloat16" if options.kv_dtype == "bf16" else options.kv_dtype,
        page_size=options.block_size,
        max_step_tokens=options.max_num_batched_tokens,
        prefix_cache=options.enable_prefix_caching,
        speculation=speculation or "none",
        num_speculative_tokens=guesses,
    )
    launch.engine_config()  # what is out of range shows here, before a process is started
    return launch


def run_verb(*arguments: str) -> None:
    """Run another verb in a process of its own: it needs torch, which has no place in the process that serves.

    Raises: UsageError if it failed; it has said why.
    """
    done = subprocess.run([sys.executable, "-m", "ernie45.cli.main", *arguments], stdout=sys.stderr, check=False)
    if done.returncode:
        raise UsageError(f"`ernie {' '.join(arguments)}` failed, see above")


def _quantized(model: Path, scheme: str | None) -> Path:
    """The model, or its packed copy in the store."""
    if scheme is None:
        return model
    file = model / "config.json"
    try:
        stated = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") if file.is_file() else None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is no JSON object: {error}") from error
    if stated is not None:
        if stated.get("scheme") == scheme:
            return model
        raise UsageError(f"{model} is quantized already, and not as {scheme}: leave --quantization out")
    target = model_path(f"{_model_name(model)}-{scheme}")
    if not (target / "config.json").exists():
        note(f"quantizing {_model_name(model)} to {scheme}, once: {target}")
        run_verb("quantize", str(model), "--scheme", scheme, "-o", str(target))
    return target


def _model_name(model: Path) -> str:
    """The model's name in the store, or that of its folder or file."""
    store = home() / "models"
    if model.is_relative_to(store):
        return model.relative_to(store).as_posix()
    return model.stem if model.suffix == ".gguf" else model.resolve().name


def _greet(config: ServerConfig, running: Running, made_key: str | None) -> None:
    """What an operator wants to know, once, when requests are taken."""
    facts = running.facts
    size = f"{human_count(facts.parameters)} parameters"
    if facts.active_parameters != facts.parameters:
        size += f", {human_count(facts.active_parameters)} active"
    lines = [
        f"model    {', '.join(config.served_model_names)} ({facts.kind}, {size})",
        f"weights  {facts.weights}, {human_bytes(facts.weight_bytes)}; ready after {facts.load_s:.1f} s",
        f"memory   {human_bytes(facts.kv_bytes)} for keys and values ({facts.kv_dtype}, {facts.kv_tokens} tokens), taken as it "
        f"fills; {facts.max_num_seqs} answers at a time of {facts.max_model_len} tokens (the model reaches {facts.context})",
        f"kernels  {facts.kernels}",
    ]
    if config.chat_page:
        # Behind '#': a browser keeps that to itself, so the key is in no log.
        lines.append(f"page     {running.url}/" + (f"#key={made_key}" if made_key else ""))
    lines.append(f"API      {running.url}/v1  (also /v3/openai and /openai/v1)")
    if made_key:
        lines.append(f"key      {made_key}  (shown once; --api-key chooses one)")
    if _is_default(config):
        lines.append(
            f"note     {DEFAULT_MODEL} is SmolLM2-135M-Instruct, which is not Baidu's: a small model to try everything with"
        )
    print("\n".join([*lines, "Ctrl-C stops."]), flush=True)


def _is_default(config: ServerConfig) -> bool:
    return config.served_model_names[0].lower() == DEFAULT_MODEL


def _log(keys: list[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter(_LOG_FORMAT, keys))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
