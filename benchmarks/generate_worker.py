"""What `generate.py` runs in fresh processes: writing the checkpoint of random weights, and measuring one network once.

Both packages pass through the same steps with the same calls on the clock. Each first loads and runs a tiny network, so
that everything that is imported or started on first use is there before the clock and the memory meter start.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import ernie45
from benchmarks.common import PeakMemory

_WARM_UP_PROMPT_TOKENS = 8
_STD = 0.02  # the published initializer_range

_TEXT = """\
A lighthouse keeper counts the ships that pass at night. On calm evenings there are few of them, and the beam turns
over an empty sea; when a storm comes up from the south, the fishing boats hurry home one behind the other, and their
lamps look like beads on a string. He writes the hour, the wind and the number of lamps into a book with a green
cover. The book before it was red, and the one before that had lost its cover long before he came to the island. In
winter the supply boat lands once in three weeks. It brings flour, oil, letters, and newspapers that are old when they
arrive, which does not trouble him: the news of a lighthouse is the weather, and that he reads from the sky. Once a
scientist stayed for a month to study the birds that fly against the glass, and left behind a barometer, two maps of
the coast and a habit of drinking tea at four. Since then the book has had a column for birds.
"""


class Runner(Protocol):
    """One package with one checkpoint."""

    def load(self, dtype: str) -> None:
        """Read the weights."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[list[float], list[int]]:
        """Continue all prompts greedily by `num_tokens`, whatever end tokens come.

        Returns: clock readings (s) after each step, for several prompts possibly without the first; ids of the first
        output.
        """
        ...


class Ernie45Runner:
    """This package."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer = ernie45.load_tokenizer(folder)

    def load(self, dtype: str) -> None:
        """See `Runner`."""
        self._model = ernie45.load_model(self._folder, dtype=dtype)

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[list[float], list[int]]:
        """See `Runner`."""
        params = ernie45.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        clock: list[float] = []
        ids: list[int] = []
        if len(prompts) == 1:
            for piece in ernie45.generate(self._model, self._tokenizer, prompts[0], params):
                clock.append(time.perf_counter())
                ids += piece.ids
        else:
            outputs = ernie45.generate_batch(
                self._model,
                self._tokenizer,
                prompts,
                params,
                progress=lambda _done, _all: clock.append(time.perf_counter()),
            )
            ids += outputs[0].ids
        return clock, ids


class TransformersRunner:
    """The peer, with the attention and the generation settings that it chooses itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, dtype: str) -> None:
        """See `Runner`."""
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(self._folder, dtype=getattr(torch, dtype))
        self._model.generation_config.eos_token_id = None  # end tokens are ignored
        self._model.generation_config.pad_token_id = 0  # never used, asked for all the same

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[list[float], list[int]]:
        """See `Runner`."""
        import torch

        clock: list[float] = []
        ids_BT = torch.tensor(prompts)
        none_is_done_B = torch.zeros(len(prompts), dtype=torch.bool)

        def note_time(_ids: Any, _scores: Any, **_: Any) -> torch.Tensor:
            clock.append(time.perf_counter())
            return none_is_done_B

        out_BT = self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=num_tokens,
            stopping_criteria=[note_time],
        )
        return clock, out_BT[0, ids_BT.shape[1] :].tolist()


RUNNERS: dict[str, type[Ernie45Runner] | type[TransformersRunner]] = {
    "ernie45": Ernie45Runner,
    "transformers": TransformersRunner,
}


def measure(
    *, package: str, folder: str, rehearsal: str, dtype: str, prompts: list[list[int]], decode_steps: int
) -> dict[str, Any]:
    """Load a checkpoint and generate from it, once.

    Args: package: a key of `RUNNERS`. rehearsal: a tiny checkpoint. prompts: as many as the batch has, equally long.
        decode_steps: steps on the clock.
    Returns: `figures` by the keys of `generate_report.METRICS`, seconds, bytes and tokens/s; `ids`, the greedy output
    of the first prompt; `memory_method`.
    """
    _rehearse(RUNNERS[package](Path(rehearsal)), dtype)
    runner: Runner = RUNNERS[package](Path(folder))
    memory = PeakMemory()
    start = time.perf_counter()
    runner.load(dtype)
    figures: dict[str, float] = {"load_s": time.perf_counter() - start}

    first, batch = prompts[:1], prompts
    figures["first_token_s"] = _prefill_s(runner, first)
    figures["start_s"] = figures["load_s"] + figures["first_token_s"]
    figures["prefill_1"] = len(first[0]) / _prefill_s(runner, prompts[1:2])  # another prompt: nothing can be reused
    figures["decode_1"], ids = _decode_rate(runner, first, decode_steps)
    figures["peak_1_bytes"] = memory.above_base()

    runner.generate([prompt[:_WARM_UP_PROMPT_TOKENS] for prompt in batch], 2)
    figures["prefill_8"] = sum(map(len, batch)) / _prefill_s(runner, batch)
    figures["decode_8"], _ = _decode_rate(runner, batch, decode_steps)
    figures["peak_8_bytes"] = memory.above_base()
    return {"figures": figures, "ids": ids, "memory_method": memory.method}


def prepare_random(
    *, preset: str | None, folder: str, seed: int, num_prompts: int, prompt_tokens: int
) -> dict[str, Any]:
    """Write a checkpoint of seeded random weights in bfloat16, -PT layout, unless the folder holds this one already.

    Args: preset: a published model's full shape; None = a tiny network for rehearsals and tests.
    Returns: `prompts`, random ids; `active_parameters`.
    """
    import torch

    from ernie45.models.build import build_model
    from ernie45.models.init import initialize

    config = _tiny_config() if preset is None else ernie45.presets()[preset]
    recipe = json.dumps({"weights": "random", "preset": preset or "tiny", "seed": seed, "std": _STD}).encode()
    target = Path(folder)
    written = target / "benchmark.json"
    if not written.exists() or written.read_bytes() != recipe:
        model = build_model(config, dtype=torch.bfloat16)
        initialize(model, std=_STD, seed=seed)
        files = {written.name: recipe, "tokenizer.json": _tokenizer_json(config.vocab_size)}
        ernie45.save_model(model, target, extra_files=files, overwrite=True)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(config.vocab_size, (num_prompts, prompt_tokens), generator=generator)
    return {"prompts": prompts.tolist(), "active_parameters": ernie45.count_parameters(config).active}


def prepare_real(*, folder: str, num_prompts: int, prompt_tokens: int) -> dict[str, Any]:
    """Cut prompts from a text, each beginning elsewhere; returns what `prepare_random` returns."""
    ids = ernie45.load_tokenizer(folder).encode(_TEXT)
    stride = max(1, len(ids) // num_prompts)
    prompts = [[ids[(i * stride + j) % len(ids)] for j in range(prompt_tokens)] for i in range(num_prompts)]
    config = ernie45.ModelConfig.from_pretrained(folder)
    return {"prompts": prompts, "active_parameters": ernie45.count_parameters(config).active}


def _rehearse(runner: Runner, dtype: str) -> None:
    runner.load(dtype)
    runner.generate([[1, 2, 3]], 3)
    runner.generate([[1, 2, 3], [4, 5, 6]], 3)
    del runner
    gc.collect()


def _prefill_s(runner: Runner, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds from the call to the first token of every prompt."""
    start = time.perf_counter()
    runner.generate(prompts, 1)
    return time.perf_counter() - start


def _decode_rate(runner: Runner, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, list[int]]:
    """Tokens/s of all prompts together over the last `steps` steps, and the first output."""
    num_tokens = steps + 2  # the first comes from the prefill, the second starts the clock
    clock, ids = runner.generate(prompts, num_tokens)
    assert len(ids) == num_tokens, f"{len(ids)} tokens came, {num_tokens} were asked for"
    return len(prompts) * steps / (clock[-1] - clock[-1 - steps]), ids


def _tiny_config() -> ernie45.ModelConfig:
    return ernie45.ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


def _tokenizer_json(vocab_size: int) -> bytes:
    """A byte-level vocabulary of invented pieces: random weights need text pieces too, and none are published here."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = sorted(ByteLevel.alphabet())
    pieces += [f"token{i}" for i in range(len(pieces), vocab_size)]
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []},
    }
    return json.dumps(definition).encode()
