"""benchmarks/generate.py on a tiny random network: is the report complete, does it agree with itself? Speeds prove
nothing here and are not looked at.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

from benchmarks import common, generate, generate_report  # noqa: E402
from benchmarks.generate_report import METRICS, Network, Row  # noqa: E402
from ernie45.errors import CapacityError, Ernie45Error, NotFoundError, UsageError  # noqa: E402

REPEATS = 2
LABELS = [
    *("load", "peak memory, batch 1", "peak memory, batch 8", "first token", "load and first token"),
    *("prefill, batch 1", "prefill, batch 8", "decode, batch 1", "decode, batch 8"),
]
TINY_PARAMETERS = 512 * 64 + 64 + 2 * (2 * 64 + 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128)
"""Table, final norm, two layers of norms, attention (4 heads of 16, 2 for keys and values) and SwiGLU of 128."""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report of a real run of the program, as data and as text."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bench")
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "generate.py"), "--quick", "--only", "float32", "--threads", "1"),
        *("--repeats", str(REPEATS), "--cache", str(folder / "cache"), "--json", str(folder / "report.json")),
    ]
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads((folder / "report.json").read_text()), process.stdout


def test_every_figure_is_there_and_labelled(quick: tuple[dict[str, Any], str]) -> None:
    rows = quick[0]["rows"]
    assert [row["metric"] for row in rows] == LABELS
    assert {(row["case"], row["weights"]) for row in rows} == {("random-tiny/float32", "seeded random")}
    for row in rows:
        assert len(row["ours"]["values"]) == len(row["peer"]["values"]) == REPEATS


def test_medians_lie_inside_the_spread_and_ratios_follow_from_them(quick: tuple[dict[str, Any], str]) -> None:
    for row in quick[0]["rows"]:
        for side in (row["ours"], row["peer"]):
            assert 0 < side["low"] <= side["median"] <= side["high"]
            assert side["median"] == statistics.median(side["values"])
        more_is_better = row["unit"] == "tok/s"
        ours, peer = row["ours"]["median"], row["peer"]["median"]
        assert row["ratio"] == pytest.approx(ours / peer if more_is_better else peer / ours)


def test_rows_repeat_what_the_processes_measured(quick: tuple[dict[str, Any], str]) -> None:
    report = quick[0]
    order = [(run["package"], run["repeat"]) for run in report["runs"]]
    assert order == [("ernie45", 0), ("transformers", 0), ("transformers", 1), ("ernie45", 1)], "in turns"
    measured = [run["figures"]["decode_8"] for run in report["runs"] if run["package"] == "ernie45"]
    (row,) = (row for row in report["rows"] if row["metric"] == "decode, batch 8")
    assert row["ours"]["values"] == measured
    assert report["same_tokens"] == {"random-tiny/float32": {"equal": 10, "of": 10}}, "both did the same work"


def test_the_bound_is_bandwidth_over_bytes_per_step(quick: tuple[dict[str, Any], str]) -> None:
    report = quick[0]
    assert report["weight_bytes"] == {"random-tiny/float32": 4 * TINY_PARAMETERS}
    steps_per_s = report["bandwidth"]["bytes_per_s"] / (4 * TINY_PARAMETERS)
    bounds = {row["metric"]: row["bound"] for row in report["rows"] if row["bound"] is not None}
    assert bounds == {
        "decode, batch 1": pytest.approx(steps_per_s),
        "decode, batch 8": pytest.approx(8 * steps_per_s),
    }
    for row in report["rows"]:
        if row["bound"] is not None:
            assert row["ours_share"] == pytest.approx(row["ours"]["median"] / row["bound"])
            assert row["peer_share"] == pytest.approx(row["peer"]["median"] / row["bound"])


def test_the_text_states_what_a_figure_needs(quick: tuple[dict[str, Any], str]) -> None:
    report, text = quick
    assert [line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| random-tiny")] == LABELS
    assert report["settings"]["threads"] == report["bandwidth"]["torch_threads"] == 1
    for stated in (
        report["machine"]["cpu"],
        f"commit {report['commit']}",
        report["date"],
        f"`{report['command']}`",
        f"torch {report['versions']['torch']}",
        f"transformers {report['versions']['transformers']}",
        "1 threads, OMP_WAIT_POLICY=",
        "not to be published",
    ):
        assert stated in text


NUMBERS = st.floats(1e-3, 1e6)
FIGURES = st.fixed_dictionaries(dict.fromkeys(METRICS, NUMBERS))


@given(ours=st.lists(FIGURES, min_size=1, max_size=5), peer=st.lists(FIGURES, min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_rows_are_consistent_for_any_figures(ours: list[dict[str, float]], peer: list[dict[str, float]]) -> None:
    network = Network(name="n", weights="real", active_parameters=1000)
    rows = generate_report.rows_of(network, "bfloat16", ours, peer, bytes_per_s=1e6)
    assert [row.metric for row in rows] == LABELS
    for row in rows:
        assert row.ours.low <= row.ours.median <= row.ours.high
        assert row.peer.low <= row.peer.median <= row.peer.high
        assert (row.ratio > 1) == _is_ahead(row)
    assert [row.bound for row in rows if row.bound is not None] == [pytest.approx(500), pytest.approx(4000)]


def _is_ahead(row: Row) -> bool:
    if row.metric.startswith(("prefill", "decode")):
        return row.ours.median > row.peer.median and row.ours.median / row.peer.median > 1
    return row.ours.median < row.peer.median and row.peer.median / row.ours.median > 1


def test_the_plot_shows_every_decode_figure(quick: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        Row(**{**row, "ours": common.Spread(**row["ours"]), "peer": common.Spread(**row["peer"])})
        for row in quick[0]["rows"]
    ]
    generate_report.plot(tmp_path / "speed.png", rows, "title")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_noise_and_cached_weights_are_said(quick: tuple[dict[str, Any], str]) -> None:
    report = quick[0] | {"settings": quick[0]["settings"] | {"quick": False}}
    report["machine"] = report["machine"] | {"last_level_cache_bytes": 1}
    quiet = generate_report.to_markdown(report | {"other_cores_max": 0.1}, [])
    assert "not to be published" not in quiet
    assert "fit into" not in quiet
    noisy = generate_report.to_markdown(report | {"other_cores_max": 0.9}, [])
    assert "not to be published**: other processes used up to 0.90 cores" in noisy
    report["machine"]["last_level_cache_bytes"] = 1 << 40
    assert "random-tiny/float32 fit into the last-level cache" in generate_report.to_markdown(report, [])


def test_only_keeps_cases_that_hold_every_word() -> None:
    networks = ("real", "random")
    assert len(generate.select_cases(networks, [])) == 4
    assert generate.select_cases(networks, ["ran", "bfloat"]) == [("random", "bfloat16")]
    with pytest.raises(UsageError, match=r"'float64'.*real/float32, real/bfloat16, random/float32"):
        generate.select_cases(networks, ["float64"])


@pytest.mark.parametrize(("option", "name"), [("--json", "report.json"), ("--plot", "speed.png")])
def test_a_missing_folder_is_found_before_measuring(
    option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--quick", option, str(tmp_path / "absent" / name)]) == NotFoundError.exit_code
    assert f"absent for {name}: make it first" in capsys.readouterr().err


PEAK = """
import sys
from pathlib import Path
from benchmarks.common import PeakMemory

def refuse(*_, **__):
    raise PermissionError("clear_refs")

bytearray(100 << 20)  # before the meter is made: not its business, where the mark can be reset
if sys.argv[1] == "ru_maxrss":
    Path.write_text = refuse
meter = PeakMemory()
bytearray(300 << 20)
print(meter.method, meter.above_base() >> 20)
"""


@pytest.mark.parametrize(("method", "expected_mib"), [("VmHWM", 300), ("ru_maxrss", 200)])
def test_peak_memory_counts_what_was_freed_again(method: str, expected_mib: int) -> None:
    """In a process of its own, so that the mark of this one stays as it is; the shell forks it, because a process
    starts with the mark of the one that it came from, and this one's is high.
    """
    forked = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", PEAK, method]
    process = subprocess.run(forked, capture_output=True, text=True, cwd=ROOT, check=True)
    used, mib = process.stdout.split()
    if method == "VmHWM" and used != method:
        pytest.skip("this system cannot reset the high-water mark")
    assert used == method
    assert int(mib) == pytest.approx(expected_mib, abs=15)


def test_a_failing_process_is_reported_with_its_error() -> None:
    with pytest.raises(Ernie45Error, match=r"(?s)common:spread ended with exit code 1:.*unexpected keyword argument"):
        common.run_fresh("benchmarks.common:spread", threads=1, nonsense=1)


def test_a_killed_process_is_reported_as_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(CapacityError, match="needs more memory"):
        common.run_fresh("benchmarks.common:spread", threads=1)
