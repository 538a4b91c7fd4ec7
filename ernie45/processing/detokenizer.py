"""Token ids to text, all at once or as they arrive.

Text is the concatenation of the bytes of all ids, read as UTF-8 with U+FFFD for what is no UTF-8. A character can
spread over several ids; what is incomplete waits for the next id.
"""

import codecs
from collections.abc import Collection, Iterable
from typing import Protocol

from ernie45.processing.vocabulary import Vocabulary


class HasVocabulary(Protocol):
    """What the detokenizer needs of a tokenizer."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every id."""
        ...


class Detokenizer:
    """Turns one sequence of ids into text, id by id; the pieces add up to what `decode` makes of the whole sequence."""

    def __init__(
        self, tokenizer: HasVocabulary, skip_special_tokens: bool = True, keep: Collection[int] = frozenset()
    ) -> None:
        """Start a sequence. Special tokens are left out, but for those in `keep`, or written as their text."""
        self._vocabulary = tokenizer.vocabulary
        self._skipped = self._vocabulary.special_ids - set(keep) if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = self._vocabulary.drops_first_space

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is certain now. Raises: RequestError for an unknown id."""
        return self._decoder.decode(self._bytes(token_id))

    def finish(self) -> str:
        """End the sequence and return what was held back."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        vocabulary = self._vocabulary
        data = vocabulary.bytes_of(token_id)
        special = token_id in vocabulary.special_ids
        if token_id in self._skipped:
            return b""
        if not self._at_start or not data:
            return data
        # The space that encoding puts before the text comes off again.
        strip = not special and data.startswith(b" ") and token_id not in vocabulary.kept_ids
        data = data[1:] if strip else data
        self._at_start = vocabulary.drops_all_first_spaces and not data
        return data


def decode(tokenizer: HasVocabulary, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    """Return the text of a whole sequence."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    return "".join([*map(detokenizer.push, ids), detokenizer.finish()])
