"""Conversions with all that belongs to a checkpoint, and the loading and saving calls of the public interface."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ernie45
from ernie45.errors import CheckpointError, ConfigError, NotFoundError, UsageError

Save = Callable[..., Path]
TEXT = "the quick brown fox, 你好 naïve 0123 </s> <s>"


def logits(folder: str | Path) -> torch.Tensor:
    return ernie45.load_model(folder)(torch.tensor([[5, 6, 7, 300, 9]]))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chain_of_formats_keeps_network_and_tokenizer(
    save: Save, bpe_folder: Path, sentencepiece_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    words = data.draw(st.sampled_from([bpe_folder, sentencepiece_folder]))
    moe = data.draw(st.booleans())
    source = save(folder / "0", tokenizer=words, moe=moe, seed=data.draw(st.integers(0, 99)))
    expected_logits, expected_ids = logits(source), ernie45.load_tokenizer(source).encode(TEXT)
    for step, to in enumerate(
        data.draw(st.lists(st.sampled_from(["pt", "paddle", "gguf"]), min_size=1, max_size=3)), 1
    ):
        target = folder / (f"{step}.gguf" if to == "gguf" else str(step))
        done = ernie45.convert(source, target, to=to, max_shard_bytes=data.draw(st.sampled_from([20_000, 10**9])))
        assert (done.to_format, done.notes) == (to, ())
        assert torch.equal(logits(target), expected_logits)
        tokenizer = ernie45.load_tokenizer(target)
        assert tokenizer.encode(TEXT) == expected_ids
        assert tokenizer.decode(expected_ids) == TEXT
        source = target


def test_companions_travel_and_nothing_else(tmp_path: Path, save: Save) -> None:
    folder = save(tmp_path / "m")
    for name in ("generation_config.json", "LICENSE", "NOTICE.txt", "preprocessor_config.json", "provenance.json"):
        (folder / name).write_text("{}")
    for name in ("evil.py", "optimizer.bin", "README.md"):
        (folder / name).write_text("")
    ernie45.convert(folder, tmp_path / "p", to="paddle", extra_files={"LICENSE": b"other"})
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("generation_config.json", "LICENSE", "NOTICE.txt", "preprocessor_config.json", "provenance.json"),
    }
    assert (tmp_path / "p" / "LICENSE").read_text() == "other"


def test_what_gguf_cannot_hold_is_noted(tmp_path: Path, save: Save) -> None:
    folder = save(tmp_path / "m", tokenizer=None, mtp=1)
    notes = ernie45.convert(folder, tmp_path / "m.gguf", to="gguf").notes
    assert len(notes) == 2
    assert notes[0].startswith("tokenizer: the folder has none")
    assert "multi-token prediction" in notes[1]
    assert torch.equal(logits(tmp_path / "m.gguf"), logits(folder))
    with pytest.raises(NotFoundError, match="holds no vocabulary"):
        ernie45.load_tokenizer(tmp_path / "m.gguf")


def test_a_promised_mtp_block_that_is_not_there_is_noted(tmp_path: Path, save: Save) -> None:
    folder = save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert "promises a multi-token prediction block" in ernie45.convert(folder, tmp_path / "p", to="paddle").notes[0]


def test_padding_rows_of_the_vocabulary_get_names(tmp_path: Path, save: Save, sentencepiece_folder: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder = save(tmp_path / "m", vocab_size=400, tokenizer=sentencepiece_folder)
    known = ernie45.load_tokenizer(sentencepiece_folder).vocab_size
    ernie45.convert(folder, tmp_path / "m.gguf", to="gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == 400
    assert tokens[known:] == [f"<unused_row_{row}>" for row in range(known, 400)]
    assert set(fields["tokenizer.ggml.token_type"].contents()[known:]) == {gguf.TokenType.UNUSED.value}
    assert len(fields["tokenizer.ggml.scores"].contents()) == 400


def test_dtype_changes_all_but_routers(tmp_path: Path, save: Save) -> None:
    folder = save(tmp_path / "m", moe=True)
    ernie45.convert(folder, tmp_path / "h", to="pt", dtype="float16")
    exact, half = (ernie45.load_model(name, dtype="float32").state_dict() for name in (folder, tmp_path / "h"))
    for name, value in exact.items():
        router = name.endswith(("mlp.gate.weight", "e_score_correction_bias"))
        assert torch.equal(half[name], value if router else value.half().float()), name


@pytest.mark.parametrize(
    ("to", "target", "options", "error", "message"),
    [
        ("onnx", "x", {}, UsageError, "cannot convert to 'onnx', expected one of pt, paddle, gguf"),
        ("gguf", "x", {}, UsageError, r"must end in \.gguf"),
        ("pt", "x", {"dtype": "int8"}, ConfigError, "dtype is 'int8', expected one of float32"),
        ("pt", "m", {}, CheckpointError, "exists"),
    ],
)
def test_conversions_that_cannot_be(
    home: Path, tmp_path: Path, save: Save, to: Any, target: str, options: dict[str, Any], error: Any, message: str
) -> None:
    save(tmp_path / "m")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        ernie45.convert("m", target, to=to, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_names_of_the_store_work_everywhere(home: Path, tmp_path: Path, save: Save) -> None:
    save(home / "models" / "own" / "good")
    ernie45.convert("good", "g.gguf", to="gguf")
    assert torch.equal(logits("good"), logits("g.gguf"))
    assert ernie45.load_tokenizer("own/good").encode(TEXT) == ernie45.load_tokenizer("g.gguf").encode(TEXT)
    with pytest.raises(NotFoundError, match="no model 'bad' here"):
        ernie45.load_model("bad")


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_here(tmp_path: Path, save: Save, device: str) -> None:
    with pytest.raises(UsageError, match=f"device '{device}' cannot be used here .*: use 'cpu'"):
        ernie45.load_model(save(tmp_path / "m"), device=device)


def test_a_chat_format_can_be_chosen(tmp_path: Path, save: Save) -> None:
    tokenizer = ernie45.load_tokenizer(save(tmp_path / "m"), chat_format="ernie_vl")
    assert tokenizer.chat_format == "ernie_vl"
    ernie45.convert(tmp_path / "m", tmp_path / "m.gguf", to="gguf")
    assert ernie45.load_tokenizer(tmp_path / "m.gguf", chat_format="ernie_thinking").chat_format == "ernie_thinking"


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_saving_a_network_keeps_weights_tokenizer_and_extra_files(
    tmp_path: Path, save: Save, small_model: Callable[..., Any], bpe_folder: Path, layout: Any
) -> None:
    model = small_model(vocab_size=320, moe=True, mtp=1)
    tokenizer = ernie45.load_tokenizer(bpe_folder)
    ernie45.save_model(model, tmp_path / "m", layout=layout, tokenizer=tokenizer, extra_files={"NOTICE": b"mine"})
    loaded = ernie45.load_model(tmp_path / "m")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert ernie45.load_tokenizer(tmp_path / "m") == tokenizer
    assert (tmp_path / "m" / "NOTICE").read_bytes() == b"mine"
    with pytest.raises(CheckpointError, match="exists"):
        ernie45.save_model(model, tmp_path / "m")
    ernie45.save_model(model, tmp_path / "m", dtype="bfloat16", overwrite=True)
    assert ernie45.load_model(tmp_path / "m", dtype="auto").dtype == torch.bfloat16
