"""The kernel benchmark: what it measures is what the kernels are asked for, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common, kernels
from ernie45.kernels.native import status


def test_rates_follow_from_seconds() -> None:
    report = {
        "bandwidth": {"bytes_per_s": 20e9, "torch_cpu_capability": "AVX2"},
        "products": [{"format": "F", "tokens": 8, "size_bytes": 10**7, "seconds": [1e-3, 2e-3, 4e-3]}],
        "attention": [
            {"fresh": 1, "length": 64, "dtype": "int8", "size_bytes": 10**6, "multiply_adds": 3 * 10**6, "seconds": [1e-4]}
        ],
        "sampling": [{"operation": "draw", "vocabulary": 10**5, "seconds": [1e-4, 2e-4]}],
        "machine": {
            "cpu": "C", "cores": 2, "features": [], "features_absent": [], "last_level_cache_bytes": None,
            "memory_bytes": None, "system": "S",
        },
        "versions": {}, "native_extension": "N", "commit": "c", "date": "d", "command": "x", "kernels": "K", "threads": 2,
        "repeats": 3, "other_cores": 0.0,
    }  # fmt: skip
    lines = kernels.render(report).splitlines()
    (product,) = [line for line in lines if line.startswith("| F")]
    # 10 MB in 2 ms are 5 GB/s; the best, in 1 ms, is half of plain reads; 8 x 4096 x 2560 multiply-adds in 2 ms are 42 G/s.
    assert [cell.strip() for cell in product.strip("|").split("|")] == [
        "F",
        "8",
        "5.00 (2.50-10.0)",
        "50%",
        "41.9 (21.0-83.9)",
    ]
    (attention,) = [line for line in lines if line.startswith("| 1 new")]
    assert [cell.strip() for cell in attention.strip("|").split("|")][1:] == [
        "10.0 (10.0-10.0)",
        "50%",
        "30.0 (30.0-30.0)",
    ]
    (draw,) = [line for line in lines if line.startswith("| draw")]
    # 0.4 MB in 0.1 ms are 4 GB/s, a fifth of plain reads; 10^5 exponentials in it are 1 G/s.
    assert [cell.strip() for cell in draw.strip("|").split("|")][1:] == [
        "100000",
        "150 (100-200)",
        "20%",
        "0.750 (0.500-1.00)",
    ]


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if not status().available:
        pytest.skip("the references are not what is measured")
    for name, value in (
        ("_POOL_BYTES", 1 << 20),
        ("_LEAST_S", 0.0),
        ("_TOKENS", (1, 3)),
        ("_ROWS", 64),
        ("_COLUMNS", 128),
    ):
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "_ATTENTION", ((1, 40, "int8"), (4, 20, "bfloat16")))
    monkeypatch.setattr(kernels, "_VOCABULARIES", (3000,))
    functions: dict[str, Any] = {
        "benchmarks.kernels:measure_products": kernels.measure_products,
        "benchmarks.kernels:measure_attention": kernels.measure_attention,
        "benchmarks.kernels:measure_sampling": kernels.measure_sampling,
        "benchmarks.kernels:kernels_in_use": kernels.kernels_in_use,
        "benchmarks.common:measure_bandwidth": lambda **_: {"bytes_per_s": 1e10, "torch_cpu_capability": "X"},
    }

    def here(function: str, *, threads: int, **arguments: Any) -> common.Fresh:
        result = functions[function](**arguments)
        return common.Fresh(result=json.loads(json.dumps(result)), other_cores=0.0)

    monkeypatch.setattr(common, "run_fresh", here)
    file = tmp_path / "k.json"
    assert kernels.main(["--json", str(file), "--repeats", "2"]) == 0
    report = json.loads(file.read_text())
    assert [row["tokens"] for row in report["products"]] == [1, 3] * 3
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in report["products"] + report["attention"])
    four, eight = report["products"][0]["size_bytes"], report["products"][-1]["size_bytes"]
    assert four == 64 * 128 / 2 + 64 * 2 * 2
    assert eight == 64 * 128 + 64 * 2 * 2
    assert [row["operation"] for row in report["sampling"]] == [
        "draw",
        "draw, reference",
        "draw, top_p 0.8",
        "draw, top_p 0.8, reference",
        "log-probability",
        "log-probability, reference",
    ]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in report["sampling"])
    # 4 new of 20: the first sees 17 tokens, the last 20.
    assert report["attention"][1]["multiply_adds"] == 2 * 20 * 128 * (17 + 18 + 19 + 20)
    assert "native kernels" in capsys.readouterr().out
