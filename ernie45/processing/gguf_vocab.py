"""Vocabularies of GGUF files: from their metadata to the files that `load_tokenizer` reads, and back.

Two kinds are known, as llama.cpp names them: `llama`, a SentencePiece vocabulary with scores, and `gpt2`, byte-level
BPE with merges and one of the pre-tokenizers below. Source: the GGUF specification; the patterns are those that the
models' publishers put into their tokenizer.json files.
"""

import json
from collections.abc import Mapping
from typing import Any

from ernie45.errors import CheckpointError
from ernie45.processing.backends import JsonBackend, SentencePieceBackend, merge_parts
from ernie45.processing.files import CONFIG, DEFINITION, GENERATION, MODEL
from ernie45.processing.sentencepiece_model import Piece, PieceType, SentencePieceModel
from ernie45.processing.vocabulary import is_marker, metadata_texts

_SOURCE = "the GGUF vocabulary"
_PREFIX = "tokenizer.ggml."
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split_then_bytes(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, _BYTE_LEVEL | {"use_regex": False}]}


_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
    "qwen2": _split_then_bytes("|".join((_CONTRACTIONS, _WORDS, r"\p{N}", _REST))),
    "llama-bpe": _split_then_bytes("|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _REST))),
}
_ALIASES = {"default": "gpt-2"}


def tokenizer_files_from_gguf(metadata: Mapping[str, object]) -> dict[str, bytes]:
    """Return the tokenizer files (content by name) that say what a GGUF file's metadata says.

    Args: metadata: key to value, arrays as lists (or NumPy arrays).
    Raises: CheckpointError for a missing or malformed entry, and for a kind of vocabulary that is not known.
    """
    kind = metadata.get(f"{_PREFIX}model")
    if kind == "gpt2":
        files = {DEFINITION: _bpe_definition(metadata)}
    elif kind == "llama":
        files = {MODEL: _sentencepiece_model(metadata)}
    else:
        raise CheckpointError(f"{_SOURCE} is of the kind {kind!r}, known are 'gpt2' and 'llama'")
    files[CONFIG] = _config(metadata)
    eot = metadata.get(f"{_PREFIX}eot_token_id")
    if eot is not None:
        ends = {_token_id(metadata, name) for name in ("eos", "eot") if f"{_PREFIX}{name}_token_id" in metadata}
        files[GENERATION] = _dump({"eos_token_id": sorted(ends)})
    return files


def sentencepiece_metadata(backend: SentencePieceBackend) -> dict[str, Any]:
    """Return the `llama` metadata of a SentencePiece vocabulary."""
    return {
        f"{_PREFIX}model": "llama",
        f"{_PREFIX}tokens": metadata_texts([piece.text for piece in backend.pieces]),
        f"{_PREFIX}scores": [piece.score for piece in backend.pieces],
        f"{_PREFIX}token_type": [int(piece.type) for piece in backend.pieces],
        f"{_PREFIX}add_space_prefix": backend.adds_space_prefix,
        f"{_PREFIX}remove_extra_whitespaces": backend.trims_spaces,
    }


def bpe_metadata(backend: JsonBackend) -> dict[str, Any]:
    """Return the `gpt2` metadata of a byte-level BPE vocabulary. Raises: CheckpointError if GGUF knows no such kind."""
    if not backend.byte_level:
        raise CheckpointError("this tokenizer.json is no byte-level BPE: GGUF takes it from the tokenizer.model only")
    merges = [pair for pair in map(merge_parts, backend.definition["model"]["merges"]) if pair is not None]
    return {
        f"{_PREFIX}model": "gpt2",
        f"{_PREFIX}pre": _pre_name(backend.definition.get("pre_tokenizer")),
        f"{_PREFIX}tokens": metadata_texts(backend.texts),
        f"{_PREFIX}token_type": [int(_type_of(text, backend)) for text in backend.texts],
        f"{_PREFIX}merges": [" ".join(pair) for pair in merges],
        f"{_PREFIX}add_space_prefix": False,
    }


def _type_of(text: str, backend: JsonBackend) -> PieceType:
    if not text:
        return PieceType.UNUSED
    if text in backend.vocabulary.special:
        return PieceType.CONTROL
    return PieceType.USER_DEFINED if text in backend.added else PieceType.NORMAL


def _pre_name(pre_tokenizer: object) -> str:
    wanted = _canonical(pre_tokenizer)
    for name, known in _PRE_TOKENIZERS.items():
        if _canonical(known) == wanted:
            return name
    raise CheckpointError(
        f"GGUF needs the name of the pre-tokenizer, known are {', '.join(_PRE_TOKENIZERS)}, not this one"
    )


def _canonical(pre_tokenizer: object) -> object:
    """Return a pre-tokenizer without what has no effect on ids."""
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    if pre_tokenizer.get("type") == "Sequence":
        return [_canonical(step) for step in pre_tokenizer.get("pretokenizers", [])]
    cleaned = {"use_regex": True} if pre_tokenizer.get("type") == "ByteLevel" else {}
    return cleaned | {key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}


def _bpe_definition(metadata: Mapping[str, object]) -> bytes:
    pre = metadata.get(f"{_PREFIX}pre", "default")
    name = _ALIASES.get(pre, pre) if isinstance(pre, str) else None
    if name not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{_SOURCE} has the pre-tokenizer {pre!r}, known are {', '.join([*_PRE_TOKENIZERS, *_ALIASES])}"
        )
    tokens = _texts(metadata, "tokens")
    types = _types(metadata, len(tokens))
    vocab = {text: idx for idx, text in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(text for idx, text in enumerate(tokens) if vocab[text] != idx)
        raise CheckpointError(f"{_SOURCE} has the token {twice!r} twice")
    added = [
        {
            "id": idx,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind is PieceType.CONTROL,
        }
        for idx, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (PieceType.CONTROL, PieceType.USER_DEFINED)
    ]
    return _dump(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": _PRE_TOKENIZERS[str(name)],
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                # Llama 3 looks whole words up before it merges; its merges alone do not reach all of them.
                "ignore_merges": name == "llama-bpe",
                "vocab": vocab,
                "merges": _merges(metadata),
            },
        }
    )


def _sentencepiece_model(metadata: Mapping[str, object]) -> bytes:
    tokens = _texts(metadata, "tokens")
    types = _types(metadata, len(tokens))
    scores = _array(metadata, "scores")
    if len(scores) != len(tokens) or not all(isinstance(score, int | float) for score in scores):
        raise CheckpointError(
            f"{_SOURCE} has {len(scores)} scores for {len(tokens)} tokens, expected a number for each"
        )
    pieces = [Piece(text, float(score), kind) for text, score, kind in zip(tokens, scores, types, strict=True)]
    model = SentencePieceModel.build(
        pieces,
        add_dummy_prefix=_flag(metadata, "add_space_prefix", default=True),
        remove_extra_whitespaces=_flag(metadata, "remove_extra_whitespaces", default=False),
        source=_SOURCE,
    )
    return model.serialise()


def _config(metadata: Mapping[str, object]) -> bytes:
    tokens = _texts(metadata, "tokens")
    types = _types(metadata, len(tokens))
    config: dict[str, Any] = {"add_bos_token": False, "add_eos_token": False}
    for name, role in _ROLES.items():
        if f"{_PREFIX}{name}_token_id" in metadata:
            config[role] = tokens[_token_id(metadata, name)]
    config["additional_special_tokens"] = [
        text
        for text, kind in zip(tokens, types, strict=True)
        if kind is PieceType.CONTROL or (kind is PieceType.USER_DEFINED and is_marker(text))
    ]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise CheckpointError(f"{_SOURCE}: tokenizer.chat_template must be text, not {type(template).__name__}")
        config["chat_template"] = template
    return _dump(config)


def _dump(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, indent=1).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{_SOURCE} holds text that is no valid Unicode: {error.reason}") from error


def _array(metadata: Mapping[str, object], name: str) -> list[Any]:
    value = metadata.get(_PREFIX + name)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple):
        raise CheckpointError(f"{_SOURCE} lacks the array {_PREFIX}{name}")
    return list(value)


def _texts(metadata: Mapping[str, object], name: str) -> list[str]:
    texts = _array(metadata, name)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise CheckpointError(f"{_SOURCE}: {_PREFIX}{name} must hold texts that are not empty")
    return texts


def _types(metadata: Mapping[str, object], num_tokens: int) -> list[PieceType]:
    types = _array(metadata, "token_type")
    if len(types) != num_tokens or not all(isinstance(kind, int) and 1 <= kind <= 6 for kind in types):
        raise CheckpointError(
            f"{_SOURCE}: {_PREFIX}token_type must hold a number from 1 to 6 for each of {num_tokens} tokens"
        )
    return [PieceType(kind) for kind in types]


def _merges(metadata: Mapping[str, object]) -> list[list[str]]:
    merges = [merge_parts(merge) for merge in _array(metadata, "merges")]
    if None in merges:
        raise CheckpointError(f"{_SOURCE}: {_PREFIX}merges[{merges.index(None)}] is no pair of tokens")
    return [list(pair) for pair in merges if pair is not None]


def _flag(metadata: Mapping[str, object], name: str, *, default: bool) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{_SOURCE}: {_PREFIX}{name} is {value!r}, expected true or false")
    return value


def _token_id(metadata: Mapping[str, object], name: str) -> int:
    value = metadata[f"{_PREFIX}{name}_token_id"]
    num_tokens = len(_array(metadata, "tokens"))
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_tokens:
        raise CheckpointError(f"{_SOURCE}: {_PREFIX}{name}_token_id is {value!r}, expected 0 to {num_tokens - 1}")
    return value
