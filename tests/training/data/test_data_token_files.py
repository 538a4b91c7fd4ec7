"""Token files: what is written is read, and a damaged folder is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45.errors import CheckpointError, ConfigError, RequestError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training.data.config import SourceConfig
from ernie45.training.data.sources import open_source
from ernie45.training.data.token_files import TokenFiles, write_token_files

DOCUMENTS = [[5, 6, 300], [], [7], list(range(200))]


@pytest.fixture
def folder(tmp_path: Path, ernie: Tokenizer) -> Path:
    write_token_files(tmp_path / "t", DOCUMENTS, ernie)
    return tmp_path / "t"


def test_there_and_back(folder: Path, ernie: Tokenizer) -> None:
    source = open_source(SourceConfig(path=str(folder)))
    assert isinstance(source, TokenFiles)
    assert [source.read(idx)["ids"].tolist() for idx in range(len(source))] == DOCUMENTS
    assert source.origin(2) == f"{folder}:3"
    index = json.loads((folder / "index.json").read_text())
    assert (index["dtype"], index["num_documents"], index["num_tokens"]) == ("uint16", 4, 204)
    assert (folder / "tokens.bin").stat().st_size == 408
    assert np.fromfile(folder / "offsets.bin", "<i8").tolist() == [0, 3, 3, 4, 204]
    source.check_tokenizer(ernie)
    assert len({source.row_digest(idx) for idx in range(4)}) == 4


def test_large_vocabularies_take_four_bytes(tmp_path: Path, ernie: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", property(lambda self: 103_424))
    index = write_token_files(tmp_path / "t", [[100_000, 1]], ernie)
    assert index["dtype"] == "uint32"
    assert TokenFiles(tmp_path / "t").read(0)["ids"].tolist() == [100_000, 1]


def test_another_tokenizer_is_refused(folder: Path, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    with pytest.raises(ConfigError, match="written with another tokenizer .*: tokenise the text again"):
        TokenFiles(folder).check_tokenizer(tokenizer_of("chatml"))


def test_nothing_is_left_of_a_failure(tmp_path: Path, ernie: Tokenizer) -> None:
    def documents() -> Any:
        yield [1]
        raise RequestError("no")

    with pytest.raises(RequestError):
        write_token_files(tmp_path / "t", documents(), ernie)
    with pytest.raises(ConfigError, match="no document"):
        write_token_files(tmp_path / "t", [], ernie)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_allowed(folder: Path, ernie: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        write_token_files(folder, [[1]], ernie)
    write_token_files(folder, [[1]], ernie, overwrite=True)
    assert len(TokenFiles(folder)) == 1


def change(folder: Path, **values: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | values))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"format": "other"}, "no folder of token files"),
        ({"version": 2}, "has version 2, this release reads 1"),
        ({"dtype": "int8"}, "has the dtype 'int8', known are uint16, uint32"),
        ({"dtype": "uint32"}, "tokens.bin has 408 bytes, expected 816"),
        ({"num_tokens": 100}, "tokens.bin has 408 bytes, expected 200"),
        ({"num_tokens": -1}, "num_tokens -1, expected a number"),
        ({"num_documents": 5}, "offsets.bin has 40 bytes, expected 48"),
        ({"num_documents": True}, "num_documents True"),
        ({"vocab_size": "320"}, "vocab_size '320'"),
        ({"tokenizer": None}, "tokenizer None, expected a digest"),
    ],
)
def test_every_number_of_the_index_is_checked(folder: Path, values: dict[str, object], reason: str) -> None:
    change(folder, **values)
    with pytest.raises(CheckpointError, match=reason):
        TokenFiles(folder)


@pytest.mark.parametrize("offsets", [[1, 3, 3, 4, 204], [0, 3, 2, 4, 204], [0, 3, 3, 4, 203], [0, -1, 3, 4, 204]])
def test_offsets_that_do_not_rise_to_the_end(folder: Path, offsets: list[int]) -> None:
    np.asarray(offsets, "<i8").tofile(folder / "offsets.bin")
    with pytest.raises(CheckpointError, match="offsets.bin is damaged: offsets must rise from 0 to 204"):
        TokenFiles(folder)


def test_tokens_outside_of_the_vocabulary_and_missing_files(folder: Path) -> None:
    change(folder, vocab_size=300)
    source = TokenFiles(folder)
    with pytest.raises(RequestError, match="token 300 lies outside the vocabulary of 300"):
        source.read(0)
    (folder / "tokens.bin").unlink()
    with pytest.raises(CheckpointError, match="tokens.bin is missing"):
        TokenFiles(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match="index.json cannot be read"):
        TokenFiles(folder)
