"""TRL as the oracle: its trainers' loss functions on the same numbers, called without building a trainer.

A stand-in takes the trainer's place, and in a pass of the network's it says the log-probabilities of the tokens.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.training.losses.advantage import group_advantages
from ernie45.training.losses.kto import KtoConfig, kl_estimate, kto_losses, kto_metrics
from ernie45.training.losses.policy import (
    clipped_policy_losses,
    kl_estimates,
    sequence_log_ratios,
    spread_to_tokens,
    token_log_ratios,
    token_weights,
)
from ernie45.training.losses.preference import (
    PairScores,
    PreferenceConfig,
    answer_scores,
    preference_losses,
    preference_metrics,
)

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::trl.import_utils.TRLExperimentalWarning")

LENGTHS = (5, 2, 7, 3, 4, 6)
"""Scored tokens of six answers."""


def _packed(seed: int, spread: float = 1.0) -> Tensor:
    """Log-probabilities of the tokens of all answers behind each other."""
    generator = torch.Generator().manual_seed(seed)
    return -(0.02 + spread * torch.rand(sum(LENGTHS), generator=generator))


def _padded(values: Tensor) -> tuple[Tensor, Tensor]:
    """(N, longest) as TRL has them, and the mask."""
    rows = torch.nn.utils.rnn.pad_sequence(list(values.split(list(LENGTHS))), batch_first=True)
    return rows, (torch.arange(rows.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()


def _sums(values: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in values.split(list(LENGTHS))])


def _trainer(**fields: Any) -> Any:
    """What a trainer's loss function looks at."""
    same = SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        num_processes=1,
    )
    common: dict[str, Any] = {
        "model": SimpleNamespace(training=True),
        "accelerator": same,
        "beta": 0.1,
        "label_smoothing": 0.0,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(common | fields))


def _pass(rows: Tensor) -> Any:
    """A network that gives these log-probabilities and nothing of interest beside."""
    empty = torch.zeros(rows.shape)
    return SimpleNamespace(log_probs=rows, entropy=empty, mean_logits=empty, is_top1=empty.bool())


def _inputs(mask: Tensor) -> dict[str, Tensor]:
    """Rows that begin with one token of prompt."""
    prompt = torch.zeros(len(mask), 1, dtype=torch.int64)
    return {
        "input_ids": torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.int64),
        "attention_mask": torch.cat((prompt + 1, mask), dim=1),
        "completion_mask": torch.cat((prompt, mask), dim=1),
    }


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "sppo_hard", "nca_pair"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo(loss_type: str, beta: float) -> None:
    """The first three answers are chosen, the others rejected: loss, its gradient at every token, and the metrics."""
    policy, reference = _packed(0).requires_grad_(), _packed(1)
    rows, mask = _padded(policy)
    sums = _sums(reference)
    trainer = _trainer(
        beta=beta,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    inputs = _inputs(mask) | {"ref_chosen_logps": sums[:3], "ref_rejected_logps": sums[3:]}
    theirs = trl.DPOTrainer._compute_loss(trainer, lambda **_: _pass(rows), inputs, False)
    config = PreferenceConfig(loss_type=loss_type, beta=beta)  # type: ignore[arg-type]
    lengths = torch.tensor(LENGTHS)
    chosen, rejected = answer_scores(_sums(policy)[:3], _sums(policy)[3:], lengths[:3], lengths[3:], config)
    reference_c, reference_r = answer_scores(sums[:3], sums[3:], lengths[:3], lengths[3:], config)
    scores = PairScores(chosen=chosen, rejected=rejected, reference_chosen=reference_c, reference_rejected=reference_r)
    ours = preference_losses(scores, config).mean()
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(torch.autograd.grad(ours, policy), torch.autograd.grad(theirs, policy), strict=True):
        torch.testing.assert_close(mine, other)
    if loss_type == "ipo":
        return  # TRL reports sums there although its loss compares means
    metrics = preference_metrics(scores, config, num_pairs=3)
    names = {"rewards/accuracy": "rewards/accuracies", "rewards/margin": "rewards/margins"}
    for name, value in metrics.items():
        assert value.item() == pytest.approx(trainer._metrics["train"][names.get(name, name)][0], abs=1e-5)


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)])
def test_kto(seeds: tuple[int, int]) -> None:
    """Once with a positive distance and once with one that is floored."""
    policy, reference = _packed(seeds[0]).requires_grad_(), _packed(seeds[1])
    mismatched = _packed(2) + (0.3 if seeds[0] else -0.3), _packed(2)
    rows, mask = _padded(policy)
    good = torch.tensor([True, False, False, True, True, False])
    trainer = _trainer(
        loss_type="kto", calculate_KL=True, desirable_weight=1.3, undesirable_weight=0.6,
        _compute_kl_logps=lambda model, batch: _sums(mismatched[0]),
    )  # fmt: skip
    inputs = _inputs(mask) | {"label": good, "ref_logps": _sums(reference), "ref_KL_logps": _sums(mismatched[1])}
    theirs = trl.KTOTrainer._compute_loss(trainer, lambda **_: _pass(rows), inputs, False)
    config = KtoConfig(desirable_weight=1.3, undesirable_weight=0.6)
    kl = kl_estimate(_sums(mismatched[0]), _sums(mismatched[1]))
    assert (kl.item() == 0) == (seeds[0] == 0), "both sides of the floor have to be seen"
    ours = kto_losses(_sums(policy), _sums(reference), good, kl, config).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, policy), torch.autograd.grad(theirs, policy))
    logged = trainer._metrics["train"]
    assert kl.item() == pytest.approx(logged["kl"][0])
    metrics = kto_metrics(_sums(policy), _sums(reference), good, config, num_good=3, num_bad=3)
    for name, value in metrics.items():
        assert value.item() == pytest.approx(
            logged["rewards/margins" if name == "rewards/margin" else name][0], abs=1e-6
        )


def test_orpo() -> None:
    orpo = pytest.importorskip("trl.experimental.orpo")
    policy = _packed(3)
    means = _sums(policy) / torch.tensor(LENGTHS)
    chosen, rejected = means[:3].clone().requires_grad_(), means[3:].clone().requires_grad_()
    theirs, *_ = orpo.ORPOTrainer.odds_ratio_loss(_trainer(beta=1.0), chosen, rejected)
    config = PreferenceConfig(loss_type="or", sft_loss_ratio=1.0)
    ours = preference_losses(PairScores(chosen=chosen, rejected=rejected), config)
    torch.testing.assert_close(ours, -theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), (chosen, rejected)), torch.autograd.grad(-theirs.sum(), (chosen, rejected))
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", ["simpo", "sigmoid"])
def test_cpo(loss_type: str, label_smoothing: float) -> None:
    """SimPO, and the smoothed sigmoid without a reference."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    means = _sums(_packed(4)) / torch.tensor(LENGTHS)
    fields = {"loss_type": loss_type, "beta": 2.0, "label_smoothing": label_smoothing}
    trainer = _trainer(**fields, alpha=0.0, simpo_gamma=0.7)
    theirs, *_ = cpo.CPOTrainer.cpo_loss(trainer, means[:3], means[3:])
    gamma = {"simpo_gamma": 0.7} if loss_type == "simpo" else {}
    config = PreferenceConfig(**fields, **gamma, reference_free=True)  # type: ignore[arg-type]
    torch.testing.assert_close(preference_losses(PairScores(chosen=means[:3], rejected=means[3:]), config), theirs)


@pytest.mark.parametrize(("loss_type", "averaging"), [("grpo", "answer"), ("bnpo", "token"), ("dr_grpo", "constant")])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_grpo(loss_type: str, averaging: str, ratio: str) -> None:
    """Clipped ratios of tokens and of sequences with a k3 distance, in all three averages, and the gradient at every token."""
    policy, old, reference = _packed(5).requires_grad_(), _packed(6), _packed(7)
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3, -2.0])
    rows, mask = _padded(policy)
    trainer = _trainer(
        loss_type=loss_type, importance_sampling_level=ratio, epsilon_low=0.2, epsilon_high=0.3, beta=0.4,
        max_completion_length=9, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        _get_per_token_logps_and_entropies=lambda *_, **__: (rows, torch.zeros(rows.shape), None),
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": _padded(old)[0], "ref_per_token_logps": _padded(reference)[0],
    }  # fmt: skip
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    by_token = ratio == "token"
    log_ratios = token_log_ratios(policy, old) if by_token else sequence_log_ratios(policy, old, LENGTHS)
    losses = clipped_policy_losses(log_ratios, spread_to_tokens(advantages, LENGTHS), clip_low=0.2, clip_high=0.3)
    losses = losses + 0.4 * kl_estimates(policy, reference)
    totals = {"total_tokens": sum(LENGTHS), "total_answers": 6, "max_tokens": 9}
    ours = (losses * token_weights(LENGTHS, averaging, **totals)).sum()  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, policy), torch.autograd.grad(theirs, policy))


def test_the_deviation_within_a_group_is_that_of_grpo() -> None:
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    rewards = torch.randn(4, 6, generator=torch.Generator().manual_seed(8))
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    ours = group_advantages(rewards.flatten(), torch.arange(4).repeat_interleave(6))
    torch.testing.assert_close(ours, theirs.flatten())
