"""The configuration of data refuses what cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest

from ernie45.errors import ConfigError
from ernie45.training.data.config import DataConfig, SourceConfig

FILE = SourceConfig(path="a.jsonl")
HEAVY = SourceConfig(path="b.jsonl", weight=2.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"train": ()}, "train has no sources"),
        ({"packing": "best"}, "packing is 'best', did you mean 'best_fit'"),
        ({"long_rows": "rigth"}, "did you mean 'right'"),
        ({"thoughts": "lasst"}, "did you mean 'last'"),
        ({"chat_format": "ernie_v"}, "did you mean 'ernie_vl'"),
        ({"max_seq_len": 1}, "max_seq_len is 1 and buffer_rows 32, expected at least 2 and 1"),
        ({"buffer_rows": 0}, "buffer_rows 0"),
        ({"max_seq_len": 100, "max_prompt_len": 91}, "max_prompt_len is 91, expected 1 to max_seq_len - 10 = 90"),
        ({"max_prompt_len": 0}, "max_prompt_len is 0"),
        ({"split": (0.9, 0.2, 0.0)}, "expected three shares .* that sum to 1"),
        ({"split": (0.0, 0.5, 0.5)}, "train above 0"),
        ({"split": (1.2, -0.2, 0.0)}, "expected three shares"),
        ({"train": (FILE, HEAVY)}, "train: a.jsonl has no weight and others have"),
        ({"valid": (HEAVY, FILE)}, "valid: a.jsonl has no weight and others have"),
    ],
)
def test_what_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        DataConfig(**{"train": (FILE,)} | options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"path": ""}, "a source needs a path"),
        ({"path": "a", "weight": 0.0}, "weight of a is 0.0, expected a number above 0"),
        ({"path": "a", "weight": float("nan")}, "weight of a is nan"),
        ({"path": "a", "format": "jsonn"}, "format is 'jsonn', did you mean 'json'"),
        ({"path": "a", "text": "line"}, "text is 'line'"),
    ],
)
def test_which_sources_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        SourceConfig(**options)


def test_parts() -> None:
    config = DataConfig(train=(FILE,), split=(0.8, 0.2, 0.0))
    assert [config.share("train"), config.share("valid")] == [(0.0, 0.8), (0.8, 1.0)]
    with pytest.raises(ConfigError, match="there are no test rows: give split a share"):
        config.sources("test")
    assert DataConfig(train=(FILE,), valid=(HEAVY,)).share("valid") == (0.0, 1.0)
    assert DataConfig(train=(FILE,)).share("train") == (0.0, 1.0)
