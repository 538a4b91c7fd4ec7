"""Networks through GGUF: our own round trip, and llama and qwen2 files against transformers' networks of that name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import ernie45
from ernie45.checkpoint.ggml_types import GGMLType
from ernie45.checkpoint.gguf import GGUFWriter, read_gguf, read_gguf_tensor
from ernie45.checkpoint.gguf_config import config_to_gguf
from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.source import ModuleSource, open_source
from ernie45.checkpoint.write import write_gguf
from ernie45.config.model import ModelConfig, MoeConfig
from ernie45.errors import CheckpointError
from ernie45.models.build import build_model
from ernie45.models.init import initialize

IDS = torch.randint(101, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_gives_the_same_network(saved: Any, tmp_path: Path, moe: bool, tied: bool) -> None:
    model, folder = saved(moe=moe, mtp=1, tie_word_embeddings=tied)
    done = ernie45.convert(folder, tmp_path / "model.gguf", to="gguf")
    assert any("prediction block" in note for note in done.notes)
    assert any("tokenizer" in note for note in done.notes)
    loaded = load_model(tmp_path / "model.gguf")
    assert loaded.config == _as_gguf_states_it(model.config)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    ernie45.convert(tmp_path / "model.gguf", tmp_path / "back", to="pt", max_shard_bytes=20_000)
    back = load_model(tmp_path / "back")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())


def _as_gguf_states_it(config: ModelConfig) -> ModelConfig:
    """Without vocabulary the file names no special ids, and it cannot hold the prediction block."""
    return replace(config, num_nextn_predict_layers=0, bos_token_id=None, eos_token_id=(), pad_token_id=None)


def test_the_independent_reader_sees_what_llama_cpp_expects(saved: Any, tmp_path: Path) -> None:
    model, folder = saved(moe=True)
    ernie45.convert(folder, tmp_path / "model.gguf", to="gguf", dtype="float16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "ernie4_5-moe"
    assert fields["ernie4_5-moe.expert_shared_feed_forward_length"] == 48, "width of the fused shared expert"
    assert fields["ernie4_5-moe.leading_dense_block_count"] == 1
    tensors = {t.name: t for t in reader.tensors}
    names = set()
    for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.ERNIE4_5_MOE]:
        for layer in range(3):
            names |= {gguf.TENSOR_NAMES[kind].format(bid=layer) + end for end in (".weight", ".bias")}
    assert set(tensors) <= names
    gate = tensors["blk.1.ffn_gate_exps.weight"]
    assert gate.tensor_type == gguf.GGMLQuantizationType.F16
    ours = model.state_dict()["model.layers.1.mlp.experts.up_gate_proj"][:, :24].half()
    assert np.array_equal(gate.data.reshape(8, 24, 48), ours.numpy())
    for name in ("blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "blk.0.attn_norm.weight"):
        assert tensors[name].tensor_type == gguf.GGMLQuantizationType.F32


# Where the float16 scales of a block lie: random bytes there would make infinite weights.
_SCALES = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q6_K: (208,),
}


def _random_blocks(kind: GGMLType, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    blocks = rng.integers(0, 256, (math.prod(shape) // kind.block_length, kind.block_bytes), dtype=np.uint8)
    for position in _SCALES[kind]:
        scales = rng.normal(0, 0.002, (len(blocks), 1)).astype(np.float16)
        blocks[:, position : position + 2] = scales.view(np.uint8)
    return torch.from_numpy(blocks)


@pytest.mark.parametrize("kind", _SCALES)
def test_a_quantized_moe_file_is_the_network_of_its_dequantized_weights(tmp_path: Path, kind: GGMLType) -> None:
    """Every matrix in blocks, stacked experts too; the values are those of the gguf package's own decoder."""
    moe = MoeConfig(
        moe_num_experts=3, moe_k=2, moe_intermediate_size=256, moe_num_shared_experts=1, moe_layer_start_index=1
    )
    model = build_model(
        ModelConfig(
            vocab_size=20, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, moe=moe,
        )
    )  # fmt: skip
    initialize(model, std=0.1, correction_bias_std=0.05)
    write_gguf(ModuleSource(model, model.config), tmp_path / "plain.gguf", name="x")
    plain = read_gguf(tmp_path / "plain.gguf")
    blocks = [t for t in plain.tensors.values() if len(t.shape) > 1 and "ffn_gate_inp" not in t.name]
    rng = np.random.default_rng(int(kind))
    raw = {t.name: _random_blocks(kind, t.shape, rng) for t in blocks}
    values = {
        name: torch.from_numpy(gguf.quants.dequantize(part.numpy(), gguf.GGMLQuantizationType(int(kind))))
        for name, part in raw.items()
    }
    others = {t.name: read_gguf_tensor(plain, t) for t in plain.tensors.values() if t.name not in raw}
    for target, chosen, found in (("blocks.gguf", kind, raw), ("values.gguf", GGMLType.F32, values)):
        plan = [(t.name, chosen if t.name in raw else t.type, t.shape) for t in plain.tensors.values()]
        with GGUFWriter(tmp_path / target, config_to_gguf(model.config, name="x"), plan) as writer:
            for name, written, shape in plan:
                writer.write(name, (others | found)[name].reshape(shape if written.torch_dtype else (-1,)))
    ours, expected = load_model(tmp_path / "blocks.gguf"), load_model(tmp_path / "values.gguf")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert ours(IDS % 20).isfinite().all()
    assert torch.equal(ours(IDS % 20), expected(IDS % 20))


def _write(path: Path, architecture: str, config: Any, tensors: dict[str, Tensor], **extra: Any) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in extra.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def _renamed(model: Any, interleave: bool) -> dict[str, Tensor]:
    """Hub names to GGUF names; llama files hold q and k with interleaved halves, qwen2 files do not."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, leaf = rest.rsplit(".", 1)
            heads = {
                "self_attn.q_proj": model.config.num_attention_heads,
                "self_attn.k_proj": model.config.num_key_value_heads,
            }
            if interleave and module in heads:
                tensor = tensor.view(heads[module], 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)  # noqa: PLW2901
            tensors[f"blk.{layer}.{_NAMES[module]}.{leaf}"] = tensor
    tensors["token_embd.weight"] = model.state_dict()["model.embed_tokens.weight"]
    tensors["output_norm.weight"] = model.state_dict()["model.norm.weight"]
    if not model.config.tie_word_embeddings:
        tensors["output.weight"] = model.state_dict()["lm_head.weight"]
    return tensors


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_files_of_sister_networks_are_dense_ernie(tmp_path: Path, architecture: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    fields = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    kind = {"llama": "Llama", "qwen2": "Qwen2"}[architecture]
    config = getattr(transformers, f"{kind}Config")(**fields)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for index, parameter in enumerate(theirs.parameters()):
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.15, generator=torch.Generator().manual_seed(index))
    theirs.tie_weights()
    _write(tmp_path / "sister.gguf", architecture, config, _renamed(theirs, architecture == "llama"))
    ours = load_model(tmp_path / "sister.gguf")
    assert ours.config.use_bias is (architecture == "qwen2")
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert (ours(IDS) - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))
    ernie45.convert(tmp_path / "sister.gguf", tmp_path / "ernie", to="pt")
    as_ernie = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ernie", dtype=torch.float32)
    assert type(as_ernie).__name__ == "Ernie4_5ForCausalLM"
    with torch.no_grad():
        assert (as_ernie(IDS).logits - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gemma"}, "architecture is 'gemma'"),
        ({"extra": {"attention.sliding_window": 128}}, "sliding_window = 128 might change the network"),
        ({"extra": {"expert_count": 8}}, "expert_count = 8 might change"),
        ({"extra": {"rope.dimension_count": 4}}, "only a part of each head"),
        ({"drop": "blk.1.ffn_up.weight"}, "1 tensors are missing: blk.1.ffn_up.weight"),
        ({"add": "rope_freqs.weight"}, "unexpected: rope_freqs.weight"),
        ({"add": "blk.0.attn_q_norm.weight"}, "unexpected: blk.0.attn_q_norm.weight"),
        ({"reshape": "blk.0.attn_output.weight"}, "has shape"),
    ],
)
def test_files_that_are_other_networks_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    tensors = _renamed(transformers.LlamaForCausalLM(config), True)
    tensors.pop(change.get("drop", ""), None)
    if "add" in change:
        tensors[change["add"]] = torch.ones(8)
    if "reshape" in change:
        tensors[change["reshape"]] = torch.ones(8, 32)
    _write(tmp_path / "x.gguf", change.get("architecture", "llama"), config, tensors, **change.get("extra", {}))
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "x.gguf")


def test_a_moe_that_ends_early_cannot_become_gguf(tmp_path: Path, saved: Any) -> None:
    model, _ = saved(moe=True)
    config = replace(model.config, moe=replace(model.config.moe, moe_layer_end_index=1))
    early = build_model(config)
    initialize(early, std=0.1)
    ernie45.save_model(early, tmp_path / "early")
    with pytest.raises(CheckpointError, match="end before the last layer"):
        ernie45.convert(tmp_path / "early", tmp_path / "early.gguf", to="gguf")
    assert not (tmp_path / "early.gguf").exists()
