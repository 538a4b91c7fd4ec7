"""Rows prepared in the background, so that a step does not wait for tokenising."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from ernie45.errors import ConfigError
from ernie45.training.objective import RowStream

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """A `RowStream` that keeps `rows` rows of another one ready. Its state is that of the last row that was taken.

    The other stream belongs to the thread from then on. Leave the `with` block, or call `close`, to end it.
    """

    def __init__(self, stream: RowStream[Item], rows: int) -> None:
        """Begin to prepare rows. Raises: ConfigError for fewer than one."""
        if rows < 1:
            raise ConfigError(f"{rows} rows cannot be prepared ahead: 1 or more")
        self._stream, self._rows = stream, rows
        self._changed = threading.Condition()
        self._ready: deque[tuple[Sequence[Item], dict[str, Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._begin()

    def __enter__(self) -> Prefetch[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next_row(self) -> Sequence[Item]:
        """See `RowStream`. Raises: what the other stream raised, when all rows before that are taken, and ever after."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closing)
            if not self._ready:
                raise self._error or ConfigError("the stream was closed: no more rows can be taken")
            row, self._state = self._ready.popleft()
            self._changed.notify_all()
        return row

    def state(self) -> dict[str, Any]:
        """See `RowStream`."""
        with self._changed:
            return self._state

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `RowStream`; what was prepared is forgotten."""
        self.close()
        try:
            self._stream.restore(state)
        finally:
            self._begin()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._ready.clear()

    def _begin(self) -> None:
        self._state = self._stream.state()
        self._closing = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._prepare, name="prefetch", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._rows or self._closing)
                if self._closing:
                    return
            try:
                row = self._stream.next_row()
                state = self._stream.state()
            except Exception as error:  # handed to whoever takes rows
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready.append((row, state))
                self._changed.notify_all()
