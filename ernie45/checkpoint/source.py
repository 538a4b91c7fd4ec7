"""Where weights come from: a -PT or -Paddle folder, a GGUF file, or a network in memory, behind one interface.

A source answers one question: what is in this box of that parameter? Loading fills the network's boxes from it,
converting fills the boxes of another layout's tensors from it, one tensor at a time.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ernie45.checkpoint.gguf import GGUFFile, read_gguf, read_gguf_tensor
from ernie45.checkpoint.gguf_config import config_from_gguf
from ernie45.checkpoint.index import open_folder
from ernie45.checkpoint.layout import Box, Part, Stored, gguf_layout, paddle_layout, pt_layout
from ernie45.checkpoint.safetensors import TensorEntry, read_into, read_tensor
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
        if data.get("quantization_config"):
            raise CheckpointError(
                f"{folder}: the weights are quantized ({str(data['quantization_config'])[:80]}); this version reads "
                "float32, bfloat16 and float16 folders and GGUF files"
            )
        self.config = parse_config(data, where)
        self.where = str(folder)
        self.index = open_folder(folder)
        self.format = "paddle" if any(name.startswith("ernie.") for name in self.index.entries) else "pt"
        if self.config.num_nextn_predict_layers and not any(".mtp_" in name for name in self.index.entries):
            self._drop_mtp()
        super().__init__((paddle_layout if self.format == "paddle" else pt_layout)(self.config))
        self.account = self._make_account()
        self.account.check(self.where)
        self._check_shapes()

    def _drop_mtp(self) -> None:
        # transformers drops these tensors whenever it saves a model; the main network does not need them.
        self.config = replace(self.config, num_nextn_predict_layers=0)
        self.mtp_dropped = True

    mtp_dropped = False
    """The config promises a multi-token prediction block, the files hold none of its tensors."""

    def _make_account(self) -> LoadAccount:
        wanted = {stored.name for stored in self.layout}
        left_out = {}
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

    def _check_shapes(self) -> None:
        for stored in self.layout:
            entry = self.index.entries[stored.name]
            squeezed = stored.name.endswith("e_score_correction_bias") and entry.shape == stored.shape[-1:]
            if entry.shape != stored.shape and not squeezed:
                raise CheckpointError(
                    f"{self.where}: {stored.name} has shape {list(entry.shape)}, "
                    f"config.json calls for {list(stored.shape)}"
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
        entry = self.entry(stored)
        if rows is not None:
            row_bytes = entry.size_bytes // entry.shape[0]
            entry = replace(
                entry,
                shape=(rows[1] - rows[0], *entry.shape[1:]),
                offset=entry.offset + rows[0] * row_bytes,
                size_bytes=(rows[1] - rows[0]) * row_bytes,
            )
        return _oriented(read_tensor(entry), stored)

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
        tensor = self.file.tensors[stored.name]
        if rows is not None:
            row_bytes = tensor.size_bytes // tensor.shape[0]
            tensor = replace(
                tensor,
                shape=(rows[1] - rows[0], *tensor.shape[1:]),
                offset=tensor.offset + rows[0] * row_bytes,
                size_bytes=(rows[1] - rows[0]) * row_bytes,
            )
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
        super().__init__(layout)

    def read(self, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = self._tensors[stored.name]
        return (tensor if rows is None else tensor[rows[0] : rows[1]]).detach().cpu()

    def stored_dtype(self, stored: Stored) -> torch.dtype:
        return self._tensors[stored.name].dtype


def open_source(path: str | Path) -> SafetensorsSource | GgufSource | PackedSource:
    """Open the weights at a path: a checkpoint folder, plain or packed, or a GGUF file (also a folder that holds one
    GGUF file alone).

    Everything is validated here but the weights themselves. Raises: NotFoundError, ConfigError, CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 and not (path / "config.json").exists():
            return GgufSource(ggufs[0])
        return _open_packed(path) if _is_packed(path) else SafetensorsSource(path)
    if path.suffix == ".gguf" and path.is_file():
        return GgufSource(path)
    raise NotFoundError(
        f"{path} is no checkpoint: expected a folder with config.json and safetensors files, or a .gguf file"
    )


def _is_packed(folder: Path) -> bool:
    """Whether the folder's weights were packed by this package."""
    stated = load_config_json(folder)[0].get("quantization_config")
    return isinstance(stated, dict) and stated.get("quant_method") == "ernie45"


def _open_packed(folder: Path) -> PackedSource:
    # The one look upwards, here and in load.py: whoever opens a folder need not know that it is packed.
    from ernie45.quant.folder import PackedSource

    return PackedSource(folder)


def _value_entry(entry: TensorEntry) -> TensorEntry:
    return entry.as_bfloat16() if entry.stored_dtype == "U16" else entry


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
