"""Files of rows: every row found again by its number, and named by its line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ConfigError, NotFoundError, RequestError
from ernie45.training.data.config import SourceConfig
from ernie45.training.data.sources import Source, Subset, open_source


def opened(path: Path, **options: Any) -> Source:
    return open_source(SourceConfig(path=str(path), **options))


def rows_of(source: Source) -> list[Any]:
    return [source.read(idx) for idx in range(len(source))]


def origins(source: Source) -> list[str]:
    return [Path(source.origin(idx)).name for idx in range(len(source))]


def test_json_lines_are_numbered_with_the_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes('\ufeff{"text": "ä"}\r\n\n   \n{"text": "b"}\n{"text": "c"}'.encode())
    source = opened(path)
    assert rows_of(source) == [{"text": "ä"}, {"text": "b"}, {"text": "c"}]
    assert origins(source) == ["r.jsonl:1", "r.jsonl:4", "r.jsonl:5"]
    assert source.read(2) == {"text": "c"}, "in any order"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "no JSON: Expecting property name .* at character 3"),
        (b'["a"]', "the row is a JSON list, expected an object"),
        (b'{"text": "\xff"}', "no UTF-8: byte 0xff at byte 10 of the row"),
        (b"[" * 100_000, "no JSON that can be read"),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    source = opened(tmp_path / "r.jsonl")
    assert source.read(0) == {"text": "a"}
    with pytest.raises(RequestError, match=reason):
        source.read(1)


def test_a_json_array_knows_its_lines(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('[\n{"a": 1}, {"b":\n[2]},\n\n{"c": 3}\n]\n')
    source = opened(tmp_path / "r.json")
    assert rows_of(source) == [{"a": 1}, {"b": [2]}, {"c": 3}]
    assert origins(source) == ["r.json:2", "r.json:2", "r.json:5"]
    (tmp_path / "r.json").write_text("[ 5 ]")
    with pytest.raises(RequestError, match="the row is a JSON int"):
        opened(tmp_path / "r.json").read(0)
    (tmp_path / "r.json").write_text("[]")
    assert len(opened(tmp_path / "r.json")) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1}\n{"a": 2}', r"r.json:1: expected '\[' of a JSON array, found '{'; is it jsonl\?"),
        ('[{"a": 1}\n{"a": 2}]', "r.json:2: expected ',' of a JSON array"),
        ('[{"a": 1},\n{"a" 2}]', "r.json:2 is no JSON"),
        ('[{"a": 1},\n', "r.json:2 is no JSON"),
        ('[{"a": 1}', "r.json:1: expected ',' of a JSON array, found the end"),
        ('[{"a": 1}]\n\n{}', "r.json:3: '{' stands behind the end"),
        ("", "found the end of the file"),
    ],
)
def test_what_is_no_json_array(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        opened(tmp_path / "r.json")


def test_text_by_files_and_by_paragraphs(tmp_path: Path) -> None:
    text = "\n\nfirst\nline two\n \n\nsecond\r\nwindows\n\n"
    (tmp_path / "b.txt").write_bytes(text.encode())
    whole = opened(tmp_path / "b.txt")
    assert rows_of(whole) == [{"text": "\n\nfirst\nline two\n \n\nsecond\nwindows"}]
    assert origins(whole) == ["b.txt:1"]
    paragraphs = opened(tmp_path / "b.txt", text="paragraph")
    assert rows_of(paragraphs) == [{"text": "first\nline two"}, {"text": "second\nwindows"}]
    assert origins(paragraphs) == ["b.txt:3", "b.txt:7"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    folder = opened(tmp_path)
    assert origins(folder) == ["x.txt:1", "b.txt:1"]
    assert folder.read(0) == {"text": "x"}


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.text(alphabet="ab \n\r\tä", max_size=6), max_size=12), end=st.booleans())
def test_spans_are_what_splitting_gives(lines: list[str], end: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = "\n".join(lines) + "\n" * end
    path = tmp_path_factory.mktemp("spans") / "t.txt"
    path.write_bytes(text.encode())
    kept: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            kept[-1].append(line)
        elif kept[-1]:
            kept.append([])
    expected = ["\n".join(group).replace("\r\n", "\n") for group in kept if group]
    found = [row["text"] for row in rows_of(opened(path, text="paragraph"))]
    assert [text.rstrip("\r") for text in found] == [text.rstrip("\r") for text in expected]


def test_formats_are_told_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.data"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=r"ends in '.data', known are .jsonl, .json, .txt, .parquet: say what it is"):
        opened(path)
    assert rows_of(opened(path, format="jsonl")) == [{"text": "a"}]
    assert rows_of(opened(path, format="text")) == [{"text": '{"text": "a"}'}]
    with pytest.raises(NotFoundError, match="there is no .*missing.jsonl"):
        opened(tmp_path / "missing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no .txt file"):
        opened(tmp_path / "empty")


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.txt"])
def test_a_digest_follows_every_byte(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[{"a": 1}]\n')
    first = opened(tmp_path / name).digest
    assert opened(tmp_path / name).digest == first
    (tmp_path / name).write_text('[{"a": 2}]\n')
    assert opened(tmp_path / name).digest != first


def test_subsets_share_rows_out_by_content(tmp_path: Path) -> None:
    rows = [{"text": f"row {idx % 900}"} for idx in range(1000)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "r.json").write_text(json.dumps(rows))
    for name in ("r.jsonl", "r.json"):
        source = opened(tmp_path / name)
        parts = [Subset(source, share) for share in ((0.0, 0.7), (0.7, 0.9), (0.9, 1.0))]
        texts = [[part.read(idx)["text"] for idx in range(len(part))] for part in parts]
        assert sorted(text for part in texts for text in part) == sorted(row["text"] for row in rows)
        assert not set(texts[0]) & set(texts[1]), "equal rows stay together"
        assert abs(len(texts[0]) - 700) < 50
        assert abs(len(texts[1]) - 200) < 50
        numbers = [int(part.origin(idx).rsplit(":", 1)[1]) for part in parts for idx in range(len(part))]
        assert len(set(numbers)) == (1000 if name == "r.jsonl" else 1)
        assert len({part.digest for part in parts}) == 3
        assert parts[0].row_digest(0) == source.row_digest(rows.index({"text": texts[0][0]}))


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"src": [f"q{idx}"], "tgt": [f"a{idx}"], "system": None if idx % 2 else "S"} for idx in range(25)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet", row_group_size=4)
    source = opened(tmp_path / "r.parquet")
    assert len(source) == 25
    for idx in (24, 3, 0, 4, 11, 19, 23, 3):
        wanted = {key: value for key, value in rows[idx].items() if value is not None}
        assert source.read(idx) == wanted
        assert source.origin(idx).endswith(f"r.parquet:{idx + 1}")
    assert len({source.row_digest(idx) for idx in range(25)}) == 25
    before = source.digest
    parquet.write_table(pa.Table.from_pylist(rows[:-1]), tmp_path / "r.parquet")
    assert opened(tmp_path / "r.parquet").digest != before
    (tmp_path / "bad.parquet").write_text("nothing")
    with pytest.raises(ConfigError, match=r"bad.parquet is no parquet file"):
        opened(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="`pip install pyarrow`, or write the rows as .jsonl"):
        opened(tmp_path / "r.parquet")
