"""From a run's configuration to a trainer that is ready to go: each part built by the folder that owns it, in the order below.

Where models lie is not known here: a `Library` that loads them by name is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ernie45.config.count import count_parameters
from ernie45.config.presets import preset
from ernie45.errors import ConfigError
from ernie45.models.build import build_model, parse_dtype
from ernie45.models.init import initialize
from ernie45.models.text import CausalLM
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training import data
from ernie45.training.adapter_weights import AdapterWeights
from ernie45.training.config import LANGUAGE_METHODS, RunConfig
from ernie45.training.fp8 import use_fp8
from ernie45.training.length import small_data_notes, with_steps
from ernie45.training.loop import Parts, StepInfo, Trainer
from ernie45.training.lora.adapter import add_lora
from ernie45.training.methods import Method, build_method
from ernie45.training.network import TrainingNetwork, count_flops_per_token, slow_dtype_warning
from ernie45.training.optim import Ema, LrSchedule, OptimizerConfig, build_optimizer
from ernie45.training.reference_cache import pending_reference
from ernie45.training.rollout import Generator
from ernie45.training.run_folder import RunFolder
from ernie45.training.speed import matmul_flops
from ernie45.training.state import AVERAGE, Checkpoints, ModelWeights, Weights
from ernie45.training.upo_config import SamplingWeights

Unit = Literal["bytes", "rows"]


class Progress(Protocol):
    """What is told how far a stage is."""

    def __call__(self, label: str, unit: Unit = "bytes") -> Callable[[int, int], None]:
        """Begins a stage; gives what is called with the units done and in all."""


class Library(Protocol):
    """How names become models, and a model becomes something that answers."""

    def load_model(self, name: str, dtype: str, progress: Callable[[int, int], None] | None) -> CausalLM:
        """A network by name or path."""

    def load_tokenizer(self, name: str, chat_format: str | None) -> Tokenizer:
        """Its tokenizer and template."""

    def address(self, name: str) -> str:
        """A name or an absolute path of that network, which holds from any folder."""

    def generator(self, model: CausalLM, tokenizer: Tokenizer, weights: SamplingWeights) -> Generator:
        """What samples answers from a network in training."""


@dataclass(kw_only=True)
class Run:
    """A run that is ready to go."""

    config: RunConfig
    """Its length in steps, whatever the run file says."""
    trainer: Trainer
    num_parameters: int
    num_active: int
    """Of a token: without the experts that it is not sent to."""
    num_trained: int
    notes: list[str] = field(default_factory=list)
    """What the user should know before it starts."""

    def close(self) -> None:
        """End what prepares rows in the background."""
        if isinstance(self.trainer.parts.rows, data.Prefetch):
            self.trainer.parts.rows.close()


def prepare(config: RunConfig, folder: Path, library: Library, *, progress: Progress | None = None) -> Run:
    """Build everything, and go on from the newest checkpoint if the folder has one.

    Raises: what the parts raise, before anything is written into the folder; and what a cached reference raises, after its
        configuration is.
    """
    opened = RunFolder(folder, config)
    torch.manual_seed(config.train.seed)
    tokenizer = _tokenizer(config, library)
    model = _model(config, library, tokenizer, progress)
    network = TrainingNetwork(model, recompute=config.recompute)
    if config.fp8 is not None:
        use_fp8(model, config.fp8)
    config, notes = _sized(config, opened, tokenizer, model, progress)
    held_out = _held_out(config, tokenizer, model)
    method = build_method(
        config,
        network,
        tokenizer,
        generator=lambda: library.generator(model, tokenizer, config.rollout.weights),
        cached=lambda: pending_reference(
            config, network, tokenizer, folder, held_out, lambda: _stage(progress, "reference", "rows")
        ),
    )
    optimizer = build_optimizer(
        [*model.named_parameters(), *_further_parameters(method.modules)],
        _optimizer_config(config),
        num_layers=model.config.num_hidden_layers,
        qkv_rows=_qkv_rows(model),
    )
    if config.ema is not None:
        _keep_average(method, Ema(optimizer.masters, config.ema))
    flops = _flops_per_token(config, model)
    parts = Parts(
        network=network,
        objective=method.objective,
        rows=method.rows,
        optimizer=optimizer,
        schedule=LrSchedule(config.schedule, config.optimizer.lr),
        checkpoints=Checkpoints(opened.checkpoints, _weights(config, library, model, tokenizer), config.checkpoint),
        after_step=method.after_step,
        held_out=held_out,
        stateful=method.stateful,
        flops_per_token=flops,
        peak_flops=None if flops is None else matmul_flops(parse_dtype(config.model.dtype)),
    )
    trainer = Trainer(parts, config.train, folder)
    facts = _sizes(model)
    opened.begin({"method": config.method, "num_steps": trainer.num_steps, **facts})
    for act in method.before_start:
        act()
    if opened.newest is not None:
        trainer.resume(opened.newest)
    slow = slow_dtype_warning(config.model.dtype)
    return Run(config=config, trainer=trainer, notes=[*notes, *([slow] if slow else [])], **facts)


def _stage(progress: Progress | None, label: str, unit: Unit = "bytes") -> Callable[[int, int], None] | None:
    return None if progress is None else progress(label, unit)


def _tokenizer(config: RunConfig, library: Library) -> Tokenizer:
    name = config.model.tokenizer or config.model.start
    assert name is not None, "StartConfig wants one of the two"
    return library.load_tokenizer(name, config.data.chat_format)


def _model(config: RunConfig, library: Library, tokenizer: Tokenizer, progress: Progress | None) -> CausalLM:
    """The network that the run begins with, ready to learn: weights or adapter want gradients."""
    start = config.model
    if start.start is not None:
        model = library.load_model(start.start, start.dtype, _stage(progress, "loading"))
    else:
        model = _random_model(config)
    if model.config.vision is not None:
        raise ConfigError("vision-language networks cannot be trained yet: choose a text model")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the network {model.config.vocab_size}: set network.vocab_size to at "
            "least that, or choose the tokenizer that belongs to the network"
        )
    model.train()
    if config.lora is not None:
        add_lora(model, config.lora, config.train.seed)
    elif model.mapped_bytes:
        raise ConfigError(f"the weights of {start.start} are packed: they can be tuned with an adapter alone, set lora")
    else:
        model.requires_grad_(True)
    return model


def _random_model(config: RunConfig) -> CausalLM:
    shape = config.model.network or preset(str(config.model.preset))
    model = build_model(shape, dtype=parse_dtype(config.model.dtype))
    initialize(model, std=shape.initializer_range, seed=config.train.seed)
    return model


def _sized(
    config: RunConfig, opened: RunFolder, tokenizer: Tokenizer, model: CausalLM, progress: Progress | None
) -> tuple[RunConfig, list[str]]:
    """The configuration with its length in steps, and what to say of it where a run begins."""
    if config.method == "upo":
        return config, []

    def open_rows() -> data.PackedRows[Any, Any]:
        return data.rows_of(config.method)(config.data, tokenizer, num_mtp=_num_mtp(config, model))

    report = _stage(progress, "counting", "rows")
    sized = with_steps(config, open_rows, known=opened.fact("num_steps", int), report=report)
    return sized, [] if opened.newest is not None else small_data_notes(config, open_rows())


def _held_out(config: RunConfig, tokenizer: Tokenizer, model: CausalLM) -> list[Sequence[Any]]:
    """The rows of the looks at held-out data. Raises: ConfigError if they are wanted and there are none."""
    if not config.train.eval_every:
        return []
    if config.method == "upo":
        raise ConfigError("eval_every is set, but upo has no held-out loss: watch its rewards")
    rows: list[Sequence[Any]] = []
    for row in data.rows_of(config.method)(
        config.data, tokenizer, num_mtp=_num_mtp(config, model), part="valid"
    ).once():
        rows.append(row)
        if len(rows) == config.train.eval_rows:
            break
    if not rows:
        raise ConfigError(
            "eval_every is set, but none of the held-out rows can be used: look at them with `ernie data check`"
        )
    return rows


def _keep_average(method: Method, ema: Ema) -> None:
    method.stateful[AVERAGE] = ema

    def act(info: StepInfo) -> None:
        ema.update(step=info.step, loss=info.losses["loss"])

    method.after_step.append(act)


def _optimizer_config(config: RunConfig) -> OptimizerConfig:
    if config.lora is None:
        return config.optimizer
    return replace(config.optimizer, lora_plus_scale=config.lora.lora_plus_scale)


def _further_parameters(modules: Mapping[str, nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    """Those of modules that learn beside the network, under their names."""
    return [(f"{name}.{key}", value) for name, module in modules.items() for key, value in module.named_parameters()]


def _num_mtp(config: RunConfig, model: CausalLM) -> int:
    return model.config.num_nextn_predict_layers if config.loss.mtp_weight and config.method in LANGUAGE_METHODS else 0


def _flops_per_token(config: RunConfig, model: CausalLM) -> float | None:
    """None where the weights do not learn: an adapter's backward pass is another one."""
    if config.lora is not None:
        return None
    return count_flops_per_token(model.config, config.data.max_seq_len, num_mtp=_num_mtp(config, model))


def _weights(config: RunConfig, library: Library, model: CausalLM, tokenizer: Tokenizer) -> Weights:
    if config.lora is not None:
        base = library.address(str(config.model.start))
        return AdapterWeights(model, base=base, extra_files=tokenizer.saved_files())
    return ModelWeights(model, tokenizer.saved_files())


def _qkv_rows(model: CausalLM) -> tuple[int, int, int]:
    config = model.config
    keys = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, keys, keys


def _sizes(model: CausalLM) -> dict[str, int]:
    counts = count_parameters(model.config)
    return {
        "num_parameters": counts.total_with_mtp,
        "num_active": counts.active + counts.mtp,
        "num_trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }
