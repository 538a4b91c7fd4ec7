"""The same figures from other programs on the same machine: llama.cpp (through the prebuilt `xllamacpp`) and transformers.

llama.cpp runs random Q4_0 weights of the same shape, or the checkpoint converted to float16 GGUF; the prebuilt wheel uses AVX2 at most
and reaches about 95 % of a native build there.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ernie45.bench.measure import Figure
from ernie45.bench.random_weights import write_gguf
from ernie45.checkpoint.source import open_source
from ernie45.config.model import ModelConfig
from ernie45.errors import NotFoundError, UsageError

_DECODE_TOKENS = 48


def measure(
    peer: str, path: Path, contexts: Sequence[int], batches: Sequence[int], prompts: Sequence[int]
) -> list[Figure]:
    """Decode and prefill speed of a peer; batches above 1 only where it can. Raises: NotFoundError if it is not installed."""
    config = open_source(path).config
    if peer == "transformers":
        return _transformers(path, batches, prompts)
    if peer != "llama.cpp":
        raise UsageError(f"peer is {peer!r}, expected llama.cpp or transformers")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "peer.gguf")
        write_gguf(config, file)
        return _llama_cpp(file, config, contexts, prompts)


def _figure(what: str, context: int, batch: int, rates: Sequence[float]) -> Figure:
    return Figure(
        what=what,
        context=context,
        batch=batch,
        tokens_per_s=statistics.median(rates),
        low=min(rates),
        high=max(rates),
        bytes_per_step=0,
        bound_tokens_per_s=None,
    )


def _llama_cpp(file: Path, config: ModelConfig, contexts: Sequence[int], prompts: Sequence[int]) -> list[Figure]:
    try:
        import xllamacpp
    except ImportError as error:
        raise NotFoundError(f"llama.cpp is not installed ({error}): pip install xllamacpp") from error
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = max([*contexts, *prompts]) + 2 * _DECODE_TOKENS + 64
    parameters.n_parallel, parameters.verbosity = 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)

    def timings(prompt: int, predict: int) -> dict[str, Any]:
        ids = [5 + i % (config.vocab_size - 10) for i in range(max(prompt, 1))]
        request = {"prompt": ids, "n_predict": predict, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(request)
        return dict((answer if isinstance(answer, dict) else json.loads(answer))["timings"])

    figures = []
    for context in contexts:
        rates = [timings(context, _DECODE_TOKENS)["predicted_per_second"] for _ in range(3)]
        figures.append(_figure("decode", context, 1, rates))
    figures += [
        _figure("prefill", prompt, 1, [timings(prompt, 1)["prompt_per_second"] for _ in range(3)]) for prompt in prompts
    ]
    return figures


@torch.inference_mode()
def _transformers(path: Path, batches: Sequence[int], prompts: Sequence[int]) -> list[Figure]:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise NotFoundError(f"transformers is not installed ({error}): pip install 'transformers>=5.16'") from error
    if open_source(path).format != "pt":
        raise UsageError(f"transformers reads -PT folders only: measure {path} against llama.cpp")
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.randint(model.config.vocab_size, (1, max([*prompts, 8])), generator=torch.Generator().manual_seed(0))
    figures = []
    for batch in batches:
        past = model(ids[:, :2].expand(batch, 2), use_cache=True).past_key_values
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(16):
                model(ids[:, :1].expand(batch, 1), past_key_values=past, use_cache=True).logits.argmax(-1)
            rates.append(16 * batch / (time.perf_counter() - start))
        figures.append(_figure("decode", 0, batch, rates))
    for prompt in prompts:
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            model(ids[:, :prompt], use_cache=True, logits_to_keep=1)
            rates.append(prompt / (time.perf_counter() - start))
        figures.append(_figure("prefill", prompt, 1, rates))
    return figures
