"""Masked logits keep what the bits allow and nothing else."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45.engine.bitmask import apply_bitmask, new_bitmask
from ernie45.engine.params import SamplingParams
from ernie45.engine.sampling import sample
from ernie45.errors import ShapeError
from ernie45.layers.cache import AttentionView
from ernie45.models.text import CausalLM
from ernie45.processing.constraint import Constraint
from ernie45.processing.grammar import Grammars, Matcher
from ernie45.processing.tokenizer import load_tokenizer


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100])
def test_bits_decide(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(3, vocab_size, generator=generator)
    allowed = torch.rand(3, vocab_size, generator=generator) < 0.5
    bitmask = torch.zeros_like(new_bitmask(3, vocab_size))
    for row, idx in allowed.nonzero().tolist():
        bit = 1 << (idx % 32)
        bitmask[row, idx // 32] |= bit - (1 << 32) if bit >> 31 else bit
    masked = apply_bitmask(logits, bitmask)
    assert torch.equal(masked, torch.where(allowed, logits, torch.tensor(-math.inf)))


def test_a_new_mask_allows_everything_it_knows() -> None:
    logits = torch.zeros(2, 40)
    assert torch.equal(apply_bitmask(logits, new_bitmask(2, 40)), logits)
    assert apply_bitmask(logits, new_bitmask(2, 32))[0].tolist() == [0.0] * 32 + [-math.inf] * 8


def test_rows_have_to_agree() -> None:
    for bitmask in (new_bitmask(1, 40), new_bitmask(2, 40).long(), new_bitmask(2, 40)[0]):
        with pytest.raises(ShapeError, match="bitmask"):
            apply_bitmask(torch.zeros(2, 40), bitmask)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["a", "b"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}


def test_a_random_network_writes_what_is_asked_for(
    small_model: Callable[..., CausalLM], train_byte_level: Callable[..., Path]
) -> None:
    pytest.importorskip("llguidance")
    jsonschema = pytest.importorskip("jsonschema")
    tokenizer = load_tokenizer(train_byte_level(["the quick brown fox"], special=["<s>", "</s>"], bos="<s>"))
    model = small_model(vocab_size=330)  # a published table, too, has more rows than the vocabulary has ids
    grammars = Grammars(tokenizer)
    num_whole = 0
    for seed in range(2):
        matcher = grammars.matcher(Constraint.json_schema(SCHEMA))
        ids = _written(model, matcher, tokenizer.stop_ids, seed)
        if ids is not None:
            num_whole += 1
            jsonschema.validate(json.loads(tokenizer.decode(ids)), SCHEMA)
    assert num_whole


@torch.inference_mode()
def _written(model: CausalLM, matcher: Matcher, stop_ids: frozenset[int], seed: int) -> list[int] | None:
    """Answer to nothing in particular; None if it takes more than 100 tokens."""
    cache, ids = model.new_cache(256), [3]
    for _ in range(100):
        view = AttentionView(lengths=(1,), caches=(cache,))
        logits = model.logits(model.hidden(torch.tensor(ids[-1:]), view))
        bitmask = new_bitmask(1, logits.shape[1])
        matcher.mask(bitmask[0].numpy())
        masked = apply_bitmask(logits, bitmask)[0]
        token = sample(masked, SamplingParams(), seed=seed, prompt=[3], output=ids[1:])
        assert matcher.accept(token)
        if token in stop_ids or matcher.finished:
            return [i for i in [*ids[1:], token] if i not in stop_ids]
        ids.append(token)
    return None
