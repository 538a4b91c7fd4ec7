"""Scores and perplexity against brute force and transformers' loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ernie45.errors import ContextLengthError, RequestError
from ernie45.evaluation import score as scoring
from ernie45.evaluation.perplexity import perplexity
from ernie45.evaluation.score import Target, score
from ernie45.models.text import CausalLM

Build = Callable[..., CausalLM]


class Letters:
    """A token per character; 101 of them."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 101 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "x" * len(ids)


def brute_force(model: CausalLM, ids: list[int], first: int) -> list[float]:
    """Log-probabilities of tokens from `first` on, one forward pass per token, in float64."""
    found = []
    for end in range(first, len(ids)):
        logits = model(torch.tensor([ids[:end]]))[0, -1].double()
        found.append(float(logits[ids[end]] - logits.exp().sum().log()))
    return found


@torch.no_grad()
@pytest.mark.parametrize("batch_tokens", [1, 16, 2048])
def test_scores_are_those_of_single_tokens(
    small_model: Build, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever shares a batch, and however few logits are held at a time."""
    monkeypatch.setattr(scoring, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(scoring, "_LOGIT_VALUES", 101 * 3)
    model = small_model(moe=True)
    generator = torch.Generator().manual_seed(0)
    targets = [
        Target(ids=tuple(torch.randint(101, (size,), generator=generator).tolist()), num_scored=scored)
        for size, scored in ((9, 4), (2, 1), (14, 13), (5, 2))
    ]
    for target, found in zip(targets, score(model, targets), strict=True):
        expected = brute_force(model, list(target.ids), len(target.ids) - target.num_scored)
        assert found.logprobs.tolist() == pytest.approx(expected, abs=1e-4)
        assert found.total == pytest.approx(sum(expected), abs=1e-4)


@torch.no_grad()
def test_greedy_is_said_of_the_most_probable_tokens_alone(small_model: Build) -> None:
    model = small_model()
    ids = [7, 8]
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    best, other = Target(ids=tuple(ids), num_scored=4), Target(ids=(*ids[:-1], (ids[-1] + 1) % 101), num_scored=4)
    assert [found.is_greedy for found in score(model, [best, other])] == [True, False]


def test_targets_that_cannot_be_scored(small_model: Build) -> None:
    for ids, scored in (((1, 2), 2), ((1, 2), 0), ((1,), 1)):
        with pytest.raises(RequestError, match="cannot be scored"):
            Target(ids=ids, num_scored=scored)
    model = small_model(max_position_embeddings=8)
    score(model, [Target(ids=(1,) * 9, num_scored=1)])
    with pytest.raises(ContextLengthError, match="10 tokens is scored, the model's context holds 8"):
        score(model, [Target(ids=(1,) * 10, num_scored=1)])


@torch.no_grad()
def test_one_window_is_transformers_loss(transformers_model: Callable[..., Any], tmp_path: Any) -> None:
    from ernie45.checkpoint.load import load_model

    theirs = transformers_model(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "m")
    text = "How likely is this? " * 5
    ids = torch.tensor([Letters().encode(text)])
    found = perplexity(load_model(tmp_path / "m"), Letters(), text)
    loss = float(theirs(ids, labels=ids).loss)
    assert found.nats_per_token == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5), "a token is a byte here"
    assert found.tokens == len(text) - 1


@torch.no_grad()
@pytest.mark.parametrize(("window", "stride"), [(7, 7), (7, 3), (7, 1), (40, 40), (64, 10), (1, 1)])
def test_windows_by_brute_force(small_model: Build, window: int, stride: int) -> None:
    """Every token but the first once, with the context that its window leaves."""
    model, text = small_model(), "the quick brown fox jumps over the lazy"
    ids = Letters().encode(text)
    expected = []
    start = 0
    for position in range(1, len(ids)):
        while position > start + window:
            start += stride
        logits = model(torch.tensor([ids[start:position]]))[0, -1].double()
        expected.append(float(logits.exp().sum().log() - logits[ids[position]]))
    found = perplexity(model, Letters(), text, window=window, stride=stride)
    mean = sum(expected) / len(expected)
    assert found.tokens == len(expected)
    assert found.nats_per_token == pytest.approx(mean, abs=1e-4)
    spread = math.sqrt(sum((value - mean) ** 2 for value in expected) / (len(expected) - 1))
    assert found.standard_error == pytest.approx(spread / math.sqrt(len(expected)), rel=1e-3)
    assert (found.window, found.stride) == (window, stride)


def test_more_context_and_fewer_tokens(small_model: Build) -> None:
    model, text = small_model(), "abcdefgh" * 9
    assert perplexity(model, Letters(), text, max_tokens=10).tokens == 9
    assert perplexity(model, Letters(), text, window=8, stride=2) != perplexity(model, Letters(), text, window=8)
    assert perplexity(model, Letters(), text).window == 1024
    assert perplexity(small_model(max_position_embeddings=32), Letters(), text).window == 32
    seen: list[tuple[int, int]] = []
    perplexity(model, Letters(), text, window=32, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (71, 71)


def test_bytes_of_other_scripts_count(small_model: Build) -> None:
    class Chinese(Letters):
        def decode(self, ids: Sequence[int]) -> str:
            return "你" * len(ids)

    model, text = small_model(), "abcdefgh"
    assert perplexity(model, Chinese(), text).bits_per_byte == pytest.approx(
        perplexity(model, Letters(), text).bits_per_byte / 3
    )


@pytest.mark.parametrize(("window", "stride"), [(0, None), (513, None), (8, 9), (8, 0)])
def test_windows_out_of_range(small_model: Build, window: int, stride: int | None) -> None:
    with pytest.raises(RequestError, match="expected a window of 1 to 512"):
        perplexity(small_model(max_position_embeddings=512), Letters(), "abc", window=window, stride=stride)


def test_a_text_needs_two_tokens(small_model: Build) -> None:
    with pytest.raises(RequestError, match="has 1 tokens"):
        perplexity(small_model(), Letters(), "a")
