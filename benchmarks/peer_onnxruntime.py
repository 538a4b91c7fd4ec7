"""Decode and prefill speed of onnxruntime-genai, a peer of `ernie bench` on dense models.

    python -m onnxruntime_genai.models.builder -i PT_FOLDER -o MODEL -p int4 -e cpu \\
        --extra_options int4_accuracy_level=4 int4_block_size=32
    python benchmarks/peer_onnxruntime.py MODEL

MODEL is what its own model builder makes of a -PT checkpoint. Needs `pip install onnxruntime-genai onnx onnx-ir`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

_DECODE_TOKENS = 32


def main() -> None:
    """Measure and print a row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model builder")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per row (default 3)")
    options = parser.parse_args()
    import onnxruntime_genai as og

    model = og.Model(og.Config(options.model))
    random = np.random.default_rng(0)

    def prefilled(batch: int, prompt: int, room: int) -> tuple[Any, float]:
        """A generator that has read its prompts, and the seconds that it took."""
        parameters = og.GeneratorParams(model)
        length = prompt + room
        parameters.set_search_options(max_length=length, min_length=length, batch_size=batch, do_sample=False)
        generator, start = og.Generator(model, parameters), time.perf_counter()
        generator.append_tokens(random.integers(5, 100_000, (batch, prompt)).astype(np.int32))
        return generator, time.perf_counter() - start

    def show(case: str, rates: list[float]) -> None:
        print(f"{case}: {statistics.median(rates):.1f} tokens/s ({min(rates):.1f}-{max(rates):.1f})", flush=True)

    for context, batch in ((2, 1), (4096, 1), (2, 8), (2, 32)):
        rates = []
        for _ in range(options.repeats):
            generator, _ = prefilled(batch, context, _DECODE_TOKENS + 8)
            generator.generate_next_token()
            start = time.perf_counter()
            for _ in range(_DECODE_TOKENS):
                generator.generate_next_token()
            rates.append(_DECODE_TOKENS * batch / (time.perf_counter() - start))
        show(f"decode, context {context}, {batch} together", rates)
    for prompt in (512, 4096):
        show(f"prefill, {prompt} tokens", [prompt / prefilled(1, prompt, 8)[1] for _ in range(options.repeats)])


if __name__ == "__main__":
    main()
