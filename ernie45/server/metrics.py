"""What the server counts, in Prometheus' form: under names of its own, and under vLLM's where both mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ernie45.engine.client import EngineClient
from ernie45.server.answering import Answering

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_OWN, _ALIAS = "ernie45_", "vllm:"
_ALIASED = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "num_preemptions",
        "prompt_tokens",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "request_success",
        "time_to_first_token_seconds",
        "request_queue_time_seconds",
        "time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
    }
)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 131072)


class Metrics:
    """Counts of this process, and the engine's as they stand when somebody asks."""

    def __init__(self, engine: EngineClient, model: str) -> None:
        """Args: model: the label `model_name` of everything."""
        self._registry = CollectorRegistry(auto_describe=True)
        own = CollectorRegistry(auto_describe=True)
        label = ["model_name"]

        def counter(name: str, text: str, *labels: str) -> Counter:
            made = Counter(_OWN + name, text, [*label, *labels], registry=own)
            if not labels:
                made.labels(model)  # 0 from the beginning: a rate over a series that is not there is none
            return made

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(_OWN + name, text, label, buckets=buckets, registry=own)
            made.labels(model)
            return made

        self._model = model
        self._http = counter("http_requests", "Answers by route and status.", "route", "status")
        self._finished = counter("request_success", "Choices that ended, by reason.", "finished_reason")
        for reason in ("stop", "length", "tool_calls"):
            self._finished.labels(model, reason)
        self._failed = counter("request_failure", "Requests that ended without an answer: aborted, failed.")
        self._prompt = counter("prompt_tokens", "Prompt tokens.")
        self._cached = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._generated = counter("generation_tokens", "Tokens of answers.")
        self._reasoning = counter("reasoning_tokens", "Tokens of answers that are thoughts.")
        self._queued = histogram(
            "request_queue_time_seconds", "From acceptance to the first step that computes something of it.", _SECONDS
        )
        self._first = histogram("time_to_first_token_seconds", "From the request to its first token.", _SECONDS)
        self._each = histogram("time_per_output_token_seconds", "Between tokens, mean of a request.", _PER_TOKEN)
        self._whole = histogram("e2e_request_latency_seconds", "From the request to its end.", _SECONDS)
        self._prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._answer_sizes = histogram("request_generation_tokens", "Tokens of a request's answers.", _TOKENS)
        own.register(_EngineCollector(engine, model))
        self._registry.register(_Aliased(own))

    def text(self) -> bytes:
        """The page for Prometheus."""
        return generate_latest(self._registry)

    def answered(self, route: str, status: int) -> None:
        """An HTTP answer was sent."""
        self._http.labels(self._model, route, str(status)).inc()

    def ended(self, answering: Answering) -> None:
        """A request has ended, one way or the other."""
        usage, timings = answering.usage, answering.timings
        model = self._model
        for reason in answering.finish_reasons:
            self._finished.labels(self._model, reason).inc()
        if answering.failed:
            self._failed.labels(model).inc()
        self._prompt.labels(model).inc(usage.prompt_tokens)
        self._queries.labels(model).inc(usage.prompt_tokens)
        self._cached.labels(model).inc(usage.cached_tokens)
        self._generated.labels(model).inc(usage.completion_tokens)
        self._reasoning.labels(model).inc(usage.reasoning_tokens)
        for seconds in answering.queue_times:
            self._queued.labels(model).observe(seconds)
        self._prompt_sizes.labels(model).observe(usage.prompt_tokens)
        self._answer_sizes.labels(model).observe(usage.completion_tokens)
        if timings.first is None or timings.ended is None:
            return
        self._first.labels(model).observe(timings.first - timings.arrived)
        self._whole.labels(model).observe(timings.ended - timings.arrived)
        choices = sum(plan.params.num_generated for plan in answering.plans)
        if usage.completion_tokens > choices:
            per_choice = usage.completion_tokens / choices
            self._each.labels(model).observe((timings.ended - timings.first) / (per_choice - 1))


class _EngineCollector(Collector):
    """The engine's own counts; they begin anew when its process does."""

    def __init__(self, engine: EngineClient, model: str) -> None:
        self._engine, self._model = engine, model

    def collect(self) -> Iterator[Metric]:
        engine, stats = self._engine, self._engine.stats
        pages = stats.pages if stats else None
        in_use = pages.in_use / pages.total if pages else 0.0
        for name, text, value in (
            ("num_requests_running", "Sequences that compute.", stats.running if stats else 0),
            ("num_requests_waiting", "Sequences that wait.", stats.waiting if stats else 0),
            ("kv_cache_usage_perc", "Share of the page pool in use, 0 to 1.", in_use),
            ("engine_up", "1 while the engine's process serves.", int(engine.state == "ready")),
        ):
            gauge = GaugeMetricFamily(_OWN + name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, text, count in (
            ("num_preemptions", "Sequences that gave up their pages for a while.", stats.preemptions if stats else 0),
            ("spec_decode_num_draft_tokens", "Guesses that were verified.", stats.drafted_tokens if stats else 0),
            ("spec_decode_num_accepted_tokens", "Guesses that were right.", stats.accepted_tokens if stats else 0),
            ("engine_steps", "Steps of the engine.", stats.steps if stats else 0),
            ("engine_restarts", "Times that the engine's process was started again.", engine.restarts),
        ):
            counter = CounterMetricFamily(_OWN + name, text, labels=["model_name"])
            counter.add_metric([self._model], count)
            yield counter


class _Aliased(Collector):
    """Every metric of a registry, and a copy under the other name where there is one."""

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for metric in self._own.collect():
            yield metric
            bare = metric.name.removeprefix(_OWN)
            if bare in _ALIASED:
                alias = copy(metric)
                alias.name = _ALIAS + bare
                alias.samples = [
                    sample._replace(name=_ALIAS + sample.name.removeprefix(_OWN)) for sample in metric.samples
                ]
                yield alias
