"""What a decode step costs beside its kernels: the same number of layers, so narrow that the kernels take next to nothing.

    python benchmarks/overhead.py

Prints microseconds per step, the least of many, for networks of as many layers as ERNIE-4.5-0.3B and 21B-A3B have.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ernie45
from ernie45.bench.random_weights import write_packed
from ernie45.kernels.choice import native
from ernie45.layers.cache import AttentionView
from ernie45.models.text import CausalLM
from ernie45.quant.scheme import make_scheme

_NARROW = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_EXPERTS = ernie45.MoeConfig(
    moe_num_experts=64, moe_k=6, moe_intermediate_size=64, moe_num_shared_experts=2, moe_layer_start_index=1
)
_NETWORKS = {
    "dense, 18 layers": ernie45.ModelConfig(**_NARROW, num_hidden_layers=18),
    "64 experts, 28 layers": ernie45.ModelConfig(**_NARROW, num_hidden_layers=28, moe=_EXPERTS),
}


@torch.inference_mode()
def step_times(model: CausalLM, batch: int, repeats: int = 500) -> tuple[float, float]:
    """Least seconds of a decode step of `batch` sequences: decoder, and norm with head."""
    ids, caches = torch.zeros(batch, dtype=torch.int64), tuple(model.new_cache() for _ in range(batch))
    decoder, head = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        hidden = model.hidden(ids, AttentionView(lengths=(1,) * batch, caches=caches))
        middle = time.perf_counter()
        model.logits(hidden)
        decoder.append(middle - start)
        head.append(time.perf_counter() - middle)
        for cache in caches:
            cache.truncate(min(cache.length, 8))
    return min(decoder), min(head)


def main() -> None:
    """Measure every network at some batch sizes."""
    torch.set_num_threads(1)
    extension = native()
    if extension is not None:
        extension.set_num_threads(1)  # waking a thread costs more than such a product
    print("| network | sequences | decoder, us | per layer, us | head, us |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, config in _NETWORKS.items():
            path = Path(folder) / name
            write_packed(config, make_scheme("wint4-all"), path)
            model = ernie45.load_model(path)
            for batch in (1, 8):
                decoder, head = (1e6 * seconds for seconds in step_times(model, batch))
                per_layer = decoder / config.num_hidden_layers
                print(f"| {name} | {batch} | {decoder:.0f} | {per_layer:.1f} | {head:.0f} |")


if __name__ == "__main__":
    main()
