"""Quantize a model with all that belongs to it, and measure what was lost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.source import open_source
from ernie45.errors import CapacityError
from ernie45.quant.calibration import Calibration
from ernie45.quant.quality import Quality, chunks_of, compare
from ernie45.quant.quantize import QuantizationReport, quantize_checkpoint
from ernie45.quant.scheme import make_scheme
from ernie45.store.api import load_tokenizer
from ernie45.store.convert import companions
from ernie45.store.location import installed, made, model_path, resolve
from ernie45.store.pulled import Stages, stage
from ernie45.store.text import read_text

QUALITY_NAME, PLOT_NAME = "quality.json", "quality.png"
_CALIBRATION_CHUNKS, _QUALITY_CHUNKS = 128, 64


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """Where the quantized model is, and how it compares."""

    path: Path
    report: QuantizationReport
    quality: Quality | None
    """Only if a text was given to measure on; also in `quality.json` and, with matplotlib, `quality.png`."""


def quantize(
    model: str | Path,
    scheme: str,
    *,
    dst: str | Path | None = None,
    group_size: int | None = None,
    calibrate: str | Path | None = None,
    report: str | Path | None = None,
    overwrite: bool = False,
    progress: Stages | None = None,
) -> QuantizedModel:
    """Write a packed copy of a model; see `quant.quantize.quantize_checkpoint`.

    Args: model: name, folder or .gguf file. scheme, group_size: see `quant.scheme.make_scheme`. dst: the folder; None:
            `MODEL-SCHEME` in the store. calibrate: text file whose first 128 chunks of 512 tokens steer the rounding.
            report: text file to compare both models on (64 chunks at most); should be another text. overwrite: replace
            `dst`. progress: called with the name of each stage.
    Raises: what reading, quantizing and comparing raise; NotFoundError, RequestError for a text that cannot be used.
    """
    make_scheme(scheme, group_size)  # a wrong option shows before anything is read
    path = resolve(model)
    target = Path(dst) if dst is not None else model_path(f"{_name(path)}-{scheme}")
    # Encoded before hours of work: a text that is too short fails at once.
    chunks = None if report is None else chunks_of(load_tokenizer(path), read_text(report), limit=_QUALITY_CHUNKS)
    calibration = None if calibrate is None else _calibration(path, Path(calibrate))
    made(target.parent)
    done = quantize_checkpoint(
        path,
        target,
        scheme,
        group_size=group_size,
        calibration=calibration,
        overwrite=overwrite,
        extra_files=companions(open_source(path)),
        progress=stage(progress, "quantizing"),
    )
    quality = None if chunks is None else _measure(path, target, chunks)
    return QuantizedModel(path=target, report=done, quality=quality)


def _name(path: Path) -> str:
    """The model's name in the store, or that of its folder or file."""
    for name, folder in installed().items():
        if folder == path:
            return name
    return path.resolve().name.removesuffix(".gguf")


def _calibration(model: Path, file: Path) -> Calibration:
    text = read_text(file)
    chunks = chunks_of(load_tokenizer(model), text, limit=_CALIBRATION_CHUNKS)
    origin = {
        "method": "gptq",
        "file": file.name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "chunks": len(chunks),
        "chunk_tokens": chunks.shape[1],
    }
    return Calibration(chunks_CT=chunks, origin=origin)


def _measure(model: Path, target: Path, chunks_CT: Tensor) -> Quality:
    try:
        reference = load_model(model)
    except CapacityError as error:
        raise CapacityError(f"{target} is finished, but the comparison needs the float32 model: {error}") from error
    quality = compare(reference, load_model(target), chunks_CT)
    quality.save_json(target / QUALITY_NAME)
    quality.save_plot(target / PLOT_NAME)
    return quality
