"""Both packages at the work that `align_worker.py` measures: what their users run, set alike.

DPO goes through the training loops, `ernie train`'s and TRL's; rollouts go through the generators.

Shape letters: B prompts, T tokens.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import ernie45
from ernie45.training.data.pairs import PreferencePair
from ernie45.training.loop import LoopConfig, Parts, Trainer
from ernie45.training.losses.preference import PreferenceConfig
from ernie45.training.network import TrainingNetwork
from ernie45.training.optim import LrSchedule, OptimizerConfig, ScheduleConfig, build_optimizer
from ernie45.training.packed_twin import PackedTwin
from ernie45.training.preference import PreferenceObjective
from ernie45.training.reference_policy import FrozenCopy
from ernie45.training.rollout import LlmGenerator
from ernie45.training.sampler_weights import sampler_twin
from ernie45.training.upo_config import SamplingWeights

PAD_ID, PAD = 0, "token0"
"""What the peer fills rows up with, and its piece; not to be used in prompts and answers."""

_BETA = 0.1
# The rate shows in a few steps; the others are what TRL begins with.
_LEARNING_RATE, _BETAS, _WEIGHT_DECAY, _CLIP = 1e-4, (0.9, 0.999), 0.0, 1.0

Pair = Mapping[str, list[int]]
"""`prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL names them."""
Course = tuple[list[float], list[float]]
"""A training run: clock readings (s) at the ends of its steps, and their losses."""
Rollout = Callable[[int], int]
"""Samples with a seed; gives the number of new tokens."""


def our_dpo(path: Path, batches: Sequence[Sequence[Pair]]) -> Course:
    """What `ernie train` builds for DPO of all weights, in its loop; nothing is saved."""
    model = ernie45.load_model(path).requires_grad_().train()
    network = TrainingNetwork(model)
    config = OptimizerConfig(lr=_LEARNING_RATE, betas=_BETAS, weight_decay=_WEIGHT_DECAY, clip=_CLIP)
    unsaved: Any = SimpleNamespace(every=0, save=lambda _snapshot: None, wait=lambda: None)
    parts = Parts(
        network=network,
        objective=PreferenceObjective(PreferenceConfig(beta=_BETA), FrozenCopy.of(network)),
        rows=_Rows(batches),
        optimizer=build_optimizer(model.named_parameters(), config, num_layers=model.config.num_hidden_layers),
        schedule=LrSchedule(ScheduleConfig(kind="constant", steps=len(batches)), config.lr),
        checkpoints=unsaved,
    )
    ends: list[float] = []
    losses: list[float] = []

    def note(line: Mapping[str, Any]) -> None:
        ends.append(time.perf_counter())
        losses.append(line["loss"])

    with TemporaryDirectory() as scratch:
        Trainer(parts, LoopConfig(steps=len(batches)), Path(scratch)).run(on_step=note)
    return ends, losses


def trl_dpo(path: Path, batches: Sequence[Sequence[Pair]], *, experts: str) -> Course:
    """TRL's trainer with its own collator, reference, head and loop; only ids come as they are, in their order.

    Two things that it does unless told otherwise are off: activations are not computed again, which would make it slower, and
    the routers have no loss of their own, which is not DPO's.
    """
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.trainer.dpo_trainer import DPOTrainer

    # Neither is annotated.
    datasets: Any = importlib.import_module("datasets")
    tokenizer_class: Any = PreTrainedTokenizerFast

    ends: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            losses.extend(value for name, value in kwargs["logs"].items() if name == "loss")

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    with TemporaryDirectory() as scratch:
        Prepared(
            model=str(path),
            args=_trl_config(scratch, len(batches), len(batches[0]), experts),
            train_dataset=datasets.Dataset.from_list([dict(pair) for pairs in batches for pair in pairs]),
            processing_class=tokenizer_class(tokenizer_file=str(path / "tokenizer.json"), pad_token=PAD),
            callbacks=[Watch()],
        ).train()
    return ends, losses


def our_rollout(
    path: Path, prompts_BT: Tensor, *, num_answers: int, new_tokens: int, weights: SamplingWeights
) -> Rollout:
    """The generator that `ernie train` hands to reinforcement learning, but past end tokens."""
    model = ernie45.load_model(path).requires_grad_().train()
    network = TrainingNetwork(model)
    twin = PackedTwin(network.model) if weights == "wint8" else None
    sampled = sampler_twin(network.model) if twin is None else twin.network
    llm = ernie45.LLM(sampled, tokenizer=ernie45.load_tokenizer(path), max_step_tokens_beside_decodes=512)
    ask = partial(ernie45.SamplingParams, ignore_eos=True)
    generator = LlmGenerator(llm, params=ask, renew=None if twin is None else twin.renew)
    prompts = prompts_BT.tolist()

    def sample(seed: int) -> int:
        generator.sync(network.model)
        answers = generator.generate(prompts, n=num_answers, max_tokens=new_tokens, temperature=1.0, seed=seed)
        return sum(len(answer.ids) for each in answers for answer in each)

    return sample


def their_rollout(path: Path, prompts_BT: Tensor, *, num_answers: int, new_tokens: int, experts: str) -> Rollout:
    """transformers' `generate` on one batch of as many rows as there are answers, without filters of its own."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation=experts)
    model.generation_config.eos_token_id = None  # end tokens are ignored
    model.generation_config.pad_token_id = PAD_ID  # never used, asked for all the same
    rows_BT = prompts_BT.repeat_interleave(num_answers, 0)

    def sample(seed: int) -> int:
        torch.manual_seed(seed)
        found_BT = model.generate(
            rows_BT,
            attention_mask=torch.ones_like(rows_BT),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            use_cache=True,
        )
        return int(found_BT[:, rows_BT.shape[1] :].numel())

    return sample


class _Rows:
    """Each batch as one packed row."""

    def __init__(self, batches: Sequence[Sequence[Pair]]) -> None:
        self._rows = iter([[_as_pair(pair) for pair in pairs] for pairs in batches])

    def next_row(self) -> Sequence[PreferencePair]:
        """See `objective.RowStream`."""
        return next(self._rows)

    def state(self) -> dict[str, Any]:
        """See `objective.RowStream`: nothing is saved."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `objective.RowStream`."""
        raise AssertionError(f"a measured run does not go on from {state}")


def _as_pair(pair: Pair) -> PreferencePair:
    prompt, chosen, rejected = (torch.tensor(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        chosen_learnt=torch.ones(len(chosen), dtype=torch.bool),
        rejected=rejected,
        rejected_learnt=torch.ones(len(rejected), dtype=torch.bool),
    )


def _trl_config(folder: str, num_steps: int, num_pairs: int, experts: str) -> Any:
    from trl.trainer.dpo_config import DPOConfig

    return DPOConfig(
        output_dir=folder,
        max_steps=num_steps,
        per_device_train_batch_size=num_pairs,
        train_sampling_strategy="sequential",
        max_length=None,
        beta=_BETA,
        router_aux_loss_coef=0.0,
        optim="adamw_torch_fused",
        learning_rate=_LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=_WEIGHT_DECAY,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        max_grad_norm=_CLIP,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        # For the reference, too, which the trainer loads from the same path.
        model_init_kwargs={"dtype": "float32", "experts_implementation": experts},
    )
