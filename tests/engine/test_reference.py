"""The reference generator: against transformers' generation, and its own promises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ernie45
from ernie45 import SamplingParams
from ernie45.engine import reference
from ernie45.engine.prompts import prompt_ids
from ernie45.errors import RequestError
from ernie45.processing.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level vocabulary of 101 tokens: specials, then bytes of ASCII, in an order of no meaning."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:96], "Ġ", "Ċ"]  # ASCII, space, newline
    vocab = {"<s>": 0, "</s>": 1, "<|im_end|>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return ernie45.load_tokenizer(folder)


@pytest.mark.parametrize("moe", [False, True])
def test_greedy_tokens_equal_transformers(
    transformers_model: Any, tokenizer: Tokenizer, tmp_path: Path, moe: bool
) -> None:
    experts = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1} if moe else {}
    theirs = transformers_model(
        11, vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, **experts,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = ernie45.load_model(tmp_path)
    for seed in range(4):
        prompt = torch.randint(3, 101, (9 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        found = [i for piece in ernie45.generate(ours, tokenizer, prompt, params) for i in piece.ids]
        assert found == expected


def recorded(into: list[Any], what: Any, function: Any) -> Any:
    """`function`, noting `what` of every call."""

    def call(*args: Any) -> Any:
        into.append(what(*args))
        return function(*args)

    return call


def test_a_long_prompt_is_read_in_chunks(
    small_model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(moe=True)
    prompt = torch.randint(101, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = list(ernie45.generate(model, tokenizer, prompt, GREEDY))
    steps: list[Any] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", recorded(steps, lambda ids, view: len(ids), hidden))
    monkeypatch.setattr(reference, "PREFILL_CHUNK", 32)
    assert [p.ids for p in ernie45.generate(model, tokenizer, prompt, GREEDY)] == [p.ids for p in whole]
    assert steps[:3] == [32, 32, 26]


def test_prompts_of_a_batch_share_steps(
    small_model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(moe=True)
    prompts = [torch.randint(101, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (20, 50, 3, 7)]
    alone = [[i for piece in ernie45.generate(model, tokenizer, p, GREEDY) for i in piece.ids] for p in prompts]
    steps: list[Any] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", recorded(steps, lambda ids, view: view.lengths, hidden))
    monkeypatch.setattr(reference, "PREFILL_CHUNK", 32)
    together = ernie45.generate_batch(model, tokenizer, prompts, GREEDY)
    assert [list(completion.ids) for completion in together] == alone
    assert steps[:3] == [(20, 12), (32,), (6, 3, 7)]


@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    greedy=st.booleans(), moe=st.booleans(),
)  # fmt: skip
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_batch_gives_what_each_prompt_gives_alone(
    small_model: Any, tokenizer: Tokenizer, seeds: list[int], lengths: list[int], greedy: bool, moe: bool
) -> None:
    model = small_model(moe=moe, seed=3)
    prompts = [
        torch.randint(101, (n,), generator=torch.Generator().manual_seed(s)).tolist()
        for s, n in zip(seeds, lengths, strict=False)
    ]  # fmt: skip
    params = [
        SamplingParams(temperature=0 if greedy else 0.9, seed=s, max_tokens=3 + s % 7, ignore_eos=True, logprobs=2)
        for s in seeds
    ]  # fmt: skip
    finished: list[tuple[int, int]] = []
    together = ernie45.generate_batch(
        model, tokenizer, prompts, params, progress=lambda done, total: finished.append((done, total))
    )  # fmt: skip
    for prompt, wanted, completion in zip(prompts, params, together, strict=True):
        alone = list(ernie45.generate(model, tokenizer, prompt, wanted))
        assert completion.ids == tuple(i for piece in alone for i in piece.ids)
        assert completion.text == "".join(piece.text for piece in alone)
        assert completion.finish_reason == alone[-1].finish_reason == "length"
        assert len(completion.logprobs) == len(completion.ids) == wanted.max_tokens
        assert completion.prompt_tokens == len(prompt)
    assert finished[-1] == (len(prompts), len(prompts))


def test_equal_seeds_give_equal_output_and_others_differ(small_model: Any, tokenizer: Tokenizer) -> None:
    model = small_model()

    def run(seed: int | None) -> list[int]:
        params = SamplingParams(seed=seed, max_tokens=20, ignore_eos=True)
        return [i for piece in ernie45.generate(model, tokenizer, [5, 6, 7], params) for i in piece.ids]

    assert run(1) == run(1)
    assert len({tuple(run(seed)) for seed in range(5)}) == 5
    assert len({tuple(run(None)) for _ in range(3)}) > 1


class Scripted:
    """A model whose next tokens are known, so that stopping can be tested to the character."""

    def __init__(self, small: Any, script: Sequence[int]) -> None:
        self.small, self.script = small, list(script)
        self.config, self.device, self.new_cache = small.config, small.device, small.new_cache
        self.step = 0

    def hidden(self, ids: torch.Tensor, view: Any) -> torch.Tensor:
        view.commit()
        return torch.zeros(len(ids), 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(hidden), 101), -10.0)
        logits[:, self.script[self.step]] = 10.0
        self.step += 1
        return logits


def _play(small_model: Any, tokenizer: Tokenizer, text: str, end: str = "</s>", **params: Any) -> Any:
    script = [*tokenizer.encode(text), tokenizer.special_tokens[end], *tokenizer.encode("never")]
    model: Any = Scripted(small_model(), script)
    return list(
        ernie45.generate(model, tokenizer, [5], SamplingParams(**({"temperature": 0, "max_tokens": 40} | params)))
    )


def test_the_end_token_ends_and_is_not_shown(small_model: Any, tokenizer: Tokenizer) -> None:
    pieces = _play(small_model, tokenizer, "hello")
    assert "".join(piece.text for piece in pieces) == "hello"
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", tokenizer.special_tokens["</s>"])
    assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_stop_strings_across_token_borders(small_model: Any, tokenizer: Tokenizer) -> None:
    pieces = _play(small_model, tokenizer, "one two three", stop=("o t", "x"))
    assert "".join(piece.text for piece in pieces) == "one tw"
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", "o t")
    near = _play(small_model, tokenizer, "one tw", stop=("twice",))
    assert "".join(piece.text for piece in near) == "one tw", "what was held back is given out at the end"
    assert near[-1].finish_reason == "stop"


def test_stop_ids(small_model: Any, tokenizer: Tokenizer) -> None:
    (letter,) = tokenizer.encode("l")
    pieces = _play(small_model, tokenizer, "hello", stop_token_ids=(letter,), ignore_eos=True)
    assert "".join(piece.text for piece in pieces) == "he"
    assert pieces[-1].stop_reason == letter


def test_length_ends_with_all_text(small_model: Any, tokenizer: Tokenizer) -> None:
    pieces = _play(small_model, tokenizer, "hello", max_tokens=3, stop=("lloyd",))
    assert "".join(piece.text for piece in pieces) == "hel"
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("length", None)


def test_min_tokens_bans_the_end(small_model: Any, tokenizer: Tokenizer) -> None:
    pieces = _play(small_model, tokenizer, "hi", min_tokens=5, max_tokens=8)
    assert sum(len(piece.ids) for piece in pieces) >= 5
    assert tokenizer.special_tokens["</s>"] not in [i for piece in pieces[:5] for i in piece.ids]


def test_ignore_eos_goes_on(small_model: Any, tokenizer: Tokenizer) -> None:
    pieces = _play(small_model, tokenizer, "hi", ignore_eos=True, max_tokens=6)
    assert sum(len(piece.ids) for piece in pieces) == 6
    assert "".join(piece.text for piece in pieces) == "hinev"


def test_messages_go_through_the_template(small_model: Any, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    rendered = prompt_ids(tokenizer, messages)
    assert rendered == tokenizer.encode(tokenizer.render(messages))
    assert prompt_ids(tokenizer, "hi") == tokenizer.encode("hi")


@pytest.mark.parametrize("prompt", ["", [], [[]]])
def test_empty_prompts_are_refused(small_model: Any, tokenizer: Tokenizer, prompt: Any) -> None:
    with pytest.raises(RequestError):
        ernie45.generate(small_model(), tokenizer, prompt)


def test_what_does_not_fit_is_refused_with_the_numbers(small_model: Any, tokenizer: Tokenizer) -> None:
    model = small_model(max_position_embeddings=16)
    with pytest.raises(
        RequestError, match="^prompt has 17 tokens, the model's context holds 16: shorten .* to 15 tokens"
    ):
        ernie45.generate(model, tokenizer, [5] * 17)
    with pytest.raises(RequestError, match="prompt has 10 tokens and max_tokens is 7.*holds 16: .*max_tokens to 6$"):
        ernie45.generate(model, tokenizer, [5] * 10, SamplingParams(max_tokens=7))
    pieces = list(ernie45.generate(model, tokenizer, [5] * 10, SamplingParams(ignore_eos=True, seed=1)))
    assert sum(len(piece.ids) for piece in pieces) == 6
    with pytest.raises(RequestError, match="token ids from -1 to 5"):
        ernie45.generate(model, tokenizer, [5, -1])
    with pytest.raises(RequestError, match="the model knows 0 to 100"):
        ernie45.generate(model, tokenizer, [101])
    mixed: Any = [1, {"role": "user", "content": "x"}]
    with pytest.raises(RequestError, match="mixes"):
        ernie45.generate(model, tokenizer, mixed)
    with pytest.raises(RequestError, match="1 sampling parameters for 2 prompts"):
        ernie45.generate_batch(model, tokenizer, [[5], [6]], [GREEDY])


def test_padding_rows_of_the_table_are_never_chosen(small_model: Any, tokenizer: Tokenizer) -> None:
    """The embedding has more rows than the tokenizer has tokens, as in the published models."""
    model = small_model(vocab_size=400)
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=0, logprobs=3)
    pieces = list(ernie45.generate(model, tokenizer, [5, 6], params))
    assert max(i for piece in pieces for i in piece.ids) < tokenizer.vocab_size
    assert max(i for piece in pieces for logprob in piece.logprobs for i, _ in logprob.top) < tokenizer.vocab_size
