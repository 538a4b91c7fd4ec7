"""The language network against transformers, an independent implementation, on random configurations."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ernie45
from ernie45.config.model import ModelConfig, MoeConfig
from ernie45.errors import ShapeError
from ernie45.layers.cache import AttentionView
from ernie45.layers.moe import Router
from ernie45.models.build import build_model
from ernie45.models.init import initialize

TOLERANCE = 2e-5
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def dense_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Configurations of the dense network: head counts, ratios and sizes that do not divide evenly into one another."""
    num_kv = draw(st.sampled_from([1, 2, 3]))
    ratio = draw(st.sampled_from([1, 2, 5]))
    return {
        "vocab_size": draw(st.sampled_from([67, 128])),
        "hidden_size": draw(st.sampled_from([32, 48, 60])),
        "intermediate_size": draw(st.sampled_from([40, 96])),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": num_kv * ratio,
        "num_key_value_heads": num_kv,
        "head_dim": draw(st.sampled_from([8, 16, 20])),
        "tie_word_embeddings": draw(st.booleans()),
        "use_bias": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([10000.0, 500000.0]))},
    }


@st.composite
def moe_fields(draw: st.DrawFn) -> dict[str, Any]:
    """MoE configurations: experts, active experts, shared experts, first, last and interval of MoE layers."""
    fields = draw(dense_fields())
    layers = fields["num_hidden_layers"]
    num_experts = draw(st.sampled_from([4, 9]))
    start = draw(st.integers(0, layers - 1))
    return fields | {
        "moe_num_experts": num_experts,
        "moe_k": draw(st.integers(1, num_experts)),
        "moe_intermediate_size": draw(st.sampled_from([12, 40])),
        "moe_num_shared_experts": draw(st.integers(0, 2)),
        "moe_layer_start_index": start,
        "moe_layer_end_index": draw(st.sampled_from([-1, *range(start, layers)])),
        "moe_layer_interval": draw(st.sampled_from([1, 1, 2])),
    }


def _ours(theirs: Any, dtype: str = "float32") -> Any:
    """The same network in this package, by way of a saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return ernie45.load_model(folder, dtype=dtype)


def _ids(vocab_size: int, rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@given(fields=dense_fields(), seed=st.integers(0, 2**16))
@SETTINGS
def test_dense_logits_equal_transformers(transformers_model: Any, fields: dict[str, Any], seed: int) -> None:
    theirs = transformers_model(seed, **fields)
    ids = _ids(fields["vocab_size"], 2, 13, seed)
    with torch.no_grad():
        assert (_ours(theirs)(ids) - theirs(ids).logits).abs().max() <= TOLERANCE


@given(fields=moe_fields(), seed=st.integers(0, 2**16))
@SETTINGS
def test_moe_logits_and_chosen_experts_equal_transformers(
    transformers_model: Any, fields: dict[str, Any], seed: int
) -> None:
    theirs = transformers_model(seed, **fields)
    ours = _ours(theirs)
    ids = _ids(fields["vocab_size"], 2, 13, seed)
    chosen_by_us = _record(ours, Router, lambda output: output[1])
    gate_class = next((type(m) for n, m in theirs.named_modules() if n.endswith("mlp.gate")), None)
    chosen_by_them = _record(theirs, gate_class, lambda output: output[2]) if gate_class else []
    with torch.no_grad():
        difference = (ours(ids) - theirs(ids).logits).abs().max()
    assert difference <= TOLERANCE
    assert len(chosen_by_us) == len(chosen_by_them) == ours.config.num_moe_layers
    for mine, other in zip(chosen_by_us, chosen_by_them, strict=True):
        assert torch.equal(mine.sort(-1).values, other.sort(-1).values)


def _record(model: Any, kind: Any, pick: Any) -> list[Tensor]:
    recorded: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda _m, _i, output: recorded.append(pick(output)))
    return recorded


def test_the_correction_bias_decides_who_is_chosen(transformers_model: Any) -> None:
    """The comparison above would be blind if the bias never mattered."""
    fields = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0}
    theirs = transformers_model(
        3, vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **fields,
    )  # fmt: skip
    ours = _ours(theirs)
    ids = _ids(64, 1, 32)
    with torch.no_grad():
        with_bias = ours(ids)
        for module in ours.modules():
            if isinstance(module, Router) and module.e_score_correction_bias is not None:
                module.e_score_correction_bias.zero_()
        assert (ours(ids) - with_bias).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("moe", [False, True])
def test_bfloat16_logits_are_near_transformers(transformers_model: Any, moe: bool) -> None:
    """bfloat16 keeps 8 bits: the stated tolerance is 2 % of the logits' spread; both sides round at other places."""
    experts = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1} if moe else {}
    theirs = transformers_model(
        5, vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, **experts,
    )  # fmt: skip
    ours = _ours(theirs, "bfloat16")
    ids = _ids(128, 2, 20)
    with torch.no_grad():
        exact = theirs(ids).logits
        for name, parameter in theirs.named_parameters():
            if ".gate." not in name:
                parameter.data = parameter.data.bfloat16()
        rounded = theirs(ids).logits.float()
        mine = ours(ids).float()
    assert mine.dtype == torch.float32
    assert ours.dtype == torch.bfloat16
    spread = exact.std()
    assert (mine - rounded).abs().max() <= 0.1 * spread
    assert (mine - exact).abs().mean() <= 0.02 * spread


def test_float16_runs_and_agrees(small_model: Any) -> None:
    wide = small_model(moe=True)
    half = build_model(wide.config, dtype=torch.float16)
    half.load_state_dict(wide.state_dict())
    ids = _ids(101, 1, 9)
    with torch.no_grad():
        assert half(ids).dtype == torch.float16
        assert (half(ids).float() - wide(ids)).abs().max() <= 5e-3 * wide(ids).std() * 10


@given(cuts=st.lists(st.integers(1, 22), max_size=5), moe=st.booleans())
@SETTINGS
def test_chunked_prefill_equals_one_pass(small_model: Any, cuts: list[int], moe: bool) -> None:
    model = small_model(moe=moe)
    ids = _ids(101, 1, 23)[0]
    borders = sorted({0, *cuts, 23})
    cache = model.new_cache(2)  # grows several times
    with torch.no_grad():
        whole = model(ids[None])[0]
        parts = [
            model.logits(model.hidden(ids[a:b], AttentionView(lengths=(b - a,), caches=(cache,))))
            for a, b in itertools.pairwise(borders)
        ]
    assert cache.length == 23
    assert (torch.cat(parts) - whole).abs().max() <= TOLERANCE


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), moe=st.booleans())
@SETTINGS
def test_packed_documents_do_not_see_each_other(small_model: Any, lengths: list[int], moe: bool) -> None:
    model = small_model(moe=moe)
    ids = _ids(101, 1, sum(lengths))[0]
    with torch.no_grad():
        packed = model.logits(model.hidden(ids, AttentionView(lengths=tuple(lengths))))
        alone = torch.cat([model(document[None])[0] for document in ids.split(lengths)])
    assert (packed - alone).abs().max() <= TOLERANCE


def test_sequences_of_a_batch_decode_as_alone(small_model: Any) -> None:
    """Caches of different lengths in one step, some sequences entering while others decode."""
    model = small_model(moe=True)
    first, second = _ids(101, 1, 12, 1)[0], _ids(101, 1, 7, 2)[0]
    caches = (model.new_cache(), model.new_cache())
    with torch.no_grad():
        model.hidden(first[:9], AttentionView(lengths=(9,), caches=caches[:1]))
        joint = model.hidden(torch.cat((first[9:10], second[:5])), AttentionView(lengths=(1, 5), caches=caches))
        last = model.hidden(torch.cat((first[10:], second[5:])), AttentionView(lengths=(2, 2), caches=caches))
        expected_first, expected_second = model(first[None])[0], model(second[None])[0]
    assert (model.logits(joint) - torch.cat((expected_first[9:10], expected_second[:5]))).abs().max() <= TOLERANCE
    assert (model.logits(last) - torch.cat((expected_first[10:], expected_second[5:]))).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "shape"),
        (torch.zeros(1, 0, dtype=torch.int64), "shape"),
        (torch.zeros(1, 4), "dtype"),
    ],
)
def test_wrong_ids_are_refused(small_model: Any, ids: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        small_model()(ids)


def test_a_view_that_does_not_match_is_refused(small_model: Any) -> None:
    with pytest.raises(ShapeError, match="5 tokens"):
        small_model().hidden(torch.zeros(5, dtype=torch.int64), AttentionView(lengths=(4,)))


@pytest.mark.parametrize("name", list(ernie45.presets()))
def test_every_published_model_builds_on_the_meta_device(name: str) -> None:
    config = ernie45.presets()[name]
    model = build_model(config, device="meta", dtype=torch.bfloat16)
    counted = sum(tensor.numel() for tensor in model.state_dict().values())
    assert counted == ernie45.count_parameters(config).total_with_mtp
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_the_21b_at_full_width_runs_in_bfloat16() -> None:
    """Four layers of the 21B-A3B (one dense, three MoE) with seeded random weights: 2.4 GB."""
    from dataclasses import replace

    config = replace(ernie45.preset("21b-a3b"), num_hidden_layers=4, num_nextn_predict_layers=0, vocab_size=4096)
    model = build_model(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            # One small block repeated: filling 2 billion values one by one would take most of a minute.
            block = torch.empty(min(tensor.numel(), 1 << 20)).normal_(0, 0.02, generator=generator).to(tensor.dtype)
            flat = tensor.view(-1)
            for start in range(0, len(flat), len(block)):
                flat[start : start + len(block)] = block[: len(flat) - start]
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
        ids = _ids(4096, 1, 24)
        logits = model(ids)
        cache = model.new_cache()
        model.hidden(ids[0, :20], AttentionView(lengths=(20,), caches=(cache,)))
        rest = model.logits(model.hidden(ids[0, 20:], AttentionView(lengths=(4,), caches=(cache,))))
    assert logits.shape == (1, 24, 4096)
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    assert (rest.float() - logits[0, 20:].float()).abs().mean() <= 0.05 * logits.float().std()


def test_moe_layers_with_nothing_but_dense_neighbours() -> None:
    """Start, end and interval of MoE layers, against a list written by hand."""
    moe = MoeConfig(
        moe_num_experts=4, moe_k=1, moe_intermediate_size=8, moe_layer_start_index=2, moe_layer_end_index=6,
        moe_layer_interval=2,
    )  # fmt: skip
    config = ModelConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=9, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, moe=moe,
    )  # fmt: skip
    assert [i for i in range(9) if config.is_moe_layer(i)] == [3, 5]


def test_initialisation_is_reproducible_and_complete() -> None:
    config = ernie45.ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, use_bias=True, num_nextn_predict_layers=1,
        moe=MoeConfig(moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1),
    )  # fmt: skip
    first, second, other = (build_model(config) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
        initialize(model, std=0.02, seed=seed, correction_bias_std=0.1)
    for name, tensor in first.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_a_cache_of_another_dtype_rounds_the_same_for_every_chunking(
    small_model: Any, computed: torch.dtype, stored: torch.dtype
) -> None:
    model = small_model(moe=True, dtype=computed)
    ids = torch.randint(model.config.vocab_size, (12,), generator=torch.Generator().manual_seed(0))

    def states(kv_dtype: torch.dtype | None, *lengths: int) -> Tensor:
        model.kv_dtype = kv_dtype
        cache = model.new_cache()
        assert cache.dtype == (kv_dtype or computed)
        with torch.inference_mode():
            return torch.cat(
                [model.hidden(p, AttentionView(lengths=(len(p),), caches=(cache,))) for p in ids.split(lengths)]
            )

    exact, whole = states(None, 12), states(stored, 12)
    noise = 2e-5 if computed == torch.float32 else 0.02
    for lengths in ((5, 7), (1,) * 12):
        torch.testing.assert_close(states(stored, *lengths), whole, rtol=noise, atol=noise)
    difference = float((whole - exact).abs().max())
    if stored == torch.bfloat16 and computed == torch.float32:
        assert 1e-4 < difference < 0.05, "keys and values are rounded to 8 bits"
    else:
        assert difference == 0, "nothing is rounded"


def test_building_without_memory_does_not_load_torchs_compiler() -> None:
    """Importing torch._dynamo takes longer than all else that `ernie show` does; an initialiser on the meta device does it."""
    program = (
        "import sys, ernie45; from ernie45.models.build import build_model; "
        "build_model(ernie45.ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, "
        "num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_nextn_predict_layers=1), device='meta'); "
        "print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n", run.stderr
