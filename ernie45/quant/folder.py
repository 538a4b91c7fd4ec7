"""A packed checkpoint folder: what its `config.json` states, and its tensors, mapped from disk or dequantized.

The folder looks like any other: `config.json`, safetensors shards with their index, tokenizer. `quantization_config`
there holds `{"quant_method": "ernie45", "version": 1, "scheme": name, "formats": [{"pattern", "bits", "group",
"activation_bits"}], "tool": version of this package, "calibration": what statistics came from, or null}`. Tensors carry
the names of the network's parameters: `X.packed` (uint8, kernel layout, 64-byte aligned) and `X.scales` (float16) for a
packed one, `X` for any other. See docs/quantization.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie45 import __version__
from ernie45.checkpoint.index import open_folder
from ernie45.checkpoint.layout import Part, Stored
from ernie45.checkpoint.safetensors import TensorEntry, map_tensor, read_tensor
from ernie45.checkpoint.source import LoadAccount, Source
from ernie45.config.reader import load_config_json, parse_config
from ernie45.errors import CheckpointError
from ernie45.kernels.packed import PackedMatrix
from ernie45.quant.plan import SCALES, WEIGHTS, PackedParameter, packing_plan
from ernie45.quant.scheme import Scheme, scheme_from_json

QUANT_METHOD, FORMAT_VERSION = "ernie45", 1
ALIGNMENT = 64
_KEYS = {"quant_method", "version", "scheme", "formats", "tool", "calibration"}
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class PackedStatement:
    """What `quantization_config` says."""

    scheme: Scheme
    tool: str
    calibration: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The content of `quantization_config`."""
        return {
            "quant_method": QUANT_METHOD,
            "version": FORMAT_VERSION,
            "scheme": self.scheme.name,
            "formats": self.scheme.to_json(),
            "tool": self.tool,
            "calibration": self.calibration,
        }

    @classmethod
    def from_json(cls, stated: object, where: str) -> PackedStatement:
        """Raises: CheckpointError for anything but what `to_json` writes."""
        if not isinstance(stated, dict) or stated.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(f"{where}: no quantization_config of quant_method {QUANT_METHOD!r}")
        if stated.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{where}: packed format version {str(stated.get('version'))[:20]}, ernie45 {__version__} reads "
                f"version {FORMAT_VERSION}: quantize the model again, or use the version that wrote it"
            )
        if stated.keys() != _KEYS:
            raise CheckpointError(f"{where}: quantization_config has {sorted(stated)}, expected {sorted(_KEYS)}")
        if not isinstance(stated["tool"], str) or not isinstance(stated["calibration"], dict | None):
            raise CheckpointError(f"{where}: tool must be a text and calibration an object or null")
        scheme = scheme_from_json(stated["scheme"], stated["formats"], where)
        return cls(scheme=scheme, tool=stated["tool"][:100], calibration=stated["calibration"])


class PackedSource(Source):
    """A packed folder. `read` dequantizes, so that it verifies and converts like any other; `matrices` maps."""

    format = "packed"
    mtp_dropped = False

    def __init__(self, folder: Path) -> None:
        data, where = load_config_json(folder)
        self.statement = PackedStatement.from_json(data.get("quantization_config"), where)
        self.config = parse_config(data, where)
        self.where = str(folder)
        self.index = open_folder(folder)
        self.plan = packing_plan(self.config, self.statement.scheme)
        self._packed = {parameter.name: parameter for parameter in self.plan.packed}
        shapes = {name: parameter.shape for name, parameter in self._packed.items()} | self.plan.plain
        super().__init__([Stored(name=n, shape=s, parts=(Part(target=n),)) for n, s in shapes.items()])
        self.account = self._make_account()
        self.account.check(self.where)
        self._check_entries()

    def matrices(self, parameter: PackedParameter) -> tuple[PackedMatrix, ...]:
        """The matrix, or one per expert, as views of the mapped file: nothing is read yet, nothing is copied."""
        weights, scales = (
            map_tensor(self.index.entries[f"{parameter.name}.{part}"]).view(parameter.num_matrices, -1)
            for part in (WEIGHTS, SCALES)
        )
        return tuple(parameter.matrix(weights[i], scales[i]) for i in range(parameter.num_matrices))

    def read(self, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        parameter = self._packed.get(stored.name)
        if parameter is None:
            tensor = read_tensor(self.index.entries[stored.name])
            return tensor if rows is None else tensor[rows[0] : rows[1]]
        matrices = self.matrices(parameter)
        if parameter.experts is None:
            whole = parameter.dequantized(matrices[0])
            return whole if rows is None else whole[rows[0] : rows[1]]
        first, end = rows or (0, parameter.experts)
        out = torch.empty(end - first, parameter.rows, parameter.columns)
        for i, matrix in enumerate(matrices[first:end]):
            out[i] = parameter.dequantized(matrix)
        return out

    def stored_dtype(self, stored: Stored) -> torch.dtype:
        return torch.float32 if stored.name in self._packed else self.index.entries[stored.name].dtype

    def _make_account(self) -> LoadAccount:
        wanted = {name for parameter in self.plan.packed for name, _, _ in parameter.tensors()} | self.plan.plain.keys()
        found = self.index.entries.keys()
        return LoadAccount(
            loaded=tuple(sorted(wanted & found)),
            left_out={},
            missing=tuple(sorted(wanted - found)),
            unexpected=tuple(sorted(found - wanted)),
        )

    def _check_entries(self) -> None:
        for parameter in self.plan.packed:
            for name, dtype, shape in parameter.tensors():
                self._check(name, (dtype,), shape)
                entry = self.index.entries[name]
                if dtype is torch.uint8 and entry.offset % ALIGNMENT:
                    raise CheckpointError(
                        f"{entry.file}: {name} begins at byte {entry.offset}, no multiple of {ALIGNMENT}: another "
                        "program has rewritten the file; quantize the model again"
                    )
        for name, plain_shape in self.plan.plain.items():
            self._check(name, _PLAIN_DTYPES, plain_shape)

    def _check(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> TensorEntry:
        entry = self.index.entries[name]
        if entry.dtype not in dtypes or entry.shape != shape:
            raise CheckpointError(
                f"{self.where}: {name} is {entry.stored_dtype} {list(entry.shape)}, config.json calls for "
                f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} {list(shape)}"
            )
        return entry
