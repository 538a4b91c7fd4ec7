"""The two kinds of tokenizer behind one interface: SentencePiece models and tokenizer.json files.

A backend encodes plain text and nothing else; it cannot produce special tokens. Those exist in its `Vocabulary` only,
and `Tokenizer` puts them where a template wrote them.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from ernie45.errors import CheckpointError
from ernie45.processing.files import parse_json
from ernie45.processing.prompt import special_pattern, split
from ernie45.processing.sentencepiece_model import SPACE, Piece, PieceType, SentencePieceModel
from ernie45.processing.vocabulary import (
    MAX_IDS,
    AddedToken,
    Vocabulary,
    byte_alphabet,
    ids_by_text,
    is_marker,
    place,
    special_tokens,
)


class Backend(Protocol):
    """A vocabulary and the way to split plain text into it."""

    vocabulary: Vocabulary
    texts: list[str]
    """Every id as its file spells it; empty for holes."""

    @property
    def max_token_bytes(self) -> int | None:
        """Bytes of text that an ordinary token stands for at most; None where text may change or be dropped on its way."""
        ...

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Split text that holds valid Unicode; `at_start` says whether it begins the prompt."""
        ...


class SentencePieceBackend:
    """A `tokenizer.model`, split by the sentencepiece library."""

    def __init__(self, data: bytes, added: Sequence[AddedToken], named: Collection[str], source: str) -> None:
        """Load a model whose markers were made unreachable for text. Raises: CheckpointError."""
        model = SentencePieceModel.parse(data, source)
        self.texts = place([piece.text for piece in model.pieces], added)
        special = {piece.text for piece in model.pieces if _is_special(piece)} | special_tokens(added, named)
        special -= {piece.text for piece in model.pieces if piece.type is PieceType.BYTE}
        special_ids = ids_by_text(self.texts, special)
        self.pieces = [*model.pieces, *(_added_piece(text, special) for text in self.texts[len(model.pieces) :])]
        self.vocabulary = Vocabulary(
            data=tuple(_piece_bytes(piece, piece.text in special_ids) for piece in self.pieces),
            special=special_ids,
            drops_first_space=model.add_dummy_prefix or model.remove_extra_whitespaces,
            drops_all_first_spaces=model.remove_extra_whitespaces,
            kept_ids=frozenset(idx for idx, piece in enumerate(model.pieces) if piece.byte is not None),
        )
        self.adds_space_prefix = model.add_dummy_prefix
        self.trims_spaces = model.remove_extra_whitespaces
        self._model = model.with_control([idx for idx in special_ids.values() if idx < len(model.pieces)])
        self._source = source
        self._processor = _load_sentencepiece(self._model, source)
        ordinary = self.texts[len(model.pieces) :]
        self._ordinary = {
            text: idx for idx, text in enumerate(ordinary, len(model.pieces)) if text and text not in special
        }
        # SentencePiece spells spaces as U+2581, so that character itself would come back as a space. Where there are
        # byte pieces it is written as its bytes.
        byte_ids = {piece.byte: idx for idx, piece in enumerate(model.pieces) if piece.byte is not None}
        self._space_mark = [byte_ids[byte] for byte in SPACE.encode()] if byte_ids else None
        self._pattern = special_pattern([*self._ordinary, *([SPACE] if byte_ids else [])])
        self._keeps_text = bool(byte_ids) and not (model.remove_extra_whitespaces or model.rewrites)

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """See `Backend`."""
        out: list[int] = []
        for part in split(text, self._pattern):
            if not part.special:
                processor = self._processor if at_start and not out else self._inner_processor
                out += processor.encode(part.text)
            elif part.text == SPACE and self._space_mark is not None:
                out += self._space_mark
            else:
                out.append(self._ordinary[part.text])
        return out

    @cached_property
    def max_token_bytes(self) -> int | None:
        """See `Backend`."""
        return self.vocabulary.max_text_bytes if self._keeps_text else None

    @cached_property
    def _inner_processor(self) -> Any:
        if not self._model.add_dummy_prefix:
            return self._processor
        return _load_sentencepiece(self._model.without_dummy_prefix(), self._source)


_CACHED_WORDS = 2048
"""Words whose pieces the library remembers, on every thread. Its own number is 10,000: a few megabytes of words, but 40 MB
where nothing splits a text into words and whole texts of up to 256 characters are kept. 2048 cost 15 % of the time of encoding
English text."""


class JsonBackend:
    """A `tokenizer.json` with a BPE model, split by the tokenizers library."""

    def __init__(self, data: bytes, added: Sequence[AddedToken], named: Collection[str], source: str) -> None:
        """Load the tokenizer without its special tokens. Raises: CheckpointError."""
        self.definition = _check_definition(parse_json(data, source), source)
        model = self.definition["model"]
        vocab: dict[str, int] = model["vocab"]
        self.texts = place(_ordered(vocab, source), added)
        special = special_tokens(added, named)
        if isinstance(model.get("unk_token"), str):
            special.add(model["unk_token"])
        special_ids = ids_by_text(self.texts, special)
        self.added = {token.text: token.id for token in added}
        style = _decoder_style(self.definition.get("decoder"), source)
        literal = self.added.keys() | special_ids.keys()
        self.byte_level = style.byte_level
        self.vocabulary = Vocabulary(
            data=tuple(text.encode() if text in literal else style.spell(text) for text in self.texts),
            special=special_ids,
            drops_first_space=style.drops_first_space,
        )
        self._tokenizer = _plain_tokenizer(self.definition, special_ids, source)
        self._tokenizer.model._resize_cache(_CACHED_WORDS)
        # The library would give added tokens new ids once special ones among them are missing, so text is cut at them
        # here.
        self._ordinary = {
            token.text: token.id for token in added if token.text not in special_ids and token.text not in vocab
        }
        self._pattern = special_pattern(self._ordinary)
        self._keeps_text = style.byte_level and _keeps_text(self.definition)

    @cached_property
    def max_token_bytes(self) -> int | None:
        """See `Backend`."""
        return self.vocabulary.max_text_bytes if self._keeps_text else None

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """See `Backend`; whether a space is put first is up to the normaliser in the file."""
        out: list[int] = []
        for part in split(text, self._pattern):
            if part.special:
                out.append(self._ordinary[part.text])
            else:
                # Of the library's calls this one lets other threads run, and it leaves out what only offsets need.
                out += self._tokenizer.encode_batch_fast([part.text], add_special_tokens=False)[0].ids
        return out


def _keeps_text(definition: Mapping[str, Any]) -> bool:
    """Whether every byte of a text ends up in a token of a byte-level vocabulary."""
    stripping = any(token.get("lstrip") or token.get("rstrip") for token in definition.get("added_tokens") or [])
    whole = definition["model"]["vocab"].keys() >= byte_alphabet().keys()
    return (
        definition.get("normalizer") is None and _only_cuts(definition.get("pre_tokenizer")) and whole and not stripping
    )


def _only_cuts(pre_tokenizer: object) -> bool:
    """Whether a pre-tokenizer spells every byte of a text, each in its place."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": list(steps)}:
            pass
        case _:
            steps = [pre_tokenizer]
    kept = [step for step in steps if isinstance(step, dict) and step.get("behavior") != "Removed"]
    kinds = {step.get("type") for step in kept}
    return len(kept) == len(steps) and "ByteLevel" in kinds and kinds <= {"ByteLevel", "Digits", "Split"}


class _DecoderStyle(NamedTuple):
    """How pieces of a tokenizer.json spell text."""

    byte_level: bool
    byte_fallback: bool = False
    drops_first_space: bool = False

    def spell(self, text: str) -> bytes:
        """Return the bytes of a piece."""
        if self.byte_level:
            try:
                return bytes(_BYTE_OF[char] for char in text)
            except KeyError:  # no byte-level spelling: the library then takes the text as it is
                return text.encode()
        kind = PieceType.BYTE if self.byte_fallback and _BYTE_PIECE.fullmatch(text) else PieceType.NORMAL
        return _piece_bytes(Piece(text, 0.0, kind), literal=False)


_BYTE_OF = byte_alphabet()
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def _is_special(piece: Piece) -> bool:
    # Digits and runs of spaces are user-defined too: they are ordinary text with a token of their own.
    return piece.type in (PieceType.CONTROL, PieceType.UNKNOWN) or (
        piece.type is PieceType.USER_DEFINED and is_marker(piece.text)
    )


def _added_piece(text: str, special: Collection[str]) -> Piece:
    if not text:
        return Piece("", 0.0, PieceType.UNUSED)
    return Piece(text, 0.0, PieceType.CONTROL if text in special else PieceType.USER_DEFINED)


def _piece_bytes(piece: Piece, literal: bool) -> bytes:
    if piece.byte is not None:
        return bytes([piece.byte])
    return (piece.text if literal else piece.text.replace(SPACE, " ")).encode()


def _load_sentencepiece(model: SentencePieceModel, source: str) -> Any:
    from sentencepiece import SentencePieceProcessor  # only where such a model is used

    try:
        return SentencePieceProcessor(model_proto=model.serialise())
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{source} is refused by the sentencepiece library: {error}") from error


def _check_definition(definition: object, source: str) -> dict[str, Any]:
    model = definition.get("model") if isinstance(definition, dict) else None
    if not isinstance(definition, dict) or not isinstance(model, dict):
        raise CheckpointError(f"{source} is no tokenizer definition: it has no 'model' object")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise CheckpointError(f"{source} has a model of type {kind!r}, only 'BPE' is supported")
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise CheckpointError(f"{source} uses {field}, which is not supported")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not all(type(idx) is int for idx in vocab.values()):
        raise CheckpointError(f"{source}: model.vocab must be an object of ids")
    if not isinstance(merges, list) or not all(merge_parts(merge) for merge in merges):
        raise CheckpointError(f"{source}: model.merges must be a list of pairs")
    return definition


def merge_parts(merge: object) -> tuple[str, str] | None:
    """Return the two sides of a merge, written as 'a b' or as ['a', 'b']."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts):
        return parts[0], parts[1]
    return None


def _ordered(vocab: dict[str, int], source: str) -> list[str]:
    if not vocab:
        raise CheckpointError(f"{source} has an empty vocabulary")
    size = max(vocab.values()) + 1
    if size > MAX_IDS or min(vocab.values()) < 0:
        raise CheckpointError(f"{source} has ids from {min(vocab.values())} to {size - 1}, expected 0 to {MAX_IDS - 1}")
    table = [""] * size
    for text, idx in vocab.items():
        if table[idx] or not text:
            raise CheckpointError(f"{source} gives the id {idx} to {table[idx]!r} and to {text!r}")
        table[idx] = text
    return table


def _decoder_style(decoder: object, source: str) -> _DecoderStyle:
    steps = _decoder_steps(decoder, source)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _DecoderStyle(byte_level=True)
    drops = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
                pass
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                drops = True
            case _:
                raise CheckpointError(
                    f"{source} has a decoder with the step {step.get('type')!r}, supported are ByteLevel, or Replace"
                    " (of U+2581 by a space), ByteFallback, Fuse and Strip (of one leading space)"
                )
    if "Replace" not in kinds:
        raise CheckpointError(f"{source} has a decoder without a Replace step for spaces")
    return _DecoderStyle(byte_level=False, byte_fallback="ByteFallback" in kinds, drops_first_space=drops)


def _decoder_steps(decoder: object, source: str) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{source} has no decoder, so its pieces cannot be turned into text")
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f"{source} has a malformed decoder")
    return steps


def _plain_tokenizer(definition: dict[str, Any], special: Collection[str], source: str) -> Any:
    """Build the library's tokenizer so that no text, however normalised or merged, yields a special token."""
    from tokenizers import Tokenizer  # only where such a file is used

    model = definition["model"]
    unknown = model.get("unk_token")
    hidden = {text for text in special if text in model["vocab"] and text != unknown}
    # A name that no text can take: spaces are never part of a byte-level piece, nor of one that spells them as U+2581.
    vocab = {f" {text}" if text in hidden else text: idx for text, idx in model["vocab"].items()}
    pairs = [pair for pair in map(merge_parts, model["merges"]) if pair is not None]
    plain = {
        **definition,
        "model": {
            **model,
            "type": "BPE",
            "dropout": None,
            "vocab": vocab,
            "merges": [list(pair) for pair in pairs if not hidden & {*pair, "".join(pair)}],
        },
        "added_tokens": [
            token
            for token in definition.get("added_tokens") or []
            if token["content"] not in special and token["content"] in vocab
        ],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    try:
        return Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{source} is refused by the tokenizers library: {error}") from error
