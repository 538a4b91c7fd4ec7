"""What the kernels reach by themselves: products with packed matrices, and attention, in bytes and multiply-adds per second; the
sampler's draw and log-probability in bytes and exponentials per second.

    python benchmarks/kernels.py [--json FILE] [--repeats N] [--threads N]

Weights are random and fit no cache, as in a model: a product of one token is bound by how fast memory gives them (compare with
the plain read in the head of the report), one of many tokens by arithmetic. `ERNIE_ISA` chooses the instruction set.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

_ROWS, _COLUMNS = 4096, 2560
_POOL_BYTES = 768 << 20
"""Of weights that products of few tokens go through before they meet one again."""
_LEAST_S = 0.3
"""Of one measurement."""
_FORMATS = {
    "4 bits, groups of 64": (4, 64, 8),
    "4 bits, groups of 32 with minima": (4, 32, 8),
    "8 bits, groups of 64, wide activations": (8, 64, 16),
}
_TOKENS = (1, 2, 4, 8, 16, 64, 512)
_HEADS, _KV_HEADS, _HEAD_DIM = 20, 4, 128
"""Of the 21B-A3B."""
_ATTENTION = (
    (1, 4096, "bfloat16"),
    (1, 4096, "int8"),
    (1, 16384, "bfloat16"),
    (512, 512, "bfloat16"),
    (512, 4096, "bfloat16"),
)
"""New tokens, tokens in all, dtype of keys and values."""
_VOCABULARIES = (32768, 103424)
"""The second is ERNIE's."""


def measure_products(*, repeats: int) -> list[dict[str, Any]]:
    """Every format with every number of tokens. Returns: rows with seconds per product."""
    import torch

    from ernie45.kernels.packed import PackedFormat, linear, pack

    _use_threads(torch.get_num_threads())
    rows = []
    for name, (bits, group, activation_bits) in _FORMATS.items():
        format = PackedFormat(bits=bits, group=group, activation_bits=activation_bits)  # type: ignore[arg-type]  # as in the table
        generator = torch.Generator().manual_seed(0)
        low, high = format.smallest + (bits == 4), format.largest + 1
        values = torch.randint(low, high, (_ROWS, _COLUMNS), generator=generator, dtype=torch.int8)
        one = pack(values, torch.full(format.scale_shape(_ROWS, _COLUMNS), 1e-3), format)
        count = max(_POOL_BYTES // one.size_bytes, 2)
        pool = [replace(one, weights=one.weights.clone(), scales=one.scales.clone()) for _ in range(count)]
        for tokens in _TOKENS:
            x = torch.randn(tokens, _COLUMNS, generator=generator)
            seconds = _timed([partial(linear, x, matrix) for matrix in pool], repeats)
            rows.append({"format": name, "tokens": tokens, "size_bytes": one.size_bytes, "seconds": seconds})
    return rows


def measure_attention(*, repeats: int) -> list[dict[str, Any]]:
    """Every case of `_ATTENTION`. Returns: rows with seconds per call."""
    import torch

    from ernie45.kernels.attention import KvPages, Sequences, attention, to_int8

    _use_threads(torch.get_num_threads())
    rows = []
    for fresh, length, dtype in _ATTENTION:
        generator = torch.Generator().manual_seed(0)
        shape = (1, _KV_HEADS, length, _HEAD_DIM)
        size = 2 * _KV_HEADS * length * _HEAD_DIM * (1 if dtype == "int8" else 2)
        stores = []
        for _ in range(max((256 << 20) // size, 2)):  # as many layers as fit no cache
            keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
            if dtype == "int8":
                (keys_8, key_scales), (values_8, value_scales) = to_int8(keys), to_int8(values)
                stores.append(
                    KvPages(
                        keys_PGWD=keys_8,
                        values_PGWD=values_8,
                        key_scales_PGW=key_scales,
                        value_scales_PGW=value_scales,
                    )
                )
            else:
                stores.append(KvPages(keys_PGWD=keys.bfloat16(), values_PGWD=values.bfloat16()))
        q = torch.randn(fresh, _HEADS, _HEAD_DIM, generator=generator)
        sequences = Sequences(
            fresh_B=torch.tensor([fresh], dtype=torch.int32),
            lengths_B=torch.tensor([length], dtype=torch.int32),
            pages_BP=torch.zeros(1, 1, dtype=torch.int32),
        )
        calls = [partial(attention, q, store, sequences, _HEAD_DIM**-0.5) for store in stores]
        # Each new token looks at those before it and at itself: keys and values, a multiply-add each per head and column.
        pairs = fresh * length - fresh * (fresh - 1) // 2
        rows.append(
            {
                "fresh": fresh,
                "length": length,
                "dtype": dtype,
                "size_bytes": size,
                "multiply_adds": 2 * _HEADS * _HEAD_DIM * pairs,
                "seconds": _timed(calls, repeats),
            }
        )
    return rows


def measure_sampling(*, repeats: int) -> list[dict[str, Any]]:
    """Draw and log-probability from rows of each vocabulary. Returns: rows with seconds of the kernel and of its reference."""
    import torch

    from ernie45.kernels import sampling

    torch.set_num_threads(1)  # the kernels use one; NumPy does, too
    rows: list[dict[str, Any]] = []
    for vocabulary in _VOCABULARIES:
        count = max(_POOL_BYTES // 8 // (4 * vocabulary), 2)
        logits = list(3 * torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(0)))
        operations: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
            "draw": (sampling.draw, (1.0, 7, 0)),
            "draw, reference": (sampling.draw_reference, (1.0, 7, 0)),
            "draw, top_p 0.8": (sampling.draw, (0.8, 7, 0, 0.8)),
            "draw, top_p 0.8, reference": (sampling.draw_reference, (0.8, 7, 0, 0.8)),
            "log-probability": (sampling.logprob, (0,)),
            "log-probability, reference": (sampling.logprob_reference, (0,)),
        }
        for name, (function, arguments) in operations.items():
            seconds = _timed([partial(function, row, *arguments) for row in logits], repeats)
            rows.append({"operation": name, "vocabulary": vocabulary, "seconds": seconds})
    return rows


def _use_threads(count: int) -> None:
    """As many threads for the kernels as for torch."""
    from ernie45.kernels.choice import native

    extension = native()
    if extension is not None:
        extension.set_num_threads(count)


def _timed(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds per call, going round through all of them."""
    for call in calls:
        call()
    start = time.perf_counter()
    calls[0]()
    rounds = max(int(_LEAST_S / max(time.perf_counter() - start, 1e-7) / len(calls)), 1)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        seconds.append((time.perf_counter() - start) / (rounds * len(calls)))
    return seconds


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    bandwidth = report["bandwidth"]["bytes_per_s"]
    products = [
        [
            row["format"],
            str(row["tokens"]),
            _rates(row["seconds"], row["size_bytes"]),
            f"{row['size_bytes'] / min(row['seconds']) / bandwidth:.0%}",
            _rates(row["seconds"], row["tokens"] * _ROWS * _COLUMNS),
        ]
        for row in report["products"]
    ]
    attention = [
        [
            f"{row['fresh']} new of {row['length']}, {row['dtype']}",
            _rates(row["seconds"], row["size_bytes"]),
            f"{row['size_bytes'] / min(row['seconds']) / bandwidth:.0%}",
            _rates(row["seconds"], row["multiply_adds"]),
        ]
        for row in report["attention"]
    ]
    sampling = [
        [
            row["operation"],
            str(row["vocabulary"]),
            common.spread_text(common.spread([s * 1e6 for s in row["seconds"]])),
            f"{4 * row['vocabulary'] / min(row['seconds']) / bandwidth:.0%}",
            _rates(row["seconds"], row["vocabulary"]),
        ]
        for row in report["sampling"]
    ]
    head = [
        *common.origin_lines(report),
        f"kernels: {report['kernels']}; {report['threads']} threads; median (lowest-highest) of {report['repeats']}",
        f"memory: {bandwidth / 1e9:.1f} GB/s in plain reads",
        common.noise_line(report["other_cores"]),
    ]
    rates = ["GB/s of it", "of plain reads", "G multiply-adds/s"]
    return "\n".join(
        [
            *(f"- {line}" for line in head),
            "",
            f"Products with a matrix of {_ROWS} x {_COLUMNS}:",
            "",
            common.markdown_table(["weights", "tokens", *rates], products, num_words=1),
            "",
            f"Attention, {_HEADS} query and {_KV_HEADS} key heads of {_HEAD_DIM}, one layer, one sequence:",
            "",
            common.markdown_table(["tokens and cache", *rates], attention, num_words=1),
            "",
            "One row of logits, one thread:",
            "",
            common.markdown_table(
                ["operation", "vocabulary", "us", "of plain reads", "G exponentials/s"], sampling, num_words=1
            ),
        ]
    )


def kernels_in_use() -> str:
    """What computes, in one line."""
    from ernie45.kernels.choice import describe

    return describe()


def _rates(seconds: list[float], amount: float) -> str:
    return common.spread_text(common.spread([amount / s / 1e9 for s in seconds]))


def main(argv: list[str] | None = None) -> int:
    """Measure in fresh processes and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements per figure (default 5)")
    parser.add_argument("--threads", type=int, default=common.usable_cores(), metavar="N", help="default: all cores")
    options = parser.parse_args(argv)
    meter = common.CoresMeter()
    size = {"size_bytes": common.bandwidth_size_bytes(), "repeats": 3}
    work = {
        "bandwidth": ("benchmarks.common:measure_bandwidth", size),
        "products": ("benchmarks.kernels:measure_products", {"repeats": options.repeats}),
        "attention": ("benchmarks.kernels:measure_attention", {"repeats": options.repeats}),
        "sampling": ("benchmarks.kernels:measure_sampling", {"repeats": options.repeats}),
        "kernels": ("benchmarks.kernels:kernels_in_use", {}),
    }
    report: dict[str, Any] = {}
    for name, (function, arguments) in work.items():
        report[name] = common.run_fresh(function, threads=options.threads, **arguments).result
    report |= {
        "threads": options.threads,
        "repeats": options.repeats,
        "machine": common.machine_facts(),
        "versions": common.software_versions(["torch"]),
        "native_extension": common.native_extension(),
        "commit": common.commit(),
        "date": common.now(),
        "command": " ".join(["python", "benchmarks/kernels.py", *(argv if argv is not None else sys.argv[1:])]),
        "other_cores": meter.others(),
    }
    if options.json is not None:
        common.write_json(options.json, report)
    print(render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
