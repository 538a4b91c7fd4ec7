"""The safetensors reader and writer, against the reference library and against files that lie."""

import errno
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ernie45.checkpoint import atomic
from ernie45.checkpoint import safetensors as ours
from ernie45.checkpoint.safetensors import (
    STORED_DTYPES,
    SafetensorsWriter,
    TensorEntry,
    map_tensor,
    read_header,
    read_into,
    read_tensor,
)
from ernie45.errors import CapacityError, CheckpointError, NotFoundError

SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (5, 7), (2, 3, 4)]

quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits of any type, so NaN payloads and denormals are among them."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    count = torch.empty(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert bits(left) == bits(right)


def many_tensors() -> dict[str, torch.Tensor]:
    return {
        f"{stored}.{number}": random_tensor(dtype, shape, seed=number)
        for stored, dtype in STORED_DTYPES.items()
        for number, shape in enumerate(SHAPES)
    }


def plan_of(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(path: Path, tensors: dict[str, torch.Tensor], **options: Any) -> None:
    with SafetensorsWriter(path, plan_of(tensors), **options) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def f32(shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


# Reading and writing, against the library


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = many_tensors()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "ü": "\n"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt", "ü": "\n"}
    assert header.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = header.entries[name]
        assert (entry.name, entry.stored_dtype) == (name, name.split(".")[0])
        assert_same(read_tensor(entry), tensor)
        out = torch.empty_like(tensor)
        read_into(entry, out)
        assert_same(out, tensor)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = many_tensors()
    write(tmp_path / "a.safetensors", tensors, metadata={"format": "pt"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_data_is_aligned_and_keeps_planned_order_among_equal_sizes(tmp_path: Path) -> None:
    tensors = {
        name: torch.zeros(3, dtype=dtype)
        for name, dtype in zip("zyxw", [torch.bfloat16, torch.float32] * 2, strict=True)
    }
    write(tmp_path / "a", tensors, align=256)
    entries = read_header(tmp_path / "a").entries
    assert list(entries) == ["y", "w", "z", "x"]
    assert [entry.offset for entry in entries.values()] == [256, 268, 280, 286]
    write(tmp_path / "b", tensors)
    assert read_header(tmp_path / "b").entries["y"].offset % 64 == 0


def test_bfloat16_as_u16_is_the_same_bits(tmp_path: Path) -> None:
    tensor = random_tensor(torch.bfloat16, (4, 5))
    write(tmp_path / "a", {"x": tensor, "y": torch.ones(1)}, store_bf16_as_u16=True)
    entries = read_header(tmp_path / "a").entries
    assert (entries["x"].dtype, entries["x"].stored_dtype) == (torch.uint16, "U16")
    assert_same(read_tensor(entries["x"]), tensor.view(torch.uint16))
    assert_same(read_tensor(entries["x"].as_bfloat16()), tensor)
    assert load_file(tmp_path / "a")["x"].dtype == torch.uint16
    with pytest.raises(CheckpointError, match="'y' is stored as F32"):
        entries["y"].as_bfloat16()


def test_writes_values_of_views_and_parameters(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write(tmp_path / "a", {"t": base.t(), "p": torch.nn.Parameter(base), "s": base[:, ::2]})
    loaded = load_file(tmp_path / "a")
    assert torch.equal(loaded["t"], base.t())
    assert torch.equal(loaded["p"], base)
    assert torch.equal(loaded["s"], base[:, ::2])


def test_reads_into_a_parameter_in_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor(torch.int16, (1000,))
    monkeypatch.setattr(atomic, "_BLOCK_BYTES", 37)
    write(tmp_path / "a", {"x": tensor, "p": torch.arange(9.0)})
    monkeypatch.setattr(ours, "_READ_BLOCK_BYTES", 7)
    entries = read_header(tmp_path / "a").entries
    assert_same(read_tensor(entries["x"]), tensor)
    parameter = torch.nn.Parameter(torch.zeros(9))
    place = parameter.data_ptr()
    read_into(entries["p"], parameter)
    assert parameter.tolist() == list(range(9))
    assert parameter.data_ptr() == place


def test_map_equals_read_and_shares_one_map(tmp_path: Path) -> None:
    tensors = many_tensors()
    write(tmp_path / "a", tensors)
    before = (tmp_path / "a").read_bytes()
    open_before = len(os.listdir("/proc/self/fd"))
    mapped = {name: map_tensor(entry) for name, entry in read_header(tmp_path / "a").entries.items()}
    assert len(os.listdir("/proc/self/fd")) <= open_before + 1
    for name, tensor in tensors.items():
        assert_same(mapped[name], tensor)
    mapped["F32.4"].fill_(7)
    assert (tmp_path / "a").read_bytes() == before
    value = mapped["I64.4"].clone()
    (tmp_path / "a").unlink()
    del mapped["F32.4"]
    assert torch.equal(mapped["I64.4"], value)


def test_map_refuses_unaligned_and_shortened(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a", {"x": f32([2], 0, 8)}, b"\0" * 8)
    entry = read_header(path).entries["x"]
    assert entry.offset % 4 != 0
    with pytest.raises(CheckpointError, match=r"begins at byte \d+, no multiple of its item size 4"):
        map_tensor(entry)
    write(path, {"x": torch.zeros(2)})
    entry = read_header(path).entries["x"]
    os.truncate(path, entry.offset + 3)
    with pytest.raises(CheckpointError, match="truncated"):
        map_tensor(entry)


def test_read_refuses_a_destination_that_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": torch.zeros(2, 3)})
    entry = read_header(tmp_path / "a").entries["x"]
    for out in (torch.zeros(3, 2), torch.zeros(2, 3).half(), torch.zeros(3, 2).t(), torch.empty(2, 3, device="meta")):
        with pytest.raises(CheckpointError, match="'x'"):
            read_into(entry, out)


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": torch.zeros(100)})
    entry = read_header(tmp_path / "a").entries["x"]
    os.truncate(tmp_path / "a", entry.offset + 17)
    with pytest.raises(CheckpointError, match=f"ends at byte {entry.offset + 17}"):
        read_tensor(entry)


# Files that lie

BAD_HEADERS: dict[str, tuple[object, bytes, str]] = {
    "array": (b"[]", b"", "begins with"),
    "leading space": (b" {}", b"", "begins with"),
    "utf-16": ("{}".encode("utf-16"), b"", "begins with"),
    "broken": (b'{"a":', b"", "JSON"),
    "not utf-8": (b'{"\xff":1}', b"", "JSON"),
    "surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b"", "JSON"),
    "trailing": (b"{}{}", b"", "JSON"),
    "nan": (b'{"a":NaN}', b"", "NaN"),
    "long number": (b'{"a":' + b"9" * 100_000 + b"}", b"", "100000 digits"),
    "bomb": (b'{"a":' + b"[" * 100_000, b"", "nested"),
    "object bomb": (b'{"a":' * 100_000, b"", "nested"),
    "deep value": (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", b"", "needs exactly"),
    "duplicate": (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}', b"", "twice"),
    "duplicate field": (b'{"a":{"dtype":"F32","shape":[0],"shape":[0],"data_offsets":[0,0]}}', b"", "twice"),
    "no object": ({"a": 1}, b"", "needs exactly"),
    "missing field": ({"a": {"dtype": "F32", "shape": [0]}}, b"", "needs exactly"),
    "extra field": ({"a": {**f32([0], 0, 0), "x": 1}}, b"", "needs exactly"),
    "dtype": ({"a": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}, b"", "F4"),
    "dtype list": ({"a": {"dtype": ["F32"], "shape": [0], "data_offsets": [0, 0]}}, b"", "dtype"),
    "negative size": ({"a": f32([-1], 0, 0)}, b"", "shape"),
    "float size": ({"a": f32([1.0], 0, 4)}, b"0000", "shape"),
    "bool size": ({"a": f32([True], 0, 4)}, b"0000", "shape"),
    "shape number": ({"a": f32(1, 0, 4)}, b"0000", "shape"),
    "too many sizes": ({"a": f32([1] * 17, 0, 4)}, b"0000", "up to 16"),
    "huge": ({"a": f32([2**62, 2**62], 0, 0)}, b"", "more than"),
    "wraps to zero": ({"a": f32([2**32, 2**32], 0, 0)}, b"", "more than"),
    "zero hides huge": ({"a": f32([0, 2**62, 2**62], 0, 0)}, b"", "more than"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"0000", "data_offsets"),
    "bool offset": ({"a": f32([1], False, 4)}, b"0000", "data_offsets"),
    "backwards": ({"a": f32([0], 4, 0)}, b"0000", "from 0 to 4"),
    "outside": ({"a": f32([2], 0, 8)}, b"0000", "from 0 to 4"),
    "size": ({"a": f32([2], 0, 4)}, b"0000", "takes 8 bytes"),
    "overlap": ({"a": f32([1], 0, 4), "b": f32([2], 0, 8)}, b"0" * 8, "overlaps"),
    "empty inside": ({"a": f32([1], 0, 4), "b": f32([0], 2, 2)}, b"0000", "overlaps"),
    "hole": ({"a": f32([1], 4, 8)}, b"0" * 8, "hole"),
    "rest": ({"a": f32([1], 0, 4)}, b"0" * 5, "file holds 5"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "strings"),
    "metadata list": ({"__metadata__": []}, b"", "strings"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(case: str, tmp_path: Path) -> None:
    header, data, message = BAD_HEADERS[case]
    path = write_raw(tmp_path / "a", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 700


def test_bad_lengths_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content, message in [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (b"\xff" * 8, "18446744073709551615"),
        (struct.pack("<Q", 3) + b"{}", "at most 2"),
        (struct.pack("<Q", 0), "begins with"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_header(path)
    os.truncate(path, 300_000_000)
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 100_000_001))
    with pytest.raises(CheckpointError, match="at most 100000000"):
        read_header(path)
    with pytest.raises(NotFoundError, match="nothing"):
        read_header(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="regular"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="regular"):
        read_header(tmp_path / "pipe")


def test_empty_file_and_zero_sizes_beside_large_ones_are_valid(tmp_path: Path) -> None:
    assert read_header(write_raw(tmp_path / "a", {})).entries == {}
    path = write_raw(tmp_path / "b", {"x": f32([0, 2**40], 0, 0)})
    assert read_tensor(read_header(path).entries["x"]).shape == (0, 2**40)


# Writers that are used wrongly, and full disks


def test_writer_refuses_what_was_not_planned(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "a", [("x", torch.float32, (2,))])
    for name, tensor, message in [
        ("y", torch.zeros(2), "not in the plan"),
        ("x", torch.zeros(3), r"\[3\], planned was torch.float32 \[2\]"),
        ("x", torch.zeros(2).half(), "float16"),
        ("x", torch.empty(2, device="meta"), "no plain values"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            writer.write(name, tensor)
    writer.write("x", torch.zeros(2))
    with pytest.raises(CheckpointError, match="already"):
        writer.write("x", torch.zeros(2))
    writer.close()
    assert load_file(tmp_path / "a")["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ([("x", torch.float32, (1,)), ("x", torch.float32, (1,))], {}),
        ([("__metadata__", torch.float32, (1,))], {}),
        ([("x", torch.complex64, (1,))], {}),
        ([("x", torch.float32, (-1,))], {}),
        ([("x", torch.float32, (2**62, 2))], {}),
        ([("\ud800", torch.float32, (1,))], {}),
        ([], {"metadata": {"a": 1}}),
        ([], {"align": 4}),
        ([], {"align": 96}),
    ],
)
def test_bad_plans_are_refused(plan: Any, options: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        SafetensorsWriter(tmp_path / "a", plan, **options)
    assert list(tmp_path.iterdir()) == []


def test_unfinished_files_never_appear(tmp_path: Path) -> None:
    plan = [("x", torch.float32, (2,)), ("y", torch.float32, (2,))]
    writer = SafetensorsWriter(tmp_path / "a", plan)
    writer.write("x", torch.zeros(2))
    assert not (tmp_path / "a").exists()
    with pytest.raises(CheckpointError, match="1 planned tensors were never written, the first is 'y'"):
        writer.close()
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path / "a", plan):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFoundError):
        SafetensorsWriter(tmp_path / "no" / "a", plan)


def test_full_disk_is_a_capacity_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"x": torch.zeros(100)}

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CapacityError, match=r"needs \d+ bytes, \d+ are free"):
            write(tmp_path / "a", tensors)
    with monkeypatch.context() as patch:
        room = SimpleNamespace(f_bavail=99, f_frsize=4)
        patch.setattr(os, "statvfs", lambda _: room)
        with pytest.raises(CapacityError, match="396 are free"):
            write(tmp_path / "a", tensors)
    assert list(tmp_path.iterdir()) == []


# Mutations


@st.composite
def mutations(draw: st.DrawFn, original: bytes) -> bytes:
    """A valid file with some bytes flipped, cut, inserted, repeated or overwritten by extreme numbers."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "truncate", "insert", "splice", "number", "digit"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "truncate":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=20))
            case "splice":
                start = draw(st.integers(0, max(len(data) - 1, 0)))
                data[at : at + draw(st.integers(0, 30))] = data[start : start + draw(st.integers(0, 30))]
            case "number":
                number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)]))
                data[at : at + 8] = struct.pack("<Q", number)
            case "digit":
                digits = [place for place, byte in enumerate(data) if 48 <= byte < 58]
                if digits:
                    data[draw(st.sampled_from(digits))] = draw(st.integers(48, 57))
    return bytes(data)


def mutation_source() -> bytes:
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "a": f32([2, 3], 0, 24), "b": f32([], 24, 28), "c": f32([0], 28, 28)}
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(range(28))


@quick
@given(data=mutations(mutation_source()))
def test_mutated_files_are_refused_or_consistent(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    entries: list[TensorEntry] = list(header.entries.values())
    (header_bytes,) = struct.unpack("<Q", data[:8])
    assert sum(entry.size_bytes for entry in entries) == len(data) - 8 - header_bytes
    for entry in entries:
        tensor = read_tensor(entry)
        assert tensor.dtype == entry.dtype
        assert tuple(tensor.shape) == entry.shape
        assert entry.offset >= 8 + header_bytes
        assert bits(tensor) == data[entry.offset : entry.offset + entry.size_bytes]
