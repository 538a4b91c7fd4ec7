"""Which parameter is stored how: a scheme is an ordered table of rules, name pattern to packed format.

`wint8` and `wint4` have the published meaning (inference reference 2.2); `wint4-all` puts attention and dense layers
into 4 bits as well. Embedding and head keep 8 bits everywhere: they decide directly over the next token. Matrices of 8
bits meet activations of 16 and share a scale per 64 columns: with activations of 8 bits or a scale per channel they lost
several times as much (`docs/quantization.md`). What no rule names (norms, bias vectors, routers, correction bias, the
vision encoder) keeps its floating-point values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from ernie45.errors import CheckpointError, ShapeError, UsageError
from ernie45.kernels.packed import GROUP, HALF, PackedFormat

SchemeName = Literal["wint8", "wint4", "wint4-all"]
SCHEMES: tuple[str, ...] = ("wint8", "wint4", "wint4-all")
DEFAULT_GROUP = 64

# Every matrix that may be packed, by its role; names are those of the network's parameters.
_EXPERTS = ("*.mlp.experts.*_proj", "*.mlp.vision_experts.*_proj")
_FEED_FORWARD = ("*.mlp.*_proj.weight",)  # dense layers and shared experts
_ATTENTION = ("*.self_attn.qkv_proj.weight", "*.self_attn.o_proj.weight")
_MTP = ("model.mtp_linear_proj.*.weight",)
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")

# A folder may come from anywhere: patterns stay simple, so that matching them stays cheap.
_PATTERN = re.compile(r"[\w.]*(\*[\w.]*){0,4}", re.ASCII)
_FORMAT_KEYS = ("bits", "group", "activation_bits")
_MAX_PATTERN, _MAX_RULES, _MAX_GROUP = 200, 64, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Parameters whose name matches `pattern` (`*` stands for anything) are stored in `format`."""

    pattern: str
    format: PackedFormat


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A named table of rules; the first that matches counts."""

    name: str
    rules: tuple[Rule, ...]

    def format_of(self, parameter: str) -> PackedFormat | None:
        """The format of a parameter of the network; None if it keeps its floating-point values."""
        return next((rule.format for rule in self.rules if fnmatchcase(parameter, rule.pattern)), None)

    def to_json(self) -> list[dict[str, Any]]:
        """The rules as `config.json` holds them."""
        return [
            {"pattern": rule.pattern, **{key: getattr(rule.format, key) for key in _FORMAT_KEYS}} for rule in self.rules
        ]


def make_scheme(name: str, group_size: int | None = None) -> Scheme:
    """The scheme of that name.

    Args: name: `wint8`, `wint4` or `wint4-all`. group_size: columns that share a scale, of the 4-bit matrices, or with
            `wint8` of all; a multiple of 64, 0 for one scale per output channel (embedding and head: 64), or 32 for a
            scale and a minimum per 32 columns of the 4-bit matrices. None: 64, but 32 for 4-bit matrices that are no
            routed experts: they see every token, and are a small part of a mixture's weights.
    Raises: UsageError for another name or group size.
    """
    if name not in SCHEMES:
        raise UsageError(f"scheme is {name!r}, expected one of {', '.join(SCHEMES)}")
    group = DEFAULT_GROUP if group_size is None else group_size
    with_minima = group == HALF and name != "wint8"
    if not with_minima and not (0 <= group <= _MAX_GROUP and group % GROUP == 0):
        raise UsageError(
            f"group size is {group}, expected 0 (one scale per channel), a multiple of 64, or for 4 bits 32 (a scale and "
            "a minimum)"
        )
    wide = PackedFormat(bits=8, group=group if name == "wint8" else DEFAULT_GROUP, activation_bits=16)
    experts = wide if name == "wint8" else PackedFormat(bits=4, group=group)
    rest = PackedFormat(bits=4, group=HALF if group_size is None else group) if name == "wint4-all" else wide
    tables = replace(wide, group=wide.group or DEFAULT_GROUP)
    table = [(_EXPERTS, experts), (_FEED_FORWARD, rest), (_ATTENTION, rest), (_MTP, rest), (_TABLES, tables)]
    return Scheme(
        name=name, rules=tuple(Rule(pattern=p, format=format) for patterns, format in table for p in patterns)
    )


def scheme_from_json(name: object, rules: object, where: str) -> Scheme:
    """A scheme as a checkpoint states it. Raises: CheckpointError for anything that `to_json` would not write."""
    if not isinstance(name, str) or not isinstance(rules, list) or len(rules) > _MAX_RULES:
        raise CheckpointError(f"{where}: expected the name of a scheme and at most {_MAX_RULES} formats")
    return Scheme(name=name[:100], rules=tuple(_rule(rule, where) for rule in rules))


def _rule(rule: object, where: str) -> Rule:
    if not isinstance(rule, dict) or rule.keys() != {"pattern", *_FORMAT_KEYS}:
        raise CheckpointError(f"{where}: a format is {str(rule)[:100]}, expected pattern, {', '.join(_FORMAT_KEYS)}")
    pattern = rule["pattern"]
    if not isinstance(pattern, str) or len(pattern) > _MAX_PATTERN or not _PATTERN.fullmatch(pattern):
        raise CheckpointError(
            f"{where}: {str(pattern)[:100]!r} is no pattern: letters, digits, '_', '.', up to four '*'"
        )
    values = {key: rule[key] for key in _FORMAT_KEYS}
    if not all(type(value) is int and abs(value) <= _MAX_GROUP for value in values.values()):
        raise CheckpointError(f"{where}: format of {pattern} is {str(values)[:100]}, expected whole numbers")
    try:
        return Rule(pattern=pattern, format=PackedFormat(**values))
    except ShapeError as error:
        raise CheckpointError(f"{where}: format of {pattern}: {error}") from error
