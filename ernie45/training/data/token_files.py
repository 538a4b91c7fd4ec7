"""Token files: a folder with documents that are tokenised already, read through memory maps.

    tokens.bin    every document's ids behind each other, uint16 or uint32, little-endian
    offsets.bin   int64: where each document begins in tokens.bin, and its end
    index.json    version, dtype, counts, digest, and which tokenizer wrote the ids

No begin or end tokens are stored: whether documents have them is up to the run that reads them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ernie45.checkpoint.atomic import atomic_folder
from ernie45.errors import CheckpointError, ConfigError, RequestError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training.data.sources import digest_of

INDEX, TOKENS, OFFSETS = "index.json", "tokens.bin", "offsets.bin"
FORMAT, VERSION = "ernie45 tokens", 1
_NUMBERS = ("num_documents", "num_tokens", "vocab_size")
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class TokenFiles:
    """Documents of a folder of token files."""

    def __init__(self, path: Path) -> None:
        """Map the files and check every number. Raises: CheckpointError for a damaged or unknown folder."""
        self.path = path
        self._index, self._digest = _read_index(path)
        dtype = _DTYPES[self._index["dtype"]]
        documents, tokens = self._index["num_documents"], self._index["num_tokens"]
        self._tokens = _mapped(path / TOKENS, dtype, tokens)
        self._offsets = _mapped(path / OFFSETS, np.dtype("<i8"), documents + 1)
        if self._offsets[0] != 0 or self._offsets[-1] != tokens or (np.diff(self._offsets) < 0).any():
            raise CheckpointError(
                f"{path / OFFSETS} is damaged: offsets must rise from 0 to {tokens}; tokenise the text again"
            )

    @property
    def digest(self) -> str:
        """See `Source`: of the index, which holds the tokens' own digest."""
        return self._digest

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def origin(self, idx: int) -> str:
        """See `Source`; documents count from 1, as lines do."""
        return f"{self.path}:{idx + 1}"

    def read(self, idx: int) -> Mapping[str, Any]:
        """See `Source`: a view of the map, uint16 or uint32."""
        ids = self._ids(idx)
        if len(ids) and int(ids.max()) >= self._index["vocab_size"]:
            raise RequestError(f"token {int(ids.max())} lies outside the vocabulary of {self._index['vocab_size']}")
        return {"ids": ids}

    def row_digest(self, idx: int) -> bytes:
        """See `Source`."""
        return digest_of(self._ids(idx).astype("<u4").tobytes())

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises: ConfigError unless `tokenizer` wrote these ids."""
        if self._index["tokenizer"] != tokenizer.fingerprint:
            raise ConfigError(
                f"{self.path} was written with another tokenizer ({self._index['tokenizer'][:12]}, this one is"
                f" {tokenizer.fingerprint[:12]}): tokenise the text again with the model that is trained"
            )

    def _ids(self, idx: int) -> npt.NDArray[Any]:
        return self._tokens[self._offsets[idx] : self._offsets[idx + 1]]


def write_token_files(
    folder: Path, documents: Iterable[Sequence[int]], tokenizer: Tokenizer, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write documents as they come; the folder appears when all are written.

    Returns: the index. Raises: CheckpointError if the folder is there already; ConfigError without any document.
    """
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    offsets = array("q", [0])
    digest = hashlib.sha256()
    with atomic_folder(folder, overwrite=overwrite) as partial:
        with (partial / TOKENS).open("wb") as file:
            for ids in documents:
                data = np.asarray(ids, dtype=_DTYPES[dtype]).tobytes()
                digest.update(data)
                file.write(data)
                offsets.append(offsets[-1] + len(ids))
        if len(offsets) == 1:
            raise ConfigError(f"there is no document to write to {folder}")
        (partial / OFFSETS).write_bytes(np.asarray(offsets, dtype="<i8").tobytes())
        index = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype,
            "num_documents": len(offsets) - 1,
            "num_tokens": offsets[-1],
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint,
            "sha256": digest.hexdigest(),
        }
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return index


def _read_index(path: Path) -> tuple[dict[str, Any], str]:
    try:
        data = (path / INDEX).read_bytes()
        index = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / INDEX} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no folder of token files: `ernie data tokenize` writes them")
    if index.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {index.get('version')!r}, this release reads {VERSION}")
    if index.get("dtype") not in _DTYPES:
        raise CheckpointError(f"{path} has the dtype {index.get('dtype')!r}, known are {', '.join(_DTYPES)}")
    for name in _NUMBERS:
        value = index.get(name)
        if type(value) is not int or value < (1 if name != "num_tokens" else 0):
            raise CheckpointError(f"{path / INDEX} has {name} {value!r}, expected a number")
    for name in ("tokenizer", "sha256"):
        if not isinstance(index.get(name), str):
            raise CheckpointError(f"{path / INDEX} has {name} {index.get(name)!r}, expected a digest")
    return index, hashlib.blake2b(data, digest_size=16).hexdigest()


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    wanted = count * dtype.itemsize
    found = path.stat().st_size if path.exists() else -1
    if found != wanted:
        what = f"has {found} bytes" if found >= 0 else "is missing"
        raise CheckpointError(f"{path} {what}, expected {wanted}: copy or tokenise it again")
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype=dtype)
