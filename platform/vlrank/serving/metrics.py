"""What Prometheus reads at /metrics: requests, the queue, users in work, prompts, memory; of all replicas together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from vlrank.serving.proxy import PATHS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LEFT = "left"
"""Status of a request whose client did not wait for the answer."""

_SECONDS = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_USERS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "vlrank_requests", "Requests by path and status of the answer.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "vlrank_request_seconds",
            "Time from a request's arrival at the replica to its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.users = Histogram(
            "vlrank_users_in_work",
            "Users whom the engine works on, seen whenever it begins with another.",
            buckets=_USERS,
            registry=self.registry,
        )
        self.prompts = Counter("vlrank_prompts", "Prompts that were scored.", registry=self.registry)
        self.tokens = Counter("vlrank_prompt_tokens", "Tokens of these prompts.", registry=self.registry)

    def watch(self, gauges: Callable[[], Mapping[str, tuple[str, float]]]) -> None:
        """Show values that are read at each scrape: name -> (help, value)."""
        self.registry.register(_Read(gauges))

    def text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self.registry).decode()


def merged(texts: Mapping[str, str]) -> bytes:
    """`Metrics.text` of several replicas as one, with a label ``replica``."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                kept.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Fixed(families.values()))
    return generate_latest(registry)


class _Read(Collector):
    def __init__(self, gauges: Callable[[], Mapping[str, tuple[str, float]]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        for name, (text, value) in self._gauges().items():
            if name.endswith("_total"):
                yield CounterMetricFamily(name.removesuffix("_total"), text, value=value)
            else:
                yield GaugeMetricFamily(name, text, value=value)


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        yield from self._families


class Measured:
    """ASGI middleware: counts and times requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        started, status = time.perf_counter(), LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._metrics.requests.labels(path, status).inc()
            if status != LEFT:
                self._metrics.seconds.labels(path).observe(time.perf_counter() - started)
