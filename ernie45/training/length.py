"""How long a run is: epochs become steps before it begins, and data that is small for its run is told of.

An epoch is every row of every source once, packed in the order of the files. Training draws them in another order, in which `best_fit`
may make a few packed rows more or fewer; without packing the count is exact. Sources with weights are drawn by their shares: an
epoch is then as many packed rows as all of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

from ernie45.errors import ConfigError
from ernie45.training.config import RunConfig
from ernie45.training.data import PackedRows

MANY_EPOCHS = 10
"""Answers and pairs are usually gone over 1 to 3 times; beyond this they are learnt by heart."""
_SMALL_ROWS = 20_000
"""Files with more rows are not called small: packing them all would only delay the run."""

Rows = PackedRows[Any, Any]
Report = Callable[[int, int], None]


def with_steps(
    config: RunConfig, open_rows: Callable[[], Rows], *, known: int | None = None, report: Report | None = None
) -> RunConfig:
    """The configuration of a run whose length is told in steps, to which its schedule then fits.

    Args: open_rows: gives the run's rows from their beginning. known: steps that were counted when the run began. report: called
        with the rows read and all rows. Raises: ConfigError if no row can be used.
    """
    train = config.train
    if train.epochs is None:
        return config
    if known is None:
        packed = count_packed(open_rows(), report=report)
        if not packed:
            raise ConfigError("none of the rows can be used: look at them with `ernie data check`")
        known = max(1, math.ceil(train.epochs * packed / train.rows_per_step))
    return replace(config, train=replace(train, steps=known, epochs=None))


def small_data_notes(config: RunConfig, rows: Rows) -> list[str]:
    """What to say of data that is small for its run; reads no more rows than that takes.

    Args: config: as the user wrote it: epochs that were asked for are not wondered at. rows: from their beginning.
    """
    train, per_step = config.train, config.train.rows_per_step
    wanted = 0 if train.steps is None or config.method == "pretrain" else train.steps * per_step
    if rows.num_rows > _SMALL_ROWS:
        return []
    packed = count_packed(rows, limit=max(per_step, wanted // MANY_EPOCHS + 1))
    small = f"the data is small: {rows.num_rows} rows make {packed} packed ones"
    notes = []
    if 0 < packed < per_step:
        notes.append(
            f"{small}, and a step takes {per_step} (rows_per_pass times accumulation), some of them more than once: lower "
            "train.accumulation or train.rows_per_pass, or add rows"
        )
    if 0 < packed * MANY_EPOCHS < wanted:
        notes.append(
            f"{small}, so {train.steps} steps of {per_step} go over them {wanted / packed:.0f} times, and above {MANY_EPOCHS} they are "
            "learnt by heart: set train.epochs to 1 to 3 instead of train.steps, add rows, or watch held-out ones (train.eval_every)"
        )
    return notes


def count_packed(rows: Rows, *, limit: int | None = None, report: Report | None = None) -> int:
    """Packed rows of an epoch; counting ends at `limit`."""
    packed = 0
    for packed, _ in enumerate(islice(rows.once(), limit), 1):  # noqa: B007  # read below
        if report is not None:
            report(rows.num_read, rows.num_rows)
    return packed
