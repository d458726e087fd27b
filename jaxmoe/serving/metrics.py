"""/metrics in Prometheus' text format, in a registry of its own.

Two sources: what the front sees of HTTP, and the engine's counters, gauges and histograms as of its
last step (tokens, TTFT, TPOT, pages, bytes read), which are read when somebody asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxmoe.common.timing import Timings
from jaxmoe.engine.async_engine import AsyncEngine

PREFIX = "jaxmoe_"
_LABEL = re.compile(r'(\w+)="([^"]*)"')
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
# Seconds.
_QUEUE = (0.001, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LONG = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    def __init__(self, engine: AsyncEngine, model: str) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.http_requests = Counter(
            PREFIX + "http_requests", "requests answered", ["method", "path", "status"], registry=r
        )
        self.queue = Histogram(
            PREFIX + "queue_seconds", "from arrival to prefill", buckets=_QUEUE, registry=r
        )
        self.request = Histogram(
            PREFIX + "request_seconds", "of whole requests", buckets=_LONG, registry=r
        )
        self.in_work = Gauge(PREFIX + "http_requests_in_work", "requests in work", registry=r)
        info = Gauge(PREFIX + "model_info", "1", ["model"], registry=r)
        info.labels(model).set(1)
        r.register(_EngineCollector(engine))

    def observe_http(self, method: str, path: str, status: int, seconds: float) -> None:
        """path: a route's, not the client's text, which would be unbounded."""
        self.http_requests.labels(method, path, str(status)).inc()

    def observe_completion(self, timings: Timings) -> None:
        self.queue.observe(timings.queue_s)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's own figures (engine/stats.py says how their names are made)."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        return ()  # not known before the engine runs

    def collect(self) -> Iterable[Metric]:
        ready = GaugeMetricFamily(PREFIX + "engine_ready", "1 while requests are taken")
        ready.add_metric([], float(self._engine.status().state == "ready"))
        yield ready
        yield from engine_families(self._engine.stats())


def engine_families(stats: Mapping[str, float]) -> list[Metric]:
    """Families of flat figures: counters end in _total, histograms have _bucket, _sum, _count."""
    histograms = {n.split("_bucket{")[0] for n in stats if "_bucket{" in n}
    families: dict[str, Metric] = {}
    for full, value in stats.items():
        name, labels = _split(full)
        base = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        kind = "gauge"
        if base in histograms:
            kind = "histogram"
        elif name.endswith("_total"):
            base, kind = name.removesuffix("_total"), "counter"
        else:
            base = name
        if base not in families:
            families[base] = Metric(PREFIX + base, base.replace("_", " "), kind)
        families[base].add_sample(PREFIX + name, labels, float(value))
    return list(families.values())


def _split(full: str) -> tuple[str, dict[str, str]]:
    """`name{label="value"}` in two."""
    name, _, rest = full.partition("{")
    return name, dict(_LABEL.findall(rest))
