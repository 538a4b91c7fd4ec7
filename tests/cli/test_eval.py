"""`ernie eval`, and a loaded network as the subject of tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie45
from ernie45.checkpoint.load import load_model
from ernie45.errors import RequestError
from ernie45.evaluation.perplexity import Perplexity, perplexity
from ernie45.evaluation.subject import Continuation, NetworkSubject, Query
from ernie45.kernels.choice import native
from ernie45.training.lora.adapter import add_lora
from ernie45.training.lora.config import LoraConfig
from ernie45.training.lora.write import save_adapter

Ernie = Callable[..., Any]
TEXT = "the quick brown fox jumps over the lazy dog, User: Assistant: 你好 " * 4


@pytest.fixture
def subject(tiny: Path) -> NetworkSubject:
    return NetworkSubject(load_model(tiny), ernie45.load_tokenizer(tiny))


@torch.no_grad()
def brute_force(subject: NetworkSubject, context: str, text: str) -> float:
    """The log-probability of a text, one token at a time, where the context's tokens are a prefix of all."""
    before, ids = subject.tokenizer.encode(context), subject.tokenizer.encode(context + text)
    before = before or [subject.tokenizer.bos_id or 0]
    ids = ids if context else [*before, *ids]
    assert ids[: len(before)] == before
    total = 0.0
    for end in range(len(before), len(ids)):
        logits = subject.model(torch.tensor([ids[:end]]))[0, -1].double()
        total += float(logits.log_softmax(-1)[ids[end]])
    return total


def test_continuations_are_scored_as_they_are_read(subject: NetworkSubject) -> None:
    pairs = [("the quick brown", " fox"), ("the quick brown", " lazy dog"), ("User:", " 你好"), ("", "the fox")]
    found = subject.score([Continuation(context=context, text=text) for context, text in pairs])
    assert found == pytest.approx([brute_force(subject, *pair) for pair in pairs], abs=1e-3)
    with pytest.raises(RequestError, match="empty text"):
        subject.score([Continuation(context="a", text="")])


def test_a_token_over_the_border_belongs_to_the_continuation(subject: NetworkSubject) -> None:
    """`qui` + `ck` is read as one token `quick`: the sequence that is scored is the one that would be read."""
    encode = subject.tokenizer.encode
    context, text = "the qui", "ck brown"
    whole = encode(context + text)
    assert whole[: len(encode(context))] != encode(context), (
        "the vocabulary does not join them: the test proves nothing"
    )
    target = subject._target(Continuation(context=context, text=text))
    assert list(target.ids) == whole
    assert encode(context)[: len(whole) - target.num_scored] == whole[: -target.num_scored]


def test_answers_are_greedy(subject: NetworkSubject) -> None:
    queries = [Query(prompt="the quick", max_tokens=6), Query(prompt="User:", max_tokens=3)]
    greedy = ernie45.SamplingParams(temperature=0, max_tokens=6)
    expected = ernie45.LLM(subject.model, tokenizer=subject.tokenizer).generate("the quick", greedy)[0].text
    assert subject.generate(queries)[0] == expected
    assert subject.generate([]) == []
    stop = expected[2:4]
    assert subject.generate([Query(prompt="the quick", max_tokens=6, stop=(stop,))])[0] == expected.partition(stop)[0]
    rendered = subject.tokenizer.encode(subject.tokenizer.render([{"role": "user", "content": "the quick"}]))
    as_chat = ernie45.LLM(subject.model, tokenizer=subject.tokenizer).generate(rendered, greedy)[0].text
    assert subject.generate([Query(prompt="the quick", max_tokens=6, chat=True)])[0] == as_chat


def test_perplexity(ernie: Ernie, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    expected = perplexity(load_model(tiny), ernie45.load_tokenizer(tiny), TEXT, window=32, stride=8)
    result = ernie("eval", "tiny", "--ppl", "text.txt", "--window", "32", "--stride", "8", "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["model"] == "tiny"
    assert data["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert data["tokens"] == expected.tokens
    assert 0 < data["bits_per_byte"] < 8 * 2
    shown = ernie("eval", "tiny", "--ppl", "text.txt", "--limit", "30").out
    assert "tokens          29 in windows of 256, 256 apart" in shown


def test_kernels_are_chosen(ernie: Ernie, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    seen: list[bool] = []

    def spy(*arguments: Any, **named: Any) -> Perplexity:
        seen.append(native() is None)
        return perplexity(*arguments, **named)

    monkeypatch.setattr("ernie45.cli.eval.perplexity", spy)
    assert ernie("eval", "tiny", "--ppl", "text.txt", "--kernels", "reference").code == 0
    assert ernie("eval", "tiny", "--ppl", "text.txt").code == 0
    assert seen == [True, native() is None]


def test_dtype_is_computed_in(ernie: Ernie, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    wide, narrow = (
        json.loads(ernie("eval", "tiny", "--ppl", "text.txt", "--json", *more).out)["nats_per_token"]
        for more in ([], ["--dtype", "bfloat16"])
    )
    assert wide != narrow
    assert wide == pytest.approx(narrow, rel=0.02)


def test_an_adapter_is_evaluated_with_its_model(ernie: Ernie, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    model = load_model(tiny)
    adapter = add_lora(model, LoraConfig(), seed=0)
    with torch.no_grad():
        for lora in adapter.values():
            lora.lora_B.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    save_adapter(adapter, model.config, tmp_path / "a")
    expected = perplexity(model, ernie45.load_tokenizer(tiny), TEXT).nats_per_token
    plain, adapted = (
        json.loads(ernie("eval", "tiny", "--ppl", "text.txt", "--json", *more).out)["nats_per_token"]
        for more in ([], ["--adapter", "a"])
    )
    assert adapted == pytest.approx(expected, rel=1e-4)
    assert abs(plain - adapted) > 1e-3


def test_tasks(ernie: Ernie, tmp_path: Path) -> None:
    rows = [{"context": f"the {i}", "choices": [" fox", " dog", " cat"], "answer": i % 3} for i in range(6)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = ernie("eval", "tiny", "--task", "t.jsonl", "--limit", "5", "--output", "items.jsonl", "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert (data["task"], data["items"], set(data["measures"])) == ("t", 5, {"accuracy", "accuracy_norm"})
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 6
    again = ernie("eval", "tiny", "--task", "t.jsonl", "--output", "items.jsonl")
    assert "items          6" in again.out
    assert "accuracy " in again.out
    other = ernie("eval", "tiny", "--task", "t.jsonl", "--output", "items.jsonl", "--dtype", "bfloat16")
    assert other.code == 1
    assert "another task's or model's items" in other.err


def test_generating_tasks(ernie: Ernie, tmp_path: Path) -> None:
    header = {"task": {"match": "regex", "pattern": ".", "max_tokens": 4}}
    (tmp_path / "g.jsonl").write_text(json.dumps(header) + "\n" + json.dumps({"prompt": "the", "answer": "?"}) + "\n")
    result = ernie("eval", "tiny", "--task", "g.jsonl", "--json")
    assert result.code == 0, result.err
    assert set(json.loads(result.out)["measures"]) == {"accuracy", "answered"}


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["tiny"], 2, "--ppl --task is required"),
        (["tiny", "--ppl", "t", "--task", "t"], 2, "not allowed with"),
        (["tiny", "--task", "t", "--window", "8"], 2, "--window means nothing without --ppl"),
        (["tiny", "--ppl", "t", "--output", "x"], 2, "--output means nothing without --task"),
        (["tiny", "--ppl", "t", "--limit", "0"], 2, "--limit is 0"),
        (["tiny", "--ppl", "gone.txt"], 4, "no text file gone.txt"),
        (["tiny", "--task", "gone"], 4, "no task 'gone'"),
        (["gone", "--ppl", "text.txt"], 4, "no model 'gone'"),
    ],
)
def test_what_cannot_be_evaluated(ernie: Ernie, tmp_path: Path, argv: list[str], code: int, message: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    result = ernie("eval", *argv)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
