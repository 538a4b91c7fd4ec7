"""How a policy is improved (`UpoConfig`) and how its answers are gathered (`RolloutConfig`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from ernie45.errors import ConfigError
from ernie45.training.losses.advantage import PromptFilter
from ernie45.training.losses.policy import Averaging, KlEstimator
from ernie45.training.losses.preference import PreferenceConfig

Advantages = Literal["gae", "group"]
PairSource = Literal["online", "offline"]
RatioOf = Literal["token", "sequence"]
SamplingWeights = Literal["float32", "wint8"]
KlIn = Literal["reward", "loss"]


@dataclass(frozen=True, kw_only=True)
class UpoConfig:
    """`L = L_policy + preference_weight * L_preference`. Defaults are GRPO without a preference part."""

    policy: bool = True
    """False leaves the policy part out: preference tuning on the pairs alone (online DPO, where they are online)."""
    advantages: Advantages = "group"
    """`gae`: PPO, with a critic that learns along. `group`: GRPO, each answer against the others to its prompt."""
    group_by_std: bool = True
    """Divide a group's advantages by their standard deviation; False is Dr. GRPO. group."""
    gamma: float = 1.0
    """Discount per token, 0 to 1. gae."""
    lam: float = 0.95
    """Decay of credit per token, 0 (one step) to 1 (to the end). gae."""
    whiten: bool = True
    """Bring the advantages of a rollout to mean 0 and deviation 1. gae."""
    clip_low: float = 0.2
    """How far a ratio may fall below 1 with a gain."""
    clip_high: float = 0.2
    """How far a ratio may rise above 1 with a gain; larger than `clip_low` lets rare tokens grow."""
    ratio_of: RatioOf = "token"
    """Ratios of tokens, or one for a whole answer (GSPO; take `averaging: answer` with it)."""
    sampler_ratio_cap: float | None = None
    """Weigh each token's policy loss by `min(old policy / sampler, this)`, which corrects for a sampler that is not quite the policy,
    such as one of 8-bit weights; None = not at all."""
    averaging: Averaging = "token"
    """How tokens are weighed: alike over the step; within each answer first; over the longest possible answer (`constant`)."""
    value_weight: float = 0.1
    """Weight of the critic's loss. gae."""
    value_clip: float | None = 0.2
    """How far a value may move from what it was with a gain; None = freely. gae."""
    kl_weight: float = 0.0
    """Weight of the distance from the reference; 0 = no reference is asked."""
    kl_in: KlIn = "reward"
    """As a penalty of each token's reward, or as a term of the loss."""
    kl_estimator: KlEstimator = "k3"
    """How the distance is estimated in the loss, k2 or k3; rewards take k1."""
    entropy_weight: float = 0.0
    """Weight of the policy's entropy, which is made larger."""
    preference_weight: float = 0.0
    """lambda. 0 = no preference part."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Loss of the pairs."""
    pair_source: PairSource = "online"
    """Pairs of the best and the worst answer to a prompt, or from a data set."""
    pair_ratio: float = 1.0
    """Pairs per prompt: online up to 1, offline any number; above 0."""
    pair_min_spread: float = 0.0
    """Best and worst answer make a pair if their rewards lie further apart than this. online."""

    def __post_init__(self) -> None:
        self._check_names()
        for name in ("gamma", "lam"):
            _check(name, getattr(self, name), 0, 1)
        for name in ("clip_low", "clip_high", "value_weight", "kl_weight", "entropy_weight", "preference_weight"):
            _check(name, getattr(self, name), 0)
        _check("clip_low", self.clip_low, 0, 1)
        _check("pair_ratio", self.pair_ratio, 0, 1 if self.pair_source == "online" else math.inf)
        if not self.pair_ratio:
            raise ConfigError("pair_ratio is 0: to leave the preference part out set preference_weight to 0")
        if self.value_clip is not None:
            _check("value_clip", self.value_clip, 0)
        if self.sampler_ratio_cap is not None:
            _check("sampler_ratio_cap", self.sampler_ratio_cap, 1)
        if self.kl_estimator == "k1":
            raise ConfigError(
                "kl_estimator is k1, whose gradient is noise: take k2 or k3, or put the distance into the reward (kl_in)"
            )
        if not self.policy and not self.preference_weight:
            raise ConfigError("policy is off and preference_weight is 0: nothing would be learnt")
        self._refuse_unread()

    @property
    def has_critic(self) -> bool:
        """Whether values are learnt."""
        return self.policy and self.advantages == "gae"

    @property
    def has_online_pairs(self) -> bool:
        """Whether the preference part compares sampled answers."""
        return bool(self.preference_weight) and self.pair_source == "online"

    @property
    def has_offline_pairs(self) -> bool:
        """Whether the preference part compares answers of a data set."""
        return bool(self.preference_weight) and self.pair_source == "offline"

    @property
    def asks_reference(self) -> bool:
        """Whether sampled answers need their log-probabilities under the reference."""
        return bool(self.policy and self.kl_weight) or (self.has_online_pairs and self.preference.uses_reference)

    def _check_names(self) -> None:
        for name, known in (
            ("advantages", Advantages),
            ("ratio_of", RatioOf),
            ("averaging", Averaging),
            ("kl_in", KlIn),
            ("kl_estimator", KlEstimator),
            ("pair_source", PairSource),
        ):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(get_args(known))}")

    def _refuse_unread(self) -> None:
        """A field that would do nothing is refused, unless it has its default."""
        for one in fields(self):
            reads, when = _READ_IF.get(one.name, (_always, ""))
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            if getattr(self, one.name) != default and not reads(self):
                raise ConfigError(f"{one.name} is {getattr(self, one.name)!r}, but is only read {when}: leave it out")


def _always(config: UpoConfig) -> bool:
    return True


def _check(name: str, value: object, low: float, high: float = math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]  # a number
        bounds = f"from {low} on" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{name} is {value!r}, expected a number {bounds}")


_POLICY = (lambda config: config.policy, "where policy is on")
_CRITIC = (lambda config: config.has_critic, "with advantages: gae")
_KL_LOSS = (
    lambda config: config.policy and config.kl_weight and config.kl_in == "loss",
    "with a kl_weight and kl_in: loss",
)
_PAIRS = (lambda config: config.preference_weight, "with a preference_weight")
_READ_IF: dict[str, tuple[Callable[[UpoConfig], Any], str]] = {
    "advantages": _POLICY,
    "group_by_std": (lambda config: config.policy and config.advantages == "group", "with advantages: group"),
    **dict.fromkeys(("gamma", "lam", "whiten", "value_weight", "value_clip"), _CRITIC),
    **dict.fromkeys(
        ("clip_low", "clip_high", "ratio_of", "sampler_ratio_cap", "averaging", "kl_weight", "entropy_weight"), _POLICY
    ),
    "kl_in": (lambda config: config.policy and config.kl_weight, "with a kl_weight"),
    "kl_estimator": _KL_LOSS,
    **dict.fromkeys(("preference", "pair_source", "pair_ratio"), _PAIRS),
    "pair_min_spread": (lambda config: config.has_online_pairs, "with online pairs"),
}


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How answers are gathered."""

    num_answers: int = 8
    """Answers to each prompt; at least 2 where they are compared with each other."""
    max_tokens: int = 256
    """Longest answer."""
    temperature: float = 1.0
    """Of the sampler. Ratios are taken at temperature 1: another one samples from another policy than the one that is improved."""
    num_minibatches: int = 1
    """Steps that a rollout is divided into: it has so many times the prompts of a step."""
    num_epochs: int = 1
    """How often a rollout is gone through, in a new order each time."""
    normalize_rewards: bool = False
    """Bring the rewards of each subset of the data to mean 0 and deviation 1 in every rollout."""
    prompt_filter: PromptFilter | None = None
    """Which prompts are left out, because their answers teach nothing; None = none."""
    max_draws: int = 4
    """How often prompts are drawn for those that were left out; what is missing then is filled up with them."""
    old_logprobs: Literal["policy", "sampler"] = "policy"
    """Ratios are against what the training network computes (one pass more), or what the sampler reports with its answers."""
    weights: SamplingWeights = "float32"
    """What is sampled from: the policy itself, or a copy of it in 8 bits, made anew for each rollout and several times as fast
    (`policy/sampler_kl` says how far it is from the policy; `sampler_ratio_cap` corrects for it)."""
    max_pass_tokens: int = 8192
    """Tokens of a pass that computes log-probabilities and values of a rollout; more memory, and not slower."""

    def __post_init__(self) -> None:
        for name in ("num_answers", "max_tokens", "num_minibatches", "num_epochs", "max_draws", "max_pass_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}, expected a whole number from 1 on")
        if self.num_answers > 128:
            raise ConfigError(f"num_answers is {self.num_answers}, expected 1 to 128")
        if not isinstance(self.temperature, int | float) or not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"temperature is {self.temperature!r}, expected a number above 0: greedy answers are all alike"
            )
        if self.old_logprobs not in ("policy", "sampler"):
            raise ConfigError(f"old_logprobs is {self.old_logprobs!r}, expected policy or sampler")
        if self.weights not in get_args(SamplingWeights):
            raise ConfigError(
                f"weights is {self.weights!r}, expected one of {', '.join(get_args(SamplingWeights))}: the weights of rollouts"
            )
        if self.prompt_filter is None and self.max_draws != type(self).max_draws:
            raise ConfigError(f"max_draws is {self.max_draws}, but is only read with a prompt_filter: leave it out")
