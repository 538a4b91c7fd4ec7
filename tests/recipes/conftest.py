"""Poems in the public domain, typed in, and a package file as npm packs it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

RECORDS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "tang": [
        {"title": "靜夜思", "author": "李白", "paragraphs": ["床前明月光，疑是地上霜。", "舉頭望明月，低頭思故鄉。"]},
        {"title": "登鸛雀樓", "author": "王之渙", "paragraphs": ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"]},
        {"title": "楓橋夜泊", "author": "張繼", "paragraphs": ["月落烏啼霜滿天，江楓漁火對愁眠。", "姑蘇城外寒山寺，夜半鐘聲到客船。"]},
        {
            "title": "山居秋暝",
            "author": "王維",
            "paragraphs": [
                "空山新雨後，天氣晚來秋。",
                "明月松間照，清泉石上流。",
                "竹喧歸浣女，蓮動下漁舟。",
                "隨意春芳歇，王孫自可留。",
            ],
        },
        {
            "title": "登高",
            "author": "杜甫",
            "paragraphs": [
                "風急天高猿嘯哀，渚清沙白鳥飛迴。",
                "無邊落木蕭蕭下，不盡長江滾滾來。",
                "萬里悲秋常作客，百年多病獨登臺。",
                "艱難苦恨繁霜鬢，潦倒新停濁酒杯。",
            ],
        },
    ],
    "song": [
        {"title": "題西林壁", "author": "蘇軾", "paragraphs": ["橫看成嶺側成峰，遠近高低各不同。", "不識廬山真面目，只緣身在此山中。"]},
        {"title": "句", "author": "某", "paragraphs": ["□□千山外，孤舟一夜歸。"]},
    ],
}  # fmt: skip


@pytest.fixture
def make_package(tmp_path: Path) -> Callable[..., Path]:
    """Writes a .tgz with records where that package has them, and things beside them that are no poems."""

    def make(records: Mapping[str, Sequence[Mapping[str, Any]]] = RECORDS) -> Path:
        path = tmp_path / "package.tgz"
        members = {f"package/dist/quantangshi/poet.{name}.0.json": json.dumps(some) for name, some in records.items()}
        others = ("package.json", "dist/quantangshi/authors.tang.json", "dist/quantangshi/error/poet.tang.0.json")
        members |= {f"package/{other}": "no poems" for other in (*others, "dist/strains/json/poet.tang.0.json")}
        with tarfile.open(path, "w:gz") as archive:
            for name, text in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
        return path

    return make


@pytest.fixture
def poem_records() -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """The records of the package by dynasty."""
    return RECORDS
