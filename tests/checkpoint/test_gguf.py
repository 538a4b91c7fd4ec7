"""The GGUF reader and writer, against the `gguf` package and against files that lie."""

import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie45.checkpoint import ggml_types
from ernie45.checkpoint.ggml_types import GGMLType
from ernie45.checkpoint.gguf import (
    GGUFValue,
    GGUFWriter,
    TypedValue,
    ValueType,
    array,
    boolean,
    float32,
    int32,
    read_gguf,
    read_gguf_raw,
    read_gguf_tensor,
    string,
    uint32,
    uint64,
)
from ernie45.errors import CapacityError, CheckpointError, NotFoundError

UINT32, STRING, ARRAY = ValueType.UINT32, ValueType.STRING, ValueType.ARRAY


def random_raw(kind: GGMLType, rows: int, row_length: int) -> np.ndarray[Any, Any]:
    bytes_per_row = row_length // kind.block_length * kind.block_bytes
    return np.random.default_rng(int(kind)).integers(0, 256, (rows, bytes_per_row), dtype=np.uint8)


def write_reference(path: Path, alignment: int = 32) -> dict[str, np.ndarray[Any, Any]]:
    """A file with every value type and every tensor type, by the gguf package."""
    writer = gguf.GGUFWriter(path, "ernie4_5")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("v.uint8", 255)
    writer.add_int8("v.int8", -128)
    writer.add_uint16("v.uint16", 65535)
    writer.add_int16("v.int16", -32768)
    writer.add_uint32("v.uint32", 2**32 - 1)
    writer.add_int32("v.int32", -(2**31))
    writer.add_uint64("v.uint64", 2**64 - 1)
    writer.add_int64("v.int64", -(2**63))
    writer.add_float32("v.float32", 0.1)
    writer.add_float64("v.float64", 0.1)
    writer.add_bool("v.bool", True)
    writer.add_string("v.string", "Grüße, 文心")
    writer.add_array("v.strings", ["a", "", "▁文"])
    writer.add_array("v.ints", [1, -2, 3])
    writer.add_array("v.floats", [0.5, -1.5])
    writer.add_array("v.bools", [True, False])
    raws = {}
    for kind in GGMLType:
        raw = random_raw(kind, 6, 256)
        raws[kind.name] = raw
        if kind.torch_dtype is None or kind == GGMLType.BF16:
            writer.add_tensor(kind.name, raw.reshape(2, 3, -1), raw_dtype=gguf.GGMLQuantizationType(int(kind)))
        else:
            dtype = np.float32 if kind == GGMLType.F32 else np.float16
            writer.add_tensor(kind.name, raw.view(dtype).reshape(2, 3, -1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raws


def equal_or_nan(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    return left.shape == right.shape and bool(((left == right) | (np.isnan(left) & np.isnan(right))).all())


@pytest.mark.parametrize("alignment", [32, 128])
def test_reads_what_the_package_writes(alignment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raws = write_reference(tmp_path / "a.gguf", alignment)
    monkeypatch.setattr(ggml_types, "_CHUNK_VALUES", 512)
    file = read_gguf(tmp_path / "a.gguf")
    values = {key[2:]: value for key, value in file.metadata.items() if key.startswith("v.")}
    assert values == {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": float(np.float32(0.1)),
        "float64": 0.1,
        "bool": True,
        "string": "Grüße, 文心",
        "strings": ["a", "", "▁文"],
        "ints": [1, -2, 3],
        "floats": [0.5, -1.5],
        "bools": [True, False],
    }
    assert values["bool"] is True
    assert (file.version, file.alignment) == (3, alignment)
    for kind in GGMLType:
        tensor = file.tensors[kind.name]
        assert (tensor.type, tensor.shape) == (kind, (2, 3, 256))
        assert tensor.offset % alignment == 0
        assert read_gguf_raw(file, tensor).numpy().tobytes() == raws[kind.name].tobytes()
        with np.errstate(all="ignore"):
            want = gguf.quants.dequantize(raws[kind.name], gguf.GGMLQuantizationType(int(kind))).astype(np.float32)
        assert equal_or_nan(read_gguf_tensor(file, tensor).numpy(), want.reshape(2, 3, 256))
        half = read_gguf_tensor(file, tensor, torch.bfloat16)
        assert equal_or_nan(half.float().numpy(), torch.from_numpy(want).bfloat16().float().numpy().reshape(2, 3, 256))
    with pytest.raises(CheckpointError, match="float type"):
        read_gguf_tensor(file, file.tensors["F32"], torch.int8)


def write_ours(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    tensors = {
        "f32": torch.randn(3, 5),
        "f16": torch.randn(2, 3, 4).half(),
        "bf16": torch.randn(7).bfloat16(),
        "q4": torch.from_numpy(random_raw(GGMLType.Q4_K, 4, 512)),
        "last": torch.randn(1, 1, 2, 1),
    }
    plan = [
        ("f32", GGMLType.F32, (3, 5)),
        ("f16", GGMLType.F16, (2, 3, 4)),
        ("bf16", GGMLType.BF16, (7,)),
        ("q4", GGMLType.Q4_K, (4, 512)),
        ("last", GGMLType.F32, (1, 1, 2, 1)),
    ]
    metadata: dict[str, GGUFValue] = {
        "general.architecture": "ernie4_5",
        "plain.int": 7,
        "plain.float": 1e-5,
        "plain.bool": False,
        "u32": uint32(2**32 - 1),
        "i32": int32(-5),
        "u64": uint64(2**40),
        "f32": float32(500000.0),
        "bool": boolean(True),
        "string": string("▁"),
        "strings": array(STRING, ["a", "b▁"]),
        "i32s": array(ValueType.INT32, [-1, 2]),
        "u32s": array(UINT32, []),
        "f32s": array(ValueType.FLOAT32, [0.5, math.inf]),
    }
    with GGUFWriter(path, metadata, plan, **options) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    return tensors


@pytest.mark.parametrize("alignment", [32, 64])
def test_the_package_reads_what_we_write(alignment: int, tmp_path: Path) -> None:
    tensors = write_ours(tmp_path / "a.gguf", alignment=alignment)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    contents = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    types = {key: [kind.name for kind in field.types] for key, field in reader.fields.items()}
    assert contents["general.architecture"] == "ernie4_5"
    assert [contents[key] for key in ("plain.int", "plain.bool", "u32", "i32", "u64", "f32", "bool", "string")] == [
        *(7, False, 2**32 - 1, -5, 2**40, 500000.0, True, "▁")
    ]
    assert contents["plain.float"] == float(np.float32(1e-5))
    assert [contents[key] for key in ("strings", "i32s", "f32s")] == [["a", "b▁"], [-1, 2], [0.5, math.inf]]
    assert types["plain.int"] == ["UINT32"]
    assert types["i32s"] == ["ARRAY", "INT32"]
    assert types["u64"] == ["UINT64"]
    assert ("general.alignment" in contents) == (alignment != 32)
    for tensor in reader.tensors:
        assert tensor.data_offset % alignment == 0
        assert tensor.data.tobytes() == tensors[tensor.name].reshape(-1).view(torch.uint8).numpy().tobytes()
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    assert reader.tensors[1].shape.tolist() == [4, 3, 2]
    assert (tmp_path / "a.gguf").stat().st_size % alignment == 0
    file = read_gguf(tmp_path / "a.gguf")
    assert file.metadata == {**contents, "u32s": []}
    assert torch.equal(read_gguf_tensor(file, file.tensors["f16"], torch.float16), tensors["f16"])
    assert list(tmp_path.iterdir()) == [tmp_path / "a.gguf"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": -1}, "does not fit UINT32"),
        ({"a": 2**32}, "does not fit UINT32"),
        ({"a": float32(1e300)}, "does not fit FLOAT32"),
        ({"a": int32(2**31)}, "does not fit INT32"),
        ({"a": TypedValue(UINT32, 1.5)}, "UINT32 holds 1.5"),
        ({"a": uint32(True)}, "UINT32 holds True"),
        ({"a": TypedValue(ValueType.BOOL, 1)}, "BOOL holds 1"),
        ({"a": TypedValue(STRING, 1)}, "STRING holds 1"),
        ({"a": [1]}, "wrap lists with array"),
        ({"a": None}, "NoneType"),
        ({"a": array(STRING, ["a", 1])}, "STRING holds 1"),
        ({"a": array(ARRAY, [1])}, "no flat array"),
        ({"a": TypedValue(ARRAY, 1, UINT32)}, "no flat array"),
        ({"a": "\ud800"}, "UTF-8"),
        ({"general.alignment": 64}, "alignment is 32"),
    ],
)
def test_metadata_that_cannot_be_written(metadata: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        GGUFWriter(tmp_path / "a", metadata, [])
    assert list(tmp_path.iterdir()) == []


def test_plans_and_tensors_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good: tuple[str, GGMLType, tuple[int, ...]] = ("x", GGMLType.F32, (2,))
    bad_plans: list[tuple[list[tuple[str, GGMLType, tuple[int, ...]]], str]] = [
        ([good, good], "named twice"),
        ([("x" * 64, GGMLType.F32, (2,))], "63 bytes"),
        ([("x", GGMLType.F32, ())], "1 to 4"),
        ([("x", GGMLType.F32, (1,) * 5)], "1 to 4"),
        ([("x", GGMLType.F32, (0,))], "positive"),
        ([("x", GGMLType.Q4_0, (32, 16))], "rows of 16"),
        ([("x", GGMLType.F32, (2**62, 2))], "more than"),
    ]
    for plan, message in bad_plans:
        with pytest.raises(CheckpointError, match=message):
            GGUFWriter(tmp_path / "a", {}, plan)
    for alignment in (0, 4, 48, 2**21):
        with pytest.raises(CheckpointError, match="power of two"):
            GGUFWriter(tmp_path / "a", {}, [good], alignment=alignment)
    with monkeypatch.context() as patch:
        patch.setattr("ernie45.checkpoint.atomic._free_bytes", lambda _: 5)
        with pytest.raises(CapacityError, match="5 are free"):
            GGUFWriter(tmp_path / "a", {}, [good])
    writer = GGUFWriter(tmp_path / "a", {}, [good, ("q", GGMLType.Q4_0, (32,))])
    for name, tensor, message in [
        ("y", torch.zeros(2), "not in the plan"),
        ("x", torch.zeros(2).half(), r"F32 takes torch.float32 \[2\]"),
        ("x", torch.zeros(8, dtype=torch.uint8), "F32 takes"),
        ("x", torch.zeros(1, 2), "F32 takes"),
        ("q", torch.zeros(32), "Q4_0 takes 18 uint8"),
        ("q", torch.zeros(17, dtype=torch.uint8), "Q4_0 takes 18 uint8"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            writer.write(name, tensor)
    writer.write("x", torch.zeros(2))
    with pytest.raises(CheckpointError, match="already"):
        writer.write("x", torch.zeros(2))
    with pytest.raises(CheckpointError, match="the first is 'q'"):
        writer.close()
    with pytest.raises(ZeroDivisionError), GGUFWriter(tmp_path / "a", {}, [good]):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


# Files that lie, built by hand


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: bytes | str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    pairs: list[bytes] = [],  # noqa: B006 - never changed
    tensors: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    *,
    version: int = 3,
    num_tensors: int | None = None,
    num_pairs: int | None = None,
) -> bytes:
    num_tensors = len(tensors) if num_tensors is None else num_tensors
    num_pairs = len(pairs) if num_pairs is None else num_pairs
    header = struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_pairs) + b"".join(pairs) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


def nested(depth: int) -> bytes:
    value = struct.pack("<IQ", UINT32, 1) + struct.pack("<I", 9)
    for _ in range(depth - 1):
        value = struct.pack("<IQ", ARRAY, 1) + value
    return value


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "4 bytes expected at byte 0, the file has 0"),
    "magic": (b"GGML" + build()[4:], "expected b'GGUF'"),
    "version 1": (build(version=1), "GGUF version 1"),
    "version 4": (build(version=4), "GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + build()[8:], "big-endian"),
    "cut counts": (build()[:20], "8 bytes expected at byte 16"),
    "tensor count": (build(num_tensors=2**62), "4611686018427387904 tensors"),
    "pair count": (build(num_pairs=2**64 - 1), "18446744073709551615 metadata pairs"),
    "key length": (build([struct.pack("<Q", 2**63) + b"\0" * 40]), "9223372036854775808 bytes expected"),
    "key not utf-8": (build([pair(b"\xff", UINT32, b"1234")]), "not UTF-8"),
    "value not utf-8": (build([pair("a", STRING, text(b"\xc3"))]), "not UTF-8"),
    "value type": (build([pair("a", 13, b"1234")]), "value type 13"),
    "bool": (build([pair("a", ValueType.BOOL, b"\2")]), "truth value 2"),
    "bools": (build([pair("a", ARRAY, struct.pack("<IQ", 7, 2) + b"\1\3")]), "truth value 3"),
    "array count": (build([pair("a", ARRAY, struct.pack("<IQ", UINT32, 2**61))]), "2305843009213693952 array items"),
    "string array count": (build([pair("a", ARRAY, struct.pack("<IQ", STRING, 100))]), "100 array items"),
    "array type": (build([pair("a", ARRAY, struct.pack("<IQ", 99, 0))]), "value type 99"),
    "array bomb": (build([pair("a", ARRAY, nested(1000))]), "more than 4 deep"),
    "array bytes": (build([pair("a", ARRAY, struct.pack("<IQ", 0, 8_000_001) + bytes(8_000_001))]), "exceeds 8000000"),
    "same key": (build([pair("a", UINT32, b"1234")] * 2), "'a' appears twice"),
    "alignment 0": (build([pair("general.alignment", UINT32, struct.pack("<I", 0))]), "power of two"),
    "alignment 24": (build([pair("general.alignment", UINT32, struct.pack("<I", 24))]), "power of two"),
    "alignment int32": (build([pair("general.alignment", ValueType.INT32, struct.pack("<i", 32))]), "uint32"),
    "alignment text": (build([pair("general.alignment", STRING, text("32"))]), "uint32"),
    "dims": (build([], [info("x", (1,) * 5)], b"0000"), "5 dimensions"),
    "dims count": (build([], [text("x") + struct.pack("<I", 2**32 - 1) + b"\0" * 40]), "4294967295 dimensions"),
    "type": (build([], [info("x", (32,), kind=23)], bytes(18)), r"type IQ4_XS \(23\)"),
    "huge": (build([], [info("x", (2**62, 2**62))], b"0000"), "more than"),
    "wraps to zero": (build([], [info("x", (2**32, 2**32))], b"0000"), "more than"),
    "zero hides huge": (build([], [info("x", (0, 2**40, 2**40))]), "more than"),
    "row": (build([], [info("x", (16, 2), kind=2)], bytes(18)), "rows of 16"),
    "offset": (build([], [info("x", (1,), offset=4)], bytes(32)), "no multiple of the alignment 32"),
    "outside": (build([], [info("x", (9,))], bytes(32)), "the file has"),
    "far outside": (build([], [info("x", (1,), offset=2**63)], bytes(32)), "the file has"),
    "empty outside": (build([], [info("x", (0,), offset=2**62)], bytes(32)), "the file has"),
    "overlap": (build([], [info("x", (16,)), info("y", (8,), offset=32)], bytes(64)), "inside the tensor"),
    "same place": (build([], [info("x", (1,)), info("y", (1,))], bytes(64)), "inside the tensor"),
    "same tensor": (build([], [info("x", (1,)), info("x", (1,), offset=32)], bytes(64)), "'x' appears twice"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_are_refused_without_memory(case: str, tmp_path: Path) -> None:
    data, message = LIES[case]
    (tmp_path / "a").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read_gguf(tmp_path / "a")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(tmp_path / "a") in str(caught.value)
    assert len(str(caught.value)) < 600
    assert peak < 4_000_000


def test_header_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(build([pair("a", STRING, struct.pack("<Q", 200_000_000))]))
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="a header may take 134217728"):
        read_gguf(tmp_path / "a")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_gguf(tmp_path / "a")


def test_unusual_but_valid_files(tmp_path: Path) -> None:
    data = build(
        [pair("a", ARRAY, nested(4))], [info("scalar", ()), info("none", (0, 3), offset=32)], b"\0\0\x80?", version=2
    )
    (tmp_path / "a").write_bytes(data + bytes(28))
    file = read_gguf(tmp_path / "a")
    assert file.metadata == {"a": [[[[9]]]]}
    assert file.version == 2
    assert read_gguf_tensor(file, file.tensors["scalar"]).item() == 1.0
    assert read_gguf_tensor(file, file.tensors["none"]).shape == (3, 0)
    assert read_gguf_tensor(file, file.tensors["none"], torch.float64).shape == (3, 0)


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    write_ours(tmp_path / "a")
    file = read_gguf(tmp_path / "a")
    tensor = file.tensors["q4"]
    with (tmp_path / "a").open("r+b") as stream:
        stream.truncate(tensor.offset + 5)
    for read in (read_gguf_raw, read_gguf_tensor):
        with pytest.raises(CheckpointError, match="truncated"):
            read(file, tensor)


def mutation_source() -> bytes:
    pairs = [
        pair("general.architecture", STRING, text("e")),
        pair("n", UINT32, b"\1\0\0\0"),
        pair("f", ARRAY, struct.pack("<IQ2f", ValueType.FLOAT32, 2, 0.5, 1.5)),
        pair("s", ARRAY, struct.pack("<IQ", STRING, 2) + text("ab") + text("")),
        pair("general.alignment", UINT32, struct.pack("<I", 32)),
    ]
    tensors = [info("x", (4, 2)), info("q", (32, 2), kind=2, offset=32), info("h", (3,), kind=1, offset=96)]
    return build(pairs, tensors, bytes(range(128)))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_refused_or_consistent(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(mutation_source())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "truncate", "insert", "splice", "number"])):
            case "flip" if content:
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "truncate":
                del content[at:]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
            case "splice":
                start = data.draw(st.integers(0, max(len(content) - 1, 0)))
                end = start + data.draw(st.integers(0, 40))
                content[at : at + data.draw(st.integers(0, 40))] = content[start:end]
            case "number":
                number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1, len(content)]))
                content[at : at + 8] = struct.pack("<Q", number)
    (tmp_path / "a").write_bytes(content)
    try:
        file = read_gguf(tmp_path / "a")
    except CheckpointError:
        return
    assert sum(tensor.size_bytes for tensor in file.tensors.values()) <= len(content)
    for tensor in file.tensors.values():
        raw = read_gguf_raw(file, tensor)
        assert raw.numpy().tobytes() == bytes(content[tensor.offset : tensor.offset + tensor.size_bytes])
        assert raw.numel() == tensor.size_bytes
        assert tuple(read_gguf_tensor(file, tensor).shape) == tensor.shape
