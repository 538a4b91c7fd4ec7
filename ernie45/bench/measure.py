"""Prefill and decode speed of a loaded network, with the bytes that each step must move.

Contexts are filled with random keys and values instead of being read token by token: decode speed does not depend on
them, and a context of 16384 tokens would otherwise take minutes.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ernie45.layers.cache import AttentionView, KVCache
from ernie45.layers.moe import Experts
from ernie45.models.text import CausalLM
from ernie45.quant.layers import PackedEmbedding, PackedExperts, PackedLinear, PackedLmHead, PackedSwiGLU


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured speed."""

    what: str
    """`prefill` or `decode`."""
    context: int
    """Tokens before the step, or of the prompt."""
    batch: int
    tokens_per_s: float
    """Median over the repeats, all sequences together."""
    low: float
    high: float
    bytes_per_step: int
    """Weights and cache that a step must read; for prefill the weights once."""
    bound_tokens_per_s: float | None
    """Decode: what the memory bandwidth allows; None for prefill, which arithmetic bounds."""


def measure(
    model: CausalLM,
    *,
    bandwidth: float,
    contexts: Sequence[int] = (0, 4096),
    batches: Sequence[int] = (1, 8),
    prompts: Sequence[int] = (512,),
    repeats: int = 3,
    seconds: float = 2.0,
    note: Callable[[str], None] = lambda _: None,
) -> list[Figure]:
    """Measure decoding at each context (one sequence) and batch (empty context), and reading prompts.

    Args: bandwidth: bytes per second that the machine reads, for the bound. seconds: least time of one decode measurement.
    """
    note("reading all weights once")
    _touch(model)
    figures = []
    for context, batch in [*((context, 1) for context in contexts), *((0, batch) for batch in batches if batch > 1)]:
        note(f"decode at {context} tokens, {batch} together")
        figures.append(_decode(model, context, batch, bandwidth=bandwidth, repeats=repeats, seconds=seconds))
    for prompt in prompts:
        note(f"prompt of {prompt} tokens")
        figures.append(_prefill(model, prompt, repeats))
    return figures


@torch.inference_mode()
def _touch(model: CausalLM) -> None:
    """Bring mapped weights into memory, all experts included: the first token that meets one waits for its pages."""
    ids = torch.randint(model.config.vocab_size, (256,), generator=torch.Generator().manual_seed(0))
    model.logits(model.hidden(ids, AttentionView(lengths=(len(ids),))))


@torch.inference_mode()
def _decode(model: CausalLM, context: int, batch: int, *, bandwidth: float, repeats: int, seconds: float) -> Figure:
    caches = tuple(_filled_cache(model, context) for _ in range(batch))
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        ids = torch.randint(model.config.vocab_size, (batch,), generator=generator)
        model.logits(model.hidden(ids, AttentionView(lengths=(1,) * batch, caches=caches))).argmax(-1)

    for _ in range(2):
        step()
    rates = []
    for _ in range(repeats):
        count, start = 0, time.perf_counter()
        while count < 4 or time.perf_counter() - start < seconds / repeats:
            step()
            count += 1
        rates.append(count * batch / (time.perf_counter() - start))
    size = step_bytes(model, batch) + batch * context * _cache_bytes_per_token(model)
    return Figure(
        what="decode",
        context=context,
        batch=batch,
        tokens_per_s=statistics.median(rates),
        low=min(rates),
        high=max(rates),
        bytes_per_step=size,
        bound_tokens_per_s=bandwidth / size * batch,
    )


@torch.inference_mode()
def _prefill(model: CausalLM, prompt: int, repeats: int) -> Figure:
    ids = torch.randint(model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0))
    rates = []
    for _ in range(repeats):
        cache = model.new_cache(prompt)
        start = time.perf_counter()
        hidden = ids
        for chunk in ids.split(512):
            hidden = model.hidden(chunk, AttentionView(lengths=(len(chunk),), caches=(cache,)))
        model.logits(hidden[-1:])
        rates.append(prompt / (time.perf_counter() - start))
    return Figure(
        what="prefill",
        context=prompt,
        batch=1,
        tokens_per_s=statistics.median(rates),
        low=min(rates),
        high=max(rates),
        bytes_per_step=step_bytes(model, prompt),
        bound_tokens_per_s=None,
    )


def _filled_cache(model: CausalLM, context: int) -> KVCache:
    cache = model.new_cache(context + 4096)
    config, generator = model.config, torch.Generator().manual_seed(0)
    if context:
        drawn = torch.empty(context, config.num_key_value_heads, config.head_dim).normal_(generator=generator)
        for layer in range(config.num_hidden_layers):
            cache.write(layer, drawn.to(model.dtype), drawn.to(model.dtype))
        cache.commit(context)
    return cache


def _cache_bytes_per_token(model: CausalLM) -> int:
    return model.config.kv_bytes_per_token(model.new_cache(1).bytes_per_value)


def step_bytes(model: CausalLM, tokens: int) -> int:
    """Weight bytes that a step over `tokens` tokens reads: everything once, of the experts those that are expected to be hit."""
    moe = model.config.moe
    hit = 1.0 if moe is None else 1 - (1 - moe.moe_k / moe.moe_num_experts) ** tokens
    return round(sum(size * (hit if expert else 1.0) for size, expert in _leaf_bytes(model)))


def _leaf_bytes(model: CausalLM) -> Iterator[tuple[int, bool]]:
    """Size of every leaf that a step reads, and whether it belongs to routed experts."""
    tied = model.config.tie_word_embeddings
    for name, module in model.named_modules():
        if "mtp_" in name or "vision" in name:
            continue
        if isinstance(module, PackedEmbedding):
            yield (module.weight.size_bytes if tied else 0), False
        elif isinstance(module, PackedLmHead | PackedLinear):
            yield (module.matrix.size_bytes if module.matrix is not None else 0), False
        elif isinstance(module, PackedSwiGLU):
            yield module.unit.gate_up.size_bytes + module.unit.down.size_bytes, False
        elif isinstance(module, PackedExperts):
            pool = module.pool
            yield sum(unit.gate_up.size_bytes + unit.down.size_bytes for unit in pool.units), True
            if pool.shared is not None:
                yield pool.shared.gate_up.size_bytes + pool.shared.down.size_bytes, False
        elif not (isinstance(module, nn.Embedding) and not tied):
            size = sum(t.numel() * t.element_size() for t in module.parameters(recurse=False))
            yield size, isinstance(module, Experts)


def measure_bandwidth() -> float:
    """Bytes per second that this machine reads from memory with all threads, as torch sums and multiplies a large array."""
    block = torch.ones(96 << 20)
    matrix, vector = block[: 8192 * 8192].view(8192, 8192), torch.ones(8192)
    rates = []
    reads: list[tuple[Callable[[], object], int]] = [
        (functools.partial(torch.sum, block), block.numel() * 4),
        (lambda: matrix @ vector, matrix.numel() * 4),
    ]
    for operation, size in reads:
        for _ in range(4):
            start = time.perf_counter()
            operation()
            rates.append(size / (time.perf_counter() - start))
    return max(rates)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, mapped file pages included."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
