"""The network's side of a step: planned work in, residual stream and logits out. Tensors live here and nowhere else in the
engine's loop.

Keys and values lie in one tensor per kind, (layers, pages, heads, slots, head size). The engine needs the kernel leaves:
they take pages, serve all sequences of a step in one call, and give a token the same bits whoever shares the step. The
plain attention core reads contiguous caches and would have to copy every sequence out of its pages in every layer; it
stays what it is, the definition that trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ernie45.engine.scheduler import Job, Work
from ernie45.errors import CapacityError, ConfigError
from ernie45.kernels.attention import KvPages
from ernie45.layers.attention import AttentionCore
from ernie45.layers.cache import PagedView
from ernie45.layers.native import can_use_kernels, use_kernel_leaves
from ernie45.models.text import CausalLM

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""What keys and values can be stored in, by name; int8 has a float32 scale per token and head."""

_ALIGNMENT = 64  # bytes, a cache line
_LOGIT_ROWS = 64  # rows of logits at a time where a prompt is scored: 64 x 103424 float32 are 26 MB


def prepare(model: CausalLM) -> None:
    """Make a network ready, in place: kernel leaves, no gradients (the kernels take none).

    Raises: ConfigError for a network that the kernels cannot run.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ConfigError(
            f"the model is {str(model.dtype).removeprefix('torch.')} on {model.device}, the engine computes in float32 on "
            "the CPU: load it with dtype float32, or quantize it; kv_dtype sets the size of the cache"
        )
    if not can_use_kernels(model.config.head_dim):
        raise ConfigError(f"head_dim is {model.config.head_dim}, the engine's kernels take multiples of 16 up to 256")
    use_kernel_leaves(model)
    model.requires_grad_(False).eval()
    assert not any(isinstance(module, AttentionCore) for module in model.modules()), "a plain attention core is left"


def kv_bytes_per_token(model: CausalLM, kv_dtype: str, num_layers: int) -> int:
    """Bytes of one token's keys and values in so many layers."""
    config = model.config
    width = KV_DTYPES[kv_dtype].itemsize * config.head_dim + (4 if kv_dtype == "int8" else 0)
    return 2 * num_layers * config.num_key_value_heads * width


def new_stores(model: CausalLM, num_layers: int, num_pages: int, page_size: int, kv_dtype: str) -> tuple[KvPages, ...]:
    """The stores of all layers. Raises: CapacityError if there is not so much memory.

    Memory is asked for at once and taken by the system page by page, when it is first written.
    """
    shape = (2, num_layers, num_pages, model.config.num_key_value_heads, page_size)
    try:
        # Zeros: a prediction block may look at slots that nobody wrote.
        store = untouched_zeros((*shape, model.config.head_dim), KV_DTYPES[kv_dtype])
        scales = untouched_zeros(shape, torch.float32) if kv_dtype == "int8" else None
    except (RuntimeError, MemoryError) as error:
        size = num_pages * page_size * kv_bytes_per_token(model, kv_dtype, num_layers)
        raise CapacityError(
            f"the key/value cache of {num_pages} pages needs {size / 2**30:.1f} GiB, more than there is: lower "
            "kv_cache_memory, max_model_len or max_num_seqs, or use kv_dtype int8"
        ) from error
    return tuple(
        KvPages(
            keys_PGWD=store[0, layer],
            values_PGWD=store[1, layer],
            key_scales_PGW=None if scales is None else scales[0, layer],
            value_scales_PGW=None if scales is None else scales[1, layer],
        )
        for layer in range(num_layers)
    )


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros, aligned as torch's own, that take no memory until they are touched: torch writes its zeros, numpy has the system's."""
    memory = np.zeros(math.prod(shape) * dtype.itemsize + _ALIGNMENT, dtype=np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[first : len(memory) - _ALIGNMENT + first]).view(dtype).view(shape)


class Runner:
    """Runs steps of one network over one page pool."""

    def __init__(
        self, model: CausalLM, *, num_pages: int, page_size: int, kv_dtype: str, guesses: bool = False
    ) -> None:
        """Args: guesses: keep pages for the prediction block, too, as `guess` needs them. Raises: ConfigError, CapacityError."""
        prepare(model)
        self._model, self._page_size = model, page_size
        layers = model.config.num_hidden_layers
        pools = new_stores(model, layers + guesses, num_pages, page_size, kv_dtype)
        self._pools, self._mtp_pools = pools[:layers], pools[layers:]

    @torch.inference_mode()
    def hidden(self, work: Sequence[Work]) -> Tensor:
        """Residual stream of all tokens of a step, (T, H), packed in the order of `work`, guesses behind their sequence."""
        ids = [token for one in work for token in _ids(one)]
        jobs = [one.job for one in work]
        view = _view(jobs, [one.start for one in work], [one.num_tokens for one in work], self._pools)
        out: Tensor = self._model.hidden(torch.tensor(ids), view)
        return out

    @torch.inference_mode()
    def logits_to_sample(self, hidden_TH: Tensor, work: Sequence[Work]) -> list[Tensor]:
        """For each work, logits (1 + guesses, V) behind its last known token and behind each guess; (0, V) if the work does
        not reach the end of its sequence.
        """
        rows: list[int] = []
        counts: list[int] = []
        start = 0
        for one in work:
            end = start + one.num_tokens
            count = 1 + len(one.drafts) if one.samples else 0
            rows += range(end - count, end)
            counts.append(count)
            start = end
        if not rows:
            return [hidden_TH.new_empty(0, self._model.config.vocab_size)] * len(work)
        return list(self._model.logits(hidden_TH[rows]).split(counts))

    @torch.inference_mode()
    def logits_to_score(self, hidden_TH: Tensor) -> list[Tensor]:
        """Logits (V,) behind each of some tokens, a few rows at a time."""
        return [row for rows in hidden_TH.split(_LOGIT_ROWS) for row in self._model.logits(rows)]

    @torch.inference_mode()
    def guess(self, hidden_TH: Tensor, work: Sequence[tuple[Work, int]], count: int) -> list[list[int]]:
        """Run the prediction block over what a step has computed, and guess where the next token but one is wanted.

        The block has keys and values of its own in the same pages. Slot t needs token t + 1, so the last slot of a shared page
        may come from a sequence that went on differently: that costs a guess, never a result.
        Args: hidden_TH: of the step. work: committed work whose sequences go on, with its first row in `hidden_TH`. count: most
            guesses. Returns: for each work its guesses, none while a prompt is read.
        """
        jobs = [one.job for one, _ in work]
        starts = [one.start for one, _ in work]
        lengths = [job.computed - start for job, start in zip(jobs, starts, strict=True)]
        rows = [row for (_, first), length in zip(work, lengths, strict=True) for row in range(first, first + length)]
        following = [
            token for job, start in zip(jobs, starts, strict=True) for token in job.tokens[start + 1 : job.computed + 1]
        ]
        out_TH = self._mtp(hidden_TH[rows], following, jobs, starts, lengths)
        last_BH = out_TH[torch.tensor(lengths).cumsum(0) - 1]
        guesses: list[list[int]] = [[] for _ in jobs]
        going_on = [at for at, job in enumerate(jobs) if job.decoding]
        last_BH = last_BH[going_on]
        for extra in range(count):
            if extra:
                room = [len(jobs[at].pages) * self._page_size > jobs[at].computed + extra - 1 for at in going_on]
                going_on = [at for at, fits in zip(going_on, room, strict=True) if fits]
                if not going_on:
                    break
                ahead = [jobs[at].computed + extra - 1 for at in going_on]
                fed = [guesses[at][-1] for at in going_on]
                last_BH = self._mtp(last_BH[room], fed, [jobs[at] for at in going_on], ahead, [1] * len(ahead))
            elif not going_on:
                break
            for at, token in zip(going_on, self._model.mtp_best(last_BH).tolist(), strict=True):
                guesses[at].append(token)
        return guesses

    def _mtp(
        self, hidden_TH: Tensor, following: list[int], jobs: list[Job], starts: list[int], lengths: list[int]
    ) -> Tensor:
        view = _view(jobs, starts, lengths, self._mtp_pools)
        out: Tensor = self._model.model.mtp(hidden_TH, torch.tensor(following), view.positions(), view)
        return out


def _ids(work: Work) -> list[int]:
    return [*work.job.tokens[work.start : work.start + work.count], *work.drafts]


def _view(jobs: list[Job], starts: list[int], lengths: list[int], pools: tuple[KvPages, ...]) -> PagedView:
    longest = max(len(job.pages) for job in jobs)
    table = [job.pages + [0] * (longest - len(job.pages)) for job in jobs]
    return PagedView(
        lengths=tuple(lengths), starts=tuple(starts), pages_BP=torch.tensor(table, dtype=torch.int32), pools=pools
    )
