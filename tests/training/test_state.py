"""Checkpoints of a run: whole or not there, bit for bit, and no more of them than asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie45.checkpoint.load import load_model
from ernie45.errors import CapacityError, CheckpointError, ConfigError
from ernie45.models.text import CausalLM
from ernie45.training import state
from ernie45.training.state import (
    CheckpointConfig,
    Checkpoints,
    ModelWeights,
    Snapshot,
    checkpoint_paths,
    read_checkpoint,
)


def snapshot(step: int, value: float = 0.0) -> Snapshot:
    return Snapshot(
        step=step, values={"rows": {"at": step}}, tensors={"optimizer": {"w.exp_avg": torch.full((3,), value)}}
    )


def checkpoints(folder: Path, model: CausalLM, **fields: object) -> Checkpoints:
    return Checkpoints(folder, ModelWeights(model, {"note.txt": b"hello"}), CheckpointConfig(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_comes_back_bit_for_bit(
    tmp_path: Path, small_model: Callable[..., CausalLM], dtype: torch.dtype
) -> None:
    model = small_model(moe=True, mtp=1, dtype=dtype)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = checkpoints(tmp_path, model)
    own.save(snapshot(7, 1.25))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    back = own.restore(tmp_path / "step-00000007")
    assert (back.step, back.values) == (7, {"rows": {"at": 7}})
    assert back.tensors["optimizer"]["w.exp_avg"].tolist() == [1.25] * 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert (tmp_path / "step-00000007/model/note.txt").read_bytes() == b"hello"


def test_the_weights_of_a_checkpoint_are_a_model(tmp_path: Path, small_model: Callable[..., CausalLM]) -> None:
    model = small_model(moe=True, mtp=1)
    checkpoints(tmp_path, model).save(snapshot(1))
    ids = torch.arange(7)[None]
    loaded = load_model(tmp_path / "step-00000001/model")
    assert torch.equal(loaded(ids), model(ids))


def test_old_ones_go_and_half_ones_are_not_seen(tmp_path: Path, small_model: Callable[..., CausalLM]) -> None:
    own = checkpoints(tmp_path, small_model(), keep=2)
    for step in (1, 2, 3):
        own.save(snapshot(step))
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003/state.json").unlink()
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000002"]
    assert checkpoint_paths(tmp_path / "none") == []


def test_a_changed_file_is_refused_by_name(tmp_path: Path, small_model: Callable[..., CausalLM]) -> None:
    checkpoints(tmp_path, small_model()).save(snapshot(1))
    path = tmp_path / "step-00000001"
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="was changed since it was written: optimizer.safetensors"):
        read_checkpoint(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors; resume from another"):
        read_checkpoint(path)
    (path / "state.json").write_text(json.dumps({"format": 99, "step": 1, "values": {}, "sha256": {}}))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        read_checkpoint(path)
    (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        read_checkpoint(path)


def test_written_on_a_thread_it_holds_the_moment_of_the_call(
    tmp_path: Path, small_model: Callable[..., CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    from ernie45.checkpoint.write import write_folder as write

    def slow(*args: object, **fields: object) -> None:
        time.sleep(0.3)
        write(*args, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(state, "write_folder", slow)
    own = checkpoints(tmp_path, model, asynchronous=True)
    moment = torch.zeros(3)
    start = time.perf_counter()
    own.save(Snapshot(step=1, values={}, tensors={"optimizer": {"m": moment}}))
    assert time.perf_counter() - start < 0.3
    with torch.no_grad():
        moment.add_(1)
        for tensor in model.state_dict().values():
            tensor.add_(1)
    own.wait()
    back = own.restore(tmp_path / "step-00000001")
    assert back.tensors["optimizer"]["m"].tolist() == [0, 0, 0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_fails_on_the_thread_is_raised(
    tmp_path: Path, small_model: Callable[..., CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise CapacityError("no room")

    own = checkpoints(tmp_path, small_model(), asynchronous=True)
    own.save(snapshot(1))
    own.wait()
    monkeypatch.setattr(state, "write_folder", full)
    own.save(snapshot(2))
    with pytest.raises(CapacityError, match="no room"):
        own.save(snapshot(3))
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "half a checkpoint was left"


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="every -1"):
        CheckpointConfig(every=-1)
    with pytest.raises(ConfigError, match="keep 0"):
        CheckpointConfig(keep=0)
