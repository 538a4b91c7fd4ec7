"""The configuration of a run: one section per part, each declared beside the part that it sets."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal

from ernie45.config.model import ModelConfig
from ernie45.errors import ConfigError
from ernie45.training.data import DataConfig
from ernie45.training.fp8 import Fp8Config
from ernie45.training.language import LanguageLossConfig
from ernie45.training.loop import LoopConfig
from ernie45.training.lora.config import LoraConfig
from ernie45.training.losses.kto import KtoConfig
from ernie45.training.losses.preference import PreferenceConfig
from ernie45.training.optim import EmaConfig, OptimizerConfig, ScheduleConfig
from ernie45.training.recompute import RecomputeConfig
from ernie45.training.reference_policy import ReferenceConfig
from ernie45.training.rewards import RewardConfig
from ernie45.training.state import CheckpointConfig
from ernie45.training.upo_config import RolloutConfig, UpoConfig

Method = Literal["pretrain", "sft", "dpo", "orpo", "simpo", "kto", "upo"]

LANGUAGE_METHODS = ("pretrain", "sft")
PAIR_METHODS = ("dpo", "orpo", "simpo")
# The sections that a method reads; set for another one they would do nothing, so that is refused.
_READ_BY = {
    "loss": LANGUAGE_METHODS,
    "preference": PAIR_METHODS,
    "kto": ("kto",),
    "upo": ("upo",),
    "rollout": ("upo",),
    "rewards": ("upo",),
    "pairs": ("upo",),
    "reference": ("dpo", "kto", "upo"),
}


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The network that a run begins with: one of `start`, `preset` and `network`."""

    start: str | None = None
    """Name, folder or .gguf file of a model to go on from."""
    preset: str | None = None
    """Published size with random weights, as 0.3b."""
    network: ModelConfig | None = None
    """Fields of a config.json, for a network of any size with random weights."""
    tokenizer: str | None = None
    """Name or folder of the model whose tokenizer and chat template are used; by default that of `start`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations. Routers are float32 always; bfloat16 weights have float32 masters in the optimizer."""

    def __post_init__(self) -> None:
        given = [name for name in ("start", "preset", "network") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"{' and '.join(given) or 'none of them'} given: name one of start, preset and network")
        if self.start is None and self.tokenizer is None:
            raise ConfigError("random weights have no tokenizer: name a model or folder as tokenizer")


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Balance of experts by rule."""

    bias_rate: float = 1e-3
    """How far every router's correction bias moves in a step, towards experts with less work; 0 leaves it as it is."""

    def __post_init__(self) -> None:
        if not 0 <= self.bias_rate < 1:
            raise ConfigError(f"bias_rate is {self.bias_rate}, expected 0 (off) to below 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run file: `ernie train --schema` prints every section and key."""

    method: Method
    """pretrain and sft learn texts and answers; dpo, orpo and simpo learn from pairs of answers, kto from single judged ones, upo from
    its own answers and what rewards say of them."""
    model: StartConfig
    data: DataConfig
    train: LoopConfig
    loss: LanguageLossConfig = field(default_factory=LanguageLossConfig)
    """Of pretrain and sft."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Of dpo, orpo and simpo; the last two choose `loss_type` themselves."""
    kto: KtoConfig = field(default_factory=KtoConfig)
    """Of kto."""
    upo: UpoConfig = field(default_factory=UpoConfig)
    """Of upo: PPO, GRPO, and either together with pairs of the best and the worst answers."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Of upo: how answers are gathered."""
    rewards: tuple[RewardConfig, ...] = ()
    """Of upo: what answers are worth."""
    pairs: DataConfig | None = None
    """Of upo with `pair_source: offline`: pairs of answers, prepared before."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """Of dpo, kto and upo: the policy before training, which the trained one is measured against."""
    lora: LoraConfig | None = None
    """Train adapters and leave the weights as they are."""
    fp8: Fp8Config | None = None
    """Of pretrain and sft: products of feed-forward layers and experts in 8-bit floats."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig | None = None
    """Keep an average of the weights beside them."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    returns_memory: bool = False
    """Give freed memory back to the system at once (Linux with glibc): less of it is held, and a step takes longer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        for entry in fields(self):
            readers = _READ_BY.get(entry.name)
            default = (
                entry.default
                if entry.default is not MISSING or entry.default_factory is MISSING
                else entry.default_factory()
            )
            if readers is not None and self.method not in readers and getattr(self, entry.name) != default:
                raise ConfigError(
                    f"{entry.name} is set but the method is {self.method}: {', '.join(readers)} read it, leave it out"
                )
        if self.method == "upo" and not self.rewards:
            raise ConfigError("rewards are missing: upo needs at least one to judge answers by")
        if self.method == "upo" and (self.pairs is not None) != self.upo.has_offline_pairs:
            need = "are needed with" if self.pairs is None else "are read only with"
            raise ConfigError(f"pairs {need} upo.pair_source offline and a preference_weight")
        if self.optimizer.lora_plus_scale != 1:
            raise ConfigError("optimizer.lora_plus_scale is set: it belongs into the section lora here")
        if self.fp8 is not None and (self.lora is not None or self.method not in LANGUAGE_METHODS):
            raise ConfigError("fp8 is for weights that learn by pretrain or sft: leave it out")
        self._check_reference()
        if self.method == "upo" and self.train.epochs is not None:
            raise ConfigError(
                "train.epochs is set but the method is upo, which may draw further prompts for those that teach nothing, so that an "
                "epoch has no known length: set train.steps"
            )
        if self.schedule.steps is None and self.train.steps is not None:
            object.__setattr__(self, "schedule", replace(self.schedule, steps=self.train.steps))
        if self.method in ("orpo", "simpo"):
            self._resolve_loss()

    def _check_reference(self) -> None:
        reference = self.reference
        if reference.refresh_steps and self.lora is not None:
            raise ConfigError(
                f"reference.refresh_steps is {reference.refresh_steps}, but with lora the reference is the network without its "
                "adapters: leave it out"
            )
        if reference.kind == "cached" and self.method != "dpo":
            unknown = (
                "every step's prompts with answers to others"
                if self.method == "kto"
                else "answers that are sampled on the way"
            )
            raise ConfigError(
                f"reference.kind is cached but the method is {self.method}, which asks it about {unknown}: let it be live"
            )
        if self.method == "dpo" and not self.preference.uses_reference and reference != ReferenceConfig():
            raise ConfigError("reference is set, but the section preference asks for a loss without one: leave it out")

    def _resolve_loss(self) -> None:
        """The losses that are methods by name. Raises: ConfigError if another one is asked for."""
        wanted = {"orpo": "or", "simpo": "simpo"}[self.method]
        stated = self.preference
        if stated.loss_type not in (wanted, PreferenceConfig().loss_type):
            raise ConfigError(
                f"method {self.method} is loss_type {wanted}, preference.loss_type says {stated.loss_type}"
            )
        changes: dict[str, Any] = {"loss_type": wanted}
        if self.method == "orpo" and not stated.sft_loss_ratio:
            changes["sft_loss_ratio"] = 1.0
        object.__setattr__(self, "preference", replace(stated, **changes))
