"""Streams of packed rows: complete, the same for any number of processes, and exactly resumable."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie45.errors import CheckpointError, ConfigError, RequestError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training.batch import IGNORED, Batch, Document
from ernie45.training.data import (
    DataConfig,
    PackedRows,
    SourceConfig,
    kto_rows,
    preference_rows,
    pretrain_rows,
    sft_rows,
)
from ernie45.training.data.order import Sample
from ernie45.training.data.token_files import write_token_files

WriteRows = Callable[..., str]
Rows = list[tuple[tuple[str, tuple[int, ...], tuple[bool, ...], int], ...]]


def sft_row(idx: int, words: int) -> dict[str, Any]:
    return {"src": [f"question {idx}"], "tgt": [" ".join(["w"] * words)]}


def texts(num: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [{"text": f"{idx} " + "x y " * draw.randrange(0, 40)} for idx in range(num)]


def plain(row: Sequence[Document]) -> Any:
    return tuple((d.origin, tuple(d.ids.tolist()), tuple(d.learnt.tolist()), d.num_unread) for d in row)


def taken(stream: PackedRows[Any, Document], num: int) -> Rows:
    return [plain(stream.next_row()) for _ in range(num)]


@pytest.fixture
def sft_path(write_rows: WriteRows) -> str:
    draw = random.Random(1)
    return write_rows([sft_row(idx, draw.randrange(1, 30)) for idx in range(60)], "sft.jsonl")


@pytest.fixture
def text_path(write_rows: WriteRows) -> str:
    return write_rows(texts(50), "text.jsonl")


def config(*paths: str, **options: Any) -> DataConfig:
    defaults: dict[str, Any] = {"max_seq_len": 96, "buffer_rows": 3}
    return DataConfig(train=tuple(SourceConfig(path=path) for path in paths), **defaults | options)


def test_once_takes_every_row_once_and_leaves_the_stream_alone(sft_path: str, ernie: Tokenizer) -> None:
    stream = sft_rows(config(sft_path), ernie)
    expected = taken(sft_rows(config(sft_path), ernie), 3)
    rows = list(stream.once())
    assert Counter(document.origin for row in rows for document in row) == Counter(
        f"{sft_path}:{line}" for line in range(1, 61)
    )
    assert all(sum(document.num_inputs for document in row) <= 96 for row in rows)
    assert taken(stream, 3) == expected
    shares = [[plain(row) for row in sft_rows(config(sft_path), ernie, rank=rank, world=2).once()] for rank in (0, 1)]
    assert shares == [[plain(row) for row in rows][rank::2] for rank in (0, 1)]
    assert [len(row) for row in sft_rows(config(sft_path, packing="none"), ernie).once()] == [1] * 60


def test_what_was_drawn_came_out_or_waits(sft_path: str, ernie: Tokenizer) -> None:
    stream = sft_rows(config(sft_path), ernie)
    seen: Counter[str] = Counter()
    for _ in range(75):
        seen.update(document.origin for document in stream.next_row())
        state = stream.state()
        drawn = [Sample(0, idx) for idx in range(state["taken"][0])]
        expected = Counter(f"{sft_path}:{stream._order.row(sample) + 1}" for sample in drawn)
        waiting = Counter(f"{sft_path}:{stream._order.row(Sample(s, c)) + 1}" for s, c, _ in state["waiting"])
        assert seen + waiting == expected
    assert stream.state()["taken"][0] > 120, "more than two epochs"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.integers(0, 25),
    world=st.integers(1, 3),
    num_mtp=st.integers(0, 2),
    packing=st.sampled_from(["best_fit", "none"]),
    pretrain=st.booleans(),
)
def test_processes_share_one_sequence_and_any_state_goes_on(
    before: int, world: int, num_mtp: int, packing: Any, pretrain: bool, sft_path: str, text_path: str, ernie: Tokenizer
) -> None:
    opens: Any = pretrain_rows if pretrain else sft_rows
    settings = config(text_path if pretrain else sft_path, packing=packing)
    whole = taken(opens(settings, ernie, num_mtp=num_mtp), (before + 8) * world)
    states = []
    for rank in range(world):
        stream = opens(settings, ernie, num_mtp=num_mtp, rank=rank, world=world)
        assert taken(stream, before) == whole[rank : before * world : world]
        states.append(json.loads(json.dumps(stream.state())))
        assert taken(stream, 8) == whole[before * world + rank :: world]
    assert all(state == states[0] for state in states)
    alone = opens(settings, ernie, num_mtp=num_mtp)
    alone.restore(states[-1])
    assert alone.state() == states[-1]
    assert taken(alone, 8) == whole[before * world : before * world + 8]
    assert len(json.dumps(states[0])) < 20_000


@pytest.mark.parametrize("num_mtp", [0, 1, 2])
def test_every_token_of_a_text_is_learnt_once_at_every_depth(text_path: str, ernie: Tokenizer, num_mtp: int) -> None:
    settings = config(text_path, max_seq_len=30, shuffle=False)
    rows = list(pretrain_rows(settings, ernie, num_mtp=num_mtp).once())
    assert sum(document.num_inputs for row in rows for document in row) > 0.9 * 30 * len(rows)
    learnt: dict[str, list[Counter[int]]] = {}
    pieces: dict[str, list[Document]] = {}
    for row in rows:
        for document in row:
            pieces.setdefault(document.origin, []).append(document)
            labels = Batch.of_rows([[document]], num_mtp=num_mtp).labels_DT
            counters = learnt.setdefault(document.origin, [Counter() for _ in range(num_mtp + 1)])
            for depth, counter in enumerate(counters):
                counter.update(label for label in labels[depth].tolist() if label != IGNORED)
    assert any(len(found) > 2 for found in pieces.values())
    for line, text in enumerate(texts(50), 1):
        ids = [*ernie.encode(text["text"]), ernie.eos_id]
        origin = f"{text_path}:{line}"
        read = [token for document in pieces[origin] for token in document.ids[: document.num_inputs].tolist()]
        assert read == ids[:-1], "pieces lie behind each other"
        assert learnt[origin] == [Counter(ids[1 + depth :]) for depth in range(num_mtp + 1)]


def test_packed_documents_learn_what_they_learn_alone(
    sft_path: str, ernie: Tokenizer, small_model: Callable[..., Any]
) -> None:
    model = small_model(vocab_size=ernie.vocab_size)

    def losses(rows: list[list[Document]]) -> torch.Tensor:
        batch = Batch.of_rows(rows)
        view = batch.view()
        with torch.no_grad():
            logits = model.logits(model.model(batch.tokens_T, view.positions(), view))
        return F.cross_entropy(logits, batch.labels_DT[0], ignore_index=IGNORED, reduction="none")

    stream = sft_rows(config(sft_path), ernie)
    rows = [list(stream.next_row()) for _ in range(2)]
    assert len(rows[0]) > 1
    alone = torch.cat([losses([[document]]) for row in rows for document in row])
    torch.testing.assert_close(losses(rows), alone)


def test_bad_rows_are_reported_with_their_lines(
    write_rows: WriteRows, ernie: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(
        [
            sft_row(0, 3),
            "{",
            "",
            {"src": ["q"], "tgt": []},
            {"src": "q", "tgt": "a", "label": [0]},
            sft_row(5, 200),
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>t</think>"}]},
            {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]},
        ]
    )
    stream = sft_rows(config(path), ernie)
    with caplog.at_level(logging.WARNING):
        taken(stream, 5)
    report = stream.report()
    assert {row.origin: row.reason.split(":")[0] for row in report.bad} == {
        f"{path}:2": "no JSON",
        f"{path}:4": "src has 1 turns and tgt 0",
        f"{path}:7": "messages[1] is an empty answer",
        f"{path}:8": "the text holds half of a surrogate pair, '\\ud800' at character 6",
    }
    epochs, rest = divmod(report.num_rows, 7)
    assert epochs > 2
    assert 0 <= report.num_bad - 4 * epochs <= rest
    assert 0 <= report.too_long - epochs <= 1
    assert 0 <= report.nothing_learnt - epochs <= 1
    assert report.num_rows == report.num_bad + report.too_long + report.nothing_learnt + report.num_used
    assert f"left out {path}:2: no JSON" in caplog.text
    assert len(caplog.records) == 4, "once each, not in every epoch"
    assert report.sizes.total() == report.num_rows - report.num_bad


def test_strict_stops_at_the_first_bad_row(write_rows: WriteRows, ernie: Tokenizer) -> None:
    path = write_rows([sft_row(0, 3), {"src": 1, "tgt": "a"}])
    with pytest.raises(RequestError, match=f"{path}:2: src must be text or a list of texts, not int; repair the row"):
        taken(sft_rows(config(path, strict=True), ernie), 3)


def test_an_error_about_long_rows_stops_the_run(write_rows: WriteRows, ernie: Tokenizer) -> None:
    path = write_rows([sft_row(0, 3), sft_row(1, 300)])
    with pytest.raises(RequestError, match=f"{path}:2 has .* tokens, the limit is 96"):
        taken(sft_rows(config(path, long_rows="error"), ernie), 3)
    shortened = sft_rows(config(path, long_rows="right"), ernie)
    rows = list(shortened.once())
    assert [document.num_inputs for row in rows for document in row][-1] == 96
    assert shortened.report().shortened == 1


def test_data_without_a_usable_row_is_an_error_and_no_endless_loop(write_rows: WriteRows, ernie: Tokenizer) -> None:
    with pytest.raises(
        ConfigError, match=r"none of the 2 rows can be used, the first because: .*rows.jsonl:\d: no JSON"
    ):
        sft_rows(config(write_rows(["{", "["])), ernie).next_row()
    with pytest.raises(ConfigError, match=r"none of the 1 rows can be used: \d+ are too long, and of 0 nothing"):
        sft_rows(config(write_rows([sft_row(0, 300)])), ernie).next_row()
    paths = (write_rows([sft_row(0, 3)], "a.jsonl"), write_rows([], "b.jsonl"))
    weighted = tuple(SourceConfig(path=path, weight=1.0) for path in paths)
    with pytest.raises(ConfigError, match="source 2 of 2 has no rows"):
        sft_rows(DataConfig(train=weighted), ernie)
    with pytest.raises(ConfigError, match="rank is 2 of 2 processes"):
        sft_rows(config(write_rows([sft_row(0, 3)])), ernie, rank=2, world=2)


def test_counts_go_on_after_a_restore(sft_path: str, ernie: Tokenizer) -> None:
    first = sft_rows(config(sft_path), ernie)
    taken(first, 10)
    second = sft_rows(config(sft_path), ernie)
    second.restore(first.state())
    taken(first, 10)
    taken(second, 10)
    assert first.report().counts() == second.report().counts()
    assert first.report().packed_rows == 20
    assert 0.8 < first.report().efficiency <= 1


def test_a_state_of_other_data_is_refused(
    sft_path: str, text_path: str, ernie: Tokenizer, tokenizer_of: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    settings = config(sft_path)
    state = sft_rows(settings, ernie).state()
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(sft_path).read_bytes())
    sft_rows(config(str(moved)), ernie).restore(state)
    sft_rows(replace(settings, strict=True), ernie).restore(state)
    sft_rows(settings, ernie, rank=1, world=2).restore(state)
    moved.write_text(json.dumps(sft_row(0, 1)) + "\n")
    others = [
        sft_rows(config(str(moved)), ernie),
        sft_rows(config(sft_path, text_path), ernie),
        sft_rows(settings, tokenizer_of("chatml")),
        sft_rows(settings, ernie, num_mtp=1),
        sft_rows(replace(settings, split=(0.5, 0.5, 0.0)), ernie),
    ]
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"shuffle": False},
        {"max_seq_len": 97},
        {"buffer_rows": 4},
        {"packing": "none"},
        {"long_rows": "left"},
        {"thoughts": "all"},
        {"chat_format": "ernie_vl"},
    ]
    others += [sft_rows(replace(settings, **change), ernie) for change in changes]
    for other in others:
        with pytest.raises(CheckpointError, match="belongs to other data"):
            other.restore(state)


def texts_of(stream: PackedRows[Any, Document], tokenizer: Tokenizer) -> list[str]:
    return [
        tokenizer.decode(document.ids.tolist(), skip_special_tokens=False) for row in stream.once() for document in row
    ]


def test_begin_and_end_tokens_are_options(write_rows: WriteRows, ernie: Tokenizer, train_byte_level: Any) -> None:
    path = write_rows([{"text": "some text"}])
    shown = [
        texts_of(pretrain_rows(config(path, add_bos=bos, add_eos=eos), ernie), ernie)[0]
        for bos, eos in ((False, False), (False, True), (True, False), (True, True))
    ]
    assert shown == ["some text", "some text</s>", "<s>some text", "<s>some text</s>"]
    assert texts_of(pretrain_rows(config(path), ernie), ernie) == ["some text</s>"], "that is the default"


def test_seeds_give_orders_and_files_may_be_read_as_they_stand(sft_path: str, ernie: Tokenizer) -> None:
    def origins(**options: Any) -> list[str]:
        stream = sft_rows(config(sft_path, packing="none", **options), ernie)
        return [stream.next_row()[0].origin for _ in range(60)]

    assert len({tuple(origins(seed=seed)) for seed in range(3)}) == 3
    in_order = [f"{sft_path}:{line}" for line in range(1, 61)]
    assert origins(shuffle=False) == in_order
    assert sorted(origins(seed=1)) == sorted(in_order)


def test_weights_mix_sources(write_rows: WriteRows, ernie: Tokenizer) -> None:
    paths = [write_rows([sft_row(idx, 2) for idx in range(num)], f"{num}.jsonl") for num in (3, 40)]

    def share(*weights: float | None) -> float:
        sources = tuple(SourceConfig(path=path, weight=weight) for path, weight in zip(paths, weights, strict=True))
        stream = sft_rows(DataConfig(train=sources, max_seq_len=96, packing="none"), ernie)
        return sum(stream.next_row()[0].origin.startswith(paths[0]) for _ in range(86)) / 86

    assert share(None, None) == 3 / 43
    assert abs(share(3, 1) - 0.75) < 0.02


def test_parts_of_a_split_share_the_rows_out(sft_path: str, write_rows: WriteRows, ernie: Tokenizer) -> None:
    settings = config(sft_path, split=(0.6, 0.3, 0.1))
    parts = [
        [document.origin for row in sft_rows(settings, ernie, part=part).once() for document in row]
        for part in ("train", "valid", "test")
    ]
    assert sorted(origin for part in parts for origin in part) == sorted(f"{sft_path}:{line}" for line in range(1, 61))
    assert 20 < len(parts[0]) < 50
    assert parts[2]
    other = write_rows([sft_row(0, 1)], "valid.jsonl")
    named = replace(settings, valid=(SourceConfig(path=other),))
    assert [row[0].origin for row in sft_rows(named, ernie, part="valid").once()] == [f"{other}:1"]
    assert [row[0].origin for row in sft_rows(named, ernie).once()] == [
        row[0].origin for row in sft_rows(settings, ernie).once()
    ]
    with pytest.raises(
        ConfigError, match="there are no valid rows: give split a share for them, or name files under valid"
    ):
        sft_rows(config(sft_path), ernie, part="valid")


def test_a_larger_buffer_packs_better(write_rows: WriteRows, ernie: Tokenizer) -> None:
    draw = random.Random(0)
    path = write_rows([sft_row(idx, draw.randrange(5, 30)) for idx in range(300)])
    filled = []
    for rows in (1, 20):
        stream = sft_rows(config(path, buffer_rows=rows), ernie)
        taken(stream, 60)
        filled.append(stream.report().efficiency)
    assert filled[1] > filled[0] + 0.01


def test_chat_format_and_thoughts_reach_the_text(write_rows: WriteRows, ernie: Tokenizer) -> None:
    path = write_rows([{"src": ["q", "r"], "tgt": ["<think>s</think>a", "<think>t</think>b"]}])
    shown = {
        thoughts: texts_of(sft_rows(config(path, chat_format="ernie_vl", thoughts=thoughts), ernie), ernie)[0]
        for thoughts in ("last", "all", "none")
    }
    assert {name: (text.count("\ns\n"), text.count("\nt\n")) for name, text in shown.items()} == {
        "last": (0, 1),
        "all": (1, 1),
        "none": (0, 0),
    }


def test_token_files_are_pretrained_on_and_nothing_else(
    tmp_path: Path, ernie: Tokenizer, tokenizer_of: Callable[[str], Tokenizer], text_path: str
) -> None:
    write_token_files(tmp_path / "t", [ernie.encode(text["text"]) for text in texts(50)], ernie)
    settings = config(str(tmp_path / "t"))
    from_files = [plain(row) for row in pretrain_rows(settings, ernie).once()]
    from_text = [plain(row) for row in pretrain_rows(config(text_path), ernie).once()]
    assert [[entry[1:] for entry in row] for row in from_files] == [[entry[1:] for entry in row] for row in from_text]
    with pytest.raises(ConfigError, match="holds tokens without turns"):
        sft_rows(settings, ernie)
    with pytest.raises(ConfigError, match="written with another tokenizer"):
        pretrain_rows(settings, tokenizer_of("chatml"))


def test_pairs_and_judged_answers_are_packed(write_rows: WriteRows, ernie: Tokenizer) -> None:
    pairs = [{"question": f"q{idx}", "chosen": "good " * (idx % 7 + 1), "rejected": "bad"} for idx in range(20)]
    stream = preference_rows(config(write_rows(pairs, "p.jsonl")), ernie)
    first = [pair.origin for _ in range(6) for pair in stream.next_row()]
    state = stream.state()
    then = [[pair.origin for pair in stream.next_row()] for _ in range(6)]
    stream.restore(state)
    assert [[pair.origin for pair in stream.next_row()] for _ in range(6)] == then
    assert len(first) > 6, "rows hold several"
    for row in stream.once():
        assert sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in row) <= 96
    judged = [{"prompt": f"q{idx}", "completion": "x", "label": idx % 2 == 0} for idx in range(9)]
    rows = list(kto_rows(config(write_rows(judged, "k.jsonl")), ernie).once())
    assert sorted(example.desirable for row in rows for example in row) == [False] * 4 + [True] * 5
