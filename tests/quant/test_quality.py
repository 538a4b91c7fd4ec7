"""Smoothing changes nothing by itself; the figures of the comparison against hand-made ones; the command's options."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.source import open_source
from ernie45.cli.main import main
from ernie45.errors import RequestError, ShapeError
from ernie45.models.build import build_model
from ernie45.quant.calibration import Calibration
from ernie45.quant.quality import Quality, chunks_of, compare
from ernie45.quant.smoothing import smooth
from ernie45.store.location import model_path

TEXT = "The quick brown fox jumps over the lazy dog; " * 80


class _Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 101 for letter in text]


@torch.inference_mode()
@pytest.mark.parametrize("moe", [False, True])
def test_smoothing_keeps_the_network_and_evens_its_columns(checkpoint: Callable[..., Path], moe: bool) -> None:
    folder = checkpoint(moe=moe, mtp=1)
    model, source = load_model(folder), open_source(folder)
    norm = "model.layers.2.input_layernorm.weight"
    model.state_dict()[norm][5] *= 50  # an outlier column
    original_fill = source.fill

    def fill(out: torch.Tensor, target: str, box: Any) -> None:
        original_fill(out, target, box)
        if target == norm:
            out[5] *= 50

    source.fill = fill  # type: ignore[method-assign]
    ids = torch.randint(101, (3, 40), generator=torch.Generator().manual_seed(0))
    smoothed = smooth(source, Calibration(chunks_CT=ids, origin={}))
    other = build_model(source.config).eval()
    for name, tensor in other.state_dict().items():
        smoothed.fill(tensor, name, ())
    assert torch.equal(other(ids), model(ids)), "factors are powers of two: not a bit may change"
    assert float(other.state_dict()[norm][5]) < 0.25 * float(model.state_dict()[norm][5])


def test_figures_by_hand(checkpoint: Callable[..., Path]) -> None:
    """A model against itself, and against one whose head is shifted: the definitions, spelled out."""
    folder = checkpoint(tie_word_embeddings=False)
    reference, model = load_model(folder), load_model(folder)
    same = compare(reference, model, chunks_of(_Letters(), TEXT))
    assert (same.perplexity_change, same.kl_mean, same.same_best_token) == (0, 0, 1)
    assert (same.chunk_tokens, same.tokens) == (512, 511 * (len(TEXT) // 512))
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1.5)
    chunks = chunks_of(_Letters(), TEXT, tokens=10, limit=3)
    found = compare(reference, model, chunks)
    with torch.inference_mode():
        p, q = (m(chunks)[:, :-1].double().log_softmax(-1) for m in (reference, model))
    nll = -q.gather(2, chunks[:, 1:, None]).mean()
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_by_position == pytest.approx(kl.mean(0).tolist(), rel=1e-4)
    assert found.same_best_token == 1, "a scaled head prefers the same tokens"


def test_what_cannot_be_compared(checkpoint: Callable[..., Path]) -> None:
    model = load_model(checkpoint())
    with pytest.raises(RequestError, match="3 tokens"):
        chunks_of(_Letters(), "abc")
    with pytest.raises(ShapeError, match="vocabularies"):
        compare(model, load_model(checkpoint(name="b", vocab_size=90)), torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ShapeError, match="expected"):
        compare(model, model, torch.zeros(3, 1, dtype=torch.int64))


@pytest.mark.parametrize("positions", [1, 39, 511])
def test_plot(tmp_path: Path, check_png: Callable[[Path], tuple[int, int]], positions: int) -> None:
    pytest.importorskip("matplotlib")
    quality = Quality(
        tokens=64 * positions, chunk_tokens=positions + 1, perplexity_reference=14.8, perplexity=15.4,
        perplexity_change=0.04, kl_mean=0.03, kl_99=0.4, same_best_token=0.9,
        kl_by_position=tuple(0.02 + 0.1 / (i + 1) for i in range(positions)),
    )  # fmt: skip
    assert quality.save_plot(tmp_path / "quality.png")
    check_png(tmp_path / "quality.png")


def test_without_matplotlib_the_report_says_that_there_is_no_plot(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--report", str(tmp_path / "text.txt"), "-o", str(tmp_path / "own")]
    assert main(["quantize", "original", "--scheme", "wint8", *arguments]) == 0
    printed = capsys.readouterr()
    assert "no plot: matplotlib is not installed" in printed.err
    assert "same first choice" in printed.out
    assert not (tmp_path / "own" / "quality.png").exists()


def test_a_report_with_a_plot_lies_beside_the_weights(
    installed: Path, tmp_path: Path, check_png: Callable[[Path], tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "own"
    assert (
        main(["quantize", "original", "--scheme", "wint8", "--report", str(tmp_path / "text.txt"), "-o", str(out)]) == 0
    )
    check_png(out / "quality.png")
    figures = json.loads((out / "quality.json").read_text())
    printed = capsys.readouterr()
    assert f"{figures['perplexity_reference']:.3f} -> {figures['perplexity']:.3f}" in printed.out
    assert figures["chunk_tokens"] == len(figures["kl_by_position"]) + 1 == 512
    assert 0 < figures["kl_mean"] < 0.1
    assert "no plot" not in printed.err
    assert main(["verify", str(out)]) == 0, "a report makes the folder no stranger"


def test_a_report_text_that_is_too_short_is_refused_before_any_work(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    assert main(["quantize", "original", "--scheme", "wint8", "--report", str(tmp_path / "short.txt")]) == 1
    assert "the text has 11 tokens, one chunk has 512" in capsys.readouterr().err
    assert not list((tmp_path / "home").rglob("*wint*"))


@pytest.fixture
def installed(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a model `original` that has a tokenizer of single bytes."""
    monkeypatch.setenv("ERNIE45_HOME", str(tmp_path / "home"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = checkpoint(vocab_size=256, num_hidden_layers=1)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "text.txt").write_text(TEXT)
    model_path("original").parent.mkdir(parents=True)
    model_path("original").symlink_to(folder)
    return folder


def test_the_command_and_its_options(installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = str(tmp_path / "text.txt"), tmp_path / "own"
    assert main(["quantize", "original", "--scheme", "wint4-all"]) == 0
    assert "bits per weight" in capsys.readouterr().out
    store = model_path("original-wint4-all")
    assert (store / "tokenizer.json").read_bytes() == (installed / "tokenizer.json").read_bytes()
    assert main(["quantize", "original", "--scheme", "wint4-all"]) == 1, "it is there already"
    assert main(["quantize", "original", "--scheme", "wint4-all", "--force", "--group-size", "128"]) == 0
    stated = json.loads((store / "config.json").read_text())["quantization_config"]
    assert any(rule["group"] == 128 for rule in stated["formats"])
    capsys.readouterr()
    arguments = ["--calibrate", text, "--report", text, "-o", str(out), "--json"]
    assert main(["quantize", "original", "--scheme", "wint8", *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["path"] == str(out)
    assert printed["quality"] == json.loads((out / "quality.json").read_text())
    assert printed["quality"]["tokens"] == 511 * (len(TEXT) // 512)
    calibration = json.loads((out / "config.json").read_text())["quantization_config"]["calibration"]
    assert (calibration["file"], calibration["chunks"]) == ("text.txt", len(TEXT) // 512)
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--scheme", "wint3"], 2),
        (["--scheme", "wint8", "--group-size", "32"], 2),
        (["--scheme", "wint8", "--calibrate", "missing.txt"], 4),
        (["--scheme", "wint8", "--report", "missing.txt"], 4),
    ],
)
def test_wrong_options(installed: Path, tmp_path: Path, arguments: list[str], code: int) -> None:
    assert main(["quantize", "original", *arguments]) == code
    assert not list((tmp_path / "home").rglob("*wint*"))
