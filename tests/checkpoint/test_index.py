"""Checkpoint folders: shards and index held against each other, and the sharded writer."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ernie45.checkpoint.index import INDEX_NAME, WEIGHTS_NAME, open_folder, write_sharded
from ernie45.checkpoint.safetensors import read_tensor
from ernie45.errors import CapacityError, CheckpointError, NotFoundError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_shards(folder: Path) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / ONE, {"format": "pt", "part": "1"})
    save_file({"c": torch.arange(4)}, folder / TWO, {"format": "pt", "part": "2"})
    weight_map: dict[str, object] = {"a": ONE, "b": ONE, "c": TWO}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"not ours")
    index = open_folder(tmp_path)
    assert index.files == [tmp_path / ONE, tmp_path / TWO]
    assert index.metadata == {"format": "pt"}
    assert index.total_bytes == 8 + 12 + 32
    assert {name: entry.file.name for name, entry in index.entries.items()} == {"a": ONE, "b": ONE, "c": TWO}
    assert read_tensor(index.entries["c"]).tolist() == [0, 1, 2, 3]


def test_single_files(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "._weights.safetensors").write_bytes(b"")
    assert open_folder(tmp_path).files == [tmp_path / "weights.safetensors"]
    save_file({"y": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"2 weight files \(other.safetensors, weights.safetensors\)"):
        open_folder(tmp_path)
    save_file({"z": torch.ones(2)}, tmp_path / WEIGHTS_NAME)
    assert list(open_folder(tmp_path).entries) == ["z"]


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=f"looked for {INDEX_NAME}"):
        open_folder(tmp_path)
    with pytest.raises(NotFoundError, match="no folder"):
        open_folder(tmp_path / "nothing")
    (tmp_path / WEIGHTS_NAME).symlink_to("gone")
    with pytest.raises(NotFoundError, match="no file"):
        open_folder(tmp_path)


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    """The cache of the Hugging Face hub: snapshots/x/file -> ../../blobs/hash."""
    two_shards(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "x"
    snapshot.mkdir(parents=True)
    for name in (ONE, TWO, INDEX_NAME):
        (tmp_path / "blobs" / name).rename(tmp_path / "blobs" / f"hash of {name}")
        (snapshot / name).symlink_to(f"../../blobs/hash of {name}")
    index = open_folder(snapshot)
    assert index.files == [snapshot / ONE, snapshot / TWO]
    assert read_tensor(index.entries["a"]).tolist() == [1, 1]


def test_draft_folder_is_merged(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / "mtp").mkdir()
    (tmp_path / "mtp" / "config.json").write_text("{}")
    assert len(open_folder(tmp_path).entries) == 3
    save_file({"ernie.mtp_block.0": torch.ones(5)}, tmp_path / "mtp" / WEIGHTS_NAME)
    index = open_folder(tmp_path)
    assert index.entries["ernie.mtp_block.0"].file == tmp_path / "mtp" / WEIGHTS_NAME
    assert index.total_bytes == 8 + 12 + 32 + 20
    save_file({"a": torch.ones(2)}, tmp_path / "mtp" / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"tensor 'a' is in .*00001.* and again in .*mtp"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": ONE}, "'d' .*promises"),
        ({"c": ONE}, "'c' .*promises"),
        ({"b": None}, "plain name"),
        ({"b": 1}, "plain name"),
        ({"b": [ONE]}, "plain name"),
        ({"d": "model-00003.safetensors"}, "missing: download"),
        ({"b": f"/{ONE}"}, "plain name"),
        ({"b": f"../x/{ONE}"}, "plain name"),
        ({"b": "sub/" + ONE}, "plain name"),
        ({"b": "sub\\" + ONE}, "plain name"),
        ({"b": "..safetensors"}, "plain name"),
        ({"b": "\0.safetensors"}, "plain name"),
        ({"b": "weights.bin"}, "plain name"),
        ({"d": "x" * 300 + ".safetensors"}, "cannot open"),
    ],
)
def test_indexes_that_lie(change: dict[str, object], message: str, tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    write_index(tmp_path, {**weight_map, **change})
    with pytest.raises(CheckpointError, match=message):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "JSON"),
        ("[]", "expected an object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": [1]}', "no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' appears twice"),
        ('{"weight_map": {"a": "\\ud800.safetensors"}}', "JSON"),
        ('{"a":' * 100_000, "nested"),
    ],
)
def test_broken_indexes(content: str, message: str, tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_folder(tmp_path)


def test_contradictions(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    del weight_map["b"]
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"tensor 'b' .*does not place there"):
        open_folder(tmp_path)
    two_shards(tmp_path)
    save_file({"a": torch.ones(2), "c": torch.arange(4)}, tmp_path / TWO)
    with pytest.raises(CheckpointError, match="tensor 'a'"):
        open_folder(tmp_path)
    two_shards(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="stale"):
        open_folder(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    (tmp_path / TWO).unlink()
    (tmp_path / TWO).mkdir()
    with pytest.raises(CheckpointError, match="regular"):
        open_folder(tmp_path)
    os.truncate(tmp_path / INDEX_NAME, 100_000_001)
    with pytest.raises(CheckpointError, match="100000001 bytes"):
        open_folder(tmp_path)


# Writing


def test_sharded_writer(tmp_path: Path) -> None:
    sizes = {"a": 3, "b": 2, "big": 50, "c": 4, "d": 1, "e": 1}
    tensors = {name: torch.full((size,), float(size)) for name, size in sizes.items()}
    plan = [(name, torch.float32, (size,)) for name, size in sizes.items()]
    with write_sharded(tmp_path / "out", plan, max_shard_bytes=20, metadata={"format": "pt"}) as writer:
        for name in reversed(sizes):
            writer.write(name, tensors[name])
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(sizes.values())
    shard_of = {name: int(file[6:11]) for name, file in index["weight_map"].items()}
    assert shard_of == {"a": 1, "b": 1, "big": 2, "c": 3, "d": 3, "e": 4}
    loaded: dict[str, torch.Tensor] = {}
    for number in range(1, 5):
        loaded |= load_file(tmp_path / "out" / f"model-{number:05d}-of-00004.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    opened = open_folder(tmp_path / "out")
    assert opened.metadata == {"format": "pt"}
    assert opened.total_bytes == 4 * sum(sizes.values())
    with pytest.raises(CheckpointError, match="holds weights already"):
        write_sharded(tmp_path / "out", plan, max_shard_bytes=20)


def test_one_shard_is_a_single_file(tmp_path: Path) -> None:
    with write_sharded(tmp_path, [("x", torch.bfloat16, (4,))], max_shard_bytes=8, store_bf16_as_u16=True) as writer:
        writer.write("x", torch.ones(4, dtype=torch.bfloat16))
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_NAME]
    assert open_folder(tmp_path).entries["x"].stored_dtype == "U16"


def test_unfinished_folders_keep_nothing(tmp_path: Path) -> None:
    plan = [(name, torch.float32, (4,)) for name in "abc"]
    writer = write_sharded(tmp_path, plan, max_shard_bytes=16)
    writer.write("a", torch.ones(4))
    writer.write("b", torch.ones(4))
    with pytest.raises(CheckpointError, match="already"):
        writer.write("a", torch.ones(4))
    with pytest.raises(CheckpointError, match="not in the plan"):
        writer.write("z", torch.ones(4))
    with pytest.raises(CheckpointError, match="'c'"):
        writer.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), write_sharded(tmp_path, plan, max_shard_bytes=16):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_bad_plans_are_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = ("a", torch.float32, (4,))
    for plan in ([good, good], [good, ("b", torch.complex64, (1,))], [good, ("b", torch.float32, (-1,))]):
        with pytest.raises(CheckpointError):
            write_sharded(tmp_path, plan, max_shard_bytes=16)
    with pytest.raises(CheckpointError, match="max_shard_bytes"):
        write_sharded(tmp_path, [good], max_shard_bytes=0)
    room = SimpleNamespace(f_bavail=1, f_frsize=30)
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    with pytest.raises(CapacityError, match="needs 32 bytes, 30 are free"):
        write_sharded(tmp_path, [good, ("b", torch.float32, (4,))], max_shard_bytes=16)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_indexes_are_refused_or_consistent(data: st.DataObject, tmp_path: Path) -> None:
    two_shards(tmp_path)
    content = bytearray((tmp_path / INDEX_NAME).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        new = data.draw(st.one_of(st.binary(max_size=3), st.just(bytes(content[:at]))))
        content[at : at + data.draw(st.integers(0, 20))] = new
    (tmp_path / INDEX_NAME).write_bytes(content)
    try:
        index = open_folder(tmp_path)
    except (CheckpointError, NotFoundError):
        return
    assert {name: entry.file.name for name, entry in index.entries.items()} == {"a": ONE, "b": ONE, "c": TWO}
