"""Endless packed rows: drawn, read, fitted together; and the place where a stream stands, to go on from later.

The sequence of rows follows from the configuration alone. It is the same for every process, which takes each its own rows out
of it; so every process reads all documents, and a state that one of them saved serves all of them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ernie45.errors import CheckpointError, ConfigError, RequestError
from ernie45.training.data.config import DataConfig
from ernie45.training.data.fitting import Fitted, TooLongError
from ernie45.training.data.order import Sample, SampleOrder
from ernie45.training.data.packing import Packer, Piece
from ernie45.training.data.report import DataReport
from ernie45.training.data.rows import BadRow, RowDroppedError
from ernie45.training.data.sources import Source

_logger = logging.getLogger(__name__)

Raw = TypeVar("Raw")
Item = TypeVar("Item")

_MAX_WAITING = 1024
"""Documents that wait at most, which bounds states and the time to go on from one."""
_LOGGED = 5
"""Bad rows that are logged; the report lists more."""


@dataclass(frozen=True, kw_only=True)
class Method(Generic[Raw, Item]):
    """What one method makes of rows."""

    read: Callable[[Mapping[str, Any], str], Fitted[Raw]]
    """Takes a row and its origin. Raises: RequestError for a bad row, RowDroppedError for one that is left out."""
    finish: Callable[[Piece[Raw]], Item]
    """Makes what the objective takes of a row, or of a piece of one."""
    cuts: bool = False
    """Whether rows may be cut into pieces."""


class PackedRows(Generic[Raw, Item]):
    """A `RowStream` over sources; made by the functions in `methods.py`."""

    def __init__(
        self,
        sources: Sequence[Source],
        method: Method[Raw, Item],
        config: DataConfig,
        *,
        weights: Sequence[float] | None,
        identity: str,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`identity`: a digest of everything that the sequence of rows depends on. Raises: ConfigError without rows."""
        if not 0 <= rank < world:
            raise ConfigError(f"rank is {rank} of {world} processes, expected 0 to {world - 1}")
        self._sources, self._method, self._config = sources, method, config
        sizes = [len(source) for source in sources]
        if not sum(sizes) or (weights is not None and not all(sizes)):
            raise ConfigError(f"source {sizes.index(0) + 1} of {len(sizes)} has no rows: leave it out or fill it")
        self._order = SampleOrder(sizes, weights, seed=config.seed, shuffle=config.shuffle)
        self._max_unusable = 2 * sum(sizes) + 1000
        self._identity, self._rank, self._world = identity, rank, world
        self._report = DataReport(room=config.max_seq_len)
        self._packer = self._new_packer()

    @property
    def num_rows(self) -> int:
        """Rows of all sources together."""
        return sum(len(source) for source in self._sources)

    @property
    def num_read(self) -> int:
        """Rows read so far, every epoch anew."""
        return self._report.num_rows

    def next_row(self) -> list[Item]:
        """See `RowStream`. Raises: ConfigError if none of the rows can be used; RequestError for a bad row if strict."""
        rows = [self._next_of_all() for _ in range(self._world)]
        return [self._method.finish(piece) for piece in rows[self._rank]]

    def once(self) -> Iterator[list[Item]]:
        """Every row of every source once, in the order of the files: an epoch for evaluation. Leaves the stream where it is."""
        for number, row in enumerate(self._rows_once()):
            if number % self._world == self._rank:
                yield [self._method.finish(piece) for piece in row]

    def report(self) -> DataReport:
        """What became of the rows so far."""
        return copy.deepcopy(self._report)

    def state(self) -> dict[str, Any]:
        """See `RowStream`: how many rows were drawn of each source, and which of them wait to be packed."""
        waiting = [[*piece.sample, piece.start] for piece in self._packer.waiting()]
        return {
            "data": self._identity,
            "taken": list(self._order.taken),
            "waiting": waiting,
            "counts": self._report.counts(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `RowStream`; reads the documents again that wait."""
        if state.get("data") != self._identity:
            raise CheckpointError(
                "the checkpoint's data position belongs to other data: files, their order, the tokenizer or options of the"
                " data have changed since; put them back, or start a new run from the checkpoint's weights"
            )
        self._order.taken = list(state["taken"])
        self._packer = self._new_packer()
        for source, ordinal, start in state["waiting"]:
            sample = Sample(source, ordinal)
            fitted = self._read(sample, self._order.row(sample))
            self._packer.add(Piece(sample, start, fitted.size - start, fitted.item))
        self._report.set_counts(state["counts"])

    def _new_packer(self) -> Packer[Raw]:
        shares = self._config.packing == "best_fit"
        return Packer(self._config.max_seq_len, cuts=self._method.cuts, shares=shares)

    def _next_of_all(self) -> list[Piece[Raw]]:
        unusable = 0
        while not self._is_full(self._packer):
            sample = self._order.draw()
            if self._let_wait(self._packer, sample, self._order.row(sample)):
                unusable = 0
            else:
                unusable += 1
            if unusable > self._max_unusable:
                raise ConfigError(f"none of the {self.num_rows} rows can be used{self._first_reason()}")
        return self._pack(self._packer)

    def _is_full(self, packer: Packer[Raw]) -> bool:
        wanted = self._config.buffer_rows * self._config.max_seq_len if self._config.packing == "best_fit" else 1
        return packer.waiting_tokens >= wanted or len(packer) >= _MAX_WAITING

    def _rows_once(self) -> Iterator[list[Piece[Raw]]]:
        packer = self._new_packer()
        for idx, source in enumerate(self._sources):
            for row in range(len(source)):
                self._let_wait(packer, Sample(idx, row), row)
                while self._is_full(packer):
                    yield self._pack(packer)
        while packer:
            yield self._pack(packer)

    def _pack(self, packer: Packer[Raw]) -> list[Piece[Raw]]:
        row = packer.row()
        self._report.packed_rows += 1
        self._report.packed_tokens += sum(piece.size for piece in row)
        return row

    def _let_wait(self, packer: Packer[Raw], sample: Sample, row: int) -> bool:
        """Read a row and count what it is. Returns: whether it can be used."""
        report = self._report
        report.num_rows += 1
        try:
            fitted = self._read(sample, row)
        except RowDroppedError as dropped:
            setattr(report, dropped.reason, getattr(report, dropped.reason) + 1)
            report.sizes[dropped.size.bit_length()] += 1
            return False
        except TooLongError:
            raise
        except RequestError as error:
            self._refuse(BadRow(origin=self._sources[sample.source].origin(row), reason=str(error)), sample, error)
            return False
        report.num_used += 1
        report.num_tokens += fitted.size
        report.num_learnt += fitted.num_learnt
        report.shortened += fitted.full_size > fitted.size
        report.sizes[fitted.full_size.bit_length()] += 1
        packer.add(Piece(sample, 0, fitted.size, fitted.item))
        return True

    def _read(self, sample: Sample, row: int) -> Fitted[Raw]:
        source = self._sources[sample.source]
        return self._method.read(source.read(row), source.origin(row))

    def _refuse(self, row: BadRow, sample: Sample, error: RequestError) -> None:
        if self._config.strict:
            raise RequestError(f"{row}; repair the row, or let strict be off") from error
        is_new = self._order.is_first_epoch(sample)
        self._report.add_bad(row, is_new=is_new)
        if is_new and self._report.num_bad <= _LOGGED:
            _logger.warning("left out %s", row)

    def _first_reason(self) -> str:
        if self._report.bad:
            return f", the first because: {self._report.bad[0]}"
        return f": {self._report.too_long} are too long, and of {self._report.nothing_learnt} nothing would be learnt"
