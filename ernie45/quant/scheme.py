"""Which parameter is stored how: a scheme is an ordered table of rules, name pattern to packed format.

`wint8` and `wint4` have the published meaning (inference reference 2.2); `wint4-all` puts attention and dense layers
into 4 bits as well. Embedding and head keep 8 bits in groups of 64 everywhere: they decide directly over the next
token, and a scale per channel lost three times as much for 3 % less size (`docs/quantization.md`). What no rule names
(norms, bias vectors, routers, correction bias, the vision encoder) keeps its floating-point values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from ernie45.errors import CheckpointError, UsageError
from ernie45.kernels.packed import PackedFormat

SchemeName = Literal["wint8", "wint4", "wint4-all"]
SCHEMES: tuple[str, ...] = ("wint8", "wint4", "wint4-all")
DEFAULT_GROUP_4BIT, TABLE_GROUP = 64, 64

# Every matrix that may be packed, by its role; names are those of the network's parameters.
_EXPERTS = ("*.mlp.experts.*_proj", "*.mlp.vision_experts.*_proj")
_FEED_FORWARD = ("*.mlp.*_proj.weight",)  # dense layers and shared experts
_ATTENTION = ("*.self_attn.qkv_proj.weight", "*.self_attn.o_proj.weight")
_MTP = ("model.mtp_linear_proj.*.weight",)
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")

# A folder may come from anywhere: patterns stay simple, so that matching them stays cheap.
_PATTERN = re.compile(r"[\w.]*(\*[\w.]*){0,4}", re.ASCII)
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
        return [{"pattern": rule.pattern, "bits": rule.format.bits, "group": rule.format.group} for rule in self.rules]


def make_scheme(name: str, group_size: int | None = None) -> Scheme:
    """The scheme of that name.

    Args: name: `wint8`, `wint4` or `wint4-all`. group_size: columns that share a scale, of the 4-bit matrices, or with
            `wint8` of all; a multiple of 64, or 0 for one scale per output channel (embedding and head: 64). None: 64
            for 4 bits, 0 for 8 bits.
    Raises: UsageError for another name or group size.
    """
    if name not in SCHEMES:
        raise UsageError(f"scheme is {name!r}, expected one of {', '.join(SCHEMES)}")
    if group_size is not None and not (0 <= group_size <= _MAX_GROUP and group_size % 64 == 0):
        raise UsageError(f"group size is {group_size}, expected 0 (one scale per channel) or a multiple of 64")
    wide = PackedFormat(bits=8, group=group_size or 0 if name == "wint8" else 0)
    narrow = PackedFormat(bits=4, group=DEFAULT_GROUP_4BIT if group_size is None else group_size)
    experts = wide if name == "wint8" else narrow
    rest = narrow if name == "wint4-all" else wide
    tables = PackedFormat(bits=8, group=(group_size if name == "wint8" else None) or TABLE_GROUP)
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
    if not isinstance(rule, dict) or rule.keys() != {"pattern", "bits", "group"}:
        raise CheckpointError(f"{where}: a format is {str(rule)[:100]}, expected pattern, bits and group")
    pattern, bits, group = rule["pattern"], rule["bits"], rule["group"]
    if not isinstance(pattern, str) or len(pattern) > _MAX_PATTERN or not _PATTERN.fullmatch(pattern):
        raise CheckpointError(
            f"{where}: {str(pattern)[:100]!r} is no pattern: letters, digits, '_', '.', up to four '*'"
        )
    if (
        type(bits) is not int
        or bits not in (4, 8)
        or type(group) is not int
        or not 0 <= group <= _MAX_GROUP
        or group % 64
    ):
        raise CheckpointError(
            f"{where}: format of {pattern} has {bits!r} bits in groups of {group!r}: expected 4 or 8, and 0 or a "
            "multiple of 64"
        )
    return Rule(pattern=pattern, format=PackedFormat(bits=4 if bits == 4 else 8, group=group))
