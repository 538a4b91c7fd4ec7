"""The language objective against plain PyTorch: next tokens, MTP, shares of micro-batches, add-ons that are not seen in the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.errors import ConfigError, TrainingError
from ernie45.layers.cache import AttentionView
from ernie45.models.text import CausalLM
from ernie45.training.batch import IGNORED, Batch, Document
from ernie45.training.language import LanguageLossConfig, LanguageObjective
from ernie45.training.losses.router import RouterLossConfig
from ernie45.training.network import TrainingNetwork

NO_ROUTER = RouterLossConfig(balance=0.0)


def documents(*lengths: int, seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length in lengths:
        learnt = torch.rand(length, generator=generator) < 0.7
        learnt[-1] = True
        out.append(
            Document(ids=torch.randint(0, 101, (length,), generator=generator), learnt=learnt, origin=f"a:{length}")
        )
    return out


def objective(num_mtp: int = 0, observers: Sequence[Any] = (), **fields: Any) -> LanguageObjective:
    config = LanguageLossConfig(**({"router": NO_ROUTER} | fields))
    return LanguageObjective(config, num_mtp=num_mtp, max_seq_len=16, observers=observers)


def gradients(model: CausalLM) -> dict[str, Tensor]:
    out = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


def run_step(
    own: LanguageObjective, model: CausalLM, passes: Sequence[Sequence[Sequence[Document]]]
) -> tuple[dict[str, float], Any]:
    """Logged sums and gradients of a step over micro-batches of rows."""
    network = TrainingNetwork(model.requires_grad_(True))
    batches = [own.collate(rows) for rows in passes]
    totals = own.totals(batches)
    logged: dict[str, float] = {}
    for batch in batches:
        loss = own.loss(network, batch, totals)
        loss.total.backward()
        for name, value in loss.logged.items():
            logged[name] = logged.get(name, 0.0) + value.item()
    return logged, gradients(model)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], factor * value, rtol=2e-4, atol=2e-6, msg=f"{name} differs")


@pytest.mark.parametrize("moe", [False, True])
def test_the_loss_is_the_mean_over_learnt_tokens_of_separate_documents(
    small_model: Callable[..., CausalLM], moe: bool
) -> None:
    docs = documents(7, 3, 12)
    model = small_model(moe=moe).requires_grad_(True)
    parts, count = [], 0
    for doc in docs:
        labels = doc.ids[1:].masked_fill(~doc.learnt[1:], IGNORED)
        parts.append(F.cross_entropy(model(doc.ids[None, :-1])[0], labels, reduction="sum"))
        count += int(doc.learnt[1:].sum())
    expected = torch.stack(parts).sum() / count
    expected.backward()
    plain = gradients(model)
    logged, got = run_step(objective(), small_model(moe=moe), [[docs[:2], docs[2:]]])
    assert logged == {"loss": pytest.approx(expected.item(), rel=1e-5)}
    assert_close(got, plain)


def test_shares_of_micro_batches_add_up(small_model: Callable[..., CausalLM]) -> None:
    rows = [documents(5, seed=1), documents(9, 4, seed=2), documents(3, seed=3), documents(8, seed=4)]
    own = objective(num_mtp=1, token_balance=True)
    once, whole = run_step(own, small_model(moe=True, mtp=1), [rows])
    each, parts = run_step(own, small_model(moe=True, mtp=1), [[row] for row in rows])
    assert each == pytest.approx(once, rel=1e-5)
    assert_close(parts, whole)


def test_the_block_learns_the_token_after_next(small_model: Callable[..., CausalLM]) -> None:
    doc = Document(ids=torch.arange(10, 18), learnt=torch.tensor([0, 0, 1, 1, 0, 1, 1, 1]).bool())
    model = small_model(mtp=1).requires_grad_(True)
    view = AttentionView(lengths=(7,))
    positions = torch.arange(7)
    hidden = model.model(doc.ids[:7], positions, view)
    ahead = model.model.mtp(hidden, doc.ids[1:8], positions, view)
    labels = torch.tensor([12, 13, IGNORED, 15, 16, 17, IGNORED])
    mtp = F.cross_entropy(model.mtp_logits(ahead), labels, reduction="sum") / 5
    lm_labels = doc.ids[1:].masked_fill(~doc.learnt[1:], IGNORED)
    lm = F.cross_entropy(model.logits(hidden), lm_labels)
    (lm + 0.3 * mtp).backward()
    plain = gradients(model)
    logged, got = run_step(objective(num_mtp=1), small_model(mtp=1), [[[doc]]])
    assert logged == {"loss": pytest.approx(lm.item(), rel=1e-5), "mtp_loss": pytest.approx(mtp.item(), rel=1e-5)}
    assert_close(got, plain)


def test_a_weight_of_0_leaves_the_block_out(small_model: Callable[..., CausalLM]) -> None:
    logged, got = run_step(objective(num_mtp=1, mtp_weight=0.0), small_model(mtp=1), [[documents(6)]])
    assert set(logged) == {"loss"}
    assert not any("mtp" in name for name in got)


def test_token_balance_divides_by_all_positions(small_model: Callable[..., CausalLM]) -> None:
    rows = [documents(9, seed=5), documents(5, seed=6)]
    learnt = sum(int(doc.learnt[1:].sum()) for row in rows for doc in row)
    plain, before = run_step(objective(), small_model(), [rows])
    logged, got = run_step(objective(token_balance=True), small_model(), [rows])
    assert logged == plain, "the value that is logged stays the ordinary mean"
    assert_close(got, before, factor=learnt / 32)


def test_add_ons_have_a_gradient_and_no_value(small_model: Callable[..., CausalLM]) -> None:
    rows = [documents(9), documents(6)]
    weights = RouterLossConfig(balance=0.5, z=0.1, orthogonal=0.2)
    plain, before = run_step(objective(), small_model(moe=True), [rows])
    logged, got = run_step(objective(router=weights), small_model(moe=True), [rows])
    assert logged["loss"] == plain["loss"]
    assert set(logged) == {"loss", "balance_loss", "z_loss", "orthogonal_loss"}
    gates = [name for name in got if name.endswith("gate.weight")]
    assert gates
    assert all(not torch.allclose(got[name], before[name], rtol=1e-3) for name in gates)
    network = TrainingNetwork(small_model(moe=True).requires_grad_(True))
    own = objective(router=weights)
    batch = own.collate(rows)
    loss = own.loss(network, batch, own.totals([batch]))
    assert loss.total.item() == pytest.approx(loss.logged["loss"].item())


def test_observers_see_the_routers_of_training_alone(small_model: Callable[..., CausalLM]) -> None:
    seen: list[int] = []
    own = objective(observers=[lambda records: seen.append(len(records))])
    network = TrainingNetwork(small_model(moe=True).requires_grad_(True))
    batch = own.collate([documents(5)])
    with torch.no_grad():
        own.loss(network, batch, own.totals([batch]))
    assert seen == []
    own.loss(network, batch, own.totals([batch]))
    assert seen == [2], "two of three layers hold experts"


def test_nothing_to_learn_is_an_error(small_model: Callable[..., CausalLM]) -> None:
    own = objective()
    batch = Batch.of_rows([[Document(ids=torch.arange(4), learnt=torch.zeros(4).bool(), origin="data.jsonl:3")]])
    with pytest.raises(TrainingError, match=r"no token of a step is learnt \(data.jsonl:3\)"):
        own.totals([batch])
    with pytest.raises(ConfigError, match="mtp_weight is -1"):
        LanguageLossConfig(mtp_weight=-1)
