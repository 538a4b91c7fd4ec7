"""Our GGUF files in llama.cpp, through its server class: the same greedy tokens as ours.

Two implementations round differently, so a different token counts only where ours prefers its own clearly: by more
than `MARGIN` over the second best. Behind a token that does not count the texts are two texts, and the comparison of
that prompt ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie45
from ernie45 import ModelConfig, MoeConfig, SamplingParams
from ernie45.cli.main import main
from ernie45.models.build import build_model
from ernie45.models.init import initialize
from ernie45.models.text import CausalLM
from ernie45.processing.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
xllamacpp = pytest.importorskip("xllamacpp", reason="pip install 'ernie45[slow]' brings llama.cpp")

NUM_TOKENS = 64
MARGIN = 1e-3
"""Smallest difference of our two largest logits at which a different choice is a mistake."""

_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_MOE = MoeConfig(
    moe_num_experts=8, moe_k=3, moe_intermediate_size=96, moe_num_shared_experts=2, moe_layer_start_index=1
)


def server(path: Path) -> Any:
    """llama.cpp on the CPU, with a float32 cache and without flash attention."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_gpu_layers = 0
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def their_tokens(llama: Any, prompt: Sequence[int]) -> tuple[list[int], str]:
    """Greedy token ids, at most `NUM_TOKENS`, and the finish reason."""
    request = {
        "prompt": list(prompt),
        "temperature": 0,
        "seed": 0,
        "n_predict": NUM_TOKENS,
        "n_probs": 1,  # the ids come with the probabilities
        "cache_prompt": False,
    }
    answer = llama.handle_completions(request)["choices"][0]
    return [token["id"] for token in answer["logprobs"]["content"]], answer["finish_reason"]


def count_equal(llama: Any, model: CausalLM, tokenizer: Tokenizer, prompt: Sequence[int]) -> int:
    """Number of equal tokens from the start; fails if the first difference is a clear one."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    ours = [token for piece in ernie45.generate(model, tokenizer, prompt, params) for token in piece.ids]
    theirs, reason = their_tokens(llama, prompt)
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
    if equal == NUM_TOKENS:
        return equal
    if equal == len(theirs) and reason == "stop":
        # It ends behind what it takes for an end token; ours was told to go on.
        assert ours[equal - 1] in tokenizer.special_tokens.values(), f"llama.cpp ended behind {ours[:equal]}"
        return equal
    logits = model(torch.tensor([[*prompt, *ours[:equal]]]))[0, -1]
    best, second = logits.topk(2).values.tolist()
    assert best - second <= MARGIN, f"token {equal}: {ours[equal]} here, {theirs[equal]} there, by {best - second:.2g}"
    return equal


@pytest.mark.network
def test_the_default_model_gives_the_same_tokens(default_model: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    file = tmp_path / "default.gguf"
    assert main(["convert", str(default_model), str(file), "--to", "gguf", "--dtype", "float32"]) == 0
    llama = server(file)
    model, tokenizer = ernie45.load_model(default_model), ernie45.load_tokenizer(default_model)
    counts = [count_equal(llama, model, tokenizer, prompt) for prompt in prompts]
    print(f"equal tokens per prompt: {counts}")
    assert sum(counts) >= 500, "too few tokens were compared to mean anything"
    file.unlink()


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize(("kind", "moe"), [("dense", None), ("MoE with correction bias", _MOE)])
@pytest.mark.parametrize("tied", [True, False])
def test_small_random_networks_give_the_same_tokens(
    sentencepiece_folder: Path, tmp_path: Path, head_dim: int, kind: str, moe: MoeConfig | None, tied: bool
) -> None:
    tokenizer = ernie45.load_tokenizer(sentencepiece_folder)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, head_dim=head_dim, tie_word_embeddings=tied, moe=moe, **_SMALL
    )
    model = build_model(config)
    initialize(model, std=0.1, seed=head_dim, correction_bias_std=0.3)
    if moe is not None:
        assert _chosen_experts_depend_on_the_bias(model)
    ordinary = [token for token in range(tokenizer.vocab_size) if _is_whole_text(tokenizer, token)]
    _never_choose(model, set(range(tokenizer.vocab_size)) - set(ordinary))
    ernie45.save_model(model, tmp_path / "m", tokenizer=tokenizer)
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "m.gguf"), "--to", "gguf"]) == 0
    llama = server(tmp_path / "m.gguf")
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(len(ordinary), (5 + 3 * n,), generator=generator).tolist() for n in range(10)]
    counts = [count_equal(llama, model.eval(), tokenizer, [ordinary[i] for i in places]) for places in drawn]
    print(f"{kind}: equal tokens per prompt: {counts}")
    assert sum(counts) >= 300, "too few tokens were compared to mean anything"


def _is_whole_text(tokenizer: Tokenizer, token: int) -> bool:
    """Whether the server reports the token: it holds back parts of characters, and ends at special tokens."""
    try:
        tokenizer.token_bytes(token).decode()
    except UnicodeDecodeError:
        return False
    return token not in tokenizer.special_tokens.values()


@torch.no_grad()
def _never_choose(model: CausalLM, tokens: set[int]) -> None:
    """Make the logits of `tokens` zero, which the largest of the others exceeds."""
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        if weight is not None:
            weight[sorted(tokens)] = 0


def _chosen_experts_depend_on_the_bias(model: CausalLM) -> bool:
    """Without its correction bias the network gives other logits, so that a reader that drops it is found out."""
    ids = torch.arange(20, 60)[None]
    with_bias = model.eval()(ids)
    biases: list[torch.Tensor] = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    biases += [p.data for name, p in model.named_parameters() if name.endswith("e_score_correction_bias")]
    kept = [bias.clone() for bias in biases]
    for bias in biases:
        bias.zero_()
    without = model(ids)
    for bias, value in zip(biases, kept, strict=True):
        bias.copy_(value)
    return bool((with_bias - without).abs().max() > 0.1)
