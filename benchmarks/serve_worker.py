"""What `serve.py` runs in fresh processes: exports of one network for every server, and the engine without a server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ernie45
from benchmarks.generate_worker import prepare_random
from ernie45.bench.measure import step_bytes
from ernie45.store.api import load_config
from ernie45.store.convert import convert
from ernie45.store.quantize import quantize

SEED = 0
# Peers refuse a folder without a tokenizer class, and conversations without a template.
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}assistant: ",
}


def prepare_folder(*, preset: str | None, folder: str) -> None:
    """Write a -PT checkpoint of random weights that transformers and vLLM read too. Args: preset: None = a tiny network."""
    prepare_random(preset=preset, folder=folder, seed=SEED, num_prompts=1, prompt_tokens=1)
    Path(folder, "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG), encoding="utf-8")


def pack(*, source: str, scheme: str, folder: str) -> None:
    """The same weights in the packed format."""
    quantize(source, scheme, dst=folder)


def export_gguf(*, source: str, file: str) -> None:
    """The same weights as GGUF, in the precision that they have."""
    convert(source, file, "gguf")


def facts(*, folder: str) -> dict[str, Any]:
    """What bounds and prompts need: vocabulary, context, bytes of weights that a token reads, of cache that it adds."""
    config, model = load_config(folder), ernie45.load_model(folder)
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "vocab_size": config.vocab_size,
        "context": config.max_position_embeddings,
        "tied": config.tie_word_embeddings,
        "active_parameters": ernie45.count_parameters(config).active,
        "step_bytes": step_bytes(model, 1),
        "kv_values_per_token": values,
        "kv_bytes_per_token": config.kv_bytes_per_token(model.new_cache(1).bytes_per_value),
    }


def engine_times(
    *, folder: str, prompts: list[list[int]], output_tokens: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Seconds per prompt of `ernie45.LLM`, one after the other; the first prompt is read and answered once before.

    Args: settings: those of the server, by the fields of `EngineConfig`.
    """
    llm = ernie45.LLM(folder, **settings)
    params = ernie45.SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    # Turned round, so that it does not leave a prefix to be found.
    llm.generate(prompts[0][::-1], params)
    seconds = []
    for prompt in prompts:
        start = time.perf_counter()
        llm.generate(prompt, params)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}
