"""Export what training made: find it, merge its adapter, write it with all that belongs to it, load it back and compare.

The copy is written beside its destination and takes its name only after its logits were compared with those of the network that
training had in memory: nothing that existed before is touched by an export that fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ernie45.checkpoint.atomic import atomic_folder, scratch_folder
from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.source import Source, open_source
from ernie45.checkpoint.write import write_folder, write_gguf
from ernie45.errors import CheckpointError, UsageError
from ernie45.models.build import build_model, dtype_name, parse_dtype
from ernie45.models.text import CausalLM
from ernie45.store.compare import Comparison, compare_networks
from ernie45.store.convert import Format, companions, gguf_vocabulary
from ernie45.store.pulled import Stages, stage
from ernie45.store.trained import Trained, find_trained

Averages = Mapping[str, Tensor]
"""By the names of parameters in training."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What an export did."""

    source: str
    adapter: str | None
    average: bool
    """Whether the average of what was trained was taken, not the last values."""
    target: str
    to_format: str
    dtype: str
    """Of the weights in the copy."""
    max_logit_difference: float
    """Of the copy, loaded in float32, to the network with its adapter unmerged, or with the averages."""
    tolerance: float
    same_best_token: float
    """Share of the compared positions at which both prefer the same next token."""
    notes: tuple[str, ...] = field(default=())
    """What could not be taken along, in words."""


def export(
    what: str | Path,
    dst: str | Path,
    to: Format,
    *,
    merge: bool = False,
    adapter: str | Path | None = None,
    average: bool = False,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Stages | None = None,
) -> Export:
    """Write a trained model in a format that serves, with tokenizer, template and generation config, and check the copy.

    Args: what: see `find_trained`. dst: a folder, or a .gguf file. merge: put the adapter into the weights. adapter: one for a
            model that has none beside it. average: take the run's average of the weights, or of the adapter, for what was trained.
            dtype: `auto` keeps every tensor's, else of all but routers and correction bias. overwrite: replace `dst`.
            progress: called with the name of each stage.
    Raises: UsageError for an adapter without `merge`, `merge` without one, or an average that is not kept; CheckpointError if
        the copy computes something else, or cannot be written; and what reading raises. `dst` is as before unless the copy is good.
    """
    if to == "gguf" and Path(dst).suffix != ".gguf":
        raise UsageError(f"{dst} is no name for a GGUF file: it must end in .gguf, or no program will read it")
    if os.path.lexists(dst) and not overwrite:
        raise CheckpointError(f"{dst} exists already: choose another name, or replace it with --force")
    trained = find_trained(what, adapter)
    _check_merge(trained, merge)
    averages = _averages(trained, what) if average else None
    base = open_source(trained.base)
    source = _merged(base, trained.adapter, averages)
    target_dtype = None if dtype == "auto" else parse_dtype(dtype)
    notes = [base.account.left_out["model.mtp_*"]] if base.mtp_dropped else []
    with _candidate(Path(dst), to, overwrite) as candidate:
        notes += _write(base, source, candidate, to, target_dtype, progress)
        copied, comparison = _check(base, trained, averages, candidate, progress)
    return Export(
        source=str(trained.base),
        adapter=None if trained.adapter is None else str(trained.adapter),
        average=average,
        target=str(dst),
        to_format=to,
        dtype=copied,
        max_logit_difference=comparison.max_difference,
        tolerance=comparison.tolerance,
        same_best_token=comparison.same_best_token,
        notes=tuple(notes),
    )


def _check_merge(trained: Trained, merge: bool) -> None:
    if trained.adapter is not None and not merge:
        raise UsageError(
            f"{trained.adapter} is an adapter: say --merge to put it into the weights, or use that folder with PEFT as it is"
        )
    if trained.adapter is None and merge:
        raise UsageError(f"{trained.base} has no adapter to merge: leave --merge out, or name one with --adapter")


def _averages(trained: Trained, what: str | Path) -> Averages:
    if trained.average is None:
        raise UsageError(
            f"{what} keeps no average of what it trained: leave --average out, or train with a section ema in the run file"
        )
    from ernie45.store.average import read_average

    return read_average(trained.average)


def _merged(base: Source, adapter: Path | None, averages: Averages | None) -> Source:
    if adapter is None and averages is None:
        return base
    from ernie45.store.average import AveragedSource, put_average
    from ernie45.training.lora.adapter_file import read_adapter
    from ernie45.training.lora.read import adapter_from
    from ernie45.training.lora.source import AdaptedSource

    if adapter is None:
        return AveragedSource(base, averages or {})
    parts = adapter_from(read_adapter(adapter), base.config)
    if averages is not None:
        put_average(parts, averages)
    return AdaptedSource(base, parts)


@contextmanager
def _candidate(dst: Path, to: Format, overwrite: bool) -> Iterator[Path]:
    """A path beside `dst` to write to; what is there takes the name of `dst` if the block ends well."""
    if to != "gguf":
        with atomic_folder(dst, overwrite=overwrite) as partial:
            yield partial
        return
    target = Path(os.path.abspath(dst))
    with scratch_folder(target) as scratch:
        yield scratch / target.name
        os.replace(scratch / target.name, target)


def _write(
    base: Source,
    source: Source,
    candidate: Path,
    to: Format,
    dtype: torch.dtype | None,
    progress: Stages | None,
) -> list[str]:
    """Write the copy; returns what could not be taken along."""
    report = stage(progress, "writing")
    if to == "gguf":
        vocabulary, notes = gguf_vocabulary(base)
        return notes + write_gguf(
            source, candidate, name=candidate.stem, dtype=dtype, vocabulary=vocabulary, progress=report
        )
    write_folder(
        source, candidate, layout=to, dtype=dtype, extra_files=companions(base), overwrite=True, progress=report
    )
    return []


def _check(
    base: Source, trained: Trained, averages: Averages | None, candidate: Path, progress: Stages | None
) -> tuple[str, Comparison]:
    """Load the copy and compare. Raises: CheckpointError if it computes something else."""
    report = stage(progress, "comparing")
    copied = dtype_name(_main_dtype(open_source(candidate)))
    reference = _network(base, trained.adapter, averages)
    comparison = compare_networks(reference, load_model(candidate, progress=report), copied)
    if not comparison.ok:
        raise CheckpointError(
            f"the copy was not kept: its logits differ by up to {comparison.max_difference:.3g} from those of {trained.base}, "
            f"and {comparison.tolerance:.3g} is what {copied} may cost"
        )
    return copied, comparison


def _main_dtype(source: Source) -> torch.dtype:
    from ernie45.checkpoint.load import file_dtype

    return file_dtype(source)


@torch.no_grad()
def _network(base: Source, adapter: Path | None, averages: Averages | None) -> CausalLM:
    """The network that training had: the base in float32 and the adapter beside it, which checks merging as well; and averages under
    the names that they had there.
    """
    model = build_model(base.config, device="meta").to_empty(device="cpu").eval()
    for name, tensor in model.state_dict().items():
        base.fill(tensor, name, ())
    if adapter is not None:
        from ernie45.training.lora.read import load_adapter

        load_adapter(model, adapter)
    parameters = dict(model.named_parameters())
    for name, average in (averages or {}).items():
        parameters[name].copy_(average)
    return model
