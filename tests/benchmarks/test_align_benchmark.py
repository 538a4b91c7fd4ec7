"""The alignment benchmark: that both packages do the same work, and its arithmetic."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import align, align_worker, common
from benchmarks.side_by_side import OURS
from ernie45.config.model import ModelConfig
from ernie45.training.rollout import LlmGenerator

DPO, SAMPLING, PACKED = align.cases(tiny=False)
SETTINGS = {"threads": 2, "repeats": 2, "steps": 2, "quick": False}


def made_up(case: align.Case, experts: str, seconds: list[float], peak: int, losses: list[float]) -> dict[str, Any]:
    """A run whose steps have 4 and 12 pairs, 100 and 300 tokens."""
    package = case.peer if experts else OURS
    work = {"units": [4, 12], "tokens": [100, 300], "peak_bytes": peak, "losses": losses}
    return {"case": case.name, "package": package, "experts": experts, "seconds": seconds, **work}


def report_of(case: align.Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What `run` would make of these runs on some machine."""
    return {
        "cases": [{**vars(case), "losses": align.losses_of(case, runs)}],
        "rows": align.rows_of(case, runs),
        "settings": SETTINGS,
        "network": {"total": 2, "active": 1, "text": "N"},
        "machine": {
            "cpu": "C", "cores": 2, "features": [], "features_absent": [], "last_level_cache_bytes": None,
            "memory_bytes": None, "system": "S",
        },
        "bandwidth": {"torch_cpu_capability": "X"},
        "versions": {}, "native_extension": "N", "commit": "c", "date": "d", "command": "x", "other_cores_max": 0.0,
    }  # fmt: skip


def dpo_runs(ours_s: list[float], their_losses: list[float]) -> list[dict[str, Any]]:
    """Two processes of ours, and one with each kind of the peer's experts."""
    return [
        made_up(DPO, "", ours_s, 10**9, [0.6931, 0.5]),
        made_up(DPO, "", ours_s, 10**9, [0.6931, 0.5]),
        made_up(DPO, "grouped_mm", [5.0, 5.0], 4 * 10**9, their_losses),
        made_up(DPO, "eager", [10.0, 10.0], 10**9, [0.6931, 0.5]),
    ]


def cells(text: str, package: str) -> list[str]:
    """Numbers of the only line of a package."""
    (line,) = (line for line in text.splitlines() if line.startswith("| ") and f"| {package}" in line)
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_rates_are_of_whole_processes_and_the_faster_peer_counts() -> None:
    # 16 pairs and 400 tokens in 4 s; the median of the steps would be 167 tokens/s.
    text = align.to_markdown(report_of(DPO, dpo_runs([3.0, 1.0], [0.6932, 0.5])))
    assert cells(text, "ernie45") == [
        *("4.00 (4.00-4.00)", "100 (100-100)", "1000 (1000-1000)"),
        *("2.50", "1.5", "0.25"),
    ]
    assert cells(text, "trl (grouped_mm experts)")[:2] == ["1.60 (1.60-1.60)", "40.0 (40.0-40.0)"]
    assert "eager" not in text


def test_a_missed_goal_says_so() -> None:
    report = report_of(DPO, dpo_runs([4.0, 4.0], [0.6932, 0.5]))
    assert [row.get("goal_met") for row in report["rows"]] == [False, None]
    assert cells(align.to_markdown(report), "ernie45")[3:5] == ["1.25, missed", "1.5"]


def test_losses_that_part_are_not_published() -> None:
    close = align.to_markdown(report_of(DPO, dpo_runs([1.0, 3.0], [0.6932, 0.502])))
    apart = align.to_markdown(report_of(DPO, dpo_runs([1.0, 3.0], [0.6932, 0.52])))
    assert "largest difference in a step 2.0e-03" in close
    assert "not to be published" not in close
    assert "largest difference in a step 2.0e-02: **not to be published**" in apart


def test_the_slower_peers_losses_are_compared_too() -> None:
    runs = dpo_runs([1.0, 3.0], [0.6931, 0.5])
    runs[-1]["losses"] = [0.6931, 0.6]
    found = align.losses_of(DPO, runs)
    assert found is not None
    assert found["largest_difference"] == pytest.approx(0.1)


def test_rollouts_have_no_losses() -> None:
    runs = [made_up(SAMPLING, experts, [1.0, 1.0], 10**9, []) for experts in ("", "grouped_mm", "eager")]
    text = align.to_markdown(report_of(SAMPLING, runs))
    assert cells(text, "ernie45")[3:5] == ["1.00, missed", "5"]
    assert "losses" not in text
    assert "ours samples from the network that learns" in text


def test_what_is_sampled_from_is_said() -> None:
    runs = [made_up(PACKED, experts, [1.0, 1.0], 10**9, []) for experts in ("", "grouped_mm", "eager")]
    assert "ours samples from a copy in 8 bits" in align.to_markdown(report_of(PACKED, runs))


def test_pairs_are_as_long_as_asked_for_and_come_again(tmp_path: Path) -> None:
    align_worker.prepare(folder=str(tmp_path), tiny=True)
    path = tmp_path / "model"
    steps = align_worker.drawn_pairs(path, 4, num_pairs=20, prompt_tokens=[3, 5], answer_tokens=[1, 2])
    assert steps[3] is steps[0]
    assert steps[1] != steps[0]
    pairs = [pair for step in steps for pair in step]
    assert {len(pair["prompt_ids"]) for pair in pairs} == {3, 4, 5}
    assert {len(pair[name]) for pair in pairs for name in ("chosen_ids", "rejected_ids")} == {1, 2}
    ids = {token for pair in pairs for name in pair for token in pair[name]}
    assert ids <= set(range(1, ModelConfig.from_pretrained(path).vocab_size)), "no padding"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_small_run_does_the_same_with_all_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for package in ("transformers", "trl"):
        pytest.importorskip(package)
    monkeypatch.setenv("CI", "1")  # TRL tells its makers nothing
    synced = []
    sync = LlmGenerator.sync

    def note_sync(self: LlmGenerator, model: Any) -> None:
        synced.append(model)
        sync(self, model)

    monkeypatch.setattr(LlmGenerator, "sync", note_sync)

    def here(function: str, *, threads: int, sleeps: bool = True, **arguments: Any) -> common.Fresh:
        result = getattr(align_worker, function.rpartition(":")[2])(**arguments)
        return common.Fresh(result=json.loads(json.dumps(result)), other_cores=0.0)

    monkeypatch.setattr(common, "run_fresh", here)
    file = tmp_path / "a.json"
    assert align.main(["--quick", "--repeats", "1", "--steps", "4", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    dpo, sampling, packed = (
        [run for run in report["runs"] if run["case"] == case.name] for case in align.cases(tiny=True)
    )
    ours, *peers = (run["losses"] for run in dpo)
    assert len(ours) == 5
    assert ours[0] == pytest.approx(math.log(2), abs=1e-6)
    assert ours[3] < ours[0], "the first batch comes again"
    for losses in peers:
        assert losses == pytest.approx(ours, abs=1e-4)
    assert report["cases"][0]["losses"]["largest_difference"] < 1e-4
    assert {tuple(run["tokens"]) for run in dpo} == {tuple(dpo[0]["tokens"])}
    assert [run["tokens"] for run in (*sampling, *packed)] == [[2 * 2 * 5] * 4] * 6
    assert len(synced) == 2 * (1 + 1 + 4), "weights are handed over before every rollout: rehearsal, warm-up, steps"
    assert [(row["case"], row["package"]) for row in report["rows"]] == [
        *(("dpo", "ernie45"), ("dpo", "trl")),
        *(("sampling float32", "ernie45"), ("sampling float32", "transformers")),
        *(("sampling wint8", "ernie45"), ("sampling wint8", "transformers")),
    ]
    assert "not to be published" in capsys.readouterr().out


def test_only_one_case_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked = []

    def note(function: str, **arguments: Any) -> common.Fresh:
        asked.append((function, arguments.get("package"), arguments["threads"]))
        run = {"seconds": [1.0], "units": [1], "tokens": [1], "losses": [], "peak_bytes": 1}
        network = {"total": 1, "active": 1, "text": "N", "torch_cpu_capability": "X"}
        return common.Fresh(result=run | network, other_cores=0.0)

    monkeypatch.setattr(common, "run_fresh", note)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert align.main(["--only", "float32", "--repeats", "2", "--threads", "3"]) == 0
    measured = [package for function, package, _ in asked if function.endswith(":measure_sampling")]
    assert measured == ["ernie45", "transformers", "transformers", "transformers", "transformers", "ernie45"]
    assert len(asked) == 1 + len(measured)
    assert {threads for *_, threads in asked} == {3}
    assert "dpo" not in capsys.readouterr().out


def test_an_unknown_case_is_refused(capsys: Any) -> None:
    assert align.main(["--only", "banana"]) == 2
    assert "dpo, sampling" in capsys.readouterr().err


def test_a_missing_peer_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else name)
    assert align.main([]) == 4
    assert "trl, the peer of dpo, is not installed" in capsys.readouterr().err
