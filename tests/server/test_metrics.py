"""/metrics: well-formed, of bounded size, and true."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from tests.server.raw import exchange, head, metric, wait_idle, wait_until
from tests.server.served import Served

USUAL = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:time_to_first_token_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:e2e_request_latency_seconds",
}


def test_the_page_is_prometheus_form_with_the_usual_names(server: Served) -> None:
    families = {family.name: family for family in text_string_to_metric_families(server.get("/metrics").text)}
    assert set(families) >= USUAL | {name.replace("vllm:", "ernie45_") for name in USUAL}
    assert all(family.documentation for family in families.values())


def test_tokens_and_answers_are_counted_as_the_answers_say(server: Served) -> None:
    names = ["ernie45_prompt_tokens_total", "ernie45_generation_tokens_total", "ernie45_prefix_cache_hits_total"]
    names += ["ernie45_request_success_total", "ernie45_e2e_request_latency_seconds_count"]
    before = [metric(server, name) for name in names]
    whole = server.chat("count me", max_tokens=7, n=2)["usage"]
    body = {
        "messages": [{"role": "user", "content": "count me"}],
        "max_tokens": 5,
        "stream_options": {"include_usage": True},
    }
    streamed = server.events("/v1/chat/completions", body)[-2]["usage"]
    wait_idle(server)
    after = [metric(server, name) for name in names]
    grown = [b - a for a, b in zip(before, after, strict=True)]
    assert grown[0] == whole["prompt_tokens"] + streamed["prompt_tokens"]
    assert grown[1] == whole["completion_tokens"] + streamed["completion_tokens"]
    assert grown[2] == sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in (whole, streamed))
    assert grown[3:] == [3, 2]


def test_no_path_adds_a_series(server: Served) -> None:
    """Labels are routes, not paths: else anyone with a key could fill the memory of server and Prometheus."""
    for number in range(3):
        exchange(server, head(f"/v1/models/x-{number}"))
        exchange(server, head(f"/nothing-{number}"))
    before = len(server.get("/metrics").text.splitlines())
    for number in range(30):
        exchange(server, head(f"/v1/models/model-{number}"))
        exchange(server, head(f"/v1/nothing-{number}"))
        exchange(server, head(f"/nothing/{number}", headers=""))
    text = server.get("/metrics").text
    assert len(text.splitlines()) <= before + 4
    assert "model-7" not in text
    assert "/models/{model:path}" in text


def test_waiting_for_a_full_engine_is_measured(start: Callable[..., Served]) -> None:
    served = start("ernie", "--max-model-len", "4096", "--max-num-seqs", "1")
    names = ["ernie45_request_queue_time_seconds", "vllm:request_queue_time_seconds"]
    assert [metric(served, f"{name}_count") for name in names] == [0, 0]
    long = {"max_tokens": 2000, "ignore_eos": True}
    first = threading.Thread(target=served.chat, kwargs=long)
    first.start()
    wait_until(lambda: metric(served, "ernie45_num_requests_running") == 1, 10, "the first one runs")
    second = threading.Thread(target=served.chat, kwargs={"max_tokens": 1})
    second.start()
    wait_until(lambda: metric(served, "ernie45_num_requests_waiting") == 1, 10, "the second one waits")
    served.post("/pause", {})
    time.sleep(0.6)
    served.post("/resume", {})
    first.join()
    second.join()
    wait_idle(served)
    for name in names:
        assert metric(served, f"{name}_count") == 2
        assert metric(served, f"{name}_bucket", le="0.5") == 1
        assert 0.6 < metric(served, f"{name}_sum") < metric(served, "ernie45_e2e_request_latency_seconds_sum")
