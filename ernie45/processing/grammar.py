"""Constraints as token masks: which ids may come next, so that only satisfying answers can be written.

    grammars = Grammars(tokenizer)                          # one per tokenizer
    matcher = grammars.matcher(constraint, start="thought") # one per request
    matcher.mask(bits)                                      # before each token: bit i of word i // 32 allows id i
    matcher.accept(token)                                   # after it

The llguidance library does the work (Earley parser over derivatives of regular expressions, walked along the trie of
the vocabulary). Its tokenizer is built from the bytes of our ids, so masks are exact whatever kind the vocabulary is.
A thought, where the prompt or the model opens one, is part of the grammar: it is free text up to its closing tag, and
the constraint begins behind it, also where that is in the middle of a token.
"""

import json
import re
from collections import OrderedDict
from importlib.util import find_spec
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ernie45.errors import ConfigError, RequestError
from ernie45.processing.answer_format import AnswerFormat, Start
from ernie45.processing.constraint import Constraint, check_lark, is_gbnf
from ernie45.processing.vocabulary import Vocabulary

CACHED_GRAMMARS = 128

# One space, or a line break with indentation: enough for compact and for indented JSON. Without a bound, models that
# are unsure write white space until the token limit.
_WHITE_SPACE = {"whitespace_flexible": True, "whitespace_pattern": r" |\n[ ]{0,64}"}
# Where the grammar leaves one continuation, the library would allow one tokenization of it alone, which it asks a
# tokenizer for. Masks that follow from the bytes need none, and leave the choice to the model.
_OPTIONS = '%llguidance {"no_forcing": true}'


class AnswerTokenizer(Protocol):
    """What grammars need of a tokenizer."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every id."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    @property
    def answer_format(self) -> AnswerFormat:
        """The tags of answers."""
        ...


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, num_ids: int, stop_ids: frozenset[int], where: str) -> None:
        """Made by `Grammars.matcher`."""
        self.num_ids = num_ids
        """Size of the vocabulary."""
        self._matcher = matcher
        self._num_words = _words(num_ids)
        self._stop_ids = stop_ids
        self._where = where
        self._num_accepted = 0
        self._ended = False

    @property
    def complete(self) -> bool:
        """Whether the answer may end here: all of it satisfies the constraint."""
        return bool(self._matcher.is_accepting())

    @property
    def finished(self) -> bool:
        """Whether the answer has ended or has to end here: end it, be there an end token or not.

        Raises: RequestError if it broke off instead, see `mask`.
        """
        self._check()
        return self._ended or bool(self._matcher.is_stopped())

    def mask(self, bits: NDArray[np.int32]) -> None:
        """Write which ids may come next. Lets other threads run meanwhile.

        Args: bits: contiguous int32, one bit per id from the lowest up, at least as many as the vocabulary has; bits of
            padding rows become 0. End ids are allowed where the answer is complete. A row of a torch tensor will do
            (`row.numpy()`).
        Raises: RequestError if the grammar turns out too complex, or the vocabulary has no token to go on with.
        """
        assert not self._ended, "nothing follows an end token"
        self._check()
        if bits.dtype != np.int32 or bits.ndim != 1 or len(bits) < self._num_words or not bits.flags.c_contiguous:
            raise ValueError(
                f"bits is {bits.dtype} {bits.shape}, expected contiguous int32 with {self._num_words} or more"
            )
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, self._num_words * 4)
        self._check()
        bits[self._num_words :] = 0
        if not bits.any():
            raise RequestError(f"{self._where}: no token of the vocabulary continues the answer")

    def accept(self, token: int) -> bool:
        """Take the next token; False, and no change, if the grammar does not allow it."""
        if self._ended:
            return False
        if token in self._stop_ids:
            self._ended = self.complete
            self._num_accepted += self._ended
            return self._ended
        if not 0 <= token < self.num_ids or self._matcher.try_consume_tokens([token]) != 1:
            self._check()
            return False
        self._num_accepted += 1
        return True

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens."""
        assert 0 <= num_tokens <= self._num_accepted, f"{num_tokens} of {self._num_accepted} tokens taken back"
        self._num_accepted -= num_tokens
        if num_tokens and self._ended:
            self._ended = False
            num_tokens -= 1
        if num_tokens and not self._matcher.rollback(num_tokens):
            self._check()

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        reason = _reason(self._matcher.get_error())
        if reason == "NoExtensionBias":
            raise RequestError(f"{self._where}: no token of the vocabulary continues the answer")
        raise RequestError(
            f"{self._where} is too complex at token {self._num_accepted} of the answer: simplify it ({reason})"
        )


class Grammars:
    """Compiles constraints for one tokenizer, and keeps what was compiled last. Safe to use from several threads."""

    def __init__(self, tokenizer: AnswerTokenizer) -> None:
        """Prepare. Raises: ConfigError if the library is not installed."""
        if find_spec("llguidance") is None:
            raise ConfigError("structured output needs the llguidance library: pip install 'ernie45[structured]'")
        self._tokenizer = tokenizer
        self._library_tokenizer: Any = None
        self._compiled: OrderedDict[tuple[Constraint, Start], Any] = OrderedDict()
        self._lock = Lock()

    def matcher(self, constraint: Constraint, start: Start = "answer") -> Matcher:
        """Begin an answer.

        Args: start: where the prompt leaves the model (`AnswerFormat.start`); a thought goes unconstrained, but for end
            tokens and other special tokens.
        Raises: RequestError if the constraint is malformed, unsatisfiable, too large or uses what is not supported.
        """
        key = (constraint, start)
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is not None:
                self._compiled.move_to_end(key)
        if compiled is None:
            compiled = self._compile(constraint, start)
            with self._lock:
                self._compiled[key] = compiled
                if len(self._compiled) > CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
        vocabulary = self._tokenizer.vocabulary
        return Matcher(compiled.deep_copy(), len(vocabulary.data), self._tokenizer.stop_ids, constraint.where)

    def _compile(self, constraint: Constraint, start: Start) -> Any:
        from llguidance import LLMatcher

        with self._lock:
            if self._library_tokenizer is None:
                self._library_tokenizer = _library_tokenizer(self._tokenizer)
        grammar = grammar_source(constraint, start, self._tokenizer.answer_format, self._tokenizer.vocabulary)
        compiled = LLMatcher(self._library_tokenizer, grammar, log_level=0, limits=_limits())
        if compiled.is_error():
            raise RequestError(f"{constraint.where} cannot be used: {_reason(compiled.get_error())}")
        return compiled


def grammar_source(constraint: Constraint, start: Start, answer_format: AnswerFormat, vocabulary: Vocabulary) -> str:
    """Write the grammar of whole answers for the library: Lark, or JSON that holds several Lark grammars.

    Raises: RequestError if the format has no way to write what is asked for, or a grammar cannot be converted.
    """
    names = _TagNames(vocabulary)
    rules = ["NL: /\\n{1,2}/"]
    side: list[dict[str, str]] = []
    if constraint.kind == "tool_calls":
        if answer_format.tool_call is None:
            raise RequestError(
                "tool_choice or a strict tool constrains calls, but the model's chat format has no tool calls"
            )
        asked = json.loads(constraint.source)
        rules += _call_rules(asked, answer_format, names)
        answer = "calls"
        if constraint.leaves_text_free:
            answer, free = _text_and_calls(asked, answer_format, names)
            rules += free
        elif "otherwise" in asked:
            kind, source = asked["otherwise"]
            body, side = _body(Constraint(kind, source, constraint.where))
            rules.append(f"body: {body}")
            answer = f"(calls | {_response(start, answer_format, names)})"
    else:
        body, side = _body(constraint)
        rules.append(f"body: {body}")
        answer = _response(start, answer_format, names)
    thought = _thought(start, answer_format, names)
    rules += thought.rules
    lark = "\n".join([_OPTIONS, f"start: {thought.lead} {answer}", *rules])
    if not side:
        return lark
    return json.dumps({"grammars": [{"name": "answer", "lark_grammar": lark}, *side]})


class _TagNames:
    """How a grammar names a tag: by its id where it is a special token, else as text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._special = vocabulary.special

    def is_special(self, tag: str) -> bool:
        return tag in self._special

    def __call__(self, tag: str) -> str:
        return f"<[{self._special[tag]}]>" if tag in self._special else _literal(tag)


class _Thought:
    """What stands in front of the answer."""

    def __init__(self, lead: str, rules: list[str]) -> None:
        self.lead = lead
        self.rules = rules


def _thought(start: Start, answer_format: AnswerFormat, names: _TagNames) -> _Thought:
    if start in ("answer", "text") or answer_format.thought is None:
        return _Thought("", [])
    opening, closing = answer_format.thought
    if names.is_special(closing):
        rules = [f"thought: TEXT {names(closing)}", "TEXT: /(.|\\n)*/"]
    else:
        escaped = re.escape(closing).replace("/", "\\/")
        rules = [f"thought[lazy]: /(.|\\n)*{escaped}/"]
    # The newlines behind a thought do not belong to the answer; the parser drops them.
    return _Thought("thought NL?" if start == "thought" else f"({names(opening)} thought NL?)?", rules)


def _response(start: Start, answer_format: AnswerFormat, names: _TagNames) -> str:
    if answer_format.response is None:
        return "body"
    opening, closing = map(names, answer_format.response)
    # One newline in front of the closing tag is the tag's, more would be the body's (`answer_parser.py`).
    end = f'body "\\n"? {closing} NL?'
    if start == "text":  # the prompt holds the opening tag
        return end
    wrapped = f"{opening} NL? {end}"
    # Tags spelled as text could be part of the body, too: then they are not optional.
    return f"(body | {wrapped})" if names.is_special(answer_format.response[0]) else wrapped


def _body(constraint: Constraint) -> tuple[str, list[dict[str, str]]]:
    """The constraint proper as the right side of a rule, and the grammars that it refers to."""
    match constraint.kind:
        case "json":
            return _json_rule(json.loads(constraint.source)), []
        case "choice":
            return " | ".join(map(_literal, json.loads(constraint.source))), []
        case "regex":
            from llguidance import regex_to_lark

            # ASCII alone for \d, \w and \s, as in JSON Schema and in what most people mean.
            return f"/{regex_to_lark(constraint.source, 'dws')}/".replace("\x7f", "\\x7f"), []
    text = constraint.source
    if is_gbnf(text):
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            text = any_to_lark(text).removeprefix("%llguidance {}")
        except Exception as error:  # the library's own error derives from Exception alone, and there are others
            raise RequestError(f"{constraint.where} is no GBNF grammar: {error}") from error
        check_lark(text, constraint.where)
    return "@body", [{"name": "body", "lark_grammar": f"{_OPTIONS}\n{text}"}]


def _call_rules(asked: dict[str, Any], answer_format: AnswerFormat, names: _TagNames) -> list[str]:
    """Calls as the templates write them, so that the model sees what it was trained on."""
    assert answer_format.tool_call is not None, "checked by the caller"
    opening, closing = map(names, answer_format.tool_call)
    functions = asked["functions"]
    rules = [
        f"calls: NL? call{' (NL call)*' if asked['parallel'] else ''} NL?",
        f"call: {opening} called",
        f'called: "\\n" ({" | ".join(f"call_{i}" for i in range(len(functions)))}) "\\n" {closing}',
    ]
    for i, (name, schema) in enumerate(functions.items()):
        head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
        rules += [f'call_{i}: {_literal(head)} arguments_{i} "}}"', f"arguments_{i}: {_json_rule(schema)}"]
    return rules


def _text_and_calls(asked: dict[str, Any], answer_format: AnswerFormat, names: _TagNames) -> tuple[str, list[str]]:
    """Free text in which the tag that opens a call is followed by a call. The right side of a rule, and further rules.

    The parser reads text, so the tag opens a call also where it is spelled out: free text never holds it.
    """
    assert answer_format.tool_call is not None, "checked by the caller"
    tag = answer_format.tool_call[0]
    spelled = re.escape(tag).replace("/", "\\/")
    rules = [f"FREE: /(.|\\n)+/ & ~/(.|\\n)*{spelled}(.|\\n)*/"]
    # Tags of the response are part of the text; special tokens have to be named, since no expression matches them.
    others = [names(other) for other in answer_format.response or () if names.is_special(other)]
    text = f"(FREE? ({' | '.join(others)}))* " if others else ""
    if names.is_special(tag):
        until = f"FREE? {names(tag)}"
    else:
        until = "until_call"
        rules.append(f"until_call[lazy]: /(.|\\n)*{spelled}/")
    return f"({text}{until} called){'*' if asked['parallel'] else '?'} {text}FREE?", rules


def _json_rule(schema: dict[str, Any]) -> str:
    return f"%json {_literal({**schema, 'x-guidance': _WHITE_SPACE})}"


def _literal(value: Any) -> str:
    """A value as JSON, which is also how Lark writes text. The library's lexer stumbles over a bare delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _limits() -> Any:
    """Effort per grammar and per token.

    It is counted in steps of the library and not in seconds, so that a refusal does not depend on the machine's load. By
    the speeds that the library states this is some 20 ms for a grammar's expressions and 15 ms per token.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_grammar_size=200_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        # The library's own 2,000 is what an object with 500 optional properties takes (json_schema.MAX_PROPERTIES).
        max_items_in_row=4_000,
        verbose_errors=False,
    )


def _library_tokenizer(tokenizer: AnswerTokenizer) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    stop_ids = sorted(i for i in tokenizer.stop_ids if i < len(tokenizer.vocabulary.data))
    return LLTokenizer(TokenizerWrapper(_LibraryVocabulary(tokenizer.vocabulary, stop_ids)), eos_token=stop_ids)


class _LibraryVocabulary:
    """Our vocabulary as the library reads it."""

    def __init__(self, vocabulary: Vocabulary, stop_ids: list[int]) -> None:
        if not stop_ids:
            raise ConfigError("structured output needs a tokenizer with an end token")
        self.tokens = vocabulary.data
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = None
        self.special_token_ids = sorted({*vocabulary.special_ids, *stop_ids})

    def __call__(self, text: bytes) -> list[int]:
        """Encode forced text, which `_OPTIONS` rules out; the library asks all the same whether this can be called."""
        return []


def _words(num_ids: int) -> int:
    return (num_ids + 31) // 32


def _reason(message: str) -> str:
    """The part of the library's message that tells a user something."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["unknown reason"]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    reason = re.sub(r"^(at )?\d+\(\d+\): |failed to compile JSON schema: ", "", reason)
    if "coerce_one_of" in reason:
        return "oneOf is supported only where its alternatives visibly exclude each other: use anyOf"
    return reason.rstrip(":")
