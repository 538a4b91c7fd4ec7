"""The rows of each method: from a configuration to a stream that the loop draws from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ernie45.errors import ConfigError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training.batch import Document
from ernie45.training.data.config import DataConfig, Part, SourceConfig
from ernie45.training.data.encoding import ChatEncoder, with_chat_format
from ernie45.training.data.fitting import Fitted, fit_conversation
from ernie45.training.data.packing import Piece
from ernie45.training.data.pairs import KtoExample, PreferencePair, fit_kto, fit_pair
from ernie45.training.data.preference_formats import parse_kto, parse_preference
from ernie45.training.data.row_formats import parse_conversation, parse_text
from ernie45.training.data.rows import RowDroppedError
from ernie45.training.data.sources import Source, Subset, open_source
from ernie45.training.data.stream import Method, PackedRows
from ernie45.training.data.token_files import TokenFiles

_STATE_VERSION = 1
"""Of everything that decides the sequence of rows besides the configuration: raise it with a change of order or packing."""


@dataclass(frozen=True)
class TextIds:
    """A text to pre-train on."""

    ids: npt.NDArray[Any]
    origin: str


def pretrain_rows(
    config: DataConfig, tokenizer: Tokenizer, *, num_mtp: int = 0, rank: int = 0, world: int = 1, part: Part = "train"
) -> PackedRows[TextIds, Document]:
    """Text, every token learnt; texts longer than a row are cut into pieces.

    Args: num_mtp: MTP blocks, which look this many tokens further: pieces overlap by as much. rank, world: rows i with
        i % world == rank are this process's. Raises: ConfigError, NotFoundError, CheckpointError.
    """
    for role, wanted in (("bos", config.add_bos), ("eos", config.add_eos)):
        if wanted and getattr(tokenizer, f"{role}_id") is None:
            raise ConfigError(f"add_{role} is set, but the tokenizer names no {role} token: turn it off")

    def read(record: Mapping[str, Any], origin: str) -> Fitted[TextIds]:
        return _read_text(record, origin, tokenizer, config)

    method = Method(read=read, finish=lambda piece: _document(piece, num_mtp), cuts=True)
    return _stream(config, tokenizer, method, ("pretrain", num_mtp), part, rank, world)


def sft_rows(
    config: DataConfig, tokenizer: Tokenizer, *, num_mtp: int = 0, rank: int = 0, world: int = 1, part: Part = "train"
) -> PackedRows[Document, Document]:
    """Dialogues, of which answers are learnt. Arguments and errors as those of `pretrain_rows`."""

    def fit(encoder: ChatEncoder, record: Mapping[str, Any], origin: str) -> Fitted[Document]:
        return fit_conversation(encoder, parse_conversation(record, origin), config, num_mtp)

    return _dialogues(config, tokenizer, fit, ("sft", num_mtp), part, rank, world)


def preference_rows(
    config: DataConfig, tokenizer: Tokenizer, *, num_mtp: int = 0, rank: int = 0, world: int = 1, part: Part = "train"
) -> PackedRows[PreferencePair, PreferencePair]:
    """Pairs of answers. A pair takes prompt, chosen and rejected of a row. `num_mtp` changes nothing here: nothing is cut
    that an MTP block would have to look into. Otherwise as `pretrain_rows`."""

    def fit(encoder: ChatEncoder, record: Mapping[str, Any], origin: str) -> Fitted[PreferencePair]:
        return fit_pair(encoder, parse_preference(record, origin), config)

    return _dialogues(config, tokenizer, fit, ("preference",), part, rank, world)


def kto_rows(
    config: DataConfig, tokenizer: Tokenizer, *, num_mtp: int = 0, rank: int = 0, world: int = 1, part: Part = "train"
) -> PackedRows[KtoExample, KtoExample]:
    """Answers with a verdict each. As `preference_rows`."""

    def fit(encoder: ChatEncoder, record: Mapping[str, Any], origin: str) -> Fitted[KtoExample]:
        return fit_kto(encoder, parse_kto(record, origin), config)

    return _dialogues(config, tokenizer, fit, ("kto",), part, rank, world)


class Opener(Protocol):
    """What opens a stream of rows of one kind."""

    def __call__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        num_mtp: int = 0,
        rank: int = 0,
        world: int = 1,
        part: Part = "train",
    ) -> PackedRows[Any, Any]: ...


OPENERS: Mapping[str, Opener] = {
    "pretrain": pretrain_rows,
    "sft": sft_rows,
    "preference": preference_rows,
    "kto": kto_rows,
}
"""By kind of row."""


def rows_of(method: str) -> Opener:
    """What makes the rows of a method of training: those that are no kind of row themselves compare pairs."""
    return OPENERS.get(method, preference_rows)


def _read_text(record: Mapping[str, Any], origin: str, tokenizer: Tokenizer, config: DataConfig) -> Fitted[TextIds]:
    ids = record.get("ids")
    if ids is None:
        ids = np.asarray(tokenizer.encode(parse_text(record)), dtype=np.uint32)
    first = [tokenizer.bos_id] if config.add_bos else []
    last = [tokenizer.eos_id] if config.add_eos else []
    if first or last:
        ids = np.concatenate((np.asarray(first, np.uint32), ids, np.asarray(last, np.uint32)))
    size = len(ids) - 1
    if size < 1:
        raise RowDroppedError("nothing_learnt", max(size, 0))
    return Fitted(TextIds(ids, origin), size, size, size)


def _document(piece: Piece[TextIds], num_mtp: int) -> Document:
    """A piece, with the tokens behind it that are targets here and are read in the next one."""
    ids, end = piece.item.ids, piece.start + piece.size
    unread = min(1 + num_mtp, len(ids) - end)
    taken = torch.from_numpy(ids[piece.start : end + unread].astype(np.int64))
    learnt = torch.ones(len(taken), dtype=torch.bool)
    learnt[0] = False
    return Document(ids=taken, learnt=learnt, num_unread=unread, origin=piece.item.origin)


def _dialogues(
    config: DataConfig,
    tokenizer: Tokenizer,
    fit: Callable[[ChatEncoder, Mapping[str, Any], str], Fitted[Any]],
    kind: tuple[object, ...],
    part: Part,
    *place: int,
) -> PackedRows[Any, Any]:
    """Rows that the chat template writes. Args: fit: an encoder, a record and its origin to what is packed."""
    tokenizer = with_chat_format(tokenizer, config.chat_format)
    encoder = ChatEncoder(tokenizer, config.thoughts)
    method = Method(read=lambda record, origin: fit(encoder, record, origin), finish=lambda piece: piece.item)
    return _stream(config, tokenizer, method, kind, part, *place)


def _stream(
    config: DataConfig,
    tokenizer: Tokenizer,
    method: Method[Any, Any],
    kind: tuple[object, ...],
    part: Part,
    *place: int,
) -> PackedRows[Any, Any]:
    configs = config.sources(part)
    sources = [_opened(source, tokenizer, cuts=method.cuts) for source in configs]
    share = config.share(part)
    if share != (0.0, 1.0):
        sources = [Subset(source, share) for source in sources]
    given = [source.weight for source in configs]
    weights = [weight for weight in given if weight is not None] or None
    rank, world = place
    identity = _identity(config, tokenizer, sources, (*kind, part, given))
    return PackedRows(sources, method, config, weights=weights, identity=identity, rank=rank, world=world)


def _opened(config: SourceConfig, tokenizer: Tokenizer, *, cuts: bool) -> Source:
    source = open_source(config)
    if isinstance(source, TokenFiles):
        if not cuts:
            raise ConfigError(f"{config.path} holds tokens without turns: they can be pre-trained on, nothing else")
        source.check_tokenizer(tokenizer)
    return source


def _identity(config: DataConfig, tokenizer: Tokenizer, sources: Sequence[Source], more: tuple[object, ...]) -> str:
    """A digest of what the sequence of rows depends on; files count by content, so that they may be moved."""
    told = asdict(config)
    for name in ("train", "valid", "split", "strict"):  # sources follow; strictness chooses no rows
        del told[name]
    told |= {
        "version": _STATE_VERSION,
        "more": more,
        "tokenizer": tokenizer.fingerprint,
        "sources": [(source.digest, len(source)) for source in sources],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
