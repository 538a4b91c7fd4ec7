"""`ernie bench`: random packed checkpoints, figures and reports that hold together. No speeds are asserted."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import ernie45
from ernie45.bench.measure import Figure, measure, peak_memory_bytes, step_bytes
from ernie45.bench.peers import LlamaCpp
from ernie45.bench.peers import measure as peers_measure
from ernie45.bench.random_weights import write_gguf, write_packed
from ernie45.bench.report import save_plot, table
from ernie45.checkpoint.index import open_folder
from ernie45.checkpoint.source import open_source
from ernie45.cli.main import main
from ernie45.errors import NotFoundError, UsageError
from ernie45.quant.scheme import make_scheme

DENSE = ernie45.ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32,
)  # fmt: skip
MOE = replace(
    DENSE,
    num_nextn_predict_layers=1,
    moe=ernie45.MoeConfig(moe_num_experts=8, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=1),
)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("scheme", ["wint8", "wint4", "wint4-all"])
def test_random_packed_checkpoints_load_and_spread(tmp_path: Path, config: Any, scheme: str) -> None:
    seen: list[tuple[int, int]] = []
    write_packed(
        config, make_scheme(scheme), tmp_path / "a", seed=3, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1]
    write_packed(config, make_scheme(scheme), tmp_path / "b", seed=3)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    source = open_source(tmp_path / "a")
    for stored in source.layout:
        value = source.read(stored)
        if value.ndim > 1:
            assert 0.015 < float(value.std()) < 0.025, stored.name
            assert abs(float(value.mean())) < 0.001, (
                f"{stored.name}: with a common direction all tokens choose one expert"
            )
    with torch.inference_mode():
        assert torch.isfinite(ernie45.load_model(tmp_path / "a")(torch.arange(9)[None])).all()


def test_a_step_of_a_tied_dense_model_reads_the_whole_file(tmp_path: Path) -> None:
    write_packed(DENSE, make_scheme("wint8"), tmp_path / "a")
    assert step_bytes(ernie45.load_model(tmp_path / "a"), 1) == open_folder(tmp_path / "a").total_bytes


def test_bytes_of_a_step_count_the_experts_that_are_hit(tmp_path: Path) -> None:
    write_packed(MOE, make_scheme("wint8"), tmp_path / "a")
    model = ernie45.load_model(tmp_path / "a")
    entries = open_folder(tmp_path / "a").entries.values()
    experts = sum(entry.size_bytes for entry in entries if ".mlp.experts." in entry.name)
    one, all_of_them = step_bytes(model, 1), step_bytes(model, 10_000)
    assert all_of_them - one == pytest.approx(experts * 6 / 8, abs=2)


def test_figures_are_complete_and_consistent(tmp_path: Path) -> None:
    write_packed(MOE, make_scheme("wint4"), tmp_path / "a")
    model = ernie45.load_model(tmp_path / "a")
    figures = measure(model, bandwidth=1e9, contexts=(0, 40), batches=(1, 3), prompts=(8,), repeats=2, seconds=0.02)
    assert [(f.what, f.context, f.batch) for f in figures] == [
        ("decode", 0, 1), ("decode", 40, 1), ("decode", 0, 3), ("prefill", 8, 1)
    ]  # fmt: skip
    for figure in figures:
        assert 0 < figure.low <= figure.tokens_per_s <= figure.high
        if figure.what == "decode":
            assert figure.bound_tokens_per_s == pytest.approx(1e9 / figure.bytes_per_step * figure.batch)
    # keys and values of 40 tokens, 2 layers, 2 heads of 32, in bfloat16
    assert figures[1].bytes_per_step - figures[0].bytes_per_step == 40 * 2 * 2 * 2 * 32 * 2
    shown = table(figures, figures[:1], "a peer")
    assert shown.count("\n") == 5
    assert "| 1.00 |" in shown
    assert peak_memory_bytes() > 50e6


@pytest.mark.parametrize("config", [DENSE, replace(MOE, num_nextn_predict_layers=0)], ids=["dense", "moe"])
def test_random_gguf_has_sane_blocks(tmp_path: Path, config: Any) -> None:
    config = replace(config, hidden_size=256, intermediate_size=512)  # Q6_K blocks span 256 columns
    write_gguf(config, tmp_path / "a.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if value.ndim > 1:
            assert 0.01 < value.std() < 0.03, tensor.name


def test_the_verb_measures_a_shape_and_keeps_the_folder(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ernie45.preset", lambda name: DENSE)
    arguments = ["bench", "--shape", "0.3b", "--scheme", "wint8", "--folder", str(tmp_path / "kept"), "--json"]
    arguments += ["--contexts", "0", "--batches", "1", "--prompts", "4", "--repeats", "1"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["about"]["weights"] == "seeded random, wint8"
    assert len(report["figures"]) == 2
    assert main([*arguments, "--kernels", "reference"]) == 0
    again = capsys.readouterr()
    assert "using the random weights" in again.err
    assert json.loads(again.out)["about"]["kernels"] == "reference kernels in PyTorch: --kernels reference"


def some(what: str, context: int, batch: int, speed: float, bound: float | None = None) -> Figure:
    return Figure(
        what=what, context=context, batch=batch, tokens_per_s=speed, low=0.9 * speed, high=1.1 * speed,
        bytes_per_step=1, bound_tokens_per_s=bound,
    )  # fmt: skip


FIGURES = [
    some("decode", 0, 1, 20, 30),
    some("decode", 4096, 1, 9, 12),
    some("decode", 0, 8, 900, 1400),
    some("prefill", 512, 1, 150),
]
ABOUT = {"model": "21b-a3b", "weights": "seeded random, wint4", "cpu": "a processor, 2 logical cores"}


@pytest.mark.parametrize(
    ("figures", "rivals", "legend"),
    [
        (FIGURES, [FIGURES[0], FIGURES[3]], ["ernie45", "llama.cpp", "memory bound"]),
        (FIGURES[:1], [], ["ernie45", "memory bound"]),
        (FIGURES[3:], [], ["ernie45"]),
    ],
)
def test_plots(tmp_path: Path, check_png: Any, figures: list[Figure], rivals: list[Figure], legend: list[str]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.png", "a.svg"):
        save_plot(tmp_path / name, figures, rivals, "llama.cpp" if rivals else None, ABOUT)
    _, height = check_png(tmp_path / "a.png")
    assert height > 200 + 70 * len(figures), "every case has room"
    # In SVG, texts are drawn as glyphs and repeated as comments.
    texts = re.findall(r"<!-- (.*) -->", (tmp_path / "a.svg").read_text())
    assert texts[-len(legend) :] == legend
    for figure in (*figures, *rivals):
        assert f"{figure.tokens_per_s:.1f}" in texts
    assert [text for text in texts if text.startswith(("decode", "prefill"))] == [
        "decode, context 0", "decode, context 4096", "decode, context 0, 8 together", "prefill, 512 tokens"
    ][FIGURES.index(figures[0]) :][: len(figures)]  # fmt: skip


def test_the_verb_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_png: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("ernie45.preset", lambda name: DENSE)
    options = ["--contexts", "0", "--batches", "1", "--prompts", "4", "--repeats", "1"]
    assert main(["bench", "--shape", "0.3b", *options, "--plot", str(tmp_path / "p.png")]) == 0
    assert f"plot: {tmp_path}/p.png\n" in capsys.readouterr().err
    check_png(tmp_path / "p.png")


def test_a_plot_that_cannot_be_saved_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ernie45.cli.bench.measure_bandwidth", lambda: pytest.fail("measured"))
    for name, code, message in (
        ("p.jpg", 2, "saved as .png or .svg, not as 'p.jpg'"),
        ("none/p.png", 4, f"no folder {tmp_path}/none"),
    ):
        assert main(["bench", "--shape", "0.3b", "--plot", str(tmp_path / name)]) == code
        assert message in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--shape", "0.3b", "--plot", str(tmp_path / "p.png")]) == 4
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give a MODEL, or --shape"),
        (["x", "--shape", "0.3b"], 2, "give a MODEL, or --shape"),
        (["--shape", "0.4b"], 4, "did you mean"),
        (["x", "--contexts", "1,b"], 2, "no list of numbers"),
        (["x", "--contexts", "", "--prompts", "", "--batches", "1"], 2, "nothing to measure"),
    ],
)
def test_bad_arguments(arguments: list[str], code: int, message: str, capsys: Any) -> None:
    assert main(["bench", *arguments]) == code
    assert message in capsys.readouterr().err


TOOL = """#!{python}
import json, os, sys
arguments = dict(zip(sys.argv[1::1], sys.argv[2::1]))
with open(sys.argv[0] + ".calls", "a") as calls:
    print(arguments.get("-d"), arguments["-fa"], "--no-repack" in sys.argv or arguments.get("--repack") == "0", file=calls)
speed = 10 + 5 * int(arguments["-fa"] in ("1", "on")) + 2 * ("--no-repack" in sys.argv or arguments.get("--repack") == "0")
speed -= 9 * ("OMP_WAIT_POLICY" in os.environ)
if sys.argv[0].endswith("batched-bench"):
    print("a line of text")
    print(json.dumps({{"pl": int(arguments["-npl"]), "speed_tg": speed * int(arguments["-npl"])}}))
elif arguments["-p"] == "0":
    print(json.dumps([{{"n_prompt": 0, "samples_ts": [speed, speed + 1, speed - 1]}}]))
else:
    print(json.dumps([{{"n_prompt": int(arguments["-p"]), "samples_ts": [speed * int(arguments["-p"])]}}]))
"""


def test_the_best_of_llama_cpps_settings_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for its tools that are fastest with flash attention and without repacking, and slow if told how to wait."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    for name in ("llama-bench", "llama-batched-bench"):
        (tmp_path / name).write_text(TOOL.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    write_packed(replace(DENSE, hidden_size=256), make_scheme("wint4"), tmp_path / "model")
    where = LlamaCpp(tools=tmp_path, file=tmp_path / "peer.gguf")
    figures = peers_measure("llama.cpp", tmp_path / "model", (0, 64), (1, 8), (16,), where)
    found = {(f.what, f.context, f.batch): f.tokens_per_s for f in figures}
    assert found == {("decode", 0, 1): 17, ("decode", 64, 1): 17, ("prefill", 16, 1): 17 * 16, ("decode", 0, 8): 17 * 8}
    calls = (tmp_path / "llama-bench.calls").read_text().splitlines()
    assert [call for call in calls if call.startswith("64")] == ["64 1 True"], "the others were behind at 0"
    assert len([call for call in calls if call.startswith("0")]) == 4
    assert where.file is not None
    assert where.file.exists(), "the weights are kept"
    (tmp_path / "llama-bench").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such model')\n")
    with pytest.raises(UsageError, match="status 1: no such model"):
        peers_measure("llama.cpp", tmp_path / "model", (0,), (1,), (), where)
    with pytest.raises(NotFoundError, match="there is no .*build llama.cpp"):
        peers_measure("llama.cpp", tmp_path / "model", (0,), (1,), (), LlamaCpp(tools=tmp_path / "x"))


def test_a_peer_that_is_not_there_is_refused_before_measuring(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_packed(DENSE, make_scheme("wint4"), tmp_path / "model")
    command = ["bench", str(tmp_path / "model"), "--peer", "llama.cpp"]
    assert main([*command, "--llama-cpp", str(tmp_path)]) != 0
    written = capsys.readouterr()
    assert "there is no" in written.err
    assert "measuring" not in written.err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(command) != 0
    assert "llama.cpp is not installed: pip install xllamacpp" in capsys.readouterr().err
