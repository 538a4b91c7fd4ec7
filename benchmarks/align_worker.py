"""What `align.py` runs in processes of their own: a few steps of DPO, or a few rollouts, with one package."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import align_runners
from benchmarks.align_runners import PAD_ID, Course, Pair, Rollout
from benchmarks.common import PeakMemory
from benchmarks.train_worker import write_networks
from ernie45.config.model import ModelConfig
from ernie45.training.upo_config import SamplingWeights

_NUM_BATCHES = 3
"""Different batches, taken in turns: what comes again has a lower loss."""
_SEED = 0
_FIRST_ID = PAD_ID + 1
"""The peer leaves the padding's row of the table as it is, wherever it stands."""


def prepare(*, folder: str, tiny: bool) -> dict[str, Any]:
    """Write random weights with a vocabulary as checkpoints that all packages read, one of them tiny, to warm up with.

    Returns: what they are.
    """
    facts = write_networks(
        Path(folder), tiny=tiny, files_of=lambda config: {"tokenizer.json": _vocabulary(config.vocab_size)}
    )
    return {**facts, "torch_cpu_capability": torch.backends.cpu.get_cpu_capability()}


def measure_dpo(
    *,
    package: str,
    experts: str,
    folder: str,
    steps: int,
    num_pairs: int,
    prompt_tokens: list[int],
    answer_tokens: list[int],
) -> dict[str, Any]:
    """Train on pairs for a step that does not count and `steps` that do.

    Args: package: `ernie45` or `trl`. experts: how the peer computes experts. prompt_tokens, answer_tokens: fewest and most.
    Returns: `seconds`, `units` (pairs) and `tokens` of each step on the clock, `losses` of all, `peak_bytes`, `memory_method`.
    """
    train: Callable[[Path, list[list[Pair]]], Course] = (
        align_runners.our_dpo if package == "ernie45" else partial(align_runners.trl_dpo, experts=experts)
    )
    tiny, model = Path(folder, "tiny"), Path(folder, "model")
    train(tiny, drawn_pairs(tiny, 2, num_pairs=2, prompt_tokens=[4, 8], answer_tokens=[2, 6]))
    batches = drawn_pairs(
        model, 1 + steps, num_pairs=num_pairs, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens
    )
    memory = PeakMemory()
    ends, losses = train(model, batches)
    assert len(ends) == len(losses) == 1 + steps, f"{len(ends)} ends and {len(losses)} losses of {1 + steps} steps"
    return {
        "seconds": [end - start for start, end in itertools.pairwise(ends)],
        "units": [len(pairs) for pairs in batches[1:]],
        "tokens": [sum(len(ids) for pair in pairs for ids in pair.values()) for pairs in batches[1:]],
        "losses": losses,
        "peak_bytes": memory.above_base(),
        "memory_method": memory.method,
    }


def measure_sampling(
    *,
    package: str,
    experts: str,
    folder: str,
    steps: int,
    num_prompts: int,
    num_answers: int,
    prompt_tokens: int,
    new_tokens: int,
    weights: SamplingWeights,
) -> dict[str, Any]:
    """Sample a rollout that does not count and `steps` that do.

    Args: package: `ernie45` or `transformers`. experts: how the peer computes experts. weights: that ours samples from.
    Returns: as `measure_dpo`, by rollout; units are answers, tokens the new ones, and there are no losses.
    """
    start: Callable[..., Rollout] = (
        partial(align_runners.our_rollout, weights=weights)
        if package == "ernie45"
        else partial(align_runners.their_rollout, experts=experts)
    )
    tiny, model = Path(folder, "tiny"), Path(folder, "model")
    start(tiny, drawn_prompts(tiny, 2, 4), num_answers=2, new_tokens=3)(_SEED)
    memory = PeakMemory()
    rollout = start(
        model, drawn_prompts(model, num_prompts, prompt_tokens), num_answers=num_answers, new_tokens=new_tokens
    )
    rollout(_SEED)
    seconds, tokens = [], []
    for step in range(steps):
        began = time.perf_counter()
        tokens.append(rollout(_SEED + 1 + step))
        seconds.append(time.perf_counter() - began)
    num_sequences = num_prompts * num_answers
    assert tokens == [num_sequences * new_tokens] * steps, f"{tokens} new tokens: an answer ended early"
    return {
        "seconds": seconds,
        "units": [num_sequences] * steps,
        "tokens": tokens,
        "losses": [],
        "peak_bytes": memory.above_base(),
        "memory_method": memory.method,
    }


def drawn_pairs(
    path: Path, num_steps: int, *, num_pairs: int, prompt_tokens: list[int], answer_tokens: list[int]
) -> list[list[Pair]]:
    """Random pairs for each step, the same for both packages."""
    size = ModelConfig.from_pretrained(path).vocab_size
    generator = torch.Generator().manual_seed(_SEED)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        drawn: list[int] = torch.randint(_FIRST_ID, size, (length,), generator=generator).tolist()
        return drawn

    def pair() -> Pair:
        return {
            "prompt_ids": ids(*prompt_tokens),
            "chosen_ids": ids(*answer_tokens),
            "rejected_ids": ids(*answer_tokens),
        }

    batches = [[pair() for _ in range(num_pairs)] for _ in range(_NUM_BATCHES)]
    return [batches[step % _NUM_BATCHES] for step in range(num_steps)]


def drawn_prompts(path: Path, num_prompts: int, prompt_tokens: int) -> Tensor:
    """Random prompts, int64 (prompts, tokens)."""
    size = ModelConfig.from_pretrained(path).vocab_size
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(_FIRST_ID, size, (num_prompts, prompt_tokens), generator=generator)


def _vocabulary(size: int) -> bytes:
    """A tokenizer with an invented piece for every row of the table: the sampler leaves out ids that have none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={f"token{i}": i for i in range(size)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text: str = tokenizer.to_str()
    return text.encode()
