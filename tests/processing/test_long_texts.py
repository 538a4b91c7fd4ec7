"""Long texts: the fewest ids that one can become is told without encoding it, and encoding lets other threads run."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ernie45
from ernie45.processing.prompt import RenderedPrompt, Segment
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    " \u3000the quick▁\n<|im_start|>0你好", max_size=200
)


@pytest.fixture(scope="module", params=["ernie_folder", "bpe_folder"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Those whose texts survive encoding."""
    return load_tokenizer(request.getfixturevalue(request.param))


@settings(deadline=None)
@given(text=TEXTS)
def test_no_text_becomes_fewer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text  # why that is so


def test_it_is_the_length_in_bytes_by_that_of_the_longest_token(tokenizer: Tokenizer) -> None:
    longest = max(
        len(data) for idx, data in enumerate(tokenizer.vocabulary.data) if idx not in tokenizer.special_tokens.values()
    )
    assert tokenizer.least_tokens("") == 0
    assert tokenizer.least_tokens("好" * longest) == 3
    assert tokenizer.least_tokens("x" * (longest + 1)) == 2


def test_special_tokens_that_a_template_wrote_are_no_text(tokenizer: Tokenizer) -> None:
    marker = "<|im_start|>"
    written = RenderedPrompt([Segment(marker, True)] * 1000)
    assert len(tokenizer.encode(written)) == 1000
    assert tokenizer.least_tokens(written) == 0
    assert tokenizer.least_tokens(marker * 1000) > 0


@pytest.mark.parametrize(
    "settings_of_training",
    [
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False, "vocab_size": 300},
    ],
)
def test_where_text_may_be_lost_nothing_is_said(
    make_sentencepiece: Any, tmp_path: Path, settings_of_training: dict[str, Any]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(make_sentencepiece(**settings_of_training))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).least_tokens("x" * 100_000) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel"}]}},
        {"pre_tokenizer": {"type": "Digits"}},
        {"pre_tokenizer": None},
    ],
)
def test_other_steps_of_a_byte_level_tokenizer_may_lose_text(
    bpe_folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    definition = json.loads((bpe_folder / "tokenizer.json").read_text())
    for step in [change.get("pre_tokenizer") or {}, *(change.get("pre_tokenizer") or {}).get("pretokenizers", [])]:
        if step.get("type") == "ByteLevel":
            step.update({"add_prefix_space": False, "trim_offsets": True, "use_regex": True})
        if step.get("type") == "Digits":
            step["individual_digits"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps({**definition, **change}))
    (tmp_path / "tokenizer_config.json").write_text((bpe_folder / "tokenizer_config.json").read_text())
    assert load_tokenizer(tmp_path).least_tokens("x" * 100_000) == 0


def test_a_llama_style_tokenizer_says_nothing(llama_json_folder: Path) -> None:
    assert load_tokenizer(llama_json_folder).least_tokens("x" * 100_000) == 0


def test_encoding_leaves_pythons_lock_to_others(tokenizer: Tokenizer) -> None:
    """A server encodes on threads beside its event loop. Held, the lock would make the longest wait as long as the encoding."""
    draw = random.Random(0)
    text = " ".join(draw.choice(["the", "quick", "brown", "fox", "世界"]) for _ in range(300_000))
    waits: list[float] = []
    encoded = threading.Event()

    def watch() -> None:
        last = time.monotonic()
        while not encoded.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            waits.append(now - last)
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    tokenizer.encode(text)
    took = time.monotonic() - start
    encoded.set()
    watcher.join()
    assert max(waits) < 0.5 * took


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_texts_that_nothing_splits_are_not_remembered_without_end(train_byte_level: Callable[..., Path]) -> None:
    """In a process of its own: what others left in this one's heap would hide what grows."""
    folder = train_byte_level(["one two three four"] * 20, special=["<s>", "</s>"], bos="<s>")
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["pre_tokenizer"]["use_regex"] = False
    path.write_text(json.dumps(definition))
    done = subprocess.run(
        [sys.executable, "-c", _GROW, str(folder)],
        env=os.environ | {"PYTHONPATH": str(Path(ernie45.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 14_000, "kilobytes; 60,000 where 10,000 texts are remembered"


_GROW = """
import random, sys
from collections.abc import Callable
from pathlib import Path
from ernie45.processing.tokenizer import load_tokenizer

def kilobytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

tokenizer = load_tokenizer(sys.argv[1])
rng = random.Random(0)
before = kilobytes()
for _ in range(12_000):
    tokenizer.encode(" ".join(rng.choices(["one", "two", "three", "four"], k=rng.randint(20, 45))))
print(kilobytes() - before)
"""
