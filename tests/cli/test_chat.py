"""`ernie chat` with a prompt: what is printed is what the generator gives, and what cannot be done is said at once."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie45
from ernie45.cli import output
from ernie45.engine import reference
from ernie45.kernels import choice, native
from ernie45.models.text import CausalLM
from ernie45.store.quantize import quantize

Ernie = Callable[..., Any]
GREEDY = ("--temperature", "0", "--max-tokens", "8")


def copy_of(tiny: Path, target: Path, **files: Any) -> Path:
    """The tiny model with further JSON files, `generation_config={...}`."""
    shutil.copytree(tiny, target)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (target / f"{name}.json").write_text(text, encoding="utf-8")
    return target


def expected(folder: Path, prompt: Any, **sampling: Any) -> ernie45.Completion:
    """What the generator answers; it is compared with transformers elsewhere."""
    model, tokenizer = ernie45.load_model(folder), ernie45.load_tokenizer(folder)
    params = ernie45.SamplingParams(**({"temperature": 0, "max_tokens": 8} | sampling))
    return ernie45.generate_batch(model, tokenizer, [prompt], params)[0]


def test_the_answer_is_streamed_to_stdout_and_the_limit_named_on_stderr(ernie: Ernie, tiny: Path) -> None:
    result = ernie("chat", "tiny", "the quick", *GREEDY)
    answer = expected(tiny, [{"role": "user", "content": "the quick"}])
    assert (result.code, result.out) == (0, answer.text + "\n")
    assert result.err == "[stopped after 8 tokens, the limit: --max-tokens sets it]\n"


def test_an_answer_without_end_is_ended(ernie: Ernie, endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie45.cli.conversation.USUAL_LIMIT", 30)
    assert ernie("chat", endless, "the quick", "--temperature", "0").err.startswith("[stopped after 30 tokens")
    filled = json.loads(ernie("chat", "tiny", "fox " * 70, "--temperature", "0", "--json").out)
    assert filled["usage"]["total_tokens"] <= 256
    assert filled["finish_reason"] == "length"


def test_pipe_argument_and_options_anywhere_agree(ernie: Ernie) -> None:
    argument = ernie("chat", "tiny", "the quick", *GREEDY)
    assert ernie("chat", "tiny", *GREEDY, stdin="the quick") == argument
    assert ernie("chat", "tiny", *GREEDY, "the quick") == argument
    assert ernie("chat", *GREEDY, "--", "tiny", "the quick") == argument
    # an argument goes before a pipe, which is not read: `while read q; do ernie chat m "$q"; done < file`
    assert ernie("chat", "tiny", "the quick", *GREEDY, stdin="unread") == argument


def test_system_message_is_part_of_the_prompt(ernie: Ernie, tiny: Path) -> None:
    result = ernie("chat", "tiny", "the quick", "--system", "brown fox", *GREEDY, "--json")
    messages = [{"role": "system", "content": "brown fox"}, {"role": "user", "content": "the quick"}]
    assert json.loads(result.out)["usage"]["prompt_tokens"] == expected(tiny, messages).prompt_tokens
    assert json.loads(result.out)["text"] == expected(tiny, messages).text


def test_raw_continues_the_text_as_it_stands(ernie: Ernie, tiny: Path) -> None:
    found = json.loads(ernie("chat", "tiny", "the quick", "--raw", *GREEDY, "--json").out)
    answer = expected(tiny, "the quick")
    assert found["ids"] == list(answer.ids)
    assert found["usage"]["prompt_tokens"] == len(ernie45.load_tokenizer(tiny).encode("the quick"))


def test_json_holds_text_ids_reason_seed_and_usage(ernie: Ernie, tiny: Path) -> None:
    result = ernie("chat", "tiny", "the quick", *GREEDY, "--seed", "7", "--json")
    answer = expected(tiny, [{"role": "user", "content": "the quick"}])
    assert result.err == ""
    assert json.loads(result.out) == {
        "text": answer.text,
        "reasoning": None,
        "ids": list(answer.ids),
        "finish_reason": "length",
        "stop_reason": None,
        "seed": 7,
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": 8,
            "total_tokens": answer.prompt_tokens + 8,
        },
    }


def test_the_seed_that_was_drawn_gives_the_same_answer_again(ernie: Ernie) -> None:
    drawn = [
        json.loads(ernie("chat", "tiny", "fox", "--temperature", "1", "--max-tokens", "12", "--json").out)
        for _ in range(2)
    ]
    assert drawn[0]["seed"] != drawn[1]["seed"]
    assert drawn[0]["ids"] != drawn[1]["ids"]
    again = ernie(
        "chat", "tiny", "fox", "--temperature", "1", "--max-tokens", "12", "--json", "--seed", str(drawn[0]["seed"])
    )
    assert json.loads(again.out) == drawn[0]


def test_stop_text_ends_the_answer_and_is_not_part_of_it(ernie: Ernie, tiny: Path) -> None:
    options = ("--raw", "--temperature", "0", "--max-tokens", "40")
    text = expected(tiny, "the quick", max_tokens=40).text
    stop = next(c for c in text[1:] if c != "\ufffd")
    found = json.loads(ernie("chat", "tiny", "the quick", *options, "--stop", "@@@", "--stop", stop, "--json").out)
    assert (found["text"], found["finish_reason"], found["stop_reason"]) == (text[: text.index(stop)], "stop", stop)


@pytest.mark.parametrize(
    ("stated", "options", "temperature", "top_p"),
    [
        (None, [], 0.8, 0.8),
        ({"eos_token_id": 2}, [], 0.8, 0.8),
        ({"temperature": 0.3}, [], 0.3, 1.0),
        ({"temperature": 0.3, "top_p": 0.9, "do_sample": True}, [], 0.3, 0.9),
        ({"temperature": 0.3, "do_sample": False}, [], 0.0, 1.0),
        ({"temperature": 0.3, "top_p": 0.9}, ["--temperature", "1.5"], 1.5, 0.9),
        ({"temperature": 0.3, "top_p": 0.9}, ["--top-p", "1", "--temperature", "0"], 0.0, 1.0),
    ],
)
def test_sampling_is_the_models_own_unless_asked_for_otherwise(
    ernie: Ernie, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: Any, options: list[str],
    temperature: float, top_p: float,
) -> None:  # fmt: skip
    seen: list[ernie45.SamplingParams] = []

    def generate(model: object, tokenizer: object, ids: object, sampling: Any) -> Any:
        seen.append(sampling)
        return iter([ernie45.Piece(text="x", ids=(1,), finish_reason="stop")])

    monkeypatch.setattr(ernie45, "generate", generate, raising=False)
    folder = copy_of(tiny, tmp_path / "m", **({} if stated is None else {"generation_config": stated}))
    assert ernie("chat", str(folder), "hi there", *options).code == 0
    assert (seen[0].temperature, seen[0].top_p) == (temperature, top_p)


def test_a_lone_argument_that_can_be_no_model_is_a_prompt_for_the_default_model(
    ernie: Ernie, tiny: Path, home: Path
) -> None:
    missing = ernie("chat", "What is it?")
    assert missing.code == 4
    assert missing.err.count("\n") == 1
    assert "`ernie pull smollm2-135m` fetches the default model" in missing.err
    (home / "models" / "smollm2-135m").symlink_to(tiny)
    for prompt in ("the quick", "quick!", "你好", "x" * 5000):
        options = (*GREEDY, "--raw") if len(prompt) < 100 else ("--max-tokens", "1000", "--raw")
        result = ernie("chat", prompt, *options)
        if len(prompt) < 100:
            assert result.out == expected(tiny, prompt).text + "\n"
        else:
            assert "the model's context holds 256" in result.err


def test_an_unknown_model_is_named_with_its_neighbour(ernie: Ernie) -> None:
    code, out, err = ernie("chat", "tinny", "hi")
    assert (code, out) == (4, "")
    assert err == "error: no model 'tinny' here: did you mean 'tiny'? (`ernie models --all` lists models)\n"
    lone = ernie("chat", "hello")
    assert lone.code == 4
    assert lone.err.endswith("; to ask the default model: ernie chat smollm2-135m hello\n")


def test_thinking_where_the_template_has_none_is_refused_before_the_weights_are_read(
    ernie: Ernie, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ernie45.checkpoint.load.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    code, out, err = ernie("chat", "tiny", "hi there", "--think")
    assert (code, out) == (2, "")
    assert err == "error: --think: the chat format ernie has no thinking: leave thinking out\n"


def test_thinking_changes_the_prompt_where_the_template_has_it(ernie: Ernie, tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    folder = copy_of(tiny, tmp_path / "m", tokenizer_config=config | {"ernie45_chat_format": "ernie_vl"})
    tokenizer = ernie45.load_tokenizer(folder)
    for option, thinking in (("--think", True), ("--no-think", False)):
        found = json.loads(ernie("chat", str(folder), "hi there", option, *GREEDY, "--json").out)
        rendered = tokenizer.render([{"role": "user", "content": "hi there"}], thinking=thinking)
        assert found["usage"]["prompt_tokens"] == len(tokenizer.encode(rendered))


@pytest.mark.parametrize("model", ["tiny", "packed"])
def test_kernels_are_chosen_for_the_command_alone(
    ernie: Ernie, home: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    folder = home / "models" / model
    if model == "packed":
        quantize("tiny", "wint8", dst=folder)
    seen: list[choice.KernelsInUse] = []

    def generate(*arguments: Any) -> Any:
        seen.append(choice.in_use())
        return reference.generate(*arguments)

    monkeypatch.setattr(ernie45, "generate", generate, raising=False)
    with choice.kernels("reference"):
        answer = expected(folder, [{"role": "user", "content": "the quick"}])
    before = choice.describe()
    if native.status().available:
        assert ernie("chat", model, "the quick", *GREEDY, "--kernels", "native").code == 0
        assert (seen[0].kernels, seen.pop().why) == ("native", "--kernels native")
        module = importlib.import_module("ernie45.kernels._native")
        for name in ("PackedMatrix", "KvStore", "Sequences", "ffn", "rms_norm", "attention", "rope_append", "route"):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("a native kernel was called"))
    found = ernie("chat", model, "the quick", *GREEDY, "--kernels", "reference", "--json")
    assert (seen[0].kernels, seen[0].why) == ("reference", "--kernels reference")
    assert json.loads(found.out)["ids"] == list(answer.ids)
    assert choice.describe() == before, "the next command of this process chooses for itself"


@pytest.mark.parametrize(
    ("model", "option", "stored"),
    [
        ("tiny", [], torch.float32),
        ("tiny", ["--kv-dtype", "bfloat16"], torch.bfloat16),
        ("tiny", ["--kv-dtype", "auto", "--dtype", "bfloat16"], torch.bfloat16),
        ("packed", [], torch.bfloat16),
        ("packed", ["--kv-dtype", "float32"], torch.float32),
    ],
)
def test_keys_and_values_are_kept_in_the_dtype_asked_for(
    ernie: Ernie, home: Path, monkeypatch: pytest.MonkeyPatch, model: str, option: list[str], stored: torch.dtype
) -> None:
    if model == "packed":
        quantize("tiny", "wint8", dst=home / "models" / model)
    seen: list[torch.dtype] = []
    new_cache = CausalLM.new_cache

    def spy(network: CausalLM, capacity: int) -> Any:
        cache = new_cache(network, capacity)
        seen.append(cache.dtype)
        return cache

    monkeypatch.setattr(CausalLM, "new_cache", spy)
    assert ernie("chat", model, "the quick", *GREEDY, *option).code == 0
    assert seen == [stored]


def test_native_kernels_that_are_missing_are_an_error(ernie: Ernie, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = native.NativeStatus(available=False, reason="no module", remedy="build it", features=(), cpu={}, build={})
    monkeypatch.setattr(choice, "status", lambda: missing)
    result = ernie("chat", "tiny", "the quick", "--kernels", "native")
    assert (result.code, result.err) == (1, "error: native kernels were asked for: no module. build it\n")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--max-tokens", "0"], 2, "max_tokens is 0, expected"),
        (["--temperature", "-1"], 2, "temperature is -1.0, expected a number from 0"),
        (["--top-p", "0"], 2, "top_p is 0, expected a value above 0"),
        (["--top-p", "nan"], 2, "top_p is nan, expected"),
        (["--min-p", "2"], 2, "min_p is 2.0, expected a number from 0 to 1"),
        (["--top-k", "-5"], 2, "top_k is -5, expected"),
        (["--repetition-penalty", "0"], 2, "repetition_penalty is 0.0, expected"),
        (["--seed", "-1"], 2, "seed is -1, expected"),
        (["--stop", ""], 2, "stop holds 1 entries"),
        (["--device", "cuda:99"], 2, "device 'cuda:99' cannot be used here"),
        (["--device", "toaster"], 2, "device 'toaster' cannot be used here"),
        (["--raw", "--system", "x"], 2, "--raw uses no chat template"),
        (["--raw", "--think"], 2, "--raw uses no chat template"),
        (["--max-tokens", "257"], 1, "max_tokens is 257, the model's context holds 256"),
    ],
)
def test_bad_values_are_named_with_their_limit(ernie: Ernie, options: list[str], code: int, message: str) -> None:
    result = ernie("chat", "tiny", "hi there", *options)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "stdin", "message"),
    [
        (["chat", "tiny"], "", "the prompt is empty"),
        (["chat", "tiny"], " \n\t", "the prompt is empty"),
        (["chat", "tiny", ""], "piped", "the prompt is empty"),
        (["chat", "tiny", "ab\udcff"], "", "the prompt is not UTF-8 at character 2"),
        (["chat", "tiny"], "\udc80", "the prompt is not UTF-8 at character 0"),
    ],
)
def test_what_is_no_prompt(ernie: Ernie, argv: list[str], stdin: str, message: str) -> None:
    result = ernie(*argv, stdin=stdin)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ([], "holds 256: shorten the prompt to 255 tokens or fewer"),
        (["--max-tokens", "7"], "holds 256: shorten the prompt to 255 tokens or fewer"),
        (["--max-tokens", "256", "--raw"], "holds 256: shorten the prompt, or lower max_tokens to 2"),
    ],
)
@pytest.mark.parametrize("form", ["tiny", "tiny.gguf", "folder"])
def test_what_does_not_fit_is_refused_before_the_weights_are_read(
    ernie: Ernie, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str, options: list[str], remedy: str
) -> None:
    if form != "tiny":
        (tmp_path / "folder").mkdir()
        ernie("convert", "tiny", "folder/tiny.gguf", "--to", "gguf")
        shutil.copy(tmp_path / "folder" / "tiny.gguf", tmp_path)
    monkeypatch.setattr("ernie45.checkpoint.load.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    result = ernie("chat", form, *options, stdin="brown fox" if "--raw" in options else "lazy dog " * 500)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: prompt has ")
    assert remedy in result.err
    assert "None" not in result.err
    assert result.err.count("\n") == 1


def test_a_folder_without_tokenizer_and_a_folder_without_model(ernie: Ernie, tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    result = ernie("chat", str(folder), "hi there")
    assert (result.code, result.out) == (4, "")
    assert "has neither tokenizer.model nor tokenizer.json" in result.err
    (tmp_path / "empty").mkdir()
    assert ernie("chat", str(tmp_path / "empty"), "hi there").code == 4
    (tmp_path / "notes.txt").write_text("x")
    result = ernie("chat", "notes.txt", "hi there")
    assert (result.code, result.err) == (
        4,
        "error: notes.txt is no model: expected a model name, a checkpoint folder or a .gguf file\n",
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"temperature": -3}', '{"top_p": "high"}'])
def test_a_damaged_generation_config_is_named(ernie: Ernie, tiny: Path, tmp_path: Path, content: str) -> None:
    folder = copy_of(tiny, tmp_path / "m", generation_config=content)
    result = ernie("chat", str(folder), "hi there")
    assert (result.code, result.out) == (1, "")
    assert "generation_config.json" in result.err
    assert result.err.count("\n") == 1


def test_a_conversation_needs_a_terminal_and_has_no_json(ernie: Ernie, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie45.cli.chat._is_terminal", lambda: True)
    for option in ("--json", "--raw"):
        result = ernie("chat", "tiny", option)
        assert (result.code, result.out) == (2, "")
        assert "need a prompt" in result.err


def test_a_gguf_file_answers_like_the_folder_that_it_was_made_from(ernie: Ernie) -> None:
    assert ernie("convert", "tiny", "tiny.gguf", "--to", "gguf").code == 0
    assert ernie("chat", "tiny.gguf", "the quick", *GREEDY) == ernie("chat", "tiny", "the quick", *GREEDY)


def test_control_c_ends_the_process_with_130(endless: str) -> None:
    command = [sys.executable, "-m", "ernie45.cli.main", "chat", endless, "hi there", "--temperature", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert b"Traceback" not in process.stderr.read()


def test_control_characters_of_an_answer_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\tb\n\x07\x9bc\r"
    assert output.shown(text) == text  # this is no terminal: data passes as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert output.shown(text) == "a\ufffd[2J\tb\n\ufffd\ufffdc\ufffd"
