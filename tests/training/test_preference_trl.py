"""TRL as the oracle of a whole step: transformers' network, TRL's padded batches and TRL's losses against one packed pass of ours.

TRL's loss functions are called with a stand-in for the trainer, which would want data sets and a tokenizer.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ernie45
from ernie45.training.data.pairs import KtoExample, PreferencePair
from ernie45.training.kto import KtoObjective
from ernie45.training.losses.kto import KtoConfig
from ernie45.training.losses.preference import PreferenceConfig
from ernie45.training.network import TrainingNetwork
from ernie45.training.preference import PreferenceObjective
from ernie45.training.reference_policy import FrozenCopy

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

FIELDS: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
MOE: dict[str, Any] = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1}
SIZES = [(3, 4, 2), (1, 1, 5), (6, 3, 3), (2, 7, 1)]


class Padded:
    """transformers' network as TRL calls it: log-probabilities of the labels of padded rows."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> Any:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        ahead = labels[:, 1:]
        found = logits.log_softmax(-1).gather(-1, ahead.clamp(min=0)[..., None])[..., 0].masked_fill(ahead < 0, 0.0)
        nothing = torch.zeros_like(found)
        return SimpleNamespace(log_probs=found, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def stand_in(model: Any, reference: Any, **fields: Any) -> Any:
    """What TRL's loss functions look at."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, num_processes=1
    )
    return SimpleNamespace(
        model=model, ref_model=Padded(reference), accelerator=accelerator, precompute_ref_logps=False, aux_loss_enabled=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1, **fields,
    )  # fmt: skip


def ours(theirs: Any, folder: Path) -> TrainingNetwork:
    """The same weights in our network, by way of a saved folder."""
    theirs.save_pretrained(folder)
    return TrainingNetwork(ernie45.load_model(folder).requires_grad_(True))


def drawn(seed: int, *sizes: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, (size,), generator=generator).tolist() for size in sizes]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_dpo_step(transformers_model: Any, tmp_path: Path, loss_type: Any, moe: bool) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    fields = FIELDS | (MOE if moe else {})
    theirs, reference = transformers_model(1, **fields), transformers_model(2, **fields)
    network, frozen = ours(theirs, tmp_path / "policy"), ours(reference, tmp_path / "reference")
    rows = [drawn(seed, *sizes) for seed, sizes in enumerate(SIZES)]
    collate = DataCollatorForPreference(pad_token_id=0)
    batch = collate([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in rows])
    trainer = stand_in(
        theirs, reference, beta=0.3, label_smoothing=0.0, loss_types=[loss_type], loss_weights=[1.0], ld_alpha=None,
        f_divergence_type="reverse_kl", use_weighting=False,
    )  # fmt: skip
    expected = trl.DPOTrainer._compute_loss(trainer, Padded(theirs), batch, False)
    expected.backward()

    objective = PreferenceObjective(PreferenceConfig(loss_type=loss_type, beta=0.3), FrozenCopy(frozen))
    packed = objective.collate([[as_pair(*row)] for row in rows])
    loss = objective.loss(network, packed, objective.totals([packed]))
    loss.total.backward()
    torch.testing.assert_close(loss.total.detach(), expected.detach(), atol=1e-5, rtol=1e-5)
    logged = trainer._metrics["eval"]
    for name, other in (("rewards/chosen", "rewards/chosen"), ("rewards/accuracy", "rewards/accuracies")):
        if loss_type != "ipo":  # TRL reports sums there although its loss compares means
            assert float(loss.logged[name]) == pytest.approx(logged[other][0], abs=1e-4)
    same_gradients(network, theirs)
    assert objective.num_tokens(packed) < 0.5 * batch["input_ids"].numel(), "no padding, and no prompt twice"


def test_kto_step(transformers_model: Any, tmp_path: Path) -> None:
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    theirs, reference = transformers_model(1, **FIELDS), transformers_model(2, **FIELDS)
    network, frozen = ours(theirs, tmp_path / "policy"), ours(reference, tmp_path / "reference")
    rows = [drawn(seed, *sizes[:2]) for seed, sizes in enumerate(SIZES)]
    labels = [True, False, False, True]
    examples = [
        {
            "prompt_ids": prompt,
            "completion_ids": answer,
            "KL_completion_ids": rows[(at + 1) % 4][1],
            "label": labels[at],
        }
        for at, (prompt, answer) in enumerate(rows)
    ]
    batch = DataCollatorForUnpairedPreference(pad_token_id=0)(examples)
    trainer = stand_in(
        theirs, reference, beta=0.3, loss_type="kto", calculate_KL=True, desirable_weight=1.3, undesirable_weight=0.7
    )
    trainer._compute_kl_logps = lambda model, inputs: trl.KTOTrainer._compute_kl_logps(trainer, model, inputs)
    expected = trl.KTOTrainer._compute_loss(trainer, Padded(theirs), batch, False)
    expected.backward()

    config = KtoConfig(beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    objective = KtoObjective(config, FrozenCopy(frozen), network)
    packed = objective.collate([[as_example(row[0], row[1], good)] for row, good in zip(rows, labels, strict=True)])
    loss = objective.loss(network, packed, objective.totals([packed]))
    loss.total.backward()
    torch.testing.assert_close(loss.total.detach(), expected.detach(), atol=1e-5, rtol=1e-5)
    assert float(loss.logged["kl"]) == pytest.approx(trainer._metrics["eval"]["kl"][0], abs=1e-4)
    same_gradients(network, theirs)


def same_gradients(network: TrainingNetwork, theirs: Any) -> None:
    """Of the parameters that both have under one name, and of the fused ones in parts."""
    other = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    compared = 0
    for name, parameter in network.model.named_parameters():
        if name in other:
            torch.testing.assert_close(parameter.grad, other[name], atol=1e-4, rtol=2e-3, msg=name)
            compared += 1
        elif name.endswith("qkv_proj.weight"):
            parts = [other[name.replace("qkv_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            torch.testing.assert_close(parameter.grad, torch.cat(parts), atol=1e-4, rtol=2e-3, msg=name)
            compared += 1
    assert compared >= 8


def as_pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> PreferencePair:
    return PreferencePair(
        prompt=torch.tensor(prompt),
        chosen=torch.tensor(chosen),
        chosen_learnt=torch.ones(len(chosen), dtype=torch.bool),
        rejected=torch.tensor(rejected),
        rejected_learnt=torch.ones(len(rejected), dtype=torch.bool),
    )


def as_example(prompt: list[int], answer: list[int], good: bool) -> KtoExample:
    return KtoExample(
        prompt=torch.tensor(prompt),
        completion=torch.tensor(answer),
        learnt=torch.ones(len(answer), dtype=torch.bool),
        desirable=good,
    )
