"""The objective of pre-training and supervised tuning: next tokens, tokens after those (MTP), and what keeps routers in shape.

`L = L_lm + lambda/D * sum L_mtp + router losses`. Everything but `L_lm` is an add-on: it has a gradient and is logged by its own name,
and `loss` in the log is the LM loss alone. Source: training reference 1.3 to 1.5.

Shape letters: T tokens (packed), H hidden, D prediction depths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ernie45.errors import ConfigError, TrainingError
from ernie45.training.batch import IGNORED, Batch, Document
from ernie45.training.head import lm_loss_sum
from ernie45.training.losses.router import RouterLossConfig, hidden_addon, router_losses, weighted_router_loss
from ernie45.training.losses.token_balance import token_balanced_sum
from ernie45.training.network import RouterRecord, TrainingNetwork
from ernie45.training.objective import Loss

Observer = Callable[[Sequence[RouterRecord]], None]


@dataclass(frozen=True, kw_only=True)
class LanguageLossConfig:
    """What of the language objective counts how much."""

    mtp_weight: float = 0.3
    """Lambda of the multi-token prediction blocks, shared by all depths; 0 leaves them out. 0.3 in the published recipes."""
    token_balance: bool = False
    """Divide by all positions of the rows instead of the learnt ones: every learnt token weighs the same in rows with long
    prompts or images."""
    router: RouterLossConfig = field(default_factory=RouterLossConfig)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mtp_weight) and self.mtp_weight >= 0):
            raise ConfigError(f"mtp_weight is {self.mtp_weight}, expected a number from 0 on (0 = off)")


@dataclass(frozen=True, kw_only=True)
class LanguageTotals:
    """Sums over the micro-batches of a step, which each takes its share of."""

    learnt_D: tuple[int, ...]
    """Positions that learn, of the head and of every MTP block."""
    num_passes: int
    num_rows: int


class LanguageObjective:
    """An `objective.Objective` over documents."""

    def __init__(
        self, config: LanguageLossConfig, *, num_mtp: int, max_seq_len: int, observers: Sequence[Observer] = ()
    ) -> None:
        """Args: num_mtp: MTP blocks of the network; none run where their weight is 0. max_seq_len: positions of a full row.
        observers: told what the routers of every training pass did, such as those that balance them.
        """
        self._config, self._observers = config, tuple(observers)
        self._num_mtp = num_mtp if config.mtp_weight else 0
        self._max_seq_len = max_seq_len

    def collate(self, rows: Sequence[Sequence[Document]]) -> Batch:
        """See `Objective`."""
        return Batch.of_rows(rows, num_mtp=self._num_mtp)

    def totals(self, batches: Sequence[Batch]) -> LanguageTotals:
        """See `Objective`. Raises: TrainingError if nothing of a step is learnt."""
        learnt = torch.stack([(batch.labels_DT != IGNORED).sum(-1) for batch in batches]).sum(0)
        totals = LanguageTotals(
            learnt_D=tuple(learnt.tolist()),
            num_passes=len(batches),
            num_rows=sum(batch.num_rows for batch in batches),
        )
        if not totals.learnt_D[0]:
            origins = ", ".join(origin for batch in batches for origin in batch.origins[:3])
            raise TrainingError(f"no token of a step is learnt ({origins}): look at the rows with `ernie data preview`")
        return totals

    def loss(self, network: TrainingNetwork, batch: Batch, totals: LanguageTotals) -> Loss:
        """See `Objective`."""
        done = network.run(batch, num_mtp=self._num_mtp)
        if torch.is_grad_enabled():
            for observe in self._observers:
                observe(done.routers)
        lm_sum = lm_loss_sum(network, done.hidden_TH, batch.labels_DT[0])
        lm = self._share(lm_sum, totals)
        logged = {"loss": lm.detach()}
        total = self._mtp(network, done.mtp_TH, batch, totals, logged)
        share = 1 / totals.num_passes
        losses = {name: share * value for name, value in router_losses(done.routers, self._config.router).items()}
        logged |= {name: value.detach() for name, value in losses.items()}
        return Loss(total=lm + hidden_addon(total + weighted_router_loss(losses, self._config.router)), logged=logged)

    def num_tokens(self, batch: Batch) -> int:
        """See `Objective`."""
        return batch.num_tokens

    def _share(self, loss_sum: Tensor, totals: LanguageTotals) -> Tensor:
        """This pass's part of the step's mean over learnt tokens."""
        if not self._config.token_balance:
            return loss_sum / totals.learnt_D[0]
        positions = max(self._max_seq_len * totals.num_rows, totals.learnt_D[0])
        return token_balanced_sum(loss_sum, num_learnt=totals.learnt_D[0], num_positions=positions)

    def _mtp(
        self,
        network: TrainingNetwork,
        mtp_TH: Sequence[Tensor],
        batch: Batch,
        totals: LanguageTotals,
        logged: dict[str, Tensor],
    ) -> Tensor:
        """Weighted loss of all MTP blocks; their plain mean goes into `logged`."""
        if not mtp_TH:
            return torch.zeros(())
        parts = [
            lm_loss_sum(network, hidden_TH, labels_T, mtp=True) / max(count, 1)
            for hidden_TH, labels_T, count in zip(mtp_TH, batch.labels_DT[1:], totals.learnt_D[1:], strict=True)
        ]
        mean = torch.stack(parts).mean()
        logged["mtp_loss"] = mean.detach()
        return self._config.mtp_weight * mean
