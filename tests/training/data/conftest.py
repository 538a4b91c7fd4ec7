"""A vocabulary with every marker of the chat formats, and rows in files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ernie45.processing.tokenizer import Tokenizer, load_tokenizer
from ernie45.training.data.encoding import Encoded

SPECIAL = [
    *("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|im_start|>", "<|im_end|>"),
    *("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"),
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are SmolLM<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def vocabulary(train_byte_level: Callable[..., Path]) -> Path:
    """A byte-level vocabulary without a template."""
    sentences = ["the quick brown fox jumps over the lazy dog, User: Assistant: "] * 20
    return train_byte_level(sentences, special=SPECIAL, bos="<s>")


@pytest.fixture(scope="session")
def with_template(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """Gives the vocabulary a chat template."""

    def make(template: str, eos: str = "<|im_end|>") -> Tokenizer:
        folder = tmp_path_factory.mktemp("template") / "m"
        shutil.copytree(vocabulary, folder)
        config = {"bos_token": "<s>", "eos_token": eos, "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(folder)

    return make


@pytest.fixture(scope="session")
def tokenizer_of(vocabulary: Path, with_template: Callable[..., Tokenizer]) -> Callable[[str], Tokenizer]:
    """The vocabulary with a chat format by its name; `chatml` is a template such as the default model's."""
    made: dict[str, Tokenizer] = {}

    def get(name: str) -> Tokenizer:
        if name not in made:
            is_template = name == "chatml"
            made[name] = with_template(CHATML) if is_template else load_tokenizer(vocabulary, chat_format=name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def ernie(tokenizer_of: Callable[[str], Tokenizer]) -> Tokenizer:
    """ERNIE's text format."""
    return tokenizer_of("ernie")


@pytest.fixture(scope="session")
def marked() -> Callable[[Tokenizer, Encoded], str]:
    """The text of what was encoded, what is learnt in double brackets."""

    def show(tokenizer: Tokenizer, encoded: Encoded) -> str:
        out, was = "", False
        for token_id, learnt in zip(encoded.ids, encoded.learnt, strict=True):
            out += ("[[" if learnt else "]]") * (learnt != was) + tokenizer.decode(
                [token_id], skip_special_tokens=False
            )
            was = learnt
        return out + "]]" * was

    return show


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes a jsonl file and returns its path; text stands as it is."""

    def write(rows: Iterable[Mapping[str, Any] | str], name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path)

    return write
