"""What Prometheus reads: vLLM's names, under `llamac:`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..request import Completion

__all__ = ["Metrics"]

_LATENCIES_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked for in slots.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found in slots.")
        self._finished = self._counter("request_success", "Finished.", "finished_reason")
        self._rejected = self._counter("admission_rejections", "Refused.", "reason")
        self._ttft = self._histogram("time_to_first_token_seconds", "To the first token.")
        self._latency = self._histogram("inter_token_latency_seconds", "Between two tokens.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From request to end.")
        self._queued = self._histogram("request_queue_time_seconds", "Waiting for a slot.")

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Adds a number that is read when it is asked for."""
        Gauge(f"llamac:{name}", text, registry=self._registry).set_function(read)

    def first_token(self, elapsed_s: float) -> None:
        """A completion's first token has come, so long after its request."""
        self._ttft.observe(elapsed_s)
        self._generation_tokens.inc()

    def next_token(self, elapsed_s: float) -> None:
        """Another has come, so long after the one before."""
        self._latency.observe(elapsed_s)
        self._generation_tokens.inc()

    def finish(self, reason: str, elapsed_s: float) -> None:
        """A completion is over, so long after its request."""
        self._finished.labels(reason).inc()
        self._whole.observe(elapsed_s)

    def count(self, num_prompt: int, completion: Completion) -> None:
        """Counts what a finished completion says of itself."""
        self._prompt_tokens.inc(num_prompt)
        self._queries.inc(num_prompt)
        self._hits.inc(completion.num_reused)
        self._queued.observe(completion.queue_s)

    def reject(self, reason: str) -> None:
        """A request was not taken in."""
        self._rejected.labels(reason).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"llamac:{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"llamac:{name}", text, registry=self._registry, buckets=_LATENCIES_S)
