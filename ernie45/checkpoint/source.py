"""Where weights come from: a -PT or -Paddle folder, plain or quantized by Paddle, a GGUF file, or a network in memory,
behind one interface.

A source answers one question: what is in this box of that parameter? Loading fills the network's boxes from it,
converting fills the boxes of another layout's tensors from it, one tensor at a time.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ernie45.checkpoint.gguf import GGUFFile, GGUFTensor, read_gguf, read_gguf_tensor
from ernie45.checkpoint.gguf_config import config_from_gguf
from ernie45.checkpoint.index import open_folder
from ernie45.checkpoint.layout import Box, Part, Stored, gguf_layout, paddle_layout, pt_layout
from ernie45.checkpoint.prequantized import (
    Bits,
    check_scale_dtype,
    check_size,
    dequantize,
    is_linear,
    read_statement,
    row_unit,
    stored_shape,
)
from ernie45.checkpoint.safetensors import TensorEntry, read_into, read_tensor, shown_value
from ernie45.config.model import ModelConfig
from ernie45.config.reader import load_config_json, parse_config
from ernie45.errors import CheckpointError, NotFoundError
from ernie45.models.build import build_model

if TYPE_CHECKING:
    from ernie45.quant.folder import PackedSource

# Tensors that files carry although the network does not need them; none of them changes a result.
_LEFT_OUT = (
    (re.compile(r".*rotary_emb\.inv_freq|rope_freqs\.weight"), "frequencies are computed from the config"),
    (
        re.compile(r".*\.(k|v)_scale|.*cache[kv]_matmul\.activation_scale"),
        "scale of a quantized cache, which is chosen at run time",
    ),
)
_MAX_LISTED = 6
_CODES, _STEPS = "quant_weight", "weight_scale"
_Entry = TypeVar("_Entry", TensorEntry, GGUFTensor)


@dataclass(frozen=True)
class LoadAccount:
    """What became of every tensor of a file."""

    loaded: tuple[str, ...]
    left_out: Mapping[str, str]
    """Tensors left out on purpose, each with the reason."""
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def check(self, where: str) -> None:
        """Raises: CheckpointError if a tensor is missing or unexpected."""
        if self.missing:
            raise CheckpointError(f"{where}: {len(self.missing)} tensors are missing: {_listed(self.missing)}")
        if self.unexpected:
            hint = ""
            if any(".mtp_" in name for name in self.unexpected):
                hint = ". Multi-token prediction weights need num_nextn_predict_layers in config.json"
            raise CheckpointError(
                f"{where}: {len(self.unexpected)} tensors are unexpected: {_listed(self.unexpected)}{hint}"
            )


class Source(ABC):
    """Weights that can be asked for by box. `config` is what they describe; `layout` lists how they are stored."""

    config: ModelConfig
    where: str

    def __init__(self, layout: list[Stored]) -> None:
        self.layout = layout
        self.shapes = {name: tuple(t.shape) for name, t in build_model(self.config, device="meta").state_dict().items()}
        self._parts: dict[str, list[tuple[Stored, Part, Box]]] = defaultdict(list)
        for stored in layout:
            for part in stored.parts:
                self._parts[part.target].append((stored, part, self._full(part.target, part.box)))

    @abstractmethod
    def read(self, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        """A stored tensor in the network's orientation and order, on the CPU; `rows` limits its first dimension."""

    @abstractmethod
    def stored_dtype(self, stored: Stored) -> torch.dtype:
        """Dtype of what `read` returns."""

    def region_shape(self, target: str, box: Box) -> tuple[int, ...]:
        """Shape of a region of a parameter or buffer of the network."""
        return tuple(end - start for start, end in self._full(target, box))

    def region_dtype(self, target: str, box: Box) -> torch.dtype:
        """The dtype that holds a region without loss."""
        region = self._full(target, box)
        dtypes = [self.stored_dtype(stored) for stored, _, full in self._parts[target] if _overlap(full, region)]
        return functools.reduce(torch.promote_types, dtypes)

    def fill(self, out: Tensor, target: str, box: Box) -> None:
        """Copy a region of `target` into `out`, whose shape is the region's."""
        region, covered = self._full(target, box), 0
        for stored, part, full in self._parts[target]:
            overlap = _overlap(full, region)
            if overlap is None:
                continue
            piece = self._piece(stored, part, full, overlap)
            out[_relative(overlap, region)].copy_(piece)
            covered += piece.numel()
        assert covered == out.numel(), f"{self.where}: {covered} of {out.numel()} values of {target} are covered"

    def _full(self, target: str, box: Box) -> Box:
        shape = self.shapes[target]
        return (*box, *((0, size) for size in shape[len(box) :]))

    def _piece(self, stored: Stored, part: Part, full: Box, overlap: Box) -> Tensor:
        """The part of a stored tensor that lies in `overlap`; reads only the rows needed where they are contiguous."""
        lengths = [end - start for start, end in full]
        index = _relative(overlap, full)
        plain = part.rows is None and not stored.transposed and not stored.half_split_heads
        if plain and stored.shape[0] == lengths[0] and overlap[0] != full[0]:
            rows = (index[0].start, index[0].stop)
            tensor = self.read(stored, rows)
            lengths[0] = rows[1] - rows[0]
            index = (slice(None), *index[1:])
        else:
            tensor = self.read(stored)
            tensor = tensor if part.rows is None else tensor[part.rows[0] : part.rows[1]]
        return tensor.reshape(lengths)[index]


class SafetensorsSource(Source):
    """A -PT or -Paddle folder."""

    def __init__(self, folder: Path) -> None:
        data, where = load_config_json(folder)
        self.config = parse_config(data, where)
        self.where = str(folder)
        self.index = open_folder(folder)
        self.format = "paddle" if any(name.startswith("ernie.") for name in self.index.entries) else "pt"
        if self.config.num_nextn_predict_layers and not any(".mtp_" in name for name in self.index.entries):
            self._drop_mtp()
        super().__init__(self._make_layout(data.get("quantization_config"), where))
        self.account = self._make_account()
        self.account.check(self.where)
        for stored in self.layout:
            self._check_entry(stored)

    def _make_layout(self, stated: object, where: str) -> list[Stored]:
        """The tensors that the folder should hold. `stated`: what the config says of quantization; `where` says it."""
        return (paddle_layout if self.format == "paddle" else pt_layout)(self.config)

    def _wanted(self) -> set[str]:
        """Names of all tensors that loading reads."""
        return {stored.name for stored in self.layout}

    def _drop_mtp(self) -> None:
        # transformers drops these tensors whenever it saves a model; the main network does not need them.
        self.config = replace(self.config, num_nextn_predict_layers=0)
        self.mtp_dropped = True

    mtp_dropped = False
    """The config promises a multi-token prediction block, the files hold none of its tensors."""

    def _make_account(self) -> LoadAccount:
        wanted, left_out = self._wanted(), {}
        for name in self.index.entries.keys() - wanted:
            reason = next((reason for pattern, reason in _LEFT_OUT if pattern.fullmatch(name)), None)
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                reason = self._tied_head_reason()
            if reason is not None:
                left_out[name] = reason
        if self.mtp_dropped:
            left_out["model.mtp_*"] = "config.json promises a multi-token prediction block, the files hold none"
        return LoadAccount(
            loaded=tuple(sorted(wanted & self.index.entries.keys())),
            left_out=left_out,
            missing=tuple(sorted(wanted - self.index.entries.keys())),
            unexpected=tuple(sorted(self.index.entries.keys() - wanted - left_out.keys())),
        )

    def _tied_head_reason(self) -> str | None:
        """A copy of the embedding may lie beside a tied head; anything else contradicts the config."""
        embedding = next(
            (self.index.entries.get(f"{prefix}.embed_tokens.weight") for prefix in ("model", "ernie")), None
        )
        if embedding is None:
            return None
        head, table = read_tensor(self.index.entries["lm_head.weight"]), read_tensor(embedding)
        head = head.T if self.format == "paddle" else head
        if head.shape != table.shape or not torch.equal(head, table):
            raise CheckpointError(
                f"{self.where}: lm_head.weight differs from the embedding although config.json ties them: set "
                "tie_word_embeddings to false"
            )
        return "equal to the embedding, which is the head"

    def _check_entry(self, stored: Stored) -> None:
        entry = self.index.entries[stored.name]
        squeezed = stored.name.endswith("e_score_correction_bias") and entry.shape == stored.shape[-1:]
        if entry.shape != stored.shape and not squeezed:
            raise CheckpointError(
                f"{self.where}: {stored.name} has shape {list(entry.shape)}, config.json calls for {list(stored.shape)}"
            )
        if not _value_entry(entry).dtype.is_floating_point or _value_entry(entry).dtype.itemsize == 1:
            raise CheckpointError(
                f"{self.where}: {stored.name} is stored as {entry.stored_dtype}, expected a floating-point type of "
                "16 bits or more"
            )

    def entry(self, stored: Stored) -> TensorEntry:
        """Where the tensor lies on disk; bfloat16 bits stored as U16 are bfloat16."""
        return replace(_value_entry(self.index.entries[stored.name]), shape=stored.shape)

    def read(self, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        return _oriented(read_tensor(_row_range(self.entry(stored), rows)), stored)

    def read_straight(self, stored: Stored, out: Tensor) -> bool:
        """Read the file's bytes directly into `out` where dtype and order agree; False if they do not."""
        if not self.reads_straight(stored, out):
            return False
        read_into(replace(self.entry(stored), shape=tuple(out.shape)), out)
        return True

    def reads_straight(self, stored: Stored, out: Tensor) -> bool:
        """Whether the tensor's bytes are those of `out`: same dtype and order, contiguous, on the CPU."""
        plain = len(stored.parts) == 1 and stored.parts[0].rows is None and not stored.transposed
        same = plain and not stored.half_split_heads and self.entry(stored).dtype == out.dtype
        return same and out.device.type == "cpu" and out.is_contiguous()

    def stored_dtype(self, stored: Stored) -> torch.dtype:
        return self.entry(stored).dtype


class PrequantizedSource(SafetensorsSource):
    """A -Paddle folder whose linear layers were quantized before publishing (`prequantized.py`); dequantizes.

    A linear layer may also be stored as a plain weight; which it is, is what the files hold.
    """

    def _make_layout(self, stated: object, where: str) -> list[Stored]:
        if self.format != "paddle":
            raise CheckpointError(
                f"{where}: the weights are quantized ({shown_value(stated)}); read are float32, bfloat16 and float16 "
                "folders, -Paddle folders in wint8 and wint4, folders that `ernie quantize` wrote, and GGUF files"
            )
        self._statement = read_statement(stated, where)
        if not any(name.endswith(f".{_CODES}") for name in self.index.entries):
            raise CheckpointError(
                f"{where}: quantization_config is {shown_value(stated)}, but the files hold no tensor *.{_CODES}: if "
                "their weights are not quantized, set its is_quantized to false"
            )
        self._bits: dict[str, Bits] = {}
        return [self._quantized(stored) for stored in super()._make_layout(stated, where)]

    @property
    def weight_formats(self) -> str:
        """The formats of the quantized weights, for people: `wint8`, `wint8 and wint4`."""
        return " and ".join(f"wint{bits}" for bits in sorted(set(self._bits.values()), reverse=True))

    def read(self, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        bits = self._bits.get(stored.name)
        if bits is None:
            return super().read(stored, rows)
        order, (total, columns) = self._statement.order, stored.shape
        first, end = rows or (0, total)
        unit = row_unit(bits, order) or total
        start, stop = first // unit * unit, -(-end // unit) * unit
        entry = self.index.entries[stored.name]
        if (start, stop) != (0, total):
            entry = _row_range(entry, (start * entry.shape[0] // total, stop * entry.shape[0] // total))
        scale = read_tensor(_value_entry(self.index.entries[_scale_name(stored)]))[start:stop]
        where = f"{entry.file}: {stored.name}"
        return dequantize(read_tensor(entry), scale, columns, bits, order, where)[first - start : end - start]

    def reads_straight(self, stored: Stored, out: Tensor) -> bool:
        return stored.name not in self._bits and super().reads_straight(stored, out)

    def stored_dtype(self, stored: Stored) -> torch.dtype:
        return torch.float32 if stored.name in self._bits else super().stored_dtype(stored)

    def _wanted(self) -> set[str]:
        return {stored.name for stored in self.layout} | {
            _scale_name(stored) for stored in self.layout if stored.name in self._bits
        }

    def _quantized(self, stored: Stored) -> Stored:
        """The tensor of codes in place of a plain weight, in the orientation of the network, which `read` returns."""
        if stored.name in self.index.entries or not is_linear(stored.name):
            return stored
        name = stored.name.removesuffix("weight") + _CODES
        columns, rows = stored.shape
        entry, order = self.index.entries.get(name), self._statement.order
        allowed = self._statement.bits_of(stored.name, self.config.moe.moe_num_experts if self.config.moe else 0)
        fitting = [b for b in allowed if entry is not None and entry.shape == stored_shape(rows, columns, b, order)]
        self._bits[name] = (fitting or allowed)[0]
        return replace(stored, name=name, shape=(rows, columns), transposed=False)

    def _check_entry(self, stored: Stored) -> None:
        bits = self._bits.get(stored.name)
        if bits is None:
            super()._check_entry(stored)
            return
        (rows, columns), order = stored.shape, self._statement.order
        codes, scale = self.index.entries[stored.name], self.index.entries[_scale_name(stored)]
        check_size(rows, columns, bits, order, f"{codes.file}: {stored.name}")
        expected = stored_shape(rows, columns, bits, order)
        if codes.dtype != torch.int8 or codes.shape != expected:
            raise CheckpointError(
                f"{codes.file}: {stored.name} is {codes.stored_dtype} {list(codes.shape)}, config.json calls for I8 "
                f"{list(expected)}: wint{bits} of {rows} outputs and {columns} inputs in {order} order. Both are stated in "
                "quantization_config, see docs/checkpoints.md"
            )
        where = f"{scale.file}: {scale.name}"
        check_scale_dtype(_value_entry(scale).dtype, scale.stored_dtype, where)
        if scale.shape != (rows,):
            raise CheckpointError(f"{where} has shape {list(scale.shape)}, expected one step per output: [{rows}]")


class GgufSource(Source):
    """A GGUF file of an ERNIE 4.5 text model, or of a `llama`/`qwen2` model that is one after renaming; dequantizes."""

    format = "gguf"
    mtp_dropped = False

    def __init__(self, path: Path) -> None:
        self.file: GGUFFile = read_gguf(path)
        self.where = str(path)
        self.config, architecture = config_from_gguf(self.file)
        super().__init__(gguf_layout(self.config, architecture))
        wanted = {stored.name for stored in self.layout}
        # qwen2 has bias vectors for q/k/v alone; the others of a network with bias are zero.
        self._zeros = architecture == "qwen2"
        found = self.file.tensors.keys()
        left_out = {
            name: reason
            for name in found - wanted
            for pattern, reason in _LEFT_OUT
            if pattern.fullmatch(name) and name != "rope_freqs.weight"
        }
        self.account = LoadAccount(
            loaded=tuple(sorted(wanted & found)),
            left_out=left_out,
            missing=tuple(sorted(wanted - found)),
            unexpected=tuple(sorted(found - wanted - left_out.keys())),
        )
        self.account.check(self.where)
        for stored in self.layout:
            shape = tuple(self.file.tensors[stored.name].shape)
            if shape != stored.shape:
                raise CheckpointError(
                    f"{path}: {stored.name} has shape {list(shape)}, the metadata call for {list(stored.shape)}"
                )

    def read(self, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = _row_range(self.file.tensors[stored.name], rows)
        return _oriented(read_gguf_tensor(self.file, tensor, dtype=self.stored_dtype(stored)), stored)

    def stored_dtype(self, stored: Stored) -> torch.dtype:
        return self.file.tensors[stored.name].type.torch_dtype or torch.float32

    def region_dtype(self, target: str, box: Box) -> torch.dtype:
        return super().region_dtype(target, box) if self._parts[target] else torch.float32

    def fill(self, out: Tensor, target: str, box: Box) -> None:
        if self._zeros and target.endswith(".bias") and not self._parts[target]:
            out.zero_()
        else:
            super().fill(out, target, box)


class ModuleSource(Source):
    """A network in memory."""

    format = "module"
    mtp_dropped = False

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        self.config, self.where = config, "the model in memory"
        self._tensors = model.state_dict()
        layout = [
            Stored(name=name, shape=tuple(tensor.shape), parts=(Part(target=name),))
            for name, tensor in self._tensors.items()
        ]
        self._check(build_model(config, device="meta").state_dict().keys())
        super().__init__(layout)

    def read(self, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = self._tensors[stored.name]
        return (tensor if rows is None else tensor[rows[0] : rows[1]]).detach().cpu()

    def stored_dtype(self, stored: Stored) -> torch.dtype:
        return self._tensors[stored.name].dtype

    def _check(self, wanted: Iterable[str]) -> None:
        """A network with an adapter or packed leaves holds other tensors than its configuration says."""
        other = sorted(self._tensors.keys() ^ set(wanted))
        if other:
            raise CheckpointError(
                f"{self.where} differs from its configuration in {_listed(tuple(other))}: merge an adapter first, or write it "
                "on its own; packed weights are copied with their folder"
            )


def open_source(path: str | Path) -> SafetensorsSource | GgufSource | PackedSource:
    """Open the weights at a path: a checkpoint folder, plain, packed or quantized by Paddle, or a GGUF file (also a
    folder that holds one GGUF file alone).

    Everything is validated here but the weights themselves. Raises: NotFoundError, ConfigError, CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 and not (path / "config.json").exists():
            return GgufSource(ggufs[0])
        return _open_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return GgufSource(path)
    raise NotFoundError(
        f"{path} is no checkpoint: expected a folder with config.json and safetensors files, or a .gguf file"
    )


def _open_folder(folder: Path) -> SafetensorsSource | PackedSource:
    stated = load_config_json(folder)[0].get("quantization_config")
    if isinstance(stated, dict) and stated.get("quant_method") == "ernie45":
        # The one look upwards, here and in load.py: whoever opens a folder need not know that it is packed.
        from ernie45.quant.folder import PackedSource

        return PackedSource(folder)
    return PrequantizedSource(folder) if _states_quantized_files(stated) else SafetensorsSource(folder)


def _states_quantized_files(stated: object) -> bool:
    """Whether the files are quantized; with `is_quantized` false, Paddle asks for quantizing plain ones when loading."""
    if isinstance(stated, dict) and stated.get("is_quantized") is False:
        return bool(stated.get("is_moe_quantized"))
    return bool(stated)


def _value_entry(entry: TensorEntry) -> TensorEntry:
    return entry.as_bfloat16() if entry.stored_dtype == "U16" else entry


def _scale_name(codes: Stored) -> str:
    return codes.name.removesuffix(_CODES) + _STEPS


def _row_range(entry: _Entry, rows: tuple[int, int] | None) -> _Entry:
    """The part of a tensor on disk that holds these rows of its first dimension."""
    if rows is None:
        return entry
    row_bytes = entry.size_bytes // entry.shape[0]
    return replace(
        entry,
        shape=(rows[1] - rows[0], *entry.shape[1:]),
        offset=entry.offset + rows[0] * row_bytes,
        size_bytes=(rows[1] - rows[0]) * row_bytes,
    )


def _oriented(tensor: Tensor, stored: Stored) -> Tensor:
    if stored.transposed:
        tensor = tensor.T
    if stored.half_split_heads:
        # Row r of the first half and row r of the second half become the neighbours 2r and 2r + 1.
        heads = tensor.reshape(stored.half_split_heads, 2, -1, *tensor.shape[1:])
        tensor = heads.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _overlap(first: Box, second: Box) -> Box | None:
    """Intersection of two boxes of equal rank; None if they do not meet."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return both if all(start < end for start, end in both) else None


def _relative(box: Box, origin: Box) -> tuple[slice, ...]:
    return tuple(slice(start - base, end - base) for (start, end), (base, _) in zip(box, origin, strict=True))


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
