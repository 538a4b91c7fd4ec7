"""The loss of files that nothing learnt from: what recipes compare models by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ernie45.errors import ConfigError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training.batch import Batch
from ernie45.training.data import DataConfig, SourceConfig, rows_of
from ernie45.training.head import lm_loss_sum
from ernie45.training.network import TrainingNetwork


def batches_of(
    method: str, data: DataConfig, path: str, tokenizer: Tokenizer, *, num_mtp: int = 0, rows_per_pass: int = 8
) -> list[Batch]:
    """Every usable row of a file once, packed as in training, with labels for `num_mtp` prediction blocks besides.

    Texts are cut as for a network without blocks, so that networks with and without are asked for the same tokens.
    Raises: ConfigError if no row can be used, NotFoundError.
    """
    config = replace(data, valid=(SourceConfig(path=path),))
    rows = list(rows_of(method)(config, tokenizer, part="valid").once())
    if not rows:
        raise ConfigError(f"none of the rows of {path} can be used: look at them with `ernie data check`")
    shares = [rows[at : at + rows_per_pass] for at in range(0, len(rows), rows_per_pass)]
    return [Batch.of_rows(share, num_mtp=num_mtp) for share in shares]


@torch.no_grad()
def mean_loss(network: TrainingNetwork, batches: Sequence[Batch]) -> float:
    """Nats per learnt token over all batches together."""
    sums = [float(lm_loss_sum(network, network.run(batch).hidden_TH, batch.labels_DT[0])) for batch in batches]
    return sum(sums) / sum(batch.num_learnt for batch in batches)
