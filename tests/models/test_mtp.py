"""The multi-token prediction block against a transcription of the formulas, written out by hand in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.errors import ConfigError
from ernie45.layers.cache import AttentionView
from ernie45.models.text import MtpVariant


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


def _rotate(x: Tensor, position: int, theta: float) -> Tensor:
    out = x.clone()
    size = len(x)
    for j in range(size // 2):
        angle = position * theta ** (-2 * j / size)
        out[2 * j] = x[2 * j] * math.cos(angle) - x[2 * j + 1] * math.sin(angle)
        out[2 * j + 1] = x[2 * j] * math.sin(angle) + x[2 * j + 1] * math.cos(angle)
    return out


def _decoder_layer(layer: Any, config: Any, rows: Tensor, positions: list[int]) -> Tensor:
    """One dense decoder layer, token by token and head by head."""
    weights = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    normed = _rms(rows, weights["input_layernorm.weight"], config.rms_norm_eps)
    qkv = normed @ weights["self_attn.qkv_proj.weight"].T
    q, k, v = qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    attended = torch.zeros(len(rows), heads * size, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // kv_heads)
        keys = [
            _rotate(k[t, group * size : (group + 1) * size], positions[t], config.rope_theta) for t in range(len(rows))
        ]
        for t in range(len(rows)):
            query = _rotate(q[t, head * size : (head + 1) * size], positions[t], config.rope_theta)
            scores = torch.stack([query @ keys[s] for s in range(t + 1)]) / math.sqrt(size)
            shares = scores.exp() / scores.exp().sum()
            values = v[: t + 1, group * size : (group + 1) * size]
            attended[t, head * size : (head + 1) * size] = shares @ values
    rows = rows + attended @ weights["self_attn.o_proj.weight"].T
    normed = _rms(rows, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = (normed @ weights["mlp.up_gate_proj.weight"].T).chunk(2, dim=-1)
    return rows + (gate / (1 + torch.exp(-gate)) * up) @ weights["mlp.down_proj.weight"].T


def _by_hand(model: Any, ids: Tensor, variant: MtpVariant) -> Tensor:
    """Logits for token t+2 from h_t and token t+1, for t = 0 .. n-2."""
    inner, config, eps = model.model, model.config, model.config.rms_norm_eps
    hidden = inner(ids, torch.arange(len(ids)), AttentionView(lengths=(len(ids),))).double()[:-1]
    if variant.final_norm_on_input:
        hidden = _rms(hidden, inner.norm.weight, eps)
    e = _rms(inner.embed_tokens.weight.double()[ids[1:]], inner.mtp_emb_norm[0].weight, eps)
    g = _rms(hidden, inner.mtp_hidden_norm[0].weight, eps)
    x = torch.cat((e, g), dim=-1) @ inner.mtp_linear_proj[0].weight.double().T
    z = _decoder_layer(inner.mtp_block[0], config, x, list(range(len(x))))
    if variant.final_norm_on_output:
        z = _rms(z, inner.norm.weight, eps)
    head = inner.embed_tokens.weight if config.tie_word_embeddings else model.lm_head.weight
    return z @ head.double().T


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("on_output", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_block_equals_its_formulas(small_model: Any, on_input: bool, on_output: bool, tied: bool) -> None:
    model = small_model(moe=True, mtp=1, tie_word_embeddings=tied)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += torch.linspace(-0.3, 0.3, len(parameter))  # a norm of ones would hide a forgotten weight
    variant = MtpVariant(final_norm_on_input=on_input, final_norm_on_output=on_output)
    ids = torch.randint(101, (9,), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(8)
    with torch.no_grad():
        hidden = model.hidden(ids, AttentionView(lengths=(9,)))[:-1]
        z = model.model.mtp(hidden, ids[1:], positions, AttentionView(lengths=(8,)), variant=variant)
        difference = (model.mtp_logits(z, variant).double() - _by_hand(model, ids, variant)).abs().max()
    assert difference <= 2e-5


def test_the_two_choices_make_a_difference(small_model: Any) -> None:
    model = small_model(mtp=1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += torch.linspace(-0.3, 0.3, len(parameter))
    ids = torch.arange(6)
    view = AttentionView(lengths=(6,))
    with torch.no_grad():
        hidden = model.hidden(ids, view)
        outputs = []
        for on_input, on_output in ((False, True), (True, True), (False, False)):
            variant = MtpVariant(final_norm_on_input=on_input, final_norm_on_output=on_output)
            z = model.model.mtp(hidden, ids, torch.arange(6), view, variant=variant)
            outputs.append(model.mtp_logits(z, variant))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3


def test_the_block_drafts_with_a_cache_of_its_own(small_model: Any) -> None:
    """Fed in pieces, as drafting does, it gives the same as in one pass, and leaves the main cache alone."""
    model = small_model(moe=True, mtp=1)
    ids = torch.randint(101, (10,), generator=torch.Generator().manual_seed(5))
    cache = model.new_mtp_cache(1)
    with torch.no_grad():
        hidden = model.hidden(ids, AttentionView(lengths=(10,)))
        whole = model.model.mtp(hidden[:9], ids[1:], torch.arange(9), AttentionView(lengths=(9,)))
        parts = []
        for start, end in ((0, 4), (4, 5), (5, 9)):
            view = AttentionView(lengths=(end - start,), caches=(cache,))
            parts.append(model.model.mtp(hidden[start:end], ids[start + 1 : end + 1], torch.arange(start, end), view))
    assert (torch.cat(parts) - whole).abs().max() <= 2e-5
    assert cache.length == 9


def test_a_model_without_the_block_says_so(small_model: Any) -> None:
    model = small_model()
    with pytest.raises(ConfigError, match="has 0 blocks"):
        model.model.mtp(
            torch.zeros(1, 48), torch.zeros(1, dtype=torch.int64), torch.zeros(1), AttentionView(lengths=(1,))
        )
