"""Quantize a checkpoint: one matrix in memory at a time, and what is done survives a killed process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie45 import __version__
from ernie45.checkpoint.load import Progress
from ernie45.checkpoint.source import GgufSource, SafetensorsSource, open_source
from ernie45.checkpoint.write import DEFAULT_SHARD_BYTES
from ernie45.config.reader import config_to_json
from ernie45.errors import CheckpointError, UsageError
from ernie45.kernels.packed import PackedFormat, interleave_gate_up, pack
from ernie45.quant.calibration import Calibration, Inputs, calibrate
from ernie45.quant.folder import PackedStatement
from ernie45.quant.gptq import gptq, shifted_target
from ernie45.quant.plan import PackedParameter, PackingPlan, packing_plan
from ernie45.quant.rounding import Quantized, quantize
from ernie45.quant.scheme import Scheme, make_scheme
from ernie45.quant.smoothing import smooth
from ernie45.quant.weights import Weights
from ernie45.quant.work import Plan, WorkFolder

REPORT_NAME = "quantization.json"
_BATCH_BYTES = 32 << 20
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What a run did."""

    source: str
    target: str
    scheme: str
    size_before_bytes: int
    size_after_bytes: int
    bits_per_weight: float
    """Of all weights of the network, scales included."""
    tensors: dict[str, dict[str, Any]]
    """By parameter: bits, group, activation_bits, relative_error (Frobenius norms), method, and with calibration its coverage."""

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """Parameters with the largest relative errors."""
        errors = [(name, float(facts["relative_error"])) for name, facts in self.tensors.items()]
        return sorted(errors, key=lambda item: -item[1])[:count]


@torch.no_grad()
def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scheme: str | Scheme,
    *,
    group_size: int | None = None,
    calibration: Calibration | None = None,
    resume: bool = True,
    overwrite: bool = False,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Write a packed copy of a checkpoint.

    A run that was killed goes on where it was when it is called again with the same source and settings, and ends with
    the same bytes. `dst` appears when all of it is written.

    Args: src: a -PT or -Paddle folder or a GGUF file. dst: the folder to create. scheme: a name, see `make_scheme`, or
            a table of rules. group_size: of a named scheme. calibration: text for smoothing and GPTQ; None:
            search by weights alone.
            resume: False starts from the beginning. overwrite: replace `dst`. extra_files: tokenizer and companions.
            progress: called with bytes written and in all.
    Raises: UsageError for a scheme that does not exist or a source that is packed already; CheckpointError for weights
        that cannot be read or are not finite; CapacityError when the disk is full (run again to go on).
    """
    source = open_source(src)
    if not isinstance(source, SafetensorsSource | GgufSource):
        raise UsageError(f"{src} is packed already: quantize the checkpoint that it was made from")
    chosen = make_scheme(scheme, group_size) if isinstance(scheme, str) else scheme
    plan = packing_plan(source.config, chosen)
    origin = None if calibration is None else dict(calibration.origin)
    statement = PackedStatement(scheme=chosen, tool=__version__, calibration=origin)
    shards = _shards(source, plan)
    identity = {"source": _fingerprint(source), "statement": statement.to_json()}
    with WorkFolder(Path(dst), shards, identity, resume=resume, overwrite=overwrite) as work:
        if not work.published:
            weights: Weights = source if calibration is None else smooth(source, calibration)
            tensors = _fill(work, weights, plan, calibration, progress)
            work.publish(_small_files(source, statement, tensors) | dict(extra_files or {}))
    return _report(source, Path(dst), chosen, plan, shards)


def _fill(
    work: WorkFolder,
    source: Weights,
    plan: PackingPlan,
    calibration: Calibration | None,
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    """Write every tensor that is not there yet; returns the facts of the packed ones."""
    batches = _plain_batches(source, plan)
    sizes = {key: sum(batch.values()) for key, batch in batches.items()}
    sizes |= {parameter.name: parameter.size_bytes for parameter in plan.packed}
    total, done = sum(sizes.values()), sum(sizes[key] for key in work.done)

    def report(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    report(0)
    for key, batch in batches.items():
        if key not in work.done:
            for name in batch:
                work.write(
                    name, _read(work, source, name, None, shape=plan.plain[name], dtype=source.region_dtype(name, ()))
                )
            work.finish(key, list(batch), {})
            report(sizes[key])
    packer = _Packer(work, source, plan, report)
    if calibration is not None:
        calibrate(source, calibration, packer, packer.unfinished_layers())
    for parameter in plan.packed:
        if parameter.name not in work.done:
            packer.pack(parameter, None)
    return {parameter.name: work.done[parameter.name]["facts"] for parameter in plan.packed}


class _Packer:
    """Rounds, packs and writes matrices, and reads finished ones back."""

    def __init__(self, work: WorkFolder, source: Weights, plan: PackingPlan, report: Callable[[int], None]) -> None:
        self._work, self._source, self._report = work, source, report
        self._parameters = {parameter.name: parameter for parameter in plan.packed}

    def unfinished_layers(self) -> int:
        """Decoder layers up to the last one that has anything left to do."""
        layers = [_LAYER.match(name) for name in self._parameters.keys() - self._work.done.keys()]
        return max((int(match[1]) + 1 for match in layers if match), default=0)

    def rounded(self, name: str, inputs: Iterator[Inputs]) -> Iterator[Tensor] | None:
        """See `calibration.Rounder`."""
        parameter = self._parameters.get(name)
        if parameter is None:
            return None
        if name not in self._work.done:
            self.pack(parameter, inputs)
        return self._finished(parameter)

    def _finished(self, parameter: PackedParameter) -> Iterator[Tensor]:
        weights, scales = (
            self._work.read(tensor).view(parameter.num_matrices, -1) for tensor, _, _ in parameter.tensors()
        )
        for i in range(parameter.num_matrices):
            yield parameter.dequantized(parameter.matrix(weights[i], scales[i]))

    def pack(self, parameter: PackedParameter, inputs: Iterator[Inputs] | None) -> None:
        """Round and write a parameter. Args: inputs: of each of its matrices; None: round by weights alone."""
        (weights_name, _, _), (scales_name, _, _) = parameter.tensors()
        squared_error, squared_norm = 0.0, 0.0
        tokens: list[int] = []
        on_layer = 0
        for i in range(parameter.num_matrices):
            shape = (parameter.rows, parameter.columns)
            expert = None if parameter.experts is None else i
            weights = _read(self._work, self._source, parameter.name, expert, shape=shape, dtype=torch.float32)
            if inputs is None:
                result = quantize(weights, parameter.format)
            else:
                seen = next(inputs)
                tokens.append(seen.tokens)
                on_layer += seen.of_layer
                result = _round_for(weights, seen, parameter.format)
            values, scales = result.values_NK, result.scales
            if parameter.interleaved:
                values, scales = interleave_gate_up(values), interleave_gate_up(scales)
            matrix = pack(values, scales, parameter.format)
            self._work.write(weights_name, matrix.weights, i * matrix.weights.nbytes)
            self._work.write(scales_name, matrix.scales, i * matrix.scales.nbytes)
            squared_error, squared_norm = squared_error + result.squared_error, squared_norm + result.squared_norm
            self._report(matrix.size_bytes)
        facts = {
            "bits": parameter.format.bits,
            "group": parameter.format.group,
            "activation_bits": parameter.format.activation_bits,
            "method": "gptq" if tokens else "search",
            "relative_error": (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
        }
        if tokens:
            facts |= {"least_tokens": min(tokens), "experts_on_layer_statistics": on_layer}
        self._work.finish(parameter.name, [weights_name, scales_name], {"facts": facts})


def _round_for(weights_NK: Tensor, inputs: Inputs, format: PackedFormat) -> Quantized:
    if inputs.shift_KK is None:
        return gptq(weights_NK, inputs.moments_KK, format)
    target_NK = shifted_target(weights_NK, inputs.moments_KK, inputs.shift_KK, inputs.tokens)
    return gptq(weights_NK, inputs.moments_KK, format, target_NK=target_NK)


def _read(
    work: WorkFolder, source: Weights, name: str, expert: int | None, *, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """One matrix or small tensor; what can never be read ends the run and leaves nothing behind."""
    weights = torch.empty(shape if expert is None else (1, *shape), dtype=dtype)
    try:
        source.fill(weights, name, () if expert is None else ((expert, expert + 1),))
        if not torch.isfinite(weights).all():
            raise CheckpointError(f"{source.where}: {name} holds NaN or infinity: `ernie verify` lists such tensors")
    except CheckpointError:
        work.discard()
        raise
    return weights.view(shape)


def _shards(source: SafetensorsSource | GgufSource, plan: PackingPlan) -> list[Plan]:
    """Small tensors, scales, then the packed weights in files of their own.

    Packed weights are multiples of 512 bytes, so in a file without anything else each begins at a multiple of 64.
    """
    plain = [(name, source.region_dtype(name, ()), shape) for name, shape in plan.plain.items()]
    pairs = [parameter.tensors() for parameter in plan.packed]
    shards: list[Plan] = [plain, [scales for _, scales in pairs]]
    current: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    filled = 0
    for weights, _ in pairs:
        size = torch.Size(weights[2]).numel()
        if current and filled + size > DEFAULT_SHARD_BYTES:
            shards.append(current)
            current, filled = [], 0
        current.append(weights)
        filled += size
    return [*shards, current]


def _plain_batches(source: Weights, plan: PackingPlan) -> dict[str, dict[str, int]]:
    """Small tensors with their sizes, in batches: bringing each to the disk on its own would take long."""
    batches: dict[str, dict[str, int]] = {}
    filled = _BATCH_BYTES
    for name, shape in plan.plain.items():
        size = torch.Size(shape).numel() * source.region_dtype(name, ()).itemsize
        if filled + size > _BATCH_BYTES:
            batches[f"plain {len(batches)}"] = batch = {}
            filled = 0
        batch[name] = size
        filled += size
    return batches


def _fingerprint(source: SafetensorsSource | GgufSource) -> dict[str, Any]:
    """Which weights these are, without reading them."""
    files = [source.file.path] if isinstance(source, GgufSource) else source.index.files
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"files": stats, "config": repr(source.config)}


def _small_files(
    source: SafetensorsSource | GgufSource, statement: PackedStatement, tensors: dict[str, dict[str, Any]]
) -> dict[str, bytes]:
    config = config_to_json(source.config, dtype="float32", layout="pt")
    config["quantization_config"] = statement.to_json()
    report = {"scheme": statement.scheme.name, "tool": statement.tool, "tensors": tensors}
    return {"config.json": _json_bytes(config), REPORT_NAME: _json_bytes(report)}


def _report(
    source: SafetensorsSource | GgufSource, target: Path, scheme: Scheme, plan: PackingPlan, shards: list[Plan]
) -> QuantizationReport:
    before = source.file.path.stat().st_size if isinstance(source, GgufSource) else source.index.total_bytes
    after = sum(torch.Size(shape).numel() * dtype.itemsize for shard in shards for _, dtype, shape in shard)
    shapes = [*plan.plain.values(), *(parameter.shape for parameter in plan.packed)]
    return QuantizationReport(
        source=source.where,
        target=str(target),
        scheme=scheme.name,
        size_before_bytes=before,
        size_after_bytes=after,
        bits_per_weight=8 * after / sum(torch.Size(shape).numel() for shape in shapes),
        tensors=json.loads((target / REPORT_NAME).read_bytes())["tensors"],
    )


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
