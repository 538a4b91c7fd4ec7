"""The reference as a file: log-probabilities of all pairs, computed once by the network that is about to learn.

Neither a second copy of the weights nor a pass in every step is needed then. The file knows rows by their content and the weights by a
hash, so that other data, another template or other weights are an error and not a wrong number.

Shape letters: A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from ernie45.checkpoint.safetensors import byte_view, read_header, read_tensor, write_tensors
from ernie45.errors import CheckpointError, ConfigError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training import data
from ernie45.training.branches import BranchBatch, Branches, branch_logprobs, in_chunks, measuring
from ernie45.training.config import RunConfig
from ernie45.training.data import PreferencePair
from ernie45.training.lora.adapter import adapter_off, lora_parameters
from ernie45.training.network import TrainingNetwork
from ernie45.training.preference import pair_branches
from ernie45.training.reference_policy import AdapterOff, Reference

REFERENCE_FILE = "reference.safetensors"
_KEY_BYTES = 16

Report = Callable[[int, int], None]


class CachedReference:
    """Sums from a file, found by the content of a prompt and its answers."""

    def __init__(self, path: Path | str, *, model_hash: str) -> None:
        """Args: model_hash: `weights_hash` of the weights that the sums must come from.

        Raises: NotFoundError, CheckpointError if the file is something else or of other weights.
        """
        self.path = Path(path)
        header = read_header(self.path)
        found = header.metadata.get("model_hash")
        if found != model_hash or not {"keys", "counts", "sums"} <= header.entries.keys():
            raise CheckpointError(
                f"{self.path} holds reference log-probabilities of weights {found}, this run's are {model_hash}: remove the file, "
                "so that they are computed again"
            )
        keys, counts, sums = (read_tensor(header.entries[name]) for name in ("keys", "counts", "sums"))
        parts = sums.split(counts.tolist())
        self._sums = {bytes(key.tolist()): part for key, part in zip(keys, parts, strict=True)}

    def __len__(self) -> int:
        return len(self._sums)

    def sums(self, batch: BranchBatch) -> Tensor:
        """See `Reference`. Raises: CheckpointError for a row that the file does not know."""
        return torch.cat([self._found(item) for item in batch.items])

    def check(self, items: Iterable[Branches]) -> None:
        """Raises: CheckpointError for the first of them that the file does not know."""
        for item in items:
            self._found(item)

    def _found(self, item: Branches) -> Tensor:
        found = self._sums.get(item.key())
        if found is None:
            raise CheckpointError(
                f"{self.path} has no log-probabilities of {item.origin or 'a row without origin'}: data or template have changed "
                "since it was made. Remove the file, so that they are computed again"
            )
        return found


def write_reference_cache(
    path: Path | str,
    reference: Reference,
    items: Iterable[Branches],
    *,
    model_hash: str,
    max_tokens: int = 8192,
    report: Report | None = None,
) -> None:
    """Compute what `CachedReference` reads, once for the data.

    Args: max_tokens: of one pass. report: called with the rows done and all rows. Equal rows are computed once.
    Raises: ConfigError without rows.
    """
    unique = {item.key(): item for item in items}
    if not unique:
        raise ConfigError("there are no rows to compute reference log-probabilities of")
    sums, done = [], 0
    for chunk in in_chunks(unique.values(), max_tokens):
        sums.append(reference.sums(BranchBatch.of_items(chunk)))
        done += len(chunk)
        if report is not None:
            report(done, len(unique))
    tensors = {
        "keys": torch.tensor([list(key) for key in unique], dtype=torch.uint8).view(-1, _KEY_BYTES),
        "counts": torch.tensor([len(item.answers) for item in unique.values()]),
        "sums": torch.cat(sums).float(),
    }
    write_tensors(path, tensors, metadata={"model_hash": model_hash})


def weights_hash(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """BLAKE2b over names, dtypes and bytes of all weights: equal for equal weights, wherever they came from.

    Args: without: names to leave out, such as those of an adapter.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if name in without:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(byte_view(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


class BeforeTraining:
    """The network that is about to train, as long as it has not."""

    def __init__(self, network: TrainingNetwork) -> None:
        self._network = network

    def sums(self, batch: BranchBatch) -> Tensor:
        """See `Reference`."""
        with measuring(self._network):
            return batch.sums(branch_logprobs(self._network, batch))


class PendingReference:
    """A cached reference that is made when all other parts of a run are known to be right, and its folder is there."""

    def __init__(self, make: Callable[[], CachedReference]) -> None:
        self._make = make
        self._made: CachedReference | None = None

    def fill(self) -> None:
        """Make it; before the first step, while the weights are those of the start."""
        self._made = self._make()

    def sums(self, batch: BranchBatch) -> Tensor:
        """See `Reference`."""
        assert self._made is not None, "fill comes before the first step"
        return self._made.sums(batch)


def pending_reference(
    config: RunConfig,
    network: TrainingNetwork,
    tokenizer: Tokenizer,
    folder: Path,
    held_out: Sequence[Sequence[PreferencePair]],
    begin_stage: Callable[[], Report | None],
) -> PendingReference:
    """The cached reference of a run: read from its file if there is one that fits, computed and written otherwise.

    Args: folder: of the run. held_out: rows that are looked at besides. begin_stage: called when computing begins, gives what is told
        the rows done and all rows.
    Raises: ConfigError for packed weights; `fill` what reading rows and file raises.
    """
    model = network.model
    if model.mapped_bytes:
        raise ConfigError(
            "the weights are packed, and a cached reference is told by plain ones: let reference.kind be live"
        )
    path = folder / REFERENCE_FILE if config.reference.file is None else Path(config.reference.file)
    live: Reference = BeforeTraining(network) if config.lora is None else AdapterOff(network, adapter_off)

    def items() -> Iterator[Branches]:
        for row in chain(held_out, data.preference_rows(config.data, tokenizer).once()):
            yield from map(pair_branches, row)

    def make() -> CachedReference:
        name = weights_hash(model, without=lora_parameters(model).keys())
        if path.exists():
            cached = CachedReference(path, model_hash=name)
            cached.check(items())
            return cached
        path.parent.mkdir(parents=True, exist_ok=True)
        write_reference_cache(path, live, items(), model_hash=name, report=begin_stage())
        return CachedReference(path, model_hash=name)

    return PendingReference(make)
