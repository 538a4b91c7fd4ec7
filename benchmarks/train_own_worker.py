"""What `train.py` measures of ours alone, in processes of their own: preparing rows, and recomputation under a budget."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ernie45
from benchmarks.train_worker import network_config
from ernie45.processing.tokenizer import Tokenizer
from ernie45.processing.tokenizer_training import TokenizerConfig, tokenizer_files, train_model
from ernie45.training import data
from ernie45.training.batch import Batch, Document
from ernie45.training.config import RunConfig, StartConfig
from ernie45.training.data import DataConfig, SourceConfig
from ernie45.training.head import lm_loss_sum
from ernie45.training.loop import LoopConfig
from ernie45.training.network import TrainingNetwork
from ernie45.training.recompute import RecomputeConfig
from ernie45.training.run import prepare
from recipes.ablations.text import collect, files

_VOCABULARY, _TINY_VOCABULARY = 2048, 400
_ROWS_ALONE = 64
_TEXTS = "texts.train.jsonl"
_BATCHES = 3
_ROOMY = 1 << 60
"""A budget that nothing meets."""


def measure_data(*, folder: str, seq_len: int, num_rows: int, steps: int, tiny: bool, library: str) -> dict[str, Any]:
    """Pre-train on real text, docstrings, as `ernie train` does, and prepare the same rows with nothing beside it.

    Args: library: a folder of Python files; its docstrings are the text. Returns: `waited`, shares of the steps behind the first
        one that waited for rows; `seconds` of those steps; `alone_s`, the time that preparing a step's rows takes by itself.
    """
    home = Path(folder, "text")
    home.mkdir()
    rows = files(collect(Path(library)))[_TEXTS]
    (home / _TEXTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = _TINY_VOCABULARY if tiny else _VOCABULARY
    network = network_config(tiny=tiny)
    network = replace(network, vocab_size=max(size, network.vocab_size))
    learnt = train_model([str(row["text"]) for row in rows], TokenizerConfig(vocab_size=size))
    for name, content in tokenizer_files(learnt, "ernie").items():
        (home / name).write_bytes(content)
    config = RunConfig(
        method="pretrain",
        model=StartConfig(network=network, tokenizer=str(home)),
        data=DataConfig(train=(SourceConfig(path=str(home / _TEXTS)),), max_seq_len=seq_len),
        train=LoopConfig(steps=1 + steps, rows_per_pass=num_rows),
    )
    run = prepare(config, Path(folder, "run"), _Library())
    lines: list[dict[str, Any]] = []
    try:
        run.trainer.run(on_step=lines.append)
    finally:
        run.close()
    stream = data.pretrain_rows(config.data, ernie45.load_tokenizer(home))
    stream.next_row()  # files are opened
    began = time.perf_counter()
    for _ in range(_ROWS_ALONE):
        stream.next_row()
    alone_s = (time.perf_counter() - began) / _ROWS_ALONE * num_rows
    times = [line["time_s"] for line in lines]
    return {
        "waited": [line["data_share"] for line in lines[1:]],
        "seconds": [end - start for start, end in itertools.pairwise(times)],
        "alone_s": alone_s,
    }


def measure_recompute(*, folder: str, seq_len: int, num_rows: int, shares: list[float]) -> dict[str, Any]:
    """Let `auto` plan for budgets, as shares of what a pass keeps if nothing is computed again, and time steps under each plan.

    Returns: `kept_without_bytes`; `plans` with `share`, `budget_bytes`, `kept_bytes` (counted over a real pass), `seconds` of a
        forward and backward pass; `seconds_without`.
    """
    path = Path(folder, "model")
    generator = torch.Generator().manual_seed(0)
    model = ernie45.load_model(path).requires_grad_().train()
    ids = torch.randint(model.config.vocab_size, (num_rows, seq_len + 1), generator=generator)
    learnt = torch.arange(seq_len + 1) > 0
    batch = Batch.of_rows([[Document(ids=row, learnt=learnt)] for row in ids])

    def step(network: TrainingNetwork) -> float:
        began = time.perf_counter()
        hidden = network.run(batch).hidden_TH
        (lm_loss_sum(network, hidden, batch.labels_DT[0]) / batch.num_learnt).backward()
        network.model.zero_grad()
        return time.perf_counter() - began

    def timed(budget_bytes: int) -> tuple[TrainingNetwork, float]:
        network = TrainingNetwork(model, recompute=RecomputeConfig(policy="auto", budget_bytes=budget_bytes))
        step(network)  # makes the plan
        return network, statistics.median(step(network) for _ in range(_BATCHES))

    roomy, seconds_without = timed(_ROOMY)
    assert roomy.plan is not None, "made with the first pass"
    whole = roomy.plan.kept_without_bytes
    plans = []
    for share in shares:
        network, seconds = timed(int(share * whole))
        assert network.plan is not None, "made with the first pass"
        kept = {"budget_bytes": int(share * whole), "kept_bytes": network.plan.kept_bytes}
        plans.append({"share": share, **kept, "seconds": seconds})
    return {"kept_without_bytes": whole, "seconds_without": seconds_without, "plans": plans}


class _Library:
    """Only a tokenizer is asked for: the network begins at random."""

    def load_tokenizer(self, name: str, chat_format: str | None) -> Tokenizer:
        """See `run.Library`."""
        return ernie45.load_tokenizer(name, chat_format=chat_format)

    def load_model(self, *_: Any) -> Any:
        """See `run.Library`."""
        raise AssertionError("the network begins at random")

    def address(self, name: str) -> str:
        """See `run.Library`."""
        return name

    def generator(self, *_: Any) -> Any:
        """See `run.Library`."""
        raise AssertionError("nothing is sampled")
