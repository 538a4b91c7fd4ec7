"""From files of rows to packed rows of tokens: sources, row formats, chat encoding, order, packing."""

from ernie45.training.data.config import DataConfig, SourceConfig
from ernie45.training.data.methods import kto_rows, preference_rows, pretrain_rows, sft_rows
from ernie45.training.data.pairs import KtoExample, PreferencePair
from ernie45.training.data.prefetch import Prefetch
from ernie45.training.data.report import DataReport
from ernie45.training.data.rows import BadRow, Conversation, KtoRow, PreferenceRow
from ernie45.training.data.stream import PackedRows

__all__ = [
    "BadRow",
    "Conversation",
    "DataConfig",
    "DataReport",
    "KtoExample",
    "KtoRow",
    "PackedRows",
    "PreferencePair",
    "PreferenceRow",
    "Prefetch",
    "SourceConfig",
    "kto_rows",
    "preference_rows",
    "pretrain_rows",
    "sft_rows",
]
