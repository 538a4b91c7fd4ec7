"""`ernie serve` and `ernie up`: from the command line to settings; the servers themselves are in tests/server."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ernie45.cli import serve
from ernie45.cli.main import build_parser, main
from ernie45.cli.serve_arguments import ineffective
from ernie45.engine.drafts import MtpSpeculation, NgramSpeculation
from ernie45.errors import ConfigError, UsageError
from ernie45.server.config import ServerConfig, is_loopback
from ernie45.server.redaction import RedactingFormatter

MODEL = Path("/models/some-model")


def parsed(*arguments: str, verb: str = "serve") -> argparse.Namespace:
    return build_parser(verb).parse_intermixed_args(["m", *arguments])


def config_of(*arguments: str) -> ServerConfig:
    return serve.server_config(parsed(*arguments), MODEL, ["key-of-tests"])


def launch_of(*arguments: str) -> Any:
    return serve.launch_of(parsed(*arguments), MODEL)


@pytest.mark.parametrize(
    ("arguments", "field", "expected"),
    [
        (["--host", "0.0.0.0"], "host", "0.0.0.0"),
        (["--port", "0"], "port", 0),
        (["--served-model-name", "a", "b", "--served-model-name", "c"], "served_model_names", ("a", "b", "c")),
        ([], "served_model_names", ("some-model",)),
        (["--allowed-host", "api.example"], "allowed_hosts", ("api.example",)),
        (["--timeout-graceful-shutdown", "3"], "drain_timeout_s", 3.0),
        (["--drain-timeout", "4"], "drain_timeout_s", 4.0),
        (["--load-timeout", "5"], "load_timeout_s", 5.0),
        (["--chat-page"], "chat_page", True),
    ],
)
def test_options_of_the_server(arguments: list[str], field: str, expected: object) -> None:
    assert getattr(config_of(*arguments), field) == expected


@pytest.mark.parametrize(
    ("arguments", "group", "field", "expected"),
    [
        (["--max-waiting", "5"], "limits", "waiting", 5),
        (["--max-concurrency", "7"], "limits", "connections", 7),
        (["--request-timeout", "9"], "limits", "request_timeout_s", 9.0),
        (["--max-body", "1MiB"], "limits", "body_bytes", 1 << 20),
        (["--requests-per-minute", "3"], "rate_limits", "requests_per_minute", 3),
        (["--tokens-per-minute", "300"], "rate_limits", "tokens_per_minute", 300),
        (["--concurrent-requests", "2"], "rate_limits", "concurrent_requests", 2),
    ],
)
def test_limits(arguments: list[str], group: str, field: str, expected: object) -> None:
    assert getattr(getattr(config_of(*arguments), group), field) == expected


@pytest.mark.parametrize(
    ("arguments", "field", "expected"),
    [
        (["--max-model-len", "100"], "max_model_len", 100),
        (["--max-num-seqs", "3"], "max_num_seqs", 3),
        (["--kv-cache-memory", "1GiB"], "kv_cache_memory", 1 << 30),
        (["--kv-dtype", "bf16"], "kv_dtype", "bfloat16"),
        (["--kv-dtype", "int8"], "kv_dtype", "int8"),
        (["--block-size", "64"], "page_size", 64),
        (["--max-num-batched-tokens", "99"], "max_step_tokens", 99),
        (["--no-enable-prefix-caching"], "prefix_cache", False),
        (["--chat-format", "ernie"], "chat_format", "ernie"),
        (["--kernels", "reference"], "kernels", "reference"),
    ],
)
def test_options_of_the_engine(arguments: list[str], field: str, expected: object) -> None:
    assert getattr(launch_of(*arguments), field) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--speculation", "ngram"], NgramSpeculation()),
        (["--speculation", "mtp", "--num-speculative-tokens", "2"], MtpSpeculation(max_tokens=2)),
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'], NgramSpeculation(max_tokens=3)),
    ],
)
def test_speculation_in_both_spellings(arguments: list[str], expected: object) -> None:
    assert launch_of(*arguments).engine_config().speculation == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "17"], "page_size is 17"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--num-speculative-tokens", "3"], "without speculation"),
        (["--speculation", "ngram", "--num-speculative-tokens", "100"], "expected 1 to 64"),
        (["--speculation", "ngram", "--speculative-config", '{"method": "mtp"}'], "give one"),
        (["--tensor-parallel-size", "2"], "tensor-parallel-size is 2: one process serves"),
        (["--port", "70000"], "port is 70000"),
        (["--max-waiting", "0"], "--max-waiting is 0"),
        (["--max-wait", "-1"], "--max-wait is -1.0, expected a number above 0"),
        (["--max-concurrency", "0"], "--max-concurrency is 0"),
        (["--requests-per-minute", "0"], "requests_per_minute is 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(arguments: list[str], message: str) -> None:
    def settings() -> None:
        config_of(*arguments)
        launch_of(*arguments)

    with pytest.raises((UsageError, ConfigError), match=message):
        settings()


@pytest.mark.parametrize("key", ["short", "with space in it", "umläute-im-schlüssel"])
def test_keys_that_no_client_could_send_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="API key|api_keys"):
        serve.server_config(parsed(), MODEL, [key])


def test_options_without_effect_say_so() -> None:
    lines = ineffective(parsed("--reasoning-parser", "ernie-x1", "--enable-chunked-prefill"))
    assert [line.split()[0] for line in lines] == ["--reasoning-parser", "--enable-chunked-prefill"]
    assert ineffective(parsed()) == []


def test_beyond_this_machine_a_key_is_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.delenv("ERNIE45_API_KEY", raising=False)
    (tmp_path / "config.json").write_text("{}")
    assert main(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0 is reached from other machines: choose a key" in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "no-such-model"]) == 4
    assert "no model 'no-such-model' here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("192.168.1.2", False),
        ("x.example", False),
    ],
)
def test_what_counts_as_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_packed_folder_is_served_as_it_is_and_no_other_way(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"scheme": "wint4"}}))
    assert serve._quantized(tmp_path, "wint4") == tmp_path
    assert serve._quantized(tmp_path, None) == tmp_path
    with pytest.raises(UsageError, match="quantized already, and not as wint8"):
        serve._quantized(tmp_path, "wint8")


def test_a_packed_copy_is_made_once(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("ERNIE45_HOME", str(tmp_path))
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    calls = []

    def run_verb(*arguments: str) -> None:
        calls.append(arguments)
        copy = Path(arguments[-1])
        copy.mkdir()
        (copy / "config.json").write_text("{}")

    monkeypatch.setattr(serve, "run_verb", run_verb)
    expected = tmp_path / "models" / "m-wint8"
    assert serve._quantized(folder, "wint8") == serve._quantized(folder, "wint8") == expected
    assert calls == [("quantize", str(folder), "--scheme", "wint8", "-o", str(expected))]


@pytest.mark.parametrize(
    "text",
    [
        "key is secret-of-mine",
        "Authorization: Bearer abcdefgh12",
        "{'x-api-key': 'qwertyuiop'}",
        "ek-0123456789abcdef",
        "sk-0123456789abcdef",
    ],
)
def test_logs_hold_no_keys(text: str) -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, text, None, None)
    line = RedactingFormatter("%(message)s", ["secret-of-mine"]).format(record)
    assert "[redacted]" in line
    for secret in ("secret-of-mine", "abcdefgh12", "qwertyuiop", "0123456789abcdef"):
        assert secret not in line


def test_up_fetches_the_default_model_once(monkeypatch: Any, tmp_path: Path) -> None:
    from ernie45.cli import up

    monkeypatch.setenv("ERNIE45_HOME", str(tmp_path))
    done: list[tuple[str, ...]] = []
    monkeypatch.setattr(serve, "run_verb", lambda *arguments: done.append(arguments))

    def run(options: argparse.Namespace) -> int:
        done.append(("served", str(options.chat_page)))
        return 0

    monkeypatch.setattr(serve, "run", run)
    options = build_parser("up").parse_intermixed_args([])
    assert up.run(options) == 0
    assert done == [("pull", "smollm2-135m"), ("served", "True")]
