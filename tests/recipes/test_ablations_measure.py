"""The figures of a run against the same figures computed document by document, and their table against hand numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

import ernie45
from ernie45.errors import ConfigError
from ernie45.layers.cache import AttentionView
from ernie45.models.text import CausalLM
from ernie45.training.balance import routers_of
from ernie45.training.batch import Batch, Document
from ernie45.training.data import DataConfig, SourceConfig
from ernie45.training.network import TrainingNetwork
from recipes.ablations.measure import Figures, load_violation, measure_mtp, router_cosine
from recipes.ablations.table import table
from recipes.held_out import batches_of, mean_loss

Build = Callable[..., CausalLM]

SPECIAL = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"]


@pytest.fixture
def documentation_tokenizer(train_byte_level: Callable[..., Path]) -> Path:
    return train_byte_level(["a word of the text"] * 20, special=SPECIAL, bos="<s>")


@pytest.fixture
def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(3)
    out = []
    for size in (9, 2, 17, 30):
        ids = torch.randint(0, 101, (size,), generator=generator)
        learnt = torch.rand(size, generator=generator) < 0.7
        learnt[0] = False
        learnt[-1] = True
        out.append(Document(ids=ids, learnt=learnt))
    return out


def batches(documents: list[Document]) -> list[Batch]:
    return [Batch.of_rows([documents[:2], documents[2:3]], num_mtp=1), Batch.of_rows([documents[3:]], num_mtp=1)]


@torch.no_grad()
def test_the_loss_is_the_mean_over_learnt_tokens_of_all_batches(small_model: Build, documents: list[Document]) -> None:
    plain, network = small_model(moe=True), TrainingNetwork(small_model(moe=True))
    losses = []
    for document in documents:
        logits = plain(document.ids[None])[0, :-1]
        losses.append(cross_entropy(logits, document.ids[1:], reduction="none")[document.learnt[1:]])
    assert mean_loss(network, batches(documents)) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


@torch.no_grad()
def test_the_block_is_asked_what_the_head_says_a_step_later(small_model: Build, documents: list[Document]) -> None:
    plain, model = (small_model(moe=True, mtp=1, use_bias=True) for _ in range(2))
    for each in (plain, model):
        assert each.lm_head.bias is not None
        with torch.no_grad():
            each.lm_head.bias[:2] = 10.0  # two candidates, so that they agree now and then
    network = TrainingNetwork(model)
    losses, equal = [], []
    for document in documents:
        ids = document.ids
        places = torch.arange(len(ids) - 1)
        hidden = plain.model(ids[:-1], places, AttentionView(lengths=(len(places),)))
        ahead = plain.model.mtp(hidden, ids[1:], places, AttentionView(lengths=(len(places),)))
        head, block = (
            plain.lm_head(plain.model.norm(states), plain.model.embed_tokens.weight) for states in (hidden, ahead)
        )
        for at in range(len(ids) - 2):  # at `at` the block reads ids up to at + 1 and names at + 2
            if document.learnt[at + 2]:
                losses.append(cross_entropy(block[at], ids[at + 2]))
                equal.append(bool(block[at].argmax() == head[at + 1].argmax()))
    loss, agreement = measure_mtp(network, batches(documents))
    assert loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert agreement == pytest.approx(sum(equal) / len(equal))
    assert 0 < agreement < 1


def test_load_of_routers_that_know_two_experts_alone(small_model: Build, documents: list[Document]) -> None:
    model = small_model(moe=True)
    for router in routers_of(model):
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias[:3] = 100.0
    assert load_violation(TrainingNetwork(model), batches(documents)) == pytest.approx(8 / 3 - 1)


def test_cosine_of_router_rows_by_hand(small_model: Build) -> None:
    routers = routers_of(small_model(moe=True))
    means = []
    for router in routers:
        rows = router.weight.detach()
        pairs = [cosine_similarity(rows[a], rows[b], dim=0) ** 2 for a in range(8) for b in range(8) if a != b]
        means.append(math.sqrt(float(torch.stack(pairs).mean())))
    assert router_cosine(routers) == pytest.approx(sum(means) / len(means), rel=1e-4)
    with torch.no_grad():
        routers[0].weight.copy_(torch.eye(8, 48))
    assert router_cosine(routers[:1]) == pytest.approx(0, abs=1e-6)


def test_a_file_is_read_once_and_whole(tmp_path: Path, documentation_tokenizer: Path) -> None:
    tokenizer = ernie45.load_tokenizer(documentation_tokenizer)
    texts = [f"a word {number} of the text" * (1 + number % 9) for number in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(train=(SourceConfig(path=str(path)),), max_seq_len=64)
    for num_mtp in (0, 1):
        found = batches_of("pretrain", data, str(path), tokenizer, num_mtp=num_mtp, rows_per_pass=3)
        assert len(found) > 3
        assert sum(batch.num_learnt for batch in found) == sum(len(tokenizer.encode(text)) for text in texts)
        assert all(len(batch.labels_DT) == 1 + num_mtp for batch in found)
    path.write_text('{"other": 1}\n')
    with pytest.raises(ConfigError, match=r"none of the rows of .*rows.jsonl can be used"):
        batches_of("pretrain", data, str(path), tokenizer)


def figures(long: float, short: float, violation: float, mtp: float | None = None) -> Figures:
    return Figures(
        losses={"long": long, "short": short},
        load_violation=violation,
        router_cosine=0.25,
        mtp_loss=mtp,
        mtp_agreement=mtp and mtp / 10,
        seconds=60.4,
    )


def test_the_table_by_hand() -> None:
    arms = {
        "all": [figures(3.0, 1.0, 0.5, 4.0), figures(3.2, 1.0, 0.7, 5.0)],
        "less": [figures(3.1, 1.0, 1.0), figures(3.6, 1.0, 1.0)],
    }
    assert table(arms).splitlines() == [
        "|  | loss, long | difference | loss, short | difference | load violation | cosine of router rows | MTP loss | MTP agreement "
        "| seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| all | 3.100 ± 0.141 | - | 1.000 ± 0.000 | - | 0.600 ± 0.141 | 0.250 ± 0.000 | 4.500 ± 0.707 | 0.450 ± 0.071 | 60 |",
        "| less | 3.350 ± 0.354 | +0.2500 ± 0.1500 | 1.000 ± 0.000 | +0.0000 ± 0.0000 | 1.000 ± 0.000 | 0.250 ± 0.000 | - | - | 60 |",
    ]


def test_a_single_seed_has_no_spread() -> None:
    lines = table({"all": [figures(3.0, 1.0, 0.5)], "less": [figures(3.1, 0.5, 0.5)]}).splitlines()
    assert lines[-1] == "| less | 3.100 | +0.1000 | 0.500 | -0.5000 | 0.500 | 0.250 | - | - | 60 |"
