"""A quantized network against the same network with the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.source import Source, open_source
from ernie45.errors import CheckpointError
from ernie45.kernels.choice import kernels
from ernie45.kernels.native import status
from ernie45.kernels.packed import round_activations
from ernie45.kernels.router import Routing
from ernie45.layers.cache import AttentionView
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.moe import Experts
from ernie45.models.build import build_model
from ernie45.models.text import CausalLM
from ernie45.quant.folder import PackedSource
from ernie45.quant.layers import BiasedSwiGLU, PackedExperts, PackedLinear, PackedSwiGLU, swap_leaves

LEAVES = (PackedLinear, PackedSwiGLU, BiasedSwiGLU, PackedExperts)
CASES: dict[str, dict[str, Any]] = {
    "dense, tied": {},
    "dense, untied, bias": {"tie_word_embeddings": False, "use_bias": True},
    "mixture": {"moe": True},
    "mixture, untied, mtp": {"moe": True, "mtp": 1, "tie_word_embeddings": False},
    "mixture, bias, mtp": {"moe": True, "mtp": 1, "use_bias": True},
}
# A whole network against the float one: activations are rounded to 8 bits in front of each of about 20 products in a
# row. No reference can be much closer: one last bit moves a value over a rounding boundary, and what follows differs
# by as much.
NETWORK = 0.08
# A single leaf on equal, rounded inputs: the order of sums alone, but for tokens whose inner state has such a value.
LEAF, LEAF_STEP = 1e-5, 0.03


def _dequantized(source: Source) -> CausalLM:
    """The float network with the weights that the packed ones stand for."""
    model = build_model(source.config)
    with torch.no_grad():
        for stored in source.layout:
            model.state_dict()[stored.name].copy_(source.read(stored))
    return model.eval()


def _rounded(x: torch.Tensor, bits: Literal[8, 16] = 8) -> torch.Tensor:
    values, scales = round_activations(x, bits)
    return (values * scales[..., None]).flatten(1)[:, : x.shape[1]]


class _RoundedExperts(nn.Module):
    """Routed experts, one token and expert after the other, with rounded activations: slow and plain."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor, routing: Routing, residual_TH: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.zeros_like(x) if residual_TH is None else residual_TH.clone()
        for t in range(len(x)):
            for weight, expert in zip(routing.weights_TK[t], routing.ids_TK[t].tolist(), strict=True):
                gate, up = (self.experts.up_gate_proj[expert] @ _rounded(x[t : t + 1])[0]).chunk(2)
                inner = _rounded((nn.functional.silu(gate) * up)[None])[0]
                out[t] += weight * (self.experts.down_proj[expert] @ inner)
        return out


def _round_inputs(model: nn.Module) -> None:
    """Make a float network round what a packed one of scheme wint4 rounds."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (_rounded(inputs[0], 16),))
        elif isinstance(module, Experts):
            model.set_submodule(name, _RoundedExperts(module))


@torch.inference_mode()
def _outputs(model: CausalLM) -> list[torch.Tensor]:
    """Logits of a prefill, of four decode steps behind it, and of the multi-token prediction block."""
    ids = torch.randint(101, (17,), generator=torch.Generator().manual_seed(3))
    cache = model.new_cache()
    view = AttentionView(lengths=(13,), caches=(cache,))
    hidden = model.hidden(ids[:13], view)
    found = [model.logits(hidden)]
    for i in range(13, 17):
        found.append(model.logits(model.hidden(ids[i : i + 1], AttentionView(lengths=(1,), caches=(cache,)))))
    if model.config.num_nextn_predict_layers:
        mtp_view = AttentionView(lengths=(13,), caches=(model.new_mtp_cache(),))
        found.append(model.mtp_logits(model.model.mtp(hidden, ids[1:14], torch.arange(13), mtp_view)))
    return found


def _largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scheme", ["wint8", "wint4", "wint4-all"])
@pytest.mark.parametrize("case", CASES)
def test_quantized_network_is_the_network_with_dequantized_weights(
    packed: Callable[..., Path], scheme: str, case: str
) -> None:
    folder = packed(scheme, **CASES[case])
    plain = _outputs(_dequantized(open_source(folder)))
    size = max(float(logits.abs().max()) for logits in plain)
    for choice in ("reference", "native"):
        if choice == "native" and not status().available:
            continue
        with kernels(choice):
            found = _outputs(load_model(folder))
        assert _largest_difference(found, plain) < NETWORK * size
        # Wrong weights of any one leaf give a mean difference of order one.
        assert max(float((a - b).abs().mean()) for a, b in zip(found, plain, strict=True)) < 0.02 * size


@pytest.mark.parametrize("case", ["mixture, untied, mtp", "mixture, bias, mtp"])
@torch.inference_mode()
def test_the_best_token_is_that_of_the_logits(packed: Callable[..., Path], case: str) -> None:
    folder = packed("wint4", **CASES[case])
    hidden = torch.randn(30, 96, generator=torch.Generator().manual_seed(11))
    for net in (load_model(folder), _dequantized(open_source(folder))):
        logits, embedding = net.mtp_logits(hidden), net.model.embed_tokens.weight
        assert torch.equal(net.mtp_best(hidden), logits.argmax(-1))
        values, ids = net.lm_head.top(net.model.norm(hidden), embedding, 5)
        expected, order = logits.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(ids, order[:, :5])
        assert torch.equal(values, expected[:, :5])


@pytest.mark.parametrize("choice", ["reference", "native"])
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_every_leaf_on_equal_inputs(packed: Callable[..., Path], choice: Any, case: str) -> None:
    if choice == "native" and not status().available:
        pytest.skip(status().reason)
    folder = packed("wint4", **CASES[case])
    exact, model = _dequantized(open_source(folder)), load_model(folder)
    shared = {name: m for name, m in exact.named_modules() if name.endswith("shared_experts")}
    _round_inputs(exact)
    names = [name for name, module in model.named_modules() if type(module) in LEAVES]
    assert len(names) >= 3 * 3
    with kernels(choice):
        for name in names:
            leaf, twin = model.get_submodule(name), exact.get_submodule(name)
            width = 192 if "mtp_linear_proj" in name else 96
            x = torch.randn(40, width, generator=torch.Generator().manual_seed(7))
            if isinstance(leaf, PackedExperts):
                block = model.get_submodule(name.removesuffix(".experts"))
                routing = block.get_submodule("gate")(x)
                found, expected = leaf(x, routing), twin(x, routing)
                if leaf.pool.shared is not None:
                    expected = expected + shared[name.replace("experts", "shared_experts")](x)
            else:
                found, expected = leaf(x), twin(x)
            close = ((found - expected).abs() < LEAF * expected.abs().max()).all(-1)
            assert close.float().mean() >= 0.8, f"{name}: {float((found - expected).abs().max())}"
            assert (found - expected).abs().max() < LEAF_STEP * expected.abs().max()


def test_dtypes_and_embedding(packed: Callable[..., Path]) -> None:
    folder = packed("wint8", moe=True)
    model = load_model(folder, "auto")
    assert model.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    ids = torch.tensor([[0, 100], [7, 7]])
    table = next(s for s in open_source(folder).layout if s.name == "model.embed_tokens.weight")
    assert torch.equal(model.model.embed_tokens(ids), open_source(folder).read(table)[ids])


@torch.inference_mode()
def test_results_do_not_depend_on_neighbours(packed: Callable[..., Path]) -> None:
    model = load_model(packed("wint4", moe=True))
    ids = torch.randint(101, (20,), generator=torch.Generator().manual_seed(5))
    together = model.hidden(ids, AttentionView(lengths=(12, 8)))
    alone = model.hidden(ids[12:], AttentionView(lengths=(8,)))
    torch.testing.assert_close(together[12:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not status().available, reason=status().reason)
@torch.inference_mode()
def test_steps_of_several_caches_are_the_steps_of_each_to_the_bit(packed: Callable[..., Path]) -> None:
    with kernels("native"):
        model = load_model(packed("wint4", moe=True))
        prompts = [torch.randint(101, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 70, 1)]
        together, alone = ([model.new_cache(1) for _ in prompts] for _ in range(2))
        for count in (70, 1, 2):
            tokens = [prompt[:count] for prompt in prompts]
            view = AttentionView(lengths=tuple(len(ids) for ids in tokens), caches=tuple(together))
            hidden = model.hidden(torch.cat(tokens), view)
            logits = model.logits(hidden)
            for part, rows, ids, cache in zip(
                hidden.split(view.lengths), logits.split(view.lengths), tokens, alone, strict=True
            ):
                one = model.hidden(ids, AttentionView(lengths=(len(ids),), caches=(cache,)))
                assert torch.equal(part, one)
                assert torch.equal(rows, model.logits(one))


@pytest.mark.parametrize("choice", ["reference", "native"])
@pytest.mark.parametrize("case", ["mixture", "dense, untied, bias"])
@torch.inference_mode()
def test_a_residual_is_added_as_it_would_be_outside(packed: Callable[..., Path], choice: Any, case: str) -> None:
    """To the bit for single matrices and dense layers; of experts only the order of the sum differs."""
    if choice == "native" and not status().available:
        pytest.skip(status().reason)
    model = load_model(packed("wint4", **CASES[case]))
    x, residual = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).unbind()
    with kernels(choice):
        for index in range(3):
            o_proj, mlp = (model.get_submodule(f"model.layers.{index}.{name}") for name in ("self_attn.o_proj", "mlp"))
            assert torch.equal(o_proj(x, residual_TH=residual), residual + o_proj(x))
            found, expected = mlp(x, residual_TH=residual), residual + mlp(x)
            if isinstance(mlp, PackedSwiGLU | BiasedSwiGLU):
                assert torch.equal(found, expected)
            else:
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_shared_experts_ride_along_and_pools_keep_apart(packed: Callable[..., Path]) -> None:
    model = load_model(packed("wint4", moe=True))
    block = model.get_submodule("model.layers.1.mlp")
    assert block.shared_experts is None
    assert isinstance(block.experts, PackedExperts)
    assert block.experts.pool.shared is not None
    # Without the routed experts' weights only the shared ones are left, once.
    x = torch.randn(5, 96)
    routing, pool = block.gate(x), block.experts.pool
    both, routed = block.experts(x, routing), PackedExperts(pool.units)(x, routing)
    silent = routing._replace(token_weights=torch.zeros_like(routing.token_weights))
    alone = PackedExperts(pool.units, pool.shared)(x, silent)
    torch.testing.assert_close(both, routed + alone, atol=1e-5, rtol=1e-5)
    assert alone.abs().max() > 1e-3


def test_leaves_that_do_not_fit_are_refused(packed: Callable[..., Path]) -> None:
    source = open_source(packed("wint8"))
    assert isinstance(source, PackedSource)
    tensors = {parameter.name: source.matrices(parameter) for parameter in source.plan.packed}
    with pytest.raises(CheckpointError, match="only one of its two"):
        swap_leaves(
            build_model(source.config, device="meta"), {k: v for k, v in tensors.items() if "down_proj" not in k}
        )
    with pytest.raises(CheckpointError, match=r"model\.layers\.9"):
        swap_leaves(build_model(source.config, device="meta"), {**tensors, "model.layers.9.x": ()})
    # What is not given stays.
    model = build_model(source.config, device="meta")
    swap_leaves(model, {})
    assert isinstance(model.get_submodule("model.layers.0.mlp"), SwiGLU)
