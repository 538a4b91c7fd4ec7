"""The published models: every figure that is known, to the unit."""

from __future__ import annotations

import pytest

import ernie45
from ernie45.errors import NotFoundError


@pytest.mark.parametrize(
    ("name", "total", "with_mtp"),
    [
        ("0.3B", 360_748_032, 360_748_032),
        ("21B-A3B", 21_825_437_888, 21_948_655_808),
        ("300B-A47B", 299_484_163_264, 300_474_051_776),
        ("VL-28B-A3B", 29_399_294_336, 29_399_294_336),
        ("VL-424B-A47B", 423_526_285_184, 423_526_285_184),
    ],
)
def test_totals_are_the_published_ones(name: str, total: int, with_mtp: int) -> None:
    count = ernie45.count_parameters(ernie45.preset(name))
    assert (count.total, count.total_with_mtp) == (total, with_mtp)


def test_active_parameters_are_the_published_ones() -> None:
    active = ernie45.count_parameters(ernie45.preset("21B-A3B")).active
    assert round(active / 1e9, 3) == 3.352
    assert round((active - 103424 * 2560) / 1e9, 2) == 3.09
    assert round(ernie45.count_parameters(ernie45.preset("300B-A47B")).active / 1e9, 2) == 47.08


@pytest.mark.parametrize(
    ("name", "size"),
    [("0.3B", 18432), ("21B-A3B", 57344), ("VL-28B-A3B", 57344), ("300B-A47B", 221184), ("VL-424B-A47B", 221184)],
)  # fmt: skip
def test_cache_bytes_per_token(name: str, size: int) -> None:
    assert ernie45.preset(name).kv_bytes_per_token() == size


def test_vision_parts() -> None:
    assert ernie45.count_parameters(ernie45.preset("VL-28B-A3B")).vision == 630_433_280 + 144_225_280
    assert ernie45.count_parameters(ernie45.preset("VL-424B-A47B")).vision == 630_433_280 + 173_072_384


def test_ten_models_and_two_thinking_ones() -> None:
    names = list(ernie45.presets())
    assert len(names) == 12
    assert sum(name.endswith("-Thinking") for name in names) == 2
    assert sum(name.endswith("-Base") for name in names) == 5


@pytest.mark.parametrize(
    "spelling", ["21b-a3b", "ERNIE-4.5-21B-A3B-PT", "baidu/ERNIE-4.5-21B-A3B-Paddle", "ernie-4.5-21b-a3b"]
)
def test_spellings_of_a_name(spelling: str) -> None:
    assert ernie45.preset(spelling) is ernie45.presets()["ERNIE-4.5-21B-A3B"]


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(NotFoundError, match="did you mean ERNIE-4.5-21B-A3B"):
        ernie45.preset("erine-4.5-21b-a3b")
