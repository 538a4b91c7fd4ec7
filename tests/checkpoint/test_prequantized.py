"""-Paddle folders that were quantized before publishing, against an encoder written from the reference text.

The encoder places one code at a time, following inference reference 2.2 word for word; digests of what Paddle's own
`weight_quantize` makes of two matrices hold it to the original.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import ernie45
from ernie45.checkpoint import prequantized
from ernie45.checkpoint.layout import pt_layout
from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.prequantized import dequantize, read_statement
from ernie45.checkpoint.safetensors import TensorEntry, read_tensor
from ernie45.checkpoint.source import ModuleSource, PrequantizedSource, open_source
from ernie45.checkpoint.write import read_stored, write_folder
from ernie45.config.model import ModelConfig, MoeConfig
from ernie45.errors import CheckpointError
from ernie45.models.build import build_model
from ernie45.models.init import initialize
from ernie45.quant.quantize import quantize_checkpoint
from ernie45.store.describe import describe

WEIGHTS = "model.safetensors"
LARGEST = {8: 127, 4: 7}
WINT8: dict[str, Any] = {"quantization": "wint8", "is_quantized": True}
MIXED: dict[str, Any] = {
    "quantization": "mix_quant",
    "dense_quant_type": "wint8",
    "moe_quant_type": "wint4",
    "is_quantized": True,
}
WINT4: dict[str, Any] = {"quantization": "wint4", "dense_quant_type": "wint4"}
KINDS = {"wint8": (WINT8, 8, 8), "mixed": (MIXED, 8, 4), "wint4": (WINT4, 4, 4)}
# Every width is a multiple of 64, no two shapes of a layer are equal but those of o_proj.
FIELDS: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


# The encoder. Codes are int, [K][N]; the result is the bytes of the file.

ROWS_INT8 = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
ROWS_INT4 = [0, 1, 8, 9, 16, 17, 24, 25]
ROWS_INT4 = [row + more for more in (0, 2, 4, 6) for row in ROWS_INT4]
NIBBLES_HIGH_TO_LOW = [7, 5, 3, 1, 6, 4, 2, 0]


def encode(codes_KN: np.ndarray, bits: int, order: str) -> Tensor:
    """`quant_weight` as published, int8, in the stated shape."""
    num_in, num_out = codes_KN.shape
    codes = codes_KN.tolist()
    if order == "gpu":
        data = _gpu_bytes(codes, num_in, num_out, bits)
        shape = (num_out * bits // 8, num_in)
    elif order == "in_out":
        data = _natural_bytes(
            [codes[k][n] for pair in _pairs(num_in, bits) for n in range(num_out) for k in pair], bits
        )
        shape = (num_in * bits // 8, num_out)
    else:
        data = _natural_bytes(
            [codes[k][n] for n in range(num_out) for pair in _pairs(num_in, bits) for k in pair], bits
        )
        shape = (num_out, num_in * bits // 8)
    return torch.frombuffer(bytearray(data), dtype=torch.int8).reshape(shape).clone()


def _pairs(num_in: int, bits: int) -> list[tuple[int, ...]]:
    return [(k,) for k in range(num_in)] if bits == 8 else [(k, k + 1) for k in range(0, num_in, 2)]


def _natural_bytes(codes: list[int], bits: int) -> bytes:
    if bits == 8:
        return bytes(code & 255 for code in codes)
    return bytes((low & 15) | ((high & 15) << 4) for low, high in zip(codes[::2], codes[1::2], strict=True))


def _gpu_bytes(codes: list[list[int]], num_in: int, num_out: int, bits: int) -> bytes:
    pattern, interleave = (ROWS_INT8, 2) if bits == 8 else (ROWS_INT4, 4)
    placed = [0] * (num_in * num_out)
    for row in range(num_in):
        block = row // len(pattern) * len(pattern)
        read = block + pattern[row % len(pattern)]  # step 1: row `row` is written from `read`
        for column in range(num_out):  # step 2: column-major; step 3: columns take turns inside tiles of 64 rows
            group = column // interleave * interleave * num_in
            tile = row // 64 * interleave * 64
            placed[group + tile + column % interleave * 64 + row % 64] = codes[read][column]
    biased = [code + (128 if bits == 8 else 8) for code in placed]  # step 4
    if bits == 8:
        for base in range(0, len(biased), 4):
            biased[base + 1], biased[base + 2] = biased[base + 2], biased[base + 1]
        return bytes(biased)
    words = b""
    for base in range(0, len(biased), 8):
        word = 0
        for nibble in NIBBLES_HIGH_TO_LOW:
            word = word << 4 | biased[base + nibble]
        words += word.to_bytes(4, "little")
    return words


def quantized(weights_KN: Tensor, bits: int, dtype: torch.dtype = torch.bfloat16) -> tuple[np.ndarray, Tensor, Tensor]:
    """Codes [K][N], steps (N,) and the float32 weights that they stand for, (K, N)."""
    largest = LARGEST[bits]
    steps = (weights_KN.abs().amax(0) / largest).to(dtype)
    codes = (weights_KN / steps.float()).round().clamp(-largest, largest)
    return codes.numpy().astype(int), steps, codes * steps.float()


def prequantize(plain: Path, target: Path, stated: dict[str, Any], *, order: str = "gpu", dense: int, moe: int) -> Path:
    """Writes the published form of a plain -Paddle folder to `target`, and the values it stands for back to `plain`."""
    tensors, by_hand = {}, load_file(plain / WEIGHTS)
    for name, weights in load_file(plain / WEIGHTS).items():
        if not name.endswith(("_proj.weight", "mtp_linear_proj.0.weight")):
            tensors[name] = weights
            continue
        bits = moe if ".experts." in name else dense
        codes, steps, by_hand[name] = quantized(weights, bits)
        base = name.removesuffix("weight")
        tensors[f"{base}quant_weight"] = encode(codes, bits, order)
        tensors[f"{base}weight_scale"] = steps.view(torch.uint16)
    shutil.copytree(plain, target)
    save_file(tensors, target / WEIGHTS)
    save_file(by_hand, plain / WEIGHTS, metadata={"format": "np"})
    edit_config(target, quantization_config=stated)
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def states(folder: Path, **changes: Any) -> None:
    """Change single keys of `quantization_config`; None removes one."""
    stated = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
    edit_config(folder, quantization_config={key: value for key, value in stated.items() if value is not None})


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes `published` and `plain` once per kind and order; leave them as they are."""
    roots: dict[str, Path] = {}

    def make(kind: str, order: str = "gpu") -> Path:
        key = f"{kind} {order}"
        if key not in roots:
            experts = MoeConfig(
                moe_num_experts=3, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=2, moe_layer_start_index=1
            )
            config = ModelConfig(**FIELDS, moe=experts, num_nextn_predict_layers=1, use_bias=kind == "wint8")
            model = build_model(config)
            initialize(model, std=0.1, seed=3, correction_bias_std=0.05)
            root = tmp_path_factory.mktemp("prequantized")
            write_folder(ModuleSource(model, config), root / "plain", layout="paddle")
            stated, dense, moe = KINDS[kind]
            stated = stated if order == "gpu" else stated | {"weight_order": order}
            prequantize(root / "plain", root / "published", stated, order=order, dense=dense, moe=moe)
            roots[key] = root
        return roots[key]

    return make


@pytest.fixture
def published(made: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """The published folder and a plain one with the same values, to do with as one likes: `published("mixed")`."""

    def copy(kind: str = "mixed", order: str = "gpu") -> tuple[Path, Path]:
        root = made(kind, order)
        for name in ("published", "plain"):
            shutil.copytree(root / name, tmp_path / name, dirs_exist_ok=True)
        return tmp_path / "published", tmp_path / "plain"

    return copy


@pytest.mark.parametrize(
    ("bits", "digest"),
    [
        (8, "9bf9fff938d93fcdd1f7ca8bf0edbc1fe3a4477fc2f48f3ca849cbfee11d905b"),
        (4, "85211a0719740e601fde29038201906a6ef2a83eafa7c671568c172f448d6b05"),
    ],
)
def test_the_encoder_writes_what_paddle_writes(bits: int, digest: str) -> None:
    """SHA-256 of `paddle.nn.quant.weight_quantize(w, arch=80)`, paddlepaddle 3.3.1, for a w whose steps are all 1."""
    k, n = np.arange(128)[:, None], np.arange(64)[None]
    codes = (37 * k * k + 11 * n + k * n) % (2 * LARGEST[bits] + 1) - LARGEST[bits]
    codes[0] = LARGEST[bits]
    raw = encode(codes, bits, "gpu")
    assert hashlib.sha256(raw.numpy().tobytes()).hexdigest() == digest
    decoded = dequantize(raw, torch.ones(64), 128, bits, "gpu", "x")  # type: ignore[arg-type]
    assert torch.equal(decoded, torch.from_numpy(codes).T.float())


@given(
    data=st.data(), bits=st.sampled_from([8, 4]), order=st.sampled_from(["gpu", "in_out", "out_in"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), chunk=st.sampled_from([1, 1000, 1 << 22]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_shape_decodes_to_code_times_step(
    data: st.DataObject, bits: Any, order: Any, dtype: torch.dtype, chunk: int
) -> None:
    rows = data.draw(st.integers(1, 3)) * 4 if order == "gpu" else data.draw(st.integers(1, 9))
    columns = data.draw(st.integers(1, 3)) * 64 if order == "gpu" else data.draw(st.integers(1, 20)) * 2
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    codes = rng.integers(-LARGEST[bits], LARGEST[bits] + 1, (columns, rows))
    steps = torch.from_numpy(rng.random(rows)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prequantized, "_CHUNK_CODES", chunk)
        out = dequantize(encode(codes, bits, order), steps, columns, bits, order, "x")
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.from_numpy(codes).T.float() * steps.float()[:, None])


@pytest.mark.parametrize(
    ("kind", "order"), [("wint8", "gpu"), ("mixed", "gpu"), ("wint4", "gpu"), ("mixed", "in_out"), ("mixed", "out_in")]
)
def test_loads_the_values_by_hand(published: Any, kind: str, order: str) -> None:
    """Every parameter bit for bit, q/k/v and gate/up in their places, and so the same logits."""
    folder, plain = published(kind, order)
    ours, expected = load_model(folder), load_model(plain)
    assert ours.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    ids = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(ids), expected(ids))
    assert ours.load_account.loaded == open_source(folder).account.loaded
    assert "ernie.layers.1.mlp.experts.2.down_proj.weight_scale" in ours.load_account.loaded


def test_a_fused_weight_by_hand(published: Any) -> None:
    """Not through any other code of the package: column n of the file's matrix is row n of the network's."""
    folder, plain = published("mixed")
    by_hand, network = load_file(plain / WEIGHTS), load_model(folder).state_dict()
    qkv = by_hand["ernie.layers.0.self_attn.qkv_proj.weight"]
    assert torch.equal(network["model.layers.0.self_attn.qkv_proj.weight"], qkv.T)
    gate_first = by_hand["ernie.layers.1.mlp.experts.1.up_gate_proj.weight"]
    assert torch.equal(network["model.layers.1.mlp.experts.up_gate_proj"][1], gate_first.T)
    assert len(network["model.layers.1.mlp.experts.up_gate_proj"][1].unique()) > 50, "the test has values to confuse"


def test_verify_and_show(published: Any) -> None:
    folder, plain = published("mixed")
    report = ernie45.verify(folder)
    assert report.ok
    assert report.format == "paddle"
    assert report.values == ernie45.verify(plain).values
    assert not report.all_zero
    shown = describe("m", folder)
    assert (shown.format, shown.dtype) == ("paddle", "wint8 and wint4")
    assert (shown.size_bytes or 0) < (describe("m", plain).size_bytes or 0)
    assert describe("m", published("wint8")[0]).dtype == "wint8"


def test_a_step_that_is_not_finite_is_reported(published: Any) -> None:
    folder, _ = published("mixed")
    name = "ernie.layers.0.mlp.down_proj.weight_scale"
    edit(folder, lambda t: t[name].view(torch.bfloat16)[:1].fill_(float("nan")))
    assert ernie45.verify(folder).not_finite == ("ernie.layers.0.mlp.down_proj.quant_weight",)


def test_pt_and_back(published: Any, tmp_path: Path) -> None:
    folder, plain = published("mixed")
    pt, back = tmp_path / "pt", tmp_path / "back"
    ernie45.convert(folder, pt, to="pt", max_shard_bytes=60_000)
    ernie45.convert(pt, back, to="paddle")
    found, expected = load_file(back / WEIGHTS), load_file(plain / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


@pytest.mark.parametrize("scheme", ["wint8", "wint4"])
def test_quantizing_on_top(published: Any, tmp_path: Path, scheme: str) -> None:
    folder, plain = published("mixed")
    report = quantize_checkpoint(folder, tmp_path / "ours", scheme)
    quantize_checkpoint(plain, tmp_path / "expected", scheme)
    for file in (tmp_path / "expected").glob("*.safetensors"):
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()
    assert report.size_before_bytes == open_source(folder).index.total_bytes  # type: ignore[union-attr]


@given(start=st.integers(0, 127), length=st.integers(1, 128))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("order", ["gpu", "in_out", "out_in"])
@pytest.mark.parametrize("name", ["ernie.layers.0.self_attn.qkv_proj", "ernie.layers.1.mlp.experts.0.up_gate_proj"])
def test_rows_are_read_alone(made: Any, order: str, name: str, start: int, length: int) -> None:
    source = open_source(made("mixed", order) / "published")
    stored = next(stored for stored in source.layout if stored.name == f"{name}.quant_weight")
    end = min(start + length, 128)
    assert torch.equal(source.read(stored, (start, end)), source.read(stored)[start:end])


def test_a_key_matrix_needs_no_other_rows(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """k of q/k/v: a quarter of the rows, a quarter of the bytes."""
    source, sizes = open_source(published("mixed")[0]), []

    def spy(entry: TensorEntry) -> Tensor:
        if entry.dtype == torch.int8:
            sizes.append(entry.size_bytes)
        return read_tensor(entry)

    monkeypatch.setattr("ernie45.checkpoint.source.read_tensor", spy)
    key = next(s for s in pt_layout(source.config) if s.name == "model.layers.0.self_attn.k_proj.weight")
    read_stored(source, key, torch.float32)
    assert sizes == [32 * 64]


def test_int4_layers_are_told_by_their_shape(published: Any) -> None:
    """`wint4` alone means int4 throughout or int8 layers with int4 experts; the two differ in shape."""
    for kind, formats in (("mixed", "wint8 and wint4"), ("wint4", "wint4")):
        folder, plain = published(kind)
        edit_config(folder, quantization_config={"quantization": "wint4"})
        source = open_source(folder)
        assert isinstance(source, PrequantizedSource)
        assert source.weight_formats == formats
        name = "model.layers.0.mlp.up_gate_proj.weight"
        assert torch.equal(load_model(folder).state_dict()[name], load_model(plain).state_dict()[name])


def test_single_layers_may_be_plain(published: Any) -> None:
    folder, plain = published("mixed")
    base = "ernie.layers.1.self_attn.o_proj."
    value = load_file(plain / WEIGHTS)[f"{base}weight"]
    edit(
        folder,
        lambda t: (t.pop(f"{base}quant_weight"), t.pop(f"{base}weight_scale"), t.update({f"{base}weight": value})),
    )
    assert torch.equal(load_model(folder).state_dict()["model.layers.1.self_attn.o_proj.weight"], value.T)


def test_plain_folders_that_ask_for_quantizing(published: Any) -> None:
    """`is_quantized` false: Paddle quantizes when it loads, the files are plain."""
    _, plain = published("mixed")
    expected = load_model(plain).state_dict()
    edit_config(plain, quantization_config=MIXED | {"is_quantized": False})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(plain).state_dict().items())
    states(plain, is_quantized=None)
    with pytest.raises(CheckpointError, match=r"hold no tensor \*\.quant_weight: .*set its is_quantized to false"):
        load_model(plain)


@pytest.mark.parametrize(
    ("keys", "order"),
    [
        ({}, "gpu"),
        ({"is_permuted": True}, "gpu"),
        ({"is_permuted": False}, "in_out"),
        ({"is_permuted": False, "weight_order": "out_in"}, "out_in"),
        ({"is_permuted": None, "weight_order": "gpu"}, "gpu"),
    ],
)
def test_the_stated_order(keys: dict[str, Any], order: str) -> None:
    assert read_statement(MIXED | keys, "x").order == order


def test_vision_experts_have_a_statement_of_their_own() -> None:
    statement = read_statement(MIXED | {"image_moe_quant_type": "wint8"}, "x")
    name = "ernie.layers.3.mlp.experts.{}.down_proj.weight"
    assert statement.bits_of(name.format(63), 64) == (4,)
    assert statement.bits_of(name.format(64), 64) == (8,)
    assert statement.bits_of("ernie.layers.3.mlp.shared_experts.down_proj.weight", 64) == (8,)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2", "moe_quant_config": {"a": 1}},
         "quantization is 'wint2', which is not read yet"),
        (MIXED | {"moe_quant_type": "w4a8"}, "moe_quant_type is 'w4a8', which is not read yet; wint8, wint4"),
        (MIXED | {"dense_quant_type": ["wint8"]}, r"dense_quant_type is \['wint8'\], which is not read yet"),
        ({"quantization": "mix_quant", "moe_quant_type": "wint4"}, "does not state dense_quant_type"),
        ({"quantization": "mix_quant", "dense_quant_type": "wint8"}, "does not state moe_quant_type"),
        ({"quant_method": "fp8"}, "does not state quantization"),
        (MIXED | {"is_permute": True}, "'is_permute' = True, .*nearest known key is is_permuted"),
        (MIXED | {"dense_quant_granularity": "group"}, "dense_quant_granularity is 'group'"),
        (MIXED | {"is_permuted": 0}, "is_permuted is 0, expected true or false"),
        (MIXED | {"weight_order": "cuda"}, "weight_order is 'cuda', expected one of gpu, in_out, out_in"),
        (MIXED | {"weight_order": "gpu", "is_permuted": False}, "is_permuted is False, but weight_order is 'gpu'"),
        ("wint8", "quantization_config is 'wint8', expected an object"),
    ],
)  # fmt: skip
def test_statements_that_are_refused(published: Any, stated: Any, message: str) -> None:
    folder, _ = published("mixed")
    edit_config(folder, quantization_config=stated)
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        open_source(folder)


DENSE, EXPERT = "ernie.layers.0.mlp.down_proj.", "ernie.layers.1.mlp.experts.2.up_gate_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{DENSE}weight_scale"), r"1 tensors are missing: ernie.layers.0.mlp.down_proj.weight_scale"),
        (lambda t: t.pop(f"{EXPERT}quant_weight"), r"1 tensors are missing: .*experts.2.up_gate_proj.quant_weight"),
        (lambda t: t.update({f"{DENSE}weight": torch.zeros(192, 64)}), "2 tensors are unexpected: .*down_proj.quant_weight"),
        (lambda t: t.update({f"{DENSE}activation_scale": torch.ones(1)}), "unexpected: .*down_proj.activation_scale"),
        (lambda t: t.update({f"{DENSE}quant_weight": t[f"{DENSE}quant_weight"].T.contiguous()}),
         r"model.safetensors: .*down_proj.quant_weight is I8 \[192, 64\], config.json calls for I8 \[64, 192\]: wint8 of 64 "
         "outputs and 192 inputs in gpu order"),
        (lambda t: t.update({f"{DENSE}quant_weight": t[f"{DENSE}quant_weight"].float()}), r"is F32 \[64, 192\], .*I8"),
        (lambda t: t.update({f"{EXPERT}quant_weight": torch.zeros(128, 64, dtype=torch.int8)}),
         r"I8 \[128, 64\], config.json calls for I8 \[64, 64\]: wint4 of 128 outputs and 64 inputs"),
        (lambda t: t.update({f"{EXPERT}weight_scale": torch.ones(1, 128)}), r"shape \[1, 128\], .*one step per output: \[128\]"),
        (lambda t: t.update({f"{EXPERT}weight_scale": torch.ones(128, dtype=torch.int32)}), "weight_scale is stored as I32"),
        (lambda t: t.update({"lm_head.quant_weight": torch.ones(64, dtype=torch.int8)}), "unexpected: lm_head.quant_weight"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(published: Any, change: Any, message: str) -> None:
    folder, _ = published("mixed")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("written", "read"), [("gpu", "out_in"), ("out_in", "gpu")])
def test_another_order_is_noticed(bits: Any, written: str, read: Any) -> None:
    """Square matrices: the shape does not tell, the codes do."""
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(bits))
    codes, steps, _ = quantized(weights, bits)
    raw = encode(codes, bits, written).reshape(prequantized.stored_shape(64, 64, bits, read))
    with pytest.raises(CheckpointError, match=rf"layer X holds \d+ times -{LARGEST[bits] + 1} .* state weight_order"):
        dequantize(raw, steps, 64, bits, read, "layer X")


def test_a_stated_order_that_the_shapes_contradict(published: Any) -> None:
    folder, _ = published("mixed")
    states(folder, is_permuted=False)
    with pytest.raises(
        CheckpointError, match=r"calls for I8 \[64, 128\]: wint8 of 128 outputs and 64 inputs in in_out"
    ):
        open_source(folder)


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "order", "message"),
    [
        (64, 100, 8, "gpu", "X has 100 inputs and 64 outputs; the gpu order of wint8 takes multiples of 64 and 2"),
        (66, 64, 4, "gpu", "X has 64 inputs and 66 outputs; the gpu order of wint4 takes multiples of 64 and 4"),
        (64, 33, 4, "in_out", "X has 33 inputs; int4 packs two into a byte"),
    ],
)
def test_widths_that_an_order_cannot_hold(rows: int, columns: int, bits: Any, order: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        prequantized.check_size(rows, columns, bits, order, "X")


def test_pt_names_are_refused(published: Any, tmp_path: Path) -> None:
    _, plain = published("mixed")
    ernie45.convert(plain, tmp_path / "pt", to="pt")
    edit_config(tmp_path / "pt", quantization_config=MIXED)
    with pytest.raises(CheckpointError, match="weights are quantized .*-Paddle folders in wint8 and wint4"):
        open_source(tmp_path / "pt")
