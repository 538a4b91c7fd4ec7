"""The training network against the plain one and against transformers: losses, every gradient, router records, prediction blocks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ernie45
from ernie45.config.model import ModelConfig, MoeConfig
from ernie45.errors import ConfigError, ShapeError
from ernie45.layers.cache import AttentionView
from ernie45.layers.moe import route
from ernie45.models.text import CausalLM, MtpVariant
from ernie45.training import network
from ernie45.training.batch import IGNORED, Batch, Document
from ernie45.training.head import lm_loss_sum
from ernie45.training.leaves.router import TrainingRouter
from ernie45.training.network import TrainingNetwork, count_flops_per_token, slow_dtype_warning
from ernie45.training.recompute import RecomputeConfig


def _documents(lengths: Sequence[int], *, unread: int = 1, seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        learnt = torch.rand(length + unread, generator=generator) < 0.8
        learnt[0] = False
        ids = torch.randint(101, (length + unread,), generator=generator)
        documents.append(Document(ids=ids, learnt=learnt, num_unread=unread))
    return documents


def _batch(lengths: Sequence[int] = (9, 5, 9, 1), num_mtp: int = 0) -> Batch:
    return Batch.of_rows([_documents(lengths, unread=1 + num_mtp)], num_mtp=num_mtp)


def _assert_same_gradients(one: CausalLM, other: CausalLM, atol: float = 1e-5) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=atol, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "fields", [{}, {"moe": True}, {"moe": True, "use_bias": True, "tie_word_embeddings": False}], ids=str
)
def test_loss_and_gradients_equal_the_plain_network(
    small_model: Callable[..., CausalLM], fields: dict[str, Any]
) -> None:
    plain, model = small_model(**fields), small_model(**fields)
    net, batch = TrainingNetwork(model), _batch()
    loss = lm_loss_sum(net, net.run(batch).hidden_TH, batch.labels_DT[0])
    whole = F.cross_entropy(
        plain.logits(plain.hidden(batch.tokens_T, batch.view())),
        batch.labels_DT[0],
        ignore_index=IGNORED,
        reduction="sum",
    )
    torch.testing.assert_close(loss, whole, atol=1e-4, rtol=1e-6)
    (loss / 10).backward()
    (whole / 10).backward()
    _assert_same_gradients(model, plain)


@pytest.mark.parametrize("moe", [False, True])
def test_loss_and_gradients_equal_transformers(transformers_model: Any, moe: bool) -> None:
    """Their backward pass through their modules; their gradients travel as a checkpoint of the same layout."""
    experts = {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24, "moe_num_shared_experts": 2}
    theirs = transformers_model(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        **({**experts, "moe_layer_start_index": 1} if moe else {}),
    )
    ids = torch.randint(101, (2, 17), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = ernie45.load_model(folder)
        expected = theirs(input_ids=ids, labels=ids).loss
        expected.backward()
        for parameter in theirs.parameters():
            # The correction bias is a parameter there that never gets one.
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        theirs.save_pretrained(folder)
        gradients = ernie45.load_model(folder)

    net = TrainingNetwork(model.requires_grad_())
    documents = [Document(ids=row, learnt=torch.arange(17) > 0) for row in ids]
    batch = Batch.of_rows([documents])
    loss = lm_loss_sum(net, net.run(batch).hidden_TH, batch.labels_DT[0]) / 32
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    loss.backward()
    for (name, mine), other in zip(model.named_parameters(), gradients.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.data, atol=1e-5, rtol=1e-3, msg=name)


def test_names_stay_and_copies_are_their_own(small_model: Callable[..., CausalLM]) -> None:
    plain, model = small_model(moe=True, mtp=1), small_model(moe=True, mtp=1)
    TrainingNetwork(model, recompute=RecomputeConfig(policy="full"))
    assert list(model.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    batch = _batch()
    torch.testing.assert_close(
        twin.hidden(batch.tokens_T, batch.view()), plain.hidden(batch.tokens_T, batch.view()), atol=1e-5, rtol=1e-5
    )


def test_packed_documents_equal_each_by_itself(small_model: Callable[..., CausalLM]) -> None:
    net = TrainingNetwork(small_model(moe=True))
    documents = _documents((9, 5, 9, 1))
    packed = net.run(Batch.of_rows([documents])).hidden_TH
    alone = torch.cat([net.run(Batch.of_rows([[document]])).hidden_TH for document in documents])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_routers_are_recorded_once_and_let_go(small_model: Callable[..., CausalLM]) -> None:
    """In order of the layers, with the logits' gradient, whatever is computed again; the choice is that of the plain router."""
    for policy in ("none", "full"):
        net = TrainingNetwork(small_model(moe=True), recompute=RecomputeConfig(policy=policy))
        batch = _batch()
        records = net.run(batch).routers
        gates = [module for module in net.model.modules() if isinstance(module, TrainingRouter)]
        assert len(gates) == 2
        assert [record.router for record in records] == gates
        for record in records:
            assert record.logits_TE.shape == (batch.num_tokens, 8)
            assert record.logits_TE.dtype == torch.float32
            _, ids = route(record.logits_TE, record.router.e_score_correction_bias, 3, 1e-12)
            assert torch.equal(record.ids_TK, ids)
        torch.stack([record.logits_TE.logsumexp(-1).square().sum() for record in records]).sum().backward()
        assert gates[0].weight.grad is not None
        assert net.model.get_parameter("model.layers.0.self_attn.qkv_proj.weight").grad is not None
        assert [gate.recorded for gate in gates] == [None, None]
        net.model.hidden(batch.tokens_T, batch.view())
        assert [gate.recorded for gate in gates] == [None, None]


@pytest.mark.parametrize("variant", [MtpVariant(), MtpVariant(final_norm_on_input=True)], ids=str)
def test_prediction_blocks_equal_a_second_writing(small_model: Callable[..., CausalLM], variant: MtpVariant) -> None:
    """e of the tokens ahead, h of what came before; block 2 goes on from block 1."""
    model = small_model(moe=True, mtp=2)
    net, batch = TrainingNetwork(model, mtp_variant=variant), _batch(num_mtp=2)
    text = model.model
    with torch.no_grad():
        found = net.run(batch, num_mtp=2)
        hidden = model.hidden(batch.tokens_T, batch.view())
        torch.testing.assert_close(found.hidden_TH, hidden)
        for depth in range(2):
            normed = text.norm(hidden) if variant.final_norm_on_input else hidden
            parts = (
                text.mtp_emb_norm[depth](text.embed_tokens(batch.ahead_DT[depth])),
                text.mtp_hidden_norm[depth](normed),
            )
            joined = text.mtp_linear_proj[depth](torch.cat(parts, dim=-1))
            hidden = text.mtp_block[depth](joined, text._rotation(batch.view().positions()), batch.view())
            torch.testing.assert_close(found.mtp_TH[depth], hidden)
    assert net.run(batch).mtp_TH == ()


def test_blocks_that_a_batch_or_model_has_not_are_refused(small_model: Callable[..., CausalLM]) -> None:
    net = TrainingNetwork(small_model(mtp=1))
    with pytest.raises(ShapeError, match="collate it with num_mtp"):
        net.run(_batch(), num_mtp=1)
    with pytest.raises(ConfigError, match="the model has 1 blocks"):
        net.run(_batch(num_mtp=2), num_mtp=2)


def test_what_lies_beyond_a_document_changes_nothing_that_is_learnt(small_model: Callable[..., CausalLM]) -> None:
    """The second block has no token to read at a document's end: whatever stands there, no label sees it."""
    net = TrainingNetwork(small_model(mtp=2))
    batch = Batch.of_rows([_documents((6, 4), unread=1)], num_mtp=2)
    other = batch.ahead_DT.clone()
    other[1, [5, 9]] = 77
    changed = Batch(
        tokens_T=batch.tokens_T, lengths=batch.lengths, ahead_DT=other, labels_DT=batch.labels_DT, num_rows=1
    )
    learnt = batch.labels_DT[2] != IGNORED
    assert learnt.any()
    one, two = (net.run(each, num_mtp=2).mtp_TH[1] for each in (batch, changed))
    assert not torch.equal(one, two)
    assert torch.equal(one[learnt], two[learnt])


def test_products_in_bfloat16_over_float32_weights(small_model: Callable[..., CausalLM]) -> None:
    batch = _batch()
    wide, narrow = TrainingNetwork(small_model(moe=True)), TrainingNetwork(small_model(moe=True), dtype="bfloat16")
    seen = []
    narrow.model.get_submodule("model.layers.0.self_attn.qkv_proj").register_forward_hook(
        lambda m, i, out: seen.append(out.dtype)
    )
    losses = [lm_loss_sum(net, net.run(batch).hidden_TH, batch.labels_DT[0]) for net in (wide, narrow)]
    assert seen == [torch.bfloat16]
    assert 0 < abs(losses[0].item() / losses[1].item() - 1) < 0.02
    losses[1].backward()
    assert {parameter.grad.dtype for parameter in narrow.model.parameters() if parameter.grad is not None} == {
        torch.float32
    }


@pytest.mark.parametrize(("dtype", "weights"), [("float16", torch.float32), ("float32", torch.bfloat16)])
def test_dtypes_that_do_not_train_are_refused(
    small_model: Callable[..., CausalLM], dtype: str, weights: torch.dtype
) -> None:
    with pytest.raises(ConfigError, match="float32"):
        TrainingNetwork(small_model(dtype=weights), dtype=dtype)


def test_pure_bfloat16_stays_near_the_plain_network(small_model: Callable[..., CausalLM]) -> None:
    plain, model = (small_model(moe=True, dtype=torch.bfloat16) for _ in range(2))
    batch = _batch()
    hidden = TrainingNetwork(model).run(batch).hidden_TH
    expected = plain.hidden(batch.tokens_T, batch.view())
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), expected.float(), atol=0.15, rtol=0.1)


def test_flops_by_hand() -> None:
    """A layer of width 4 with one head of 2: q 4x2, k 4x2, v 4x2, o 2x4, feed-forward 3 x 4x3, norms 2 x 4; final norm 4,
    head 10 x 4."""
    config = ModelConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=3,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        num_nextn_predict_layers=1,
    )
    active = (8 + 8 + 8 + 8) + 36 + 8 + 4 + 40
    # Two queries see 1 and 2 keys, each 2 + 2 multiply-adds of width 2, forward once and backward twice: 3 x 2 x (2 + 2) x 1.5 a token.
    assert count_flops_per_token(config, 2) == 6 * active + 36
    block = (8 + 8 + 8 + 8) + 36 + 8 + 2 * 4 + 2 * 4 * 4 + 40
    assert count_flops_per_token(config, 2, num_mtp=1) == 6 * (active + block) + 2 * 36
    with pytest.raises(ConfigError, match="2 prediction blocks"):
        count_flops_per_token(config, 2, num_mtp=2)


def test_flops_count_active_experts_alone() -> None:
    sizes: dict[str, Any] = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 3}
    fields: dict[str, Any] = {
        "vocab_size": 10,
        "hidden_size": 4,
        "intermediate_size": 3,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
    }
    two, three = (ModelConfig(**fields, moe=MoeConfig(**(sizes | {"moe_k": k}))) for k in (2, 3))
    assert count_flops_per_token(three, 8) - count_flops_per_token(two, 8) == 6 * 3 * 4 * 3


def test_a_slow_dtype_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 100e9, torch.bfloat16: 2e9}
    monkeypatch.setattr(network, "_product_rate", lambda dtype: rates[dtype])
    warning = slow_dtype_warning("bfloat16")
    assert warning is not None
    assert "2.0 GFLOP/s in bfloat16 and at 100.0 in float32" in warning
    rates[torch.bfloat16] = 60e9
    assert slow_dtype_warning("bfloat16") is None
    assert slow_dtype_warning("float32") is None


def test_the_rate_of_products_is_measured() -> None:
    assert network._product_rate(torch.float32, size=64) > 1e6


def test_a_hidden_state_of_the_plain_network(small_model: Callable[..., CausalLM]) -> None:
    """Without gradients and without a batch, the model answers as ever: it is the same model."""
    plain, model = small_model(moe=True), small_model(moe=True)
    TrainingNetwork(model)
    ids = torch.arange(10)
    view = AttentionView(lengths=(10,))
    with torch.no_grad():
        found: Tensor = model.logits(model.hidden(ids, view))
    torch.testing.assert_close(found, plain(ids[None])[0].detach(), atol=1e-5, rtol=1e-5)
