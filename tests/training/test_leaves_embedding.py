"""The embedding that shares its table with the head: one gradient, the sum of both, whatever the loss uses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ernie45.models.text import CausalLM
from ernie45.training.batch import Batch, Document
from ernie45.training.head import lm_loss_sum
from ernie45.training.leaves.embedding import TrainingEmbedding
from ernie45.training.network import TrainingNetwork

IDS = torch.tensor([3, 7, 3, 9, 3, 1, 7, 2])


def _batch() -> Batch:
    return Batch.of_rows([[Document(ids=IDS, learnt=torch.arange(len(IDS)) > 0)]])


def _table(model: CausalLM) -> Tensor:
    return model.model.embed_tokens.weight


def _plain_gradient(model: CausalLM, weight_of_loss: float, weight_of_hidden: float) -> Tensor:
    """By autograd alone, through dense gradients."""
    batch = _batch()
    hidden = model.model(batch.tokens_T, torch.arange(len(batch.tokens_T)), batch.view())
    logits = model.model.norm(hidden) @ _table(model).t()
    loss = torch.nn.functional.cross_entropy(logits, batch.labels_DT[0], ignore_index=-100, reduction="sum")
    (weight_of_loss * loss + weight_of_hidden * hidden.square().sum()).backward()
    gradient = _table(model).grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize(("loss", "hidden"), [(1.0, 0.0), (0.5, 2.0), (0.0, 1.0)])
def test_gradient_is_that_of_both_uses(small_model: Callable[..., CausalLM], loss: float, hidden: float) -> None:
    expected = _plain_gradient(small_model(), loss, hidden)
    model = small_model()
    net = TrainingNetwork(model)
    assert isinstance(model.model.embed_tokens, TrainingEmbedding)
    batch = _batch()
    hidden_TH = net.run(batch).hidden_TH
    total = hidden * hidden_TH.square().sum()
    if loss:
        total = total + loss * lm_loss_sum(net, hidden_TH, batch.labels_DT[0])
    total.backward()
    gradient = _table(model).grad
    assert gradient is not None
    assert gradient.layout == torch.strided
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_gradients_of_steps_add_up(small_model: Callable[..., CausalLM]) -> None:
    model, batch = small_model(), _batch()
    net = TrainingNetwork(model)
    sums = []
    for _ in range(2):
        lm_loss_sum(net, net.run(batch).hidden_TH, batch.labels_DT[0]).backward()
        gradient = _table(model).grad
        assert gradient is not None
        sums.append(gradient.clone())
    torch.testing.assert_close(sums[1], 2 * sums[0])


def test_the_head_reads_what_the_parameter_holds_now(small_model: Callable[..., CausalLM]) -> None:
    """A pass whose hidden states no head reads leaves nothing behind that a later head could take for the table."""
    model, batch = small_model(), _batch()
    net = TrainingNetwork(model)
    hidden_TH = net.run(batch).hidden_TH.detach()
    _table(model).data = torch.zeros_like(_table(model))
    loss = lm_loss_sum(net, hidden_TH, batch.labels_DT[0]).detach()
    torch.testing.assert_close(float(loss), batch.num_learnt * math.log(len(_table(model))), rtol=1e-5, atol=0)


def test_a_network_can_be_copied_between_forward_and_backward(small_model: Callable[..., CausalLM]) -> None:
    model, batch = small_model(), _batch()
    net = TrainingNetwork(model)
    net.run(batch)
    other = TrainingNetwork(copy.deepcopy(model))
    lm_loss_sum(other, other.run(batch).hidden_TH, batch.labels_DT[0]).backward()
    assert _table(model).grad is None
    assert _table(other.model).grad is not None
