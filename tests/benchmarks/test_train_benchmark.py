"""The training benchmark: that it trains the same network with both packages, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common, train, train_own, train_own_worker, train_worker
from benchmarks.side_by_side import OURS
from ernie45.config.count import count_parameters


def _run(seconds: list[float], peak: int, experts: str = "") -> dict[str, Any]:
    package = train.PEER if experts else OURS
    case = {"case": "4 x 512", "package": package, "experts": experts}
    return {**case, "seconds": seconds, "peak_bytes": peak, "losses": [1.0], "flops_per_token": 10**8}


OWN = {
    "case": "4 x 512",
    "data": {"waited": [0.01, 0.5, 0.015], "seconds": [2.0, 3.0, 2.5], "alone_s": 0.01},
    "recompute": {
        "kept_without_bytes": 400 * 10**6,
        "seconds_without": 2.0,
        "plans": [
            {"share": 0.75, "budget_bytes": 300 * 10**6, "kept_bytes": 291 * 10**6, "seconds": 2.1},
            {"share": 0.5, "budget_bytes": 200 * 10**6, "kept_bytes": 180 * 10**6, "seconds": 3.0},
        ],
    },
}


def test_what_is_measured_of_ours_alone_is_judged() -> None:
    data, near, far = train_own.to_markdown(OWN)
    assert data[2:] == ["1.50% of the step", "10.0 ms to prepare them alone, of 2.50 s", "2%"]
    assert near[1:] == [
        "recompute auto with 75% of 400 MB",
        "keeps 97.0% of its budget",
        "a pass takes 1.05 of the time",
        "95% to 100%",
    ]
    assert far[2] == "keeps 90.0% of its budget, missed"
    over = {**OWN["recompute"], "plans": [{"share": 1.0, "budget_bytes": 100, "kept_bytes": 101, "seconds": 1.0}]}  # type: ignore[dict-item]
    slow = {**OWN, "recompute": over, "data": {**OWN["data"], "waited": [0.03]}}  # type: ignore[dict-item]
    assert [row[2] for row in train_own.to_markdown(slow)] == [
        "3.00% of the step, missed",
        "keeps 101.0% of its budget, missed",
    ]


def test_the_faster_peer_counts_and_ratios_are_of_medians() -> None:
    runs = [_run([2.0, 4.0, 1.0], 10**9), _run([4.0], 2 * 10**9, "grouped_mm"), _run([8.0], 10**9, "eager")]
    rows = train.rows_of(train.CASES[0], runs)
    assert [(row["package"], row["experts"]) for row in rows] == [("ernie45", ""), ("transformers", "grouped_mm")]
    report = {
        "rows": rows,
        "own": [OWN],
        "peak_flops": 2.048e11,
        "peak_flops_before_and_after": [1e11, 2.048e11],
        "settings": {"threads": 2, "repeats": 1, "steps": 3, "recompute": "", "returns_memory": False, "quick": False},
        "network": {"total": 2, "active": 1, "text": "N"},
        "machine": {
            "cpu": "C", "cores": 2, "features": [], "features_absent": [], "last_level_cache_bytes": None,
            "memory_bytes": None, "system": "S",
        },
        "bandwidth": {"torch_cpu_capability": "X"},
        "versions": {}, "native_extension": "N", "commit": "c", "date": "d", "command": "x", "other_cores_max": 0.0,
    }  # fmt: skip
    ours, peer, *_ = (line for line in train.to_markdown(report).splitlines() if line.startswith("| 4 x 512"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")][2:] for line in (ours, peer)]
    # 2048 tokens in 2 s of 10^8 FLOPs each are 102.4 GFLOP/s, half of the peak.
    assert cells[0] == ["1024 (512-2048)", "50.0%", "1000 (1000-1000)", "2.00", "0.50"]
    assert cells[1] == ["512 (512-512)", "25.0%", "2000 (2000-2000)", "1.00", "1.00"]


def test_the_network_is_as_large_as_announced() -> None:
    count = count_parameters(train_worker.network_config(tiny=False))
    assert round(count.total / 1e6) == 74
    assert round(count.active / 1e6) == 41


def test_a_small_run_learns_the_same_with_both_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("transformers")
    functions: dict[str, Any] = {
        f"benchmarks.train_worker:{name}": getattr(train_worker, name)
        for name in ("prepare", "measure_peak", "measure")
    } | {
        f"benchmarks.train_own_worker:{name}": getattr(train_own_worker, name)
        for name in ("measure_data", "measure_recompute")
    }

    def here(function: str, *, threads: int, sleeps: bool = True, **arguments: Any) -> common.Fresh:
        result = functions[function](**arguments)
        return common.Fresh(result=json.loads(json.dumps(result)), other_cores=0.0)

    monkeypatch.setattr(common, "run_fresh", here)
    file = tmp_path / "t.json"
    assert train.main(["--quick", "--repeats", "1", "--steps", "3", "--recompute", "norm", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    ours, *peers = (run["losses"] for run in report["runs"])
    assert len(ours) == 4
    assert ours[-1] != ours[0]
    for losses in peers:
        assert losses == pytest.approx(ours, abs=1e-4)
    (own,) = report["own"]
    assert len(own["data"]["waited"]) == len(own["data"]["seconds"]) == 3
    assert own["data"]["alone_s"] > 0
    kept = [plan["kept_bytes"] for plan in own["recompute"]["plans"]]
    assert sorted(kept, reverse=True) == kept
    assert all(plan["kept_bytes"] <= plan["budget_bytes"] for plan in own["recompute"]["plans"])
    assert "not to be published" in capsys.readouterr().out


def test_an_unknown_case_is_refused(capsys: Any) -> None:
    assert train.main(["--only", "banana"]) == 2
    assert "4 x 512" in capsys.readouterr().err
