"""What a finished run has become, measured on held-out rows with its last weights.

Shape letters: T tokens (packed), V vocabulary, E experts, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ernie45
from ernie45.layers.moe import Router
from ernie45.store.trained import find_trained
from ernie45.training.balance import ExpertLoad, routers_of
from ernie45.training.batch import IGNORED, Batch
from ernie45.training.config import RunConfig
from ernie45.training.head import lm_loss_sum
from ernie45.training.losses.router import orthogonal_loss
from ernie45.training.network import Pass, TrainingNetwork
from ernie45.training.run_log import read_run
from recipes.held_out import batches_of, mean_loss


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One run in figures."""

    losses: Mapping[str, float]
    """Nats per learnt token by held-out file, named as the file is up to its first dot."""
    load_violation: float
    """The busiest expert's load over the mean load, minus 1; mean of the routers, over all held-out rows."""
    router_cosine: float
    """Root of the mean squared cosine between the rows of a router, mean of the routers: 0 where all are orthogonal."""
    mtp_loss: float | None
    """Nats per token of the prediction block; None where it was not trained."""
    mtp_agreement: float | None
    """How often the block names the token that the head names one step later, with true tokens before both: the share of its
    greedy drafts that would be accepted."""
    seconds: float
    """That the steps of the run took."""


def measure(folder: Path, config: RunConfig) -> Figures:
    """Load the newest checkpoint of a run and measure it. Raises: NotFoundError without one, ConfigError without rows."""
    weights = find_trained(folder).base
    tokenizer = ernie45.load_tokenizer(weights, chat_format=config.data.chat_format)
    network = TrainingNetwork(ernie45.load_model(weights))
    learns_mtp = bool(config.loss.mtp_weight) and network.model.config.num_nextn_predict_layers > 0
    files = {
        Path(source.path).name.partition(".")[0]: batches_of(
            config.method, config.data, source.path, tokenizer, num_mtp=int(learns_mtp)
        )
        for source in config.data.valid
    }
    batches = [batch for found in files.values() for batch in found]
    mtp = measure_mtp(network, batches) if learns_mtp else None
    return Figures(
        losses={name: mean_loss(network, found) for name, found in files.items()},
        load_violation=load_violation(network, batches),
        router_cosine=router_cosine(routers_of(network.model)),
        mtp_loss=None if mtp is None else mtp[0],
        mtp_agreement=None if mtp is None else mtp[1],
        seconds=read_run(folder, folder.name).counter("time_s"),
    )


@torch.no_grad()
def load_violation(network: TrainingNetwork, batches: Sequence[Batch]) -> float:
    """See `Figures`."""
    load = ExpertLoad(routers_of(network.model))
    for batch in batches:
        load.observe(network.run(batch).routers)
    found = load.take()["load_violation/mean"]
    assert isinstance(found, float), "one number for all routers"
    return found


@torch.no_grad()
def router_cosine(routers: Sequence[Router]) -> float:
    """See `Figures`. The orthogonal loss is the same sum of squares over E^2 pairs, of which E are of a row with itself."""
    found = []
    for router in routers:
        num_experts = len(router.weight)
        found.append(math.sqrt(float(orthogonal_loss(router.weight)) * num_experts / (num_experts - 1)))
    return sum(found) / len(found)


@torch.no_grad()
def measure_mtp(network: TrainingNetwork, batches: Sequence[Batch]) -> tuple[float, float]:
    """Loss of the first prediction block, and its agreement with the head; see `Figures`."""
    loss_sum, num_equal, num_places = 0.0, 0, 0
    for batch in batches:
        done = network.run(batch, num_mtp=1)
        learnt_T = batch.labels_DT[1] != IGNORED
        loss_sum += float(lm_loss_sum(network, done.mtp_TH[0], batch.labels_DT[1], mtp=True))
        num_equal += int((_agrees(network, done) & learnt_T[:-1]).sum())
        num_places += int(learnt_T.sum())
    return loss_sum / num_places, num_equal / num_places


def _agrees(network: TrainingNetwork, done: Pass) -> Tensor:
    """Whether the block at each place but the last names what the head names at the next place; bool (T - 1,).

    Where the block has a label, the next place is one of the same document: the label is the token behind it.
    """
    block_T = _named(network, network.final_norm(done.mtp_TH[0], mtp=True))
    head_T = _named(network, network.final_norm(done.hidden_TH))
    return block_T[:-1] == head_T[1:]


def _named(network: TrainingNetwork, normed_TH: Tensor) -> Tensor:
    """The likeliest tokens, int64 (T,)."""
    model = network.model
    logits_TV: Tensor = model.lm_head(normed_TH, model.model.embed_tokens.weight)
    return logits_TV.argmax(-1)
