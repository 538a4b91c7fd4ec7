"""Every example runs, on a small random model, and prints what it promises."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import ernie45
from tests.server.served import Served

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder(tmp_path: Path, small_model: Any) -> Path:
    """A checkpoint with a byte-level tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    specials = ["<unk>", "<s>", "<|end_of_sentence|>"]  # the end token where the configuration has it
    vocab = {c: i for i, c in enumerate([*specials, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(specials)
    (tmp_path / "tokenizer").mkdir()
    built.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": specials[2]}))
    tokenizer = ernie45.load_tokenizer(tmp_path / "tokenizer")
    ernie45.save_model(small_model(moe=True, vocab_size=259), tmp_path / "model", tokenizer=tokenizer)
    return tmp_path / "model"


def _main(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_chat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _main("chat.py")(str(folder), "hello")
    assert "least certain" in capsys.readouterr().out


def test_batch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _main("batch.py")(str(folder))
    printed = capsys.readouterr().out
    assert printed.count("?") >= 6
    assert "prompt tokens were known" in printed
    assert "second turn: 0 of" not in printed


def test_structured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance")
    _main("structured.py")(str(folder))
    printed = capsys.readouterr().out
    assert re.search(r"mixed\? (positive|negative|mixed)\n.*\? [1-9][0-9]? days\n", printed)
    assert "as JSON. {" in printed


def test_convert(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _main("convert.py")(str(folder), str(tmp_path / "out"))
    assert capsys.readouterr().out.count(": True") == 2


def test_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    _main("drafts.py")()
    assert "by the block's guess" in capsys.readouterr().out


def test_train_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _main("train_tiny.py")(str(tmp_path / "tiny"))
    printed = capsys.readouterr().out
    first, last = map(float, re.findall(r"loss ([\d.]+) at first, ([\d.]+) at last", printed)[0])
    assert first > 5
    assert last < 0.1
    for question, answer in (("What is the capital of France?", "Paris."), ("Which planet is red?", "Mars.")):
        assert f"{question} {answer}\n" in printed


def test_tune_with_lora(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _main("tune_with_lora.py")(str(folder), str(tmp_path / "tuned"))
    printed = capsys.readouterr()
    before, after = re.findall(r"(?:before|after): (.*)", printed.out)
    assert before != after
    losses = [float(loss) for loss in re.findall(r"step \d+/\d+  loss ([\d.]+)", printed.err)]
    assert losses[-1] < 0.9 * losses[0]


def test_reward(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as it is where the example is run
    _main("reward.py")(str(folder), str(tmp_path / "rewarded"))
    worth = [float(found) for found in re.findall(r"worth ([\d.]+)", capsys.readouterr().out)]
    assert len(worth) == 4
    assert any(worth)
    assert all(0 <= value <= 1 for value in worth)


def test_responses(served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="openai is not installed: pip install ernie45[clients]")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{served.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", served.key)
    _main("responses.py")()
    printed = capsys.readouterr().out
    assert re.search(r"\[[0-9]+ tokens, [0-9]+ of them thought\]\n", printed)
    assert re.search(r": [0-9]+ days\nweather\(\{.*'days': [0-9]+", printed, re.DOTALL)


def test_anthropic_messages(
    served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("anthropic", reason="anthropic is not installed: pip install ernie45[clients]")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", served.url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", served.key)
    _main("anthropic_messages.py")()
    printed = capsys.readouterr().out
    assert re.match(r"[0-9]+ tokens with the tool\n", printed)
    assert re.search(r"\[[0-9]+ tokens, ended by (end_turn|max_tokens)\]\nweather\(\{'city': ", printed)


def test_every_example_is_short_and_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for example in EXAMPLES.glob("*.py"):
        assert f'_main("{example.name}")' in source
        assert len(example.read_text(encoding="utf-8").splitlines()) < 60
