"""What `train.py` runs in processes of their own: one package, one batch shape, a few training steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ernie45
from benchmarks.common import PeakMemory
from ernie45.config.model import ModelConfig, MoeConfig

if TYPE_CHECKING:
    from torch import Tensor

_STD = 0.02
_LEARNING_RATE = 1e-4
_NUM_BATCHES = 4
"""Different batches, taken in turns."""
_SEED = 0

Step = Callable[["Tensor"], float]
"""One step on rows of ids, (rows, seq_len + 1); gives the loss."""


def network_config(*, tiny: bool) -> ModelConfig:
    """The network that is trained: 74 M parameters, 41 M of them active."""
    if tiny:
        moe = MoeConfig(
            moe_num_experts=4, moe_k=2, moe_intermediate_size=8, moe_num_shared_experts=1, moe_layer_start_index=1
        )
        return ModelConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            moe=moe,
        )
    moe = MoeConfig(
        moe_num_experts=16, moe_k=4, moe_intermediate_size=256, moe_num_shared_experts=2, moe_layer_start_index=1
    )
    return ModelConfig(
        vocab_size=32768,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        moe=moe,
    )


def prepare(*, folder: str, tiny: bool) -> dict[str, Any]:
    """Write random weights as checkpoints that both packages read, one of them tiny, to warm up with. Returns: what they are."""
    return write_networks(Path(folder), tiny=tiny)


def write_networks(
    folder: Path, *, tiny: bool, files_of: Callable[[ModelConfig], Mapping[str, bytes]] | None = None
) -> dict[str, Any]:
    """`tiny` and `model`. Args: files_of: what else lies in each folder. Returns: what `model` is."""
    from ernie45.models.build import build_model
    from ernie45.models.init import initialize

    for name, config in (("tiny", network_config(tiny=True)), ("model", network_config(tiny=tiny))):
        model = build_model(config)
        initialize(model, std=_STD, seed=_SEED, correction_bias_std=0.01)
        files = {} if files_of is None else files_of(config)
        ernie45.save_model(model, folder / name, extra_files=files, overwrite=True)
    count = ernie45.count_parameters(config)
    moe = config.moe
    assert moe is not None, "the network that is measured is a mixture of experts"
    return {
        "total": count.total,
        "active": count.active,
        "text": f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} query and"
        f" {config.num_key_value_heads} key heads of {config.head_dim}, {moe.moe_num_experts} experts of"
        f" {moe.moe_intermediate_size}, {moe.moe_k} per token, {moe.moe_num_shared_experts} shared, vocabulary"
        f" {config.vocab_size} (tied)",
    }


def measure_peak(*, size: int) -> dict[str, Any]:
    """The fastest of ten float32 products of square matrices, of this size and half as large again, in FLOP/s."""
    import torch

    best = 0.0
    for side in (size, size * 3 // 2):
        x, y = torch.rand(side, side), torch.rand(side, side)
        for _ in range(10):
            start = time.perf_counter()
            torch.matmul(x, y)
            best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return {"flops": best, "torch_cpu_capability": torch.backends.cpu.get_cpu_capability()}


def measure(
    *,
    package: str,
    experts: str,
    folder: str,
    seq_len: int,
    num_rows: int,
    steps: int,
    recompute: str,
    returns_memory: bool,
) -> dict[str, Any]:
    """Train for a step that does not count and `steps` that do.

    Args: package: `ernie45` or `transformers`. experts: how the peer computes experts. recompute: operations that ours computes
        again, separated by commas. returns_memory: whether ours sets the allocator as `training.allocator` does.
    Returns: `seconds` and `losses` of each step, `peak_bytes`, `flops_per_token`.
    """
    import torch

    from ernie45.training.network import count_flops_per_token

    def start(name: str) -> Step:
        path = Path(folder, name)
        return _ours(path, recompute, returns_memory) if package == "ernie45" else _transformers(path, experts)

    def batches(name: str, rows: int, length: int) -> list[Tensor]:
        size = ModelConfig.from_pretrained(Path(folder, name)).vocab_size
        generator = torch.Generator().manual_seed(_SEED)
        return [torch.randint(size, (rows, length + 1), generator=generator) for _ in range(_NUM_BATCHES)]

    rehearsal = start("tiny")
    for rows in batches("tiny", 2, 16):
        rehearsal(rows)
    del rehearsal
    gc.collect()
    memory = PeakMemory()
    step, rows_in_turn = start("model"), batches("model", num_rows, seq_len)
    losses = [step(rows_in_turn[0])]
    seconds = []
    for i in range(steps):
        began = time.perf_counter()
        losses.append(step(rows_in_turn[(i + 1) % _NUM_BATCHES]))
        seconds.append(time.perf_counter() - began)
    config = ModelConfig.from_pretrained(Path(folder, "model"))
    return {
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": memory.above_base(),
        "memory_method": memory.method,
        "flops_per_token": count_flops_per_token(config, seq_len),
    }


def _ours(path: Path, recompute: str, returns_memory: bool) -> Step:
    import torch

    from ernie45.training.allocator import keep_freed_memory, return_freed_memory
    from ernie45.training.batch import Batch, Document
    from ernie45.training.head import lm_loss_sum
    from ernie45.training.network import TrainingNetwork
    from ernie45.training.recompute import RecomputeConfig

    if returns_memory:
        return_freed_memory()
    else:
        keep_freed_memory()
    model = ernie45.load_model(path).requires_grad_().train()
    operations = tuple(filter(None, recompute.split(",")))
    config = RecomputeConfig(policy="selective", selective=operations) if operations else RecomputeConfig()
    network = TrainingNetwork(model, recompute=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, fused=True)

    def step(rows: Tensor) -> float:
        learnt = torch.arange(rows.shape[1]) > 0
        batch = Batch.of_rows([[Document(ids=row, learnt=learnt)] for row in rows])
        hidden = network.run(batch).hidden_TH
        loss = lm_loss_sum(network, hidden, batch.labels_DT[0]) / batch.num_learnt
        del hidden
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _transformers(path: Path, experts: str) -> Step:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation=experts).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, fused=True)

    def step(rows: Tensor) -> float:
        read, learnt = rows[:, :-1], rows[:, 1:].contiguous()
        # Without a cache, which training has no use for; labels are given as shifted, so that all positions learn.
        loss = model(input_ids=read, labels=learnt, shift_labels=learnt, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step
