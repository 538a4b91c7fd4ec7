"""Small tokenizers, trained on the spot: SentencePiece with ERNIE's special-id layout, byte-level BPE, Llama-style
JSON."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

MARKERS = [
    *("<|end_of_sentence|>", "<|begin_of_sentence|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    *("<response>", "</response>", "<tool_call>", "</tool_call>", "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>"),
    *("<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>", "<mask:1>"),
]
WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "hello", "world", "User", "Assistant"),
    *("Picture", "time", "number", "what", "kind", "of", "is", "this", "def", "return", "import", "class", "value"),
    *("你好", "世界", "数据", "模型", "système", "naïve", "im_start", "end", "think", "tool_call"),
]

MakeSentencePiece = Callable[..., bytes]


def corpus() -> list[str]:
    """Return sentences that every trained vocabulary here is made of."""
    rng = random.Random(0)
    return [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(400)]


@pytest.fixture(scope="session")
def make_sentencepiece() -> MakeSentencePiece:
    """Return a function that trains a model: unk 0, bos 1, eos 2, digits from 3, then byte pieces and markers."""

    def make(**settings: object) -> bytes:
        out = io.BytesIO()
        defaults: dict[str, object] = {
            "model_type": "bpe",
            "vocab_size": 480,
            "byte_fallback": True,
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "pad_id": -1,
            "user_defined_symbols": [*"0123456789", *MARKERS],
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity",
            "character_coverage": 1.0,
            "minloglevel": 2,
        }
        options: dict[str, Any] = defaults | settings
        spm.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_writer=out, **options)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def ernie_folder(make_sentencepiece: MakeSentencePiece, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder laid out like a published ERNIE 4.5 checkpoint, without weights and without a template."""
    folder = tmp_path_factory.mktemp("ernie")
    (folder / "tokenizer.model").write_bytes(make_sentencepiece())
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "additional_special_tokens": ["<|IMAGE_PLACEHOLDER|>"],
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a byte-level BPE tokenizer.json: special tokens before and behind the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<think>"), AddedToken("</think>"), AddedToken("<|end_of_sentence|>")])
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def llama_json_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tokenizer.json as Llama 2 has it: spaces as U+2581, byte fallback, one space put first."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in [*"▁helowrdHW,!<s>/", "he", "ll", "hell", "▁w", "or"]:
        vocab.setdefault(piece, len(vocab))
    definition = {
        "version": "1.0",
        "added_tokens": [
            {"id": idx, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": True}
            for text, idx in list(vocab.items())[:3]
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": ["h e", "l l", "he ll", "▁ w", "o r"],
        },
    }
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder
