"""The methods: for each, where its rows come from, what is made smaller, and what acts beside the optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ernie45.processing.tokenizer import Tokenizer
from ernie45.training import data
from ernie45.training.balance import BiasBalance, DecoupledOrthogonal, ExpertLoad, routers_of
from ernie45.training.config import LANGUAGE_METHODS, RunConfig
from ernie45.training.kto import KtoObjective
from ernie45.training.language import LanguageObjective
from ernie45.training.loop import Stateful, StepInfo
from ernie45.training.lora.adapter import adapter_off
from ernie45.training.module_state import ModuleState
from ernie45.training.network import TrainingNetwork
from ernie45.training.objective import Objective, RowStream
from ernie45.training.preference import PreferenceObjective
from ernie45.training.prompts import PromptList, load_prompts
from ernie45.training.reference_cache import PendingReference
from ernie45.training.reference_policy import AdapterOff, FrozenCopy, Reference, TokenReference
from ernie45.training.rewards import Rewards
from ernie45.training.rollout import Generator
from ernie45.training.upo import UpoObjective
from ernie45.training.upo_rows import UpoRows

_logger = logging.getLogger(__name__)
_FIRST_LOSS_SLACK = 0.1

AfterStep = Callable[[StepInfo], Mapping[str, Any] | None]


@dataclass(kw_only=True)
class Method:
    """What a method brings to the loop."""

    objective: Objective[Any, Any]
    rows: RowStream[Any]
    after_step: list[AfterStep] = field(default_factory=list)
    before_start: list[Callable[[], None]] = field(default_factory=list)
    """Called once everything is built and the run's folder is there, while the weights are those of the start."""
    stateful: dict[str, Stateful] = field(default_factory=dict)
    """What checkpoints have to keep besides, by file name."""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Modules that learn beside the network."""


def build_method(
    config: RunConfig,
    network: TrainingNetwork,
    tokenizer: Tokenizer,
    *,
    generator: Callable[[], Generator],
    cached: Callable[[], PendingReference],
) -> Method:
    """The method of a configuration.

    Args: generator: makes what samples answers; asked by upo alone. cached: makes a reference from a file, where one is wanted.
    """
    if config.method in LANGUAGE_METHODS:
        return _language(config, network, tokenizer)
    if config.method == "kto":
        return _kto(config, network, tokenizer)
    if config.method == "upo":
        return _upo(config, network, tokenizer, generator())
    return _pairs(config, network, tokenizer, cached)


def _language(config: RunConfig, network: TrainingNetwork, tokenizer: Tokenizer) -> Method:
    model = network.model
    num_mtp = model.config.num_nextn_predict_layers if config.loss.mtp_weight else 0
    routers = [router for router in routers_of(model) if router.weight.requires_grad]
    balance, load = BiasBalance(routers, rate=config.balance.bias_rate), ExpertLoad(routers)

    def act(_: StepInfo) -> Mapping[str, Any]:
        balance.step()
        return load.take()

    after_step: list[AfterStep] = [act]
    if config.model.start is None:
        after_step.append(partial(_check_first_loss, math.log(model.config.vocab_size)))
    weights = config.loss.router
    if weights.orthogonal and weights.orthogonal_mode == "decoupled":
        orthogonal = DecoupledOrthogonal(routers, weight=weights.orthogonal)
        after_step.append(lambda _: orthogonal.step())
    objective = LanguageObjective(
        config.loss,
        num_mtp=num_mtp,
        max_seq_len=config.data.max_seq_len,
        observers=(balance.observe, load.observe) if routers else (),
    )
    rows = data.rows_of(config.method)(config.data, tokenizer, num_mtp=num_mtp)
    return Method(objective=objective, rows=_ahead(config, rows), after_step=after_step)


def _check_first_loss(expected: float, info: StepInfo) -> None:
    """Random weights know nothing, so that the first loss is ln(V): anything else is a mistake in labels, masks or initialisation."""
    loss = info.losses["loss"]
    if info.step == 1 and abs(loss - expected) > _FIRST_LOSS_SLACK * expected:
        _logger.warning(
            "the first loss is %.3f, random weights should give ln(vocabulary) = %.3f: look at the rows with "
            "`ernie data preview`, and at initializer_range",
            loss,
            expected,
        )


def _pairs(
    config: RunConfig, network: TrainingNetwork, tokenizer: Tokenizer, cached: Callable[[], PendingReference]
) -> Method:
    reference: Reference | None = None
    if config.preference.uses_reference:
        reference = cached() if config.reference.kind == "cached" else _reference(config, network)
    objective = PreferenceObjective(config.preference, reference)
    rows = _ahead(config, data.preference_rows(config.data, tokenizer))
    return _with_reference(Method(objective=objective, rows=rows), reference, network)


def _kto(config: RunConfig, network: TrainingNetwork, tokenizer: Tokenizer) -> Method:
    reference = _reference(config, network)
    objective = KtoObjective(config.kto, reference, network)
    rows = _ahead(config, data.kto_rows(config.data, tokenizer))
    return _with_reference(Method(objective=objective, rows=rows), reference, network)


def _upo(config: RunConfig, network: TrainingNetwork, tokenizer: Tokenizer, generator: Generator) -> Method:
    upo = config.upo
    offline = upo.has_offline_pairs
    reference = (
        _reference(config, network) if upo.asks_reference or (offline and upo.preference.uses_reference) else None
    )
    objective = UpoObjective(
        upo, config.rollout, hidden_size=network.model.config.hidden_size, reference=reference if offline else None
    )
    rows = UpoRows(
        upo,
        config.rollout,
        network=network,
        generator=generator,
        prompts=PromptList(
            load_prompts(config.data.train, tokenizer, max_prompt_len=config.data.max_prompt_len), seed=config.data.seed
        ),
        rewards=Rewards(config.rewards),
        rows_per_step=config.train.rows_per_step,
        seed=config.train.seed,
        critic=objective.critic,
        reference=reference if upo.asks_reference else None,
        pairs=None if config.pairs is None else data.preference_rows(config.pairs, tokenizer),
    )
    method = Method(objective=objective, rows=rows)
    if objective.critic is not None:
        method.modules["critic"] = objective.critic
        method.stateful["critic"] = ModuleState(objective.critic)
    return _with_reference(method, reference, network)


def _reference(config: RunConfig, network: TrainingNetwork) -> TokenReference:
    """The policy before training: the network without its adapters, or a frozen copy."""
    if config.lora is not None:
        return AdapterOff(network, adapter_off)
    return FrozenCopy.of(network, refresh_steps=config.reference.refresh_steps)


def _with_reference(method: Method, reference: Reference | None, network: TrainingNetwork) -> Method:
    if isinstance(reference, PendingReference):
        method.before_start.append(reference.fill)
    if isinstance(reference, FrozenCopy):
        copy = reference

        def refresh(info: StepInfo) -> None:
            copy.after_step(network, info.step)

        method.after_step.append(refresh)
        method.stateful["reference"] = copy
    return method


def _ahead(config: RunConfig, rows: RowStream[Any]) -> RowStream[Any]:
    """Rows of two steps, prepared in the background."""
    return data.Prefetch(rows, rows=2 * config.train.rows_per_step)
