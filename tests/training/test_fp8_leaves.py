"""The fp8 leaves beside the plain ones: values, gradients, what they keep, and which layers they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.errors import ConfigError
from ernie45.kernels.router import Routing, order_by_expert
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.linear import Linear
from ernie45.layers.moe import Experts, Router
from ernie45.models.text import CausalLM
from ernie45.training.fp8 import Fp8Config, use_fp8
from ernie45.training.fp8.experts import Fp8Experts
from ernie45.training.fp8.linear import Fp8Linear, Fp8SwiGLU
from ernie45.training.fp8.scaled import quantize_rows, quantize_tiles
from ernie45.training.fp8.swiglu import swiglu
from ernie45.training.optim import OptimizerConfig, build_optimizer

FEED_FORWARD_ERROR = 0.07
"""One rounding errs by 2.6 %, root mean square. Gate and up see two each, which makes 5.2 % of their product; down adds two: 6.4 %."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


M = TypeVar("M", bound=nn.Module)


def fill(module: M) -> M:
    for index, parameter in enumerate(module.parameters()):
        parameter.data.copy_(drawn(*parameter.shape, seed=100 + index) * parameter.shape[-1] ** -0.5)
    return module


def cosine(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def gradients(
    module: nn.Module, x: Tensor, *arguments: Any, upstream_seed: int = 7
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output and gradients of input, parameters and float arguments for one upstream gradient."""
    x = x.clone().requires_grad_()
    y = module(x, *arguments)
    module.zero_grad()
    (y * drawn(*y.shape, seed=upstream_seed).to(y.dtype)).sum().backward()
    return y.detach(), {"x": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}


def routing(num_tokens: int, num_experts: int, active: int) -> Routing:
    """Expert 0 gets nothing; the others unequal groups."""
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(4))
    scores[:, 0], scores[:, 1] = -1, scores[:, 1] + 0.3
    weights, ids = scores.topk(active, dim=-1)
    return order_by_expert(weights.detach().clone().requires_grad_(), ids, num_experts)


def test_linear_is_the_product_of_rounded_operands() -> None:
    plain = fill(Linear(200, 70))
    leaf = Fp8Linear(plain, "emulate")
    x, residual = drawn(33, 200), drawn(33, 70, seed=1)
    expected = quantize_rows(x).dequantized() @ quantize_tiles(plain.weight.detach()).dequantized().mT + plain.bias
    torch.testing.assert_close(leaf(x), expected)
    torch.testing.assert_close(leaf(x, residual_TH=residual), expected + residual)
    assert leaf(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_point_where_those_of_float32_point() -> None:
    plain = fill(SwiGLU(192, 160, bias=True, dtype=torch.float32))
    x = drawn(150, 192)
    y, expected = gradients(plain, x)
    leaf = Fp8SwiGLU(plain.up_gate_proj, plain.down_proj, "emulate", keeps_products=True)
    y_fp8, found = gradients(leaf, x)
    assert y_fp8.sub(y).norm() < FEED_FORWARD_ERROR * y.norm()
    assert found.keys() == expected.keys()
    for name in found:
        assert cosine(found[name], expected[name]) > 0.997, name
        assert found[name] is not None


@pytest.mark.parametrize("keep", [True, False])
def test_experts_and_their_gradients(keep: bool) -> None:
    """Groups of any size, one of them empty; the router's weights get gradients too."""
    plain = fill(Experts(5, 144, 72, torch.float32))
    leaf = Fp8Experts(plain.up_gate_proj, plain.down_proj, "emulate", keeps_products=keep)
    x, residual = drawn(70, 144), drawn(70, 144, seed=1)
    results = []
    for module in (plain, leaf):
        chosen = routing(70, 5, 2)
        y, grads = gradients(module, x, chosen, residual)
        (router,) = torch.autograd.grad(
            (module(x, chosen) * drawn(70, 144, seed=7)).sum(), chosen.token_weights, retain_graph=True
        )
        results.append((y - residual, grads | {"router": router}))
    (y, expected), (y_fp8, found) = results
    assert y_fp8.sub(y).norm() < FEED_FORWARD_ERROR * y.norm()
    for name in expected:
        assert cosine(found[name], expected[name]) > 0.995, name
    for name in ("up_gate_proj", "down_proj"):
        assert not found[name][0].any(), "the empty expert"  # type: ignore[index]


def test_experts_are_the_sum_of_their_rounded_products() -> None:
    plain = fill(Experts(3, 20, 12, torch.float32))
    x, chosen = drawn(9, 20), routing(9, 3, 2)
    expected = torch.zeros(9, 20)
    for token in range(9):
        for weight, expert in zip(chosen.weights_TK[token], chosen.ids_TK[token], strict=True):
            rounded = quantize_rows(x[token : token + 1]).dequantized()
            gate, up = (rounded @ quantize_tiles(plain.up_gate_proj[expert]).dequantized().mT).chunk(2, dim=-1)
            inner = quantize_rows(F.silu(gate) * up * weight).dequantized()
            expected[token] += (inner @ quantize_tiles(plain.down_proj[expert]).dequantized().mT)[0]
    leaf = Fp8Experts(plain.up_gate_proj, plain.down_proj, "emulate", keeps_products=True)
    torch.testing.assert_close(leaf(x, chosen), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_dense", [True, False])
def test_keeping_and_computing_again_give_the_same_bits(is_dense: bool) -> None:
    x, outcomes = drawn(30, 40).bfloat16(), []
    for keep in (True, False):
        leaf: nn.Module
        if is_dense:
            layer = fill(SwiGLU(40, 24, bias=False, dtype=torch.bfloat16))
            leaf = Fp8SwiGLU(layer.up_gate_proj, layer.down_proj, "emulate", keeps_products=keep)
            outcomes.append(gradients(leaf, x)[1])
        else:
            experts = fill(Experts(4, 40, 24, torch.bfloat16))
            leaf = Fp8Experts(experts.up_gate_proj, experts.down_proj, "emulate", keeps_products=keep)
            outcomes.append(gradients(leaf, x, routing(30, 4, 2))[1])
    kept, again = outcomes
    for name, gradient in kept.items():
        found = again[name]
        assert gradient is not None
        assert found is not None
        assert torch.equal(gradient, found)


def test_swiglu_by_finite_differences() -> None:
    up_gate = drawn(3, 10).double().float()
    x = up_gate.clone().requires_grad_()
    upstream = drawn(3, 5, seed=2)
    (swiglu(x) * upstream).sum().backward()
    reference = up_gate.double().requires_grad_()
    gate, up = reference.chunk(2, dim=-1)
    (gate * gate.sigmoid() * up * upstream).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=0, atol=1e-6)
    step = 1e-3
    for index in range(10):
        ahead, behind = up_gate.clone(), up_gate.clone()
        ahead[1, index] += step
        behind[1, index] -= step
        slope = ((swiglu(ahead) - swiglu(behind)) * upstream).sum() / (2 * step)
        assert x.grad[1, index].item() == pytest.approx(slope.item(), abs=2e-3)


def saved_bytes(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    return sum(sizes.values())


def test_the_input_is_kept_in_fp8() -> None:
    """A byte per number and 4 bytes per 128 of them; bfloat16 would be twice that."""
    leaf = Fp8Linear(nn.Linear(256, 64, bias=False), "emulate")
    x = drawn(100, 256).bfloat16().requires_grad_()
    assert saved_bytes(leaf, lambda: leaf(x)) == 100 * (256 + 4 * 2)
    leaf.weight.requires_grad_(False)
    assert saved_bytes(leaf, lambda: leaf(x)) == 0, "a frozen weight needs no input"


def test_what_the_feed_forward_layers_keep() -> None:
    """Dense: input in fp8, up/gate in bfloat16, the inner values in fp8. Experts: input once per token, up/gate or nothing."""
    tokens, hidden, inner, active = 100, 256, 128, 2
    plain = SwiGLU(hidden, inner, bias=False, dtype=torch.bfloat16)
    x = drawn(tokens, hidden).bfloat16().requires_grad_()
    dense = Fp8SwiGLU(plain.up_gate_proj, plain.down_proj, "emulate", keeps_products=True)
    assert saved_bytes(dense, lambda: dense(x)) == tokens * ((hidden + 8) + 2 * 2 * inner + (inner + 4))
    dense.keeps_products = False
    assert saved_bytes(dense, lambda: dense(x)) == 2 * tokens * hidden, "the input as it came"
    stacks = Experts(4, hidden, inner, torch.bfloat16)
    chosen = routing(tokens, 4, active)
    entry_bytes = 4 * tokens * active  # the router's weights
    for keep, up_gate_bytes in ((True, 2 * 2 * inner * tokens * active), (False, 0)):
        leaf = Fp8Experts(stacks.up_gate_proj, stacks.down_proj, "emulate", keeps_products=keep)
        assert saved_bytes(leaf, lambda leaf=leaf: leaf(x, chosen)) == (  # type: ignore[misc]
            tokens * (hidden + 8) + entry_bytes + up_gate_bytes
        )


def test_weight_gradients_reach_the_float32_sum_unrounded() -> None:
    plain = fill(nn.Linear(64, 16, bias=False))
    wide = Fp8Linear(plain, "emulate")
    narrow = Fp8Linear(nn.Linear(64, 16, bias=False).to(torch.bfloat16), "emulate")
    narrow.weight.data.copy_(wide.weight)
    wide.weight.data.copy_(narrow.weight)
    optimizer = build_optimizer(narrow.named_parameters(), OptimizerConfig(), num_layers=1)
    x = drawn(40, 64).bfloat16()
    for _ in range(2):
        wide(x.float()).square().sum().backward()
        narrow(x.float()).square().sum().backward()
    assert wide.weight.grad is not None
    assert narrow.weight.grad is None
    assert torch.equal(optimizer.gradients()["weight"], wide.weight.grad)


def test_which_layers_change(small_model: Callable[..., CausalLM]) -> None:
    """Dense, shared and MTP feed-forward layers and experts; names and parameters stay."""
    model = small_model(moe=True, mtp=1)
    before = dict(model.named_parameters())
    assert use_fp8(model) == 1 + 2 * 2 + 1  # a dense layer, two mixtures with shared experts, the MTP block
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, Fp8Linear) is (".mlp." in name), name
        assert type(module) not in (SwiGLU, Experts)
        if isinstance(module, Router):
            assert module.weight.dtype == torch.float32
    assert not model.training


def test_options_and_refusals(small_model: Callable[..., CausalLM]) -> None:
    model = small_model(moe=True)
    use_fp8(model, Fp8Config(keep_up_gate=False, backend="emulate"))
    kept = {module.keeps_products for module in model.modules() if isinstance(module, Fp8Experts | Fp8SwiGLU)}
    assert kept == {False}
    for nothing_left in (model, nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(ConfigError, match="fp8 has nothing to do"):
            use_fp8(nothing_left)


def test_layers_with_an_adapter_stay_as_they_are(small_model: Callable[..., CausalLM]) -> None:
    """To take only their weights would lose the adapter without a word."""

    class Adapted(nn.Linear):
        pass

    model = small_model(moe=True)
    blocks: list[Any] = [layer.mlp for layer in model.model.layers]
    blocks[0].up_gate_proj = Adapted(48, 160)
    blocks[1].experts.register_parameter("up_gate_lora_A", nn.Parameter(torch.zeros(1)))
    left = [blocks[0], blocks[1].experts]
    use_fp8(model)
    after: list[Any] = [layer.mlp for layer in model.model.layers]
    assert [after[0], after[1].experts] == left
    assert isinstance(after[2].experts, Fp8Experts)


def test_what_was_computed_again_before_is_so_in_fp8(small_model: Callable[..., CausalLM]) -> None:
    model = small_model(moe=True)
    block: Any = model.model.layers[1].mlp
    block.experts.keeps_products = False
    use_fp8(model)
    assert block.experts.keeps_products is False
    assert block.shared_experts.keeps_products is True
