"""Quantizing a checkpoint: errors told, interruptions survived, failures clean, calibration of use."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ernie45
from ernie45.checkpoint.gguf import read_gguf
from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.source import Source, open_source
from ernie45.errors import CapacityError, CheckpointError, ShapeError, UsageError
from ernie45.kernels.packed import PackedFormat, restore
from ernie45.quant.calibration import Calibration, Inputs, calibrate
from ernie45.quant.folder import PackedSource
from ernie45.quant.gptq import gptq, shifted_target
from ernie45.quant.quantize import quantize_checkpoint
from ernie45.quant.scheme import Rule, Scheme
from ernie45.store.convert import convert


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "quantizing" in path.name]


def _calibration(seed: int = 0, chunks: int = 4) -> Calibration:
    ids = torch.randint(101, (chunks, 40), generator=torch.Generator().manual_seed(seed))
    return Calibration(chunks_CT=ids, origin={"seed": seed})


def test_report_says_what_the_folder_holds(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source_folder = checkpoint(moe=True, mtp=1)
    calls: list[tuple[int, int]] = []
    report = quantize_checkpoint(source_folder, tmp_path / "out", "wint4", progress=lambda *c: calls.append(c))
    original, result = open_source(source_folder), open_source(tmp_path / "out")
    for name, facts in report.tensors.items():
        exact = torch.empty(result.shapes[name])
        original.fill(exact, name, ())
        stored = next(stored for stored in result.layout if stored.name == name)
        error = float((result.read(stored).double() - exact.double()).norm() / exact.double().norm())
        assert facts["relative_error"] == pytest.approx(error, rel=1e-4), name
        assert facts["method"] == "search"
    assert report.worst(1)[0][1] == max(facts["relative_error"] for facts in report.tensors.values())
    assert json.loads((tmp_path / "out/quantization.json").read_text())["tensors"] == report.tensors
    assert isinstance(result, PackedSource)
    files = sum(entry.size_bytes for entry in result.index.entries.values())
    assert report.size_after_bytes == files
    values = sum(torch.Size(shape).numel() for shape in result.shapes.values())
    assert report.bits_per_weight == pytest.approx(8 * files / values)
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1] == files
    assert calls == sorted(calls)
    assert not _leftovers(tmp_path)


def test_plain_tensors_are_the_originals(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source_folder = checkpoint(moe=True, use_bias=True)
    original, out = load_model(source_folder), tmp_path / "out"
    quantize_checkpoint(source_folder, out, "wint8")
    quantized = load_model(out)
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name]), name


def test_scheme_and_group_size_matter(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(moe=True, hidden_size=192, num_hidden_layers=2)
    errors = {}
    groups = {"wint8": (None, 0), "wint4": (None, 32), "wint4-all": (None, 64, 128)}
    for scheme, group in ((name, group) for name in groups for group in groups[name]):
        report = quantize_checkpoint(folder, tmp_path / "out", scheme, group_size=group, overwrite=True)
        errors[scheme, group] = {name: facts["relative_error"] for name, facts in report.tensors.items()}
    attention, experts = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.mlp.experts.up_gate_proj"
    assert errors["wint8", None][attention] < errors["wint8", 0][attention] < 0.02
    assert errors["wint4", None][attention] == errors["wint8", None][attention]
    assert errors["wint4", None][experts] > 5 * errors["wint8", None][experts]
    assert errors["wint4", 32][experts] < errors["wint4", None][experts]
    assert errors["wint4-all", None][experts] == errors["wint4", None][experts]
    ascending = [errors["wint4-all", group][attention] for group in (None, 64, 128)]
    assert ascending == sorted(set(ascending))
    own = Scheme(name="mine", rules=(Rule(pattern=attention, format=PackedFormat(bits=4, group=0)),))
    assert list(quantize_checkpoint(folder, tmp_path / "own", own).tensors) == [attention]
    assert not load_model(tmp_path / "own").get_submodule("model.layers.0.mlp.up_gate_proj").weight.is_meta


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ernie45.quant.calibration import Calibration
from ernie45.quant.quantize import quantize_checkpoint
import ernie45.quant.work as work
source, target, stop_after = sys.argv[1], sys.argv[2], int(sys.argv[3])
finish, count = work.WorkFolder.finish, 0
def counted(self, *arguments):
    global count
    finish(self, *arguments)
    count += 1
    if count == stop_after:
        Path(target).with_name("reached").touch()
        import time
        time.sleep(60)
work.WorkFolder.finish = counted
ids = torch.randint(101, (4, 40), generator=torch.Generator().manual_seed(0))
quantize_checkpoint(source, target, "wint4", calibration=Calibration(chunks_CT=ids, origin={"seed": 0}))
print(count)
"""


def _run(source: Path, target: Path, stop_after: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(ernie45.__file__).parents[1])}
    arguments = [sys.executable, "-c", SCRIPT, str(source), str(target), str(stop_after)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _kill_when_reached(process: subprocess.Popen[str], mark: Path) -> None:
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    mark.unlink()
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_and_run_again_gives_the_same_bytes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint(moe=True, mtp=1)
    whole = _run(source, tmp_path / "whole", 0)
    total = int(whole.communicate()[0])
    killed = tmp_path / "killed"
    journal = tmp_path / ".killed.quantizing.journal"
    # The plain tensors, layer 0 and of layer 1 attention and half of the experts; then as far in layer 2.
    for stop_after, layer in ((8, 1), (6, 2)):
        _kill_when_reached(_run(source, killed, stop_after), tmp_path / "reached")
        assert not killed.exists()
        last = json.loads(journal.read_bytes().splitlines()[-1])
        assert last["key"] == f"model.layers.{layer}.mlp.experts.up_gate_proj"
        assert last["facts"]["method"] == "gptq"
    # Half-written data and half a journal line, as a power cut leaves them.
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 8 + 6
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-10])
    shard = tmp_path / ".killed.quantizing" / "model-00001-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 255
    shard.write_bytes(raw)
    output, errors = _run(source, killed, 0).communicate()
    assert int(output) == total - (8 + 6) + 2, errors
    assert _bytes(killed) == _bytes(tmp_path / "whole")
    assert not _leftovers(tmp_path)


def test_killed_between_the_last_two_steps(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The folder has its name and the journal is still there: the next run sees that nothing is left to do."""
    source, out = checkpoint(), tmp_path / "out"
    journal = tmp_path / ".out.quantizing.journal"
    kept = {}

    def keep(done: int, total: int) -> None:
        if done == total:
            kept["journal"] = journal.read_bytes()

    report = quantize_checkpoint(source, out, "wint8", progress=keep)
    journal.write_bytes(kept["journal"])
    assert quantize_checkpoint(source, out, "wint8") == report
    assert not journal.exists()


def test_other_settings_do_not_go_on_with_old_work(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, out = checkpoint(), tmp_path / "out"

    def interrupted(scheme: str, resume: bool) -> int:
        seen: list[int] = []

        def stop(done: int, total: int) -> None:
            seen.append(done)
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, out, scheme, progress=stop, resume=resume)
        return seen[0]

    assert interrupted("wint8", True) == 0
    assert interrupted("wint8", True) > 0
    assert interrupted("wint8", False) == 0
    assert interrupted("wint4-all", True) == 0
    assert interrupted("wint4-all", True) > 0
    # A changed source is another work, too.
    os.utime(source / "model.safetensors", ns=(1, 1))
    assert interrupted("wint4-all", True) == 0


def test_existing_folders(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, out = checkpoint(), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize_checkpoint(source, out, "wint8")
    assert (out / "precious").exists()
    assert not _leftovers(tmp_path)
    quantize_checkpoint(source, out, "wint8", overwrite=True)
    assert not (out / "precious").exists()
    load_model(out)


def test_what_is_not_ours_is_left_alone(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint()
    foreign = tmp_path / ".out.quantizing"
    foreign.mkdir()
    (foreign / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="in the way"):
        quantize_checkpoint(source, tmp_path / "out", "wint8")
    (tmp_path / ".out.quantizing.journal").write_text("a diary\n")
    with pytest.raises(CheckpointError, match="in the way"):
        quantize_checkpoint(source, tmp_path / "out", "wint8")
    assert (foreign / "precious").exists()
    assert (tmp_path / ".out.quantizing.journal").read_text() == "a diary\n"


def test_a_second_process_is_kept_out(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint()

    def second(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="another process"):
            quantize_checkpoint(source, tmp_path / "out", "wint8")

    quantize_checkpoint(source, tmp_path / "out", "wint8", progress=second)


def test_unreadable_and_infinite_weights(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint()
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 3] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down_proj\.weight holds NaN or infinity"):
        quantize_checkpoint(source, tmp_path / "out", "wint8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]
    raw = file.read_bytes()

    def truncate(done: int, total: int) -> None:
        file.write_bytes(raw[:5000])

    with pytest.raises(CheckpointError, match="ends at byte"):
        quantize_checkpoint(source, tmp_path / "out", "wint8", progress=truncate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]


def test_full_disk(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A file size limit stands in for a disk that fills up: clear error, no folder, and the next run goes on."""
    source, out = checkpoint(), tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CapacityError, match="no room to write"):
            quantize_checkpoint(source, out, "wint8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not out.exists()
    quantize_checkpoint(source, out, "wint8")
    assert not _leftovers(tmp_path)
    load_model(out)


def test_no_room_is_said_before_any_work(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint()
    monkeypatch.setattr("ernie45.checkpoint.atomic._free_bytes", lambda folder: 1000)
    with pytest.raises(CapacityError, match="1000 are free"):
        quantize_checkpoint(source, tmp_path / "out", "wint8")


def test_packed_sources_are_refused(packed: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="packed already"):
        quantize_checkpoint(packed("wint8"), tmp_path / "twice", "wint4-all")


def test_gguf_sources(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, file = checkpoint(moe=True), tmp_path / "m.gguf"
    convert(folder, file, "gguf")
    assert read_gguf(file).tensors
    from_folder = quantize_checkpoint(folder, tmp_path / "a", "wint4")
    from_gguf = quantize_checkpoint(file, tmp_path / "b", "wint4")
    assert from_folder.tensors == from_gguf.tensors
    packed_files = [f"model-0000{i}-of-00003.safetensors" for i in (2, 3)]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in packed_files)


def _output_error(source: Path, out: Path, ids: torch.Tensor) -> float:
    """Distance of the dequantized network's logits from the original's: weights alone, no rounding of activations."""
    from ernie45.models.build import build_model

    packed_source = open_source(out)
    model = build_model(packed_source.config).eval()
    with torch.no_grad():
        for stored in packed_source.layout:
            model.state_dict()[stored.name].copy_(packed_source.read(stored))
        exact = load_model(source)(ids)
        return float((model(ids) - exact).norm() / exact.norm())


@pytest.mark.parametrize("moe", [False, True])
def test_calibration_brings_outputs_closer(checkpoint: Callable[..., Path], tmp_path: Path, moe: bool) -> None:
    source = checkpoint(moe=moe, num_hidden_layers=2)
    calibration = _calibration(chunks=24)
    plain = quantize_checkpoint(source, tmp_path / "plain", "wint4-all")
    steered = quantize_checkpoint(source, tmp_path / "steered", "wint4-all", calibration=calibration)
    methods = {name: facts["method"] for name, facts in steered.tensors.items()}
    assert methods["model.layers.0.self_attn.qkv_proj.weight"] == "gptq"
    assert methods["model.embed_tokens.weight"] == "search"
    assert {facts["method"] for facts in plain.tensors.values()} == {"search"}
    ids = _calibration(seed=9).chunks_CT
    assert _output_error(source, tmp_path / "steered", ids) < 0.97 * _output_error(source, tmp_path / "plain", ids)
    stated = json.loads((tmp_path / "steered" / "config.json").read_text())["quantization_config"]
    assert stated["calibration"] == {"seed": 0}


class _Recorder:
    """A rounder that keeps what it is told, and moves every matrix by a seeded part of itself."""

    def __init__(self, source: Source, by: float) -> None:
        self.seen: dict[str, list[Inputs]] = {}
        self._source, self._by = source, by

    def rounded(self, name: str, inputs: Iterator[Inputs]) -> Iterator[torch.Tensor]:
        self.seen[name] = list(inputs)
        return iter(self.moved(name).flatten(0, -3))

    def moved(self, name: str) -> torch.Tensor:
        weights = torch.empty(self._source.shapes[name])
        self._source.fill(weights, name, ())
        noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(len(name)))
        weights = weights * (1 + self._by * noise)
        return weights if weights.ndim == 3 else weights[None]


@pytest.mark.parametrize("by", [0.0, 0.2])
@pytest.mark.parametrize("use_bias", [False, True])
def test_statistics_are_the_inputs_behind_rounded_matrices(
    checkpoint: Callable[..., Path], by: float, use_bias: bool
) -> None:
    """Against inputs caught in a run of the whole network with the same matrices, and in one as it was."""
    folder, calibration = checkpoint(moe=True, use_bias=use_bias), _calibration()
    source = open_source(folder)
    recorder = _Recorder(source, by)
    calibrate(source, calibration, recorder, 3)
    original, rounded = load_model(folder), load_model(folder)
    for name in recorder.seen:
        rounded.get_parameter(name).data.copy_(recorder.moved(name).view(rounded.get_parameter(name).shape))
    before, after = (_caught(model, calibration.chunks_CT) for model in (original, rounded))
    assert len(recorder.seen) == 4 + 2 * 6
    assert {inputs.of_layer for seen in recorder.seen.values() for inputs in seen if len(seen) > 1} == {False, True}
    for name, seen in recorder.seen.items():
        if len(seen) == 1:
            path = name.removesuffix(".weight")
            x, x_before = (torch.cat([inputs[0] for inputs in caught[path]]) for caught in (after, before))
            torch.testing.assert_close(seen[0].moments_KK, x.T @ x, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(seen[0].shift_KK, (x_before - x).T @ x, rtol=1e-3, atol=2e-3)
            assert seen[0].tokens == calibration.chunks_CT.numel()
        else:
            _check_experts(rounded, name, seen, after[name.rpartition(".")[0]])


def _caught(model: torch.nn.Module, chunks_CT: torch.Tensor) -> dict[str, list[Any]]:
    """Inputs of every matrix and of the experts, by name."""
    caught: dict[str, list[Any]] = {}

    def catch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            caught.setdefault(name, []).append(inputs)

        return hook

    for name, module in model.named_modules():
        if name.endswith(("_proj", "mlp.experts")):
            module.register_forward_pre_hook(catch(name))
    for chunk in chunks_CT:
        model(chunk[None])
    return caught


def _check_experts(model: torch.nn.Module, name: str, seen: list[Inputs], inputs: list[tuple[Any, ...]]) -> None:
    x, ids = torch.cat([i[0] for i in inputs]), torch.cat([i[1].ids_TK for i in inputs])
    chosen = [x[(ids == expert).any(-1)] for expert in range(8)]
    if name.endswith("down_proj"):
        up_gate = model.get_parameter(name.replace("down_proj", "up_gate_proj"))
        products = [rows @ matrix.T for rows, matrix in zip(chosen, up_gate, strict=True)]
        chosen = [torch.nn.functional.silu(p[:, :40]) * p[:, 40:] for p in products]
    shared = sum(rows.T @ rows for rows in chosen)
    for rows, found in zip(chosen, seen, strict=True):
        # 160 tokens, 3 of 8 experts each, 96 or 40 columns: some experts see too few
        few = len(rows) < rows.shape[1]
        assert (found.tokens, found.of_layer, found.shift_KK) == (len(rows), few, None)
        torch.testing.assert_close(found.moments_KK, shared if few else rows.T @ rows, rtol=1e-3, atol=1e-3)


def test_experts_on_layer_statistics_are_counted(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    facts = quantize_checkpoint(checkpoint(moe=True), tmp_path / "out", "wint4", calibration=_calibration()).tensors
    experts = facts["model.layers.1.mlp.experts.up_gate_proj"]
    assert 0 < experts["experts_on_layer_statistics"] < 8
    assert experts["least_tokens"] < 96
    assert facts["model.layers.1.self_attn.o_proj.weight"]["least_tokens"] == 160


def test_wrong_calibration(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for ids in (torch.zeros(3, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(2, 4)):
        with pytest.raises(ShapeError, match="expected int64"):
            Calibration(chunks_CT=ids, origin={})
    beyond = Calibration(chunks_CT=torch.full((1, 8), 101), origin={})
    with pytest.raises(ShapeError, match="token ids up to 101"):
        quantize_checkpoint(checkpoint(), tmp_path / "out", "wint8", calibration=beyond)


class _Gptq:
    """A rounder in memory; `onward` chooses what the text goes on with, rounded matrices or the originals."""

    def __init__(self, source: Source, onward: str) -> None:
        self.matrices: dict[str, torch.Tensor] = {}
        self._source, self._onward = source, onward

    def rounded(self, name: str, inputs: Iterator[Inputs]) -> Iterator[torch.Tensor]:
        format, weights = PackedFormat(bits=4, group=64), torch.empty(self._source.shapes[name])
        self._source.fill(weights, name, ())
        matrices = weights if weights.ndim == 3 else weights[None]
        found = []
        for matrix, seen in zip(matrices, inputs, strict=True):
            target = matrix
            if seen.shift_KK is not None:
                target = shifted_target(matrix, seen.moments_KK, seen.shift_KK, seen.tokens)
            result = gptq(matrix, seen.moments_KK, format, target_NK=target)
            found.append(restore(result.values_NK, result.scales, format))
        self.matrices[name] = torch.stack(found).view(weights.shape)
        return iter(matrices if self._onward == "original" else found)


@pytest.mark.parametrize("moe", [False, True])
def test_rounding_behind_rounded_layers_keeps_the_networks_outputs(checkpoint: Callable[..., Path], moe: bool) -> None:
    """On the text itself, against rounding every matrix for the inputs of the network as it was."""
    folder = checkpoint(moe=moe, num_hidden_layers=4)
    source, calibration, errors = open_source(folder), _calibration(chunks=24), {}
    exact = load_model(folder)(calibration.chunks_CT)
    for onward in ("original", "rounded"):
        rounder = _Gptq(source, onward)
        calibrate(source, calibration, rounder, 4)
        model = load_model(folder)
        for name, matrix in rounder.matrices.items():
            model.get_parameter(name).data.copy_(matrix)
        errors[onward] = float((model(calibration.chunks_CT) - exact).norm() / exact.norm())
    assert errors["rounded"] < 0.85 * errors["original"]
