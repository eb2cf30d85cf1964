"""What Prometheus may read at /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from genarm.engine import Completion
from genarm.server.backend import Backend

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_GAPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(backend))
        self.requests = Counter("genarm_requests", "Requests answered.", ("path", "status"), registry=self.registry)
        self.prompt_tokens = self._counter("genarm_prompt_tokens", "Tokens of prompts.")
        self.tokens = self._counter("genarm_generated_tokens", "Tokens of replies.")
        self.drafted = self._counter("genarm_drafted_tokens", "Tokens drafted for complete replies.")
        self.accepted = self._counter("genarm_accepted_tokens", "Drafted tokens that stayed.")
        self.nats = self._counter("genarm_kl_nats", "Nats that complete replies went from the base.")
        self.first = self._histogram(
            "genarm_time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS
        )
        self.gap = self._histogram("genarm_inter_token_seconds", "Between two tokens of a reply.", _GAPS)
        self.request = self._histogram(
            "genarm_request_seconds", "From a request's arrival to the end of its answer.", _SECONDS
        )

    def completed(self, completion: Completion) -> None:
        """Count what a reply came to, but for its tokens, which were counted as they came."""
        self.prompt_tokens.inc(completion.prompt_tokens)
        self.drafted.inc(completion.drafted)
        self.accepted.inc(completion.accepted)
        self.nats.inc(completion.kl or 0.0)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)


class _Now(Collector):
    """Read from the backend when asked."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        load = self._backend.load()
        yield GaugeMetricFamily("genarm_running", "Replies that run.", load.running)
        yield GaugeMetricFamily("genarm_queue", "Replies that wait to run.", load.waiting)
        yield GaugeMetricFamily("genarm_streams", "Replies that can run at once.", self._backend.streams)
        yield GaugeMetricFamily("genarm_ready", "1 while requests are taken.", float(self._backend.state == "ok"))
        yield CounterMetricFamily("genarm_engine_restarts", "Restarts of the engine.", self._backend.restarts)
