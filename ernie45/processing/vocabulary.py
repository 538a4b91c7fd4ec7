"""What every id stands for: the table that decoding, export and special tokens share, whatever the tokenizer's kind."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ernie45.errors import CheckpointError, RequestError

MAX_IDS = 1 << 22

_MARKER = re.compile(r"<[^<>\n]+>")


class AddedToken(NamedTuple):
    """A token that a checkpoint declares beside its vocabulary."""

    id: int
    text: str
    special: bool
    source: str
    """Where it is declared, for errors."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The bytes of every id, and which ids are special.

    A hole, an id that nothing stands behind, has no bytes.
    """

    data: tuple[bytes, ...]
    special: dict[str, int]
    """Text of every special token and its id."""
    drops_first_space: bool = False
    """Encoding puts a space before the text, so decoding drops it again."""
    drops_all_first_spaces: bool = False
    """Encoding trims the text, and decoding drops leading spaces, piece by piece."""
    kept_ids: frozenset[int] = frozenset()
    """Ids whose leading space is never dropped: byte pieces."""

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(self.special.values())

    @cached_property
    def max_text_bytes(self) -> int:
        """Bytes of the longest token that is not special."""
        return max((len(data) for idx, data in enumerate(self.data) if idx not in self.special_ids), default=0)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of an id. Raises: RequestError if there is no such id."""
        if not 0 <= token_id < len(self.data):
            raise RequestError(f"token id {token_id} is outside the vocabulary of {len(self.data)} ids")
        return self.data[token_id]


def is_marker(text: str) -> bool:
    """Whether a token is written like markup, `<..>`: text that only a template should produce."""
    return _MARKER.fullmatch(text) is not None


def special_tokens(added: Iterable[AddedToken], named: Iterable[str]) -> set[str]:
    """Return the texts that plain text must not produce: markers among `added`, and what has a role (bos, eos, ..)."""
    return {token.text for token in added if token.special or is_marker(token.text)} | set(named)


def place(texts: Sequence[str], added: Iterable[AddedToken]) -> list[str]:
    """Extend a vocabulary with its added tokens; holes become empty strings.

    Raises: CheckpointError if an added token contradicts the vocabulary or another one, or has an impossible id.
    """
    table = list(texts)
    ids = {text: idx for idx, text in enumerate(texts) if text}
    for token in sorted(added):
        if not 0 <= token.id < MAX_IDS:
            raise CheckpointError(
                f"{token.source}: added token {token.text!r} has the id {token.id}, expected 0 to {MAX_IDS - 1}"
            )
        if not token.text:
            raise CheckpointError(f"{token.source}: added token {token.id} is empty")
        table += [""] * (token.id + 1 - len(table))
        if table[token.id] not in ("", token.text) or ids.get(token.text, token.id) != token.id:
            other = ids.get(token.text, token.id)
            raise CheckpointError(
                f"{token.source}: added token {token.text!r} with the id {token.id} contradicts the vocabulary, where"
                f" that id is {table[token.id]!r} and the text has the id {other}"
            )
        table[token.id] = token.text
        ids[token.text] = token.id
    return table


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: the character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 characters stand for themselves; the other 68 bytes follow as U+0100, U+0101, ..
    Source: GPT-2's published encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + idx): byte for idx, byte in enumerate(others)}


def ids_by_text(table: Sequence[str], texts: Iterable[str]) -> dict[str, int]:
    """Return the ids of `texts`; texts without an id are left out."""
    wanted = set(texts)
    return {text: idx for idx, text in enumerate(table) if text in wanted and text}


def metadata_texts(table: Sequence[str]) -> list[str]:
    """Return the table with a unique name in every hole, as GGUF wants it."""
    return [text or f"[PAD{idx}]" for idx, text in enumerate(table)]


def role_ids(named: Mapping[str, str], ids: Mapping[str, int]) -> dict[str, int]:
    """Return the id of every role (`bos_token`, ..) whose token exists."""
    return {role: ids[text] for role, text in named.items() if text in ids}
