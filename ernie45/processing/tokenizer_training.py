"""Learn a vocabulary from text: SentencePiece BPE whose ids are laid out as in the published ERNIE 4.5 vocabulary.

    id                 token
    0, 1, 2            <unk> (padding, too), <s>, </s>
    3 .. 12            the digits 0 .. 9, never part of a longer token
    13 .. 268          the bytes, for characters that are not in the vocabulary; a line feed is 23
    269 ..             learnt pieces, first merged last; then single characters
    the last 21        `MARKERS`, in the published order

What a reference of the published vocabulary lists beyond that (1001 places in a picture, reserved ids) would fill a small
vocabulary with tokens that nothing writes, and is left out. Source: reference architecture 5.1 and 5.2.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.errors import ConfigError, NotFoundError
from ernie45.processing.files import ADDED, CONFIG, FORMAT_KEY, MODEL, SPECIAL_MAP, TEMPLATE
from ernie45.processing.formats import BEGIN, END_OF_SENTENCE, FORMATS, IM_END, IM_START
from ernie45.processing.sentencepiece_model import Piece, PieceType, SentencePieceModel
from ernie45.processing.vocabulary import MAX_IDS

Progress = Callable[[int, int], None]
"""Called with the bytes read and the bytes in all."""

DIGITS = tuple("0123456789")
MARKERS = (
    *(END_OF_SENTENCE, BEGIN),
    *("<mask:1>", "<mask:4>", "<mask:5>", "<mask:6>", "<mask:7>"),
    *(IM_START, IM_END, "<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"),
    *("<|IMAGE_PLACEHOLDER|>", "<|AUDIO_PLACEHOLDER|>"),
    *("<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>"),
)
"""Special tokens behind the learnt pieces. Text never encodes to them."""
ROLES = {
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": BEGIN,
    "sep_token": END_OF_SENTENCE,
    "mask_token": "<mask:1>",
}

_NUM_FIXED = 3 + len(DIGITS) + 256
# The library drops lines with U+2585 in silence, spells spaces as U+2581, and cannot hold a zero; the others end a line for
# it or stand for a boundary. None of them is ever part of a piece: their bytes are tokens.
_BOUNDARY = re.compile("[\0\t\n\r\u2581\u2585]+")
# It drops longer lines in silence, too, unless told otherwise, and counts places in a line with 16 bits.
_MAX_LINE_CHARS = 16384
_TOO_HIGH = re.compile(r"set it to a value <= (\d+)")
_TOO_LOW = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")

# Reference architecture 5.2; `formats.FORMATS["ernie"]` writes the same, for checkpoints without a template.
_ERNIE_TEMPLATE = (
    f"{{{{- '{BEGIN}' -}}}}"
    """
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- message['content'] + '\\n' -}}
    {%- elif message['role'] == 'user' -%}
        {{- 'User: ' + message['content'] + '\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'Assistant: ' + message['content'] + '"""
    f"{END_OF_SENTENCE}"
    """' -}}
    {%- else -%}
        {{- raise_exception('there is no role ' + message['role'] + ' in this format') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant: ' -}}
{%- endif -%}
"""
)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What is learnt, and for which conversations."""

    vocab_size: int
    """Ids in all, special tokens included: 291 or more."""
    character_coverage: float = 0.9995
    """Share of the text whose characters get an id of their own, 0.98 to 1; rarer ones are written as bytes."""
    chat_format: str = "ernie"
    """How conversations are written: a name of `formats.FORMATS`."""

    def __post_init__(self) -> None:
        lowest = _NUM_FIXED + len(MARKERS) + 1
        if not lowest <= self.vocab_size <= MAX_IDS:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}, expected {lowest} ({_NUM_FIXED} for bytes, digits and ends,"
                f" {len(MARKERS)} markers, 1 to learn) to {MAX_IDS}"
            )
        if not 0.98 <= self.character_coverage <= 1:
            raise ConfigError(f"character_coverage is {self.character_coverage}, expected 0.98 to 1")
        if self.chat_format not in FORMATS:
            raise ConfigError(f"chat_format is {self.chat_format!r}, known are {', '.join(FORMATS)}")


def read_lines(files: Sequence[str | Path], *, field: str, progress: Progress | None = None) -> Iterator[str]:
    """Give the lines of text files, and of .jsonl files the text (or each text of a list) in `field` of every row.

    Raises: NotFoundError for a missing file; ConfigError, with file and line, for what is no UTF-8, no row or no text.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise NotFoundError(f"there is no file {path}: give text files, or .jsonl files with a text per row")
    done, total = 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                where = f"{path}:{number}"
                text = _decoded(data, where)
                yield from _row_texts(text, field, where) if path.suffix == ".jsonl" else [text]
                done += len(data)
                if progress is not None:
                    progress(done, total)


def train_model(texts: Iterable[str], config: TokenizerConfig) -> SentencePieceModel:
    """Learn pieces; equal texts in equal order give an equal model.

    All text is held in memory, as the library does. Raises: ConfigError if the text is too little for the size of the
    vocabulary, or has too many different characters for it.
    """
    lines = list(_lines(texts))
    if not lines:
        raise ConfigError("there is no text to learn a vocabulary from: the files are empty")
    learnt = SentencePieceModel.parse(_learn(lines, config), "the trained vocabulary").pieces
    assert [piece.text for piece in learnt[3:13]] == list(DIGITS), "the library numbers its symbols in another order"
    markers = [Piece(text, 0.0, PieceType.CONTROL) for text in MARKERS]
    return SentencePieceModel.build(
        [*learnt, *markers],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        source="the trained vocabulary",
    )


def tokenizer_files(model: SentencePieceModel, chat_format: str) -> dict[str, bytes]:
    """Return the contents, by name, of a folder that `load_tokenizer` and programs for the published models read.

    The format "ernie" becomes a chat template, which other programs understand as well; of the others only the name is
    written, for `load_tokenizer`.
    """
    ids = {piece.text: idx for idx, piece in enumerate(model.pieces)}
    special = {text: ids[text] for text in (*dict.fromkeys(ROLES.values()), *MARKERS)}
    others = [text for text in MARKERS if text not in ROLES.values()]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config: dict[str, Any] = {
        **ROLES,
        "additional_special_tokens": others,
        "added_tokens_decoder": {str(idx): {"content": text, **flags} for text, idx in special.items()},
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
    }
    files = {
        MODEL: model.serialise(),
        SPECIAL_MAP: _json({**ROLES, "additional_special_tokens": others}),
        ADDED: _json(special),
    }
    if chat_format == "ernie":
        files[TEMPLATE] = _ERNIE_TEMPLATE.encode()
    else:
        config[FORMAT_KEY] = chat_format
    return {**files, CONFIG: _json(config)}


def _learn(lines: list[str], config: TokenizerConfig) -> bytes:
    from sentencepiece import SentencePieceTrainer  # only where a vocabulary is trained

    out = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type="bpe",
            vocab_size=config.vocab_size - len(MARKERS),
            character_coverage=config.character_coverage,
            byte_fallback=True,
            user_defined_symbols=list(DIGITS),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=4 * _MAX_LINE_CHARS,
            num_threads=1,  # the order of equally frequent pairs must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(_explained(str(error), config)) from error
    return out.getvalue()


def _explained(message: str, config: TokenizerConfig) -> str:
    if match := _TOO_HIGH.search(message):
        most = int(match[1]) + len(MARKERS)
        return (
            f"the text is too little for a vocabulary of {config.vocab_size} ids: give more text, or a vocab_size of at"
            f" most {most}"
        )
    if match := _TOO_LOW.search(message):
        least = int(match[1]) + len(MARKERS) + 1
        return (
            f"the text has too many different characters for a vocabulary of {config.vocab_size} ids: give a vocab_size"
            f" of at least {least}, or a character_coverage below {config.character_coverage}"
        )
    return f"the sentencepiece library cannot train this vocabulary: {message}"


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in _BOUNDARY.split(text):
            for start in range(0, len(line), _MAX_LINE_CHARS):
                yield line[start : start + _MAX_LINE_CHARS]


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not UTF-8: {error.reason} at byte {error.start}; convert the file first"
        ) from error


def _row_texts(line: str, field: str, where: str) -> list[str]:
    if not line.strip():
        return []
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    value = row.get(field) if isinstance(row, dict) else None
    found: list[Any] = value if isinstance(value, list) else [value]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        known = f"it has {', '.join(row)}" if isinstance(row, dict) else "it is no object"
        raise ConfigError(f"{where} has no text in the field {field!r}: {known}; choose another field")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise ConfigError(f"{where} holds half of a surrogate pair at character {error.start}") from error
    return texts


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
