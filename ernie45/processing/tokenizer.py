"""The tokenizer: a checkpoint's vocabulary, special tokens and chat format in one object.

    tokenizer = load_tokenizer("ERNIE-4.5-0.3B-PT")
    prompt = tokenizer.render([{"role": "user", "content": "Hello"}])
    ids = tokenizer.encode(prompt)

Special tokens come from templates alone. Text, whatever it spells, encodes to ordinary tokens: `encode("</s>")` is four
or five characters of text, while the `</s>` that a template wrote into a `RenderedPrompt` is token 2.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ernie45.errors import ConfigError, RequestError
from ernie45.processing import detokenizer
from ernie45.processing.answer_format import AnswerFormat, Start, told_answer_format
from ernie45.processing.backends import Backend, JsonBackend, SentencePieceBackend
from ernie45.processing.chat_template import ChatTemplate
from ernie45.processing.files import (
    CONFIG,
    DEFINITION,
    FORMAT_KEY,
    GENERATION,
    MODEL,
    TOKENIZER_FILES,
    Declarations,
    parse_json,
    read_declarations,
    read_files,
)
from ernie45.processing.formats import FORMATS, ChatFormat, Thinking
from ernie45.processing.gguf_vocab import bpe_metadata, sentencepiece_metadata
from ernie45.processing.messages import check_messages, check_tools
from ernie45.processing.prompt import MEDIA_MARKERS, RenderedPrompt, Segment, Shield, SpecialStrings
from ernie45.processing.vocabulary import Vocabulary, role_ids

_logger = logging.getLogger(__name__)

_PROMPT_END = 32
"""Ids at the end of a prompt that are enough to see a tag there, also one that is spelled out."""


def load_tokenizer(folder: str | Path, *, chat_format: str | None = None) -> "Tokenizer":
    """Load the tokenizer of a checkpoint.

    Args: folder: holds `tokenizer.model` (preferred) or `tokenizer.json`, and what else describes it. chat_format: a
        built-in format (`formats.FORMATS`) to use in place of the checkpoint's own chat template.
    Raises: NotFoundError if the folder has no vocabulary; CheckpointError for a damaged, inconsistent or unsupported
        file; ConfigError for an unknown `chat_format`.
    """
    return Tokenizer(read_files(folder), str(folder), chat_format)


class Tokenizer:
    """Made by `load_tokenizer`. Immutable, and safe to use from several threads."""

    def __init__(self, files: Mapping[str, bytes], folder: str, chat_format: str | None = None) -> None:
        """Build from file contents by name; `folder` names them in errors."""
        declared = read_declarations(files, folder)
        self._files = {name: data for name, data in files.items() if name in TOKENIZER_FILES}
        self._generation = files.get(GENERATION)
        self._backend = _load_backend(files, declared, folder)
        self.vocabulary: Vocabulary = self._backend.vocabulary
        self._special_strings = SpecialStrings({*self.special_tokens, *MEDIA_MARKERS})
        self._roles = role_ids(declared.named, self.special_tokens)
        _warn_about_missing(declared, self.special_tokens, folder)
        self._chosen_format = chat_format or declared.chat_format
        if self._chosen_format is not None and self._chosen_format not in FORMATS:
            raise ConfigError(f"chat_format is {self._chosen_format!r}, known are {', '.join(FORMATS)}")
        self._template = None
        if declared.templates and self._chosen_format is None:
            self._template = ChatTemplate(declared.templates, declared.named, declared.template_source)
        self._eos_ids = declared.eos_ids
        self.stop_ids: frozenset[int] = self._find_stop_ids(declared)

    @property
    def vocab_size(self) -> int:
        """Largest id plus one; the model may have more rows, for padding."""
        return len(self.vocabulary.data)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that plain text never produces, by their text."""
        return self.vocabulary.special

    @property
    def bos_id(self) -> int | None:
        """Id of the begin token."""
        return self._roles.get("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the end token."""
        return self._roles.get("eos_token")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token."""
        return self._roles.get("pad_token")

    @property
    def chat_format(self) -> str:
        """Name of the chat format: a built-in one, "chatml", or "custom" for a template of another kind."""
        return self._template.format_name if self._template else self._chosen_format or "ernie"

    @cached_property
    def answer_format(self) -> AnswerFormat:
        """The markup of answers, for `AnswerParser`."""
        if self._template is None:
            return told_answer_format(self.chat_format, "")
        return told_answer_format(self.chat_format, self._template.written_text, lends_tools=self._template.lends_tools)

    @property
    def thinking(self) -> Thinking:
        """Whether the model thinks before it answers; "optional" means that `render` decides."""
        return self._chat.thinking

    @property
    def capabilities(self) -> frozenset[str]:
        """What a conversation may ask for: "tools", "thinking"."""
        has = {"tools": self._chat.has_tools, "thinking": self.thinking != "never"}
        return frozenset(name for name, given in has.items() if given)

    def answer_start(self, prompt: Sequence[int]) -> Start:
        """Tell from the end of a prompt's ids where the answer starts."""
        end = [token_id for token_id in prompt[-_PROMPT_END:] if 0 <= token_id < self.vocab_size]  # padding rows
        return self.answer_format.start(self.decode(end, skip_special_tokens=False))

    @cached_property
    def answer_tag_ids(self) -> frozenset[int]:
        """Ids of the special tokens that mark up answers: a `Detokenizer` for `AnswerParser` keeps these."""
        return frozenset(self.special_tokens[tag] for tag in self.answer_format.tags if tag in self.special_tokens)

    @property
    def chat_template(self) -> str | None:
        """Source of the checkpoint's own template, None if there is none or a built-in format replaces it."""
        return next(iter(self._template.sources.values())) if self._template else None

    @property
    def fingerprint(self) -> str:
        """Digest of everything that behaviour depends on; equal tokenizers have equal fingerprints."""
        return self._fingerprint

    def __eq__(self, other: object) -> bool:
        """Whether both encode, decode and render alike."""
        return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def encode(self, text: str) -> list[int]:
        """Return the ids of text.

        Args: text: a `RenderedPrompt` gives special tokens where its template wrote them; plain text gives none. (Where
            the vocabulary has no byte pieces, a character it lacks becomes the unknown token.)
        Raises: RequestError if the text holds half of a surrogate pair.
        """
        segments = text.segments if isinstance(text, RenderedPrompt) else (Segment(text, False),)
        out: list[int] = []
        plain: list[str] = []
        at_start = True
        for segment in (*segments, Segment("", True)):
            token_id = self.special_tokens.get(segment.text) if segment.special else None
            if token_id is None and segment.text:
                plain.append(segment.text)  # media markers that nobody expanded are text, too
                continue
            out += self._encode_plain("".join(plain), at_start)
            plain.clear()
            at_start = False
            if token_id is not None:
                out.append(token_id)
        return out

    def least_tokens(self, text: str) -> int:
        """Fewest ids that `encode` can give for `text`, told by its length alone; 0 where the vocabulary does not say."""
        longest = self._backend.max_token_bytes
        if not longest:
            return 0
        segments = text.segments if isinstance(text, RenderedPrompt) else (Segment(text, False),)
        plain = (one.text for one in segments if not (one.special and one.text in self.special_tokens))
        return -(-sum(len(one.encode("utf-8", "surrogatepass")) for one in plain) // longest)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD.

        With `skip_special_tokens` every special token is left out, markers such as `</think>` included: a parser of
        answers wants those of `answer_tag_ids` (`Detokenizer`). Raises: RequestError for an id outside the vocabulary.
        """
        return detokenizer.decode(self, ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes an id stands for, for special tokens their text. Raises: RequestError for an unknown id."""
        return self.vocabulary.bytes_of(token_id)

    def token_str(self, token_id: int) -> str:
        """Return `token_bytes` as text, with U+FFFD for parts of characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> RenderedPrompt:
        """Write a conversation as the model was trained to read it.

        Args: messages: OpenAI's form, see `messages.py`. tools: function definitions. thinking: whether the model shall
            think first; None leaves it to the format. add_generation_prompt: open an assistant turn at the end; None does
            unless the final message is continued. continue_final_message: end right behind the text of the last
            message, an assistant's, for the model to go on with it (`AnswerFormat`'s start is "text" then).
        Raises: RequestError, with the index of the message, for what is malformed or what the format cannot express.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other: send one")
        checked, functions = check_messages(messages), check_tools(tools)
        takes_thoughts = self._template.takes_thoughts_apart if self._template else self.thinking != "never"
        if takes_thoughts:
            checked = [message.with_thought_apart() for message in checked]
        # A built-in format writes nothing but special strings and ASCII, which stand-ins never are.
        written = self._template.written_text if self._template else ""
        shield = Shield(self._special_strings, [[message.caller_values for message in checked], functions], written)
        shielded = [message.shielded(shield) for message in checked]
        if continue_final_message:
            shielded[-1] = shielded[-1].marked(shield.mark)
        opens = add_generation_prompt is not False and not continue_final_message
        text = self._chat.render(shielded, shield.value(functions), thinking, opens)
        return shield.reveal(_cut(text, shield.mark) if continue_final_message else text)

    def save(self, folder: str | Path) -> None:
        """Write the files from which `load_tokenizer` makes an equal tokenizer; creates the folder.

        The end ids that came from config.json go into generation_config.json, since config.json is the model's.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.saved_files().items():
            (folder / name).write_bytes(data)

    def saved_files(self) -> dict[str, bytes]:
        """The files that `save` writes, by name."""
        files = dict(self._files)
        if self._chosen_format is not None:
            config = parse_json(files.get(CONFIG, b"{}"), CONFIG) | {FORMAT_KEY: self._chosen_format}
            files[CONFIG] = json.dumps(config, ensure_ascii=False, indent=2).encode()
        if self._eos_ids:
            generation = parse_json(self._generation or b"{}", GENERATION)
            if set(_as_list(generation.get("eos_token_id"))) != self._eos_ids:
                generation["eos_token_id"] = sorted(self._eos_ids)
                files[GENERATION] = json.dumps(generation, ensure_ascii=False, indent=2).encode()
            elif self._generation is not None:
                files[GENERATION] = self._generation
        return files

    def gguf_metadata(self) -> dict[str, Any]:
        """Return the `tokenizer.*` metadata of a GGUF file. Raises: CheckpointError if GGUF knows no such kind."""
        if isinstance(self._backend, SentencePieceBackend):
            metadata = sentencepiece_metadata(self._backend)
        else:
            assert isinstance(self._backend, JsonBackend), "there are two backends"
            metadata = bpe_metadata(self._backend)
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        for role, name in names.items():
            if role in self._roles:
                metadata[f"tokenizer.ggml.{name}_token_id"] = self._roles[role]
        metadata["tokenizer.ggml.add_bos_token"] = False  # templates write their begin token themselves
        if self.chat_template is not None:
            metadata["tokenizer.chat_template"] = self.chat_template
        return metadata

    @property
    def _chat(self) -> ChatTemplate | ChatFormat:
        return self._template or FORMATS[self.chat_format]

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds half of a surrogate pair, {text[error.start]!r} at character {error.start}: send valid"
                " Unicode"
            ) from error
        return self._backend.encode(text, at_start=at_start)

    def _find_stop_ids(self, declared: Declarations) -> frozenset[int]:
        stop = self._chat.stop
        found = {self.eos_id, self.special_tokens.get(stop) if stop else None}
        return declared.eos_ids | {token_id for token_id in found if token_id is not None}

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in (MODEL, DEFINITION):
            if name in self._files and (name == MODEL or MODEL not in self._files):
                digest.update(self._files[name])
        behaviour = {
            "special": self.special_tokens,
            "roles": self._roles,
            "stop": sorted(self.stop_ids),
            "format": self.chat_format,
            "templates": self._template.sources if self._template else None,
            "size": self.vocab_size,
        }
        digest.update(json.dumps(behaviour, sort_keys=True).encode())
        digest.update(b"\0".join(self.vocabulary.data))
        return digest.hexdigest()


def _cut(text: str, mark: str) -> str:
    """Return what stands in front of the mark."""
    if text.count(mark) != 1:
        raise RequestError(
            f"continue_final_message: the chat template writes the last message {text.count(mark)} times, so where to go on"
            " cannot be told: leave it out"
        )
    return text.partition(mark)[0]


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _load_backend(files: Mapping[str, bytes], declared: Declarations, folder: str) -> Backend:
    named = [*declared.named.values(), *declared.additional]
    if MODEL in files:
        return SentencePieceBackend(files[MODEL], declared.added, named, str(Path(folder) / MODEL))
    return JsonBackend(files[DEFINITION], declared.added, named, str(Path(folder) / DEFINITION))


def _warn_about_missing(declared: Declarations, special: Mapping[str, int], folder: str) -> None:
    missing = [text for text in (*declared.named.values(), *declared.additional) if text and text not in special]
    if missing:
        _logger.warning(
            "%s declares %d special tokens that have no id, such as %r: they stay plain text",
            folder,
            len(missing),
            missing[0],
        )
