"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from emotrain.modular.expert_store import ExpertStore

MOST_MODELS = 256
"""Names of models that are told apart; subsets may come and go for as long as the server runs."""


class _Experts:
    """What a store counts, read when somebody asks."""

    def __init__(self, store: ExpertStore):
        self.store = store

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        store, counters = self.store, self.store.counters
        for name, text, value in (
            ("resident_experts", "Experts in memory", store.resident_bytes // store.expert_bytes),
            ("resident_expert_bytes", "Bytes of experts in memory", store.resident_bytes),
        ):
            yield GaugeMetricFamily(f"emotrain_{name}", text, value=value)
        for name, text, value in (
            ("expert_hits", "Experts found in memory", counters.hits),
            ("expert_misses", "Experts read from files", counters.misses),
            ("expert_evictions", "Experts that made room", counters.evictions),
            ("expert_read_bytes", "Bytes read of experts", counters.bytes_read),
        ):
            yield CounterMetricFamily(f"emotrain_{name}", text, value=value)


class ServerMetrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, store: ExpertStore | None):
        """`store`: of the experts, where they are read when they are needed."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._models: set[str] = set()
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry, "namespace": "emotrain"}
        self._tokens = Counter("generated_tokens", "Tokens generated", ["model"], **options)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts read", ["model"], **options)
        self._ended = Counter("sequences", "Sequences that ended", ["model", "reason"], **options)
        self._requests = Counter("requests", "Answers by HTTP status", ["path", "code"], **options)
        self._first = Histogram(
            "time_to_first_token_seconds",
            "From the request's arrival to its first token",
            ["model"],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            **options,
        )
        self._running = Gauge("running_sequences", "Sequences that are generated", **options)
        self._waiting = Gauge("waiting_sequences", "Sequences that wait for room", **options)
        self._pages = Gauge("cache_pages", "Pages of keys and values in use", **options)
        if store is not None:
            self.registry.register(_Experts(store))

    def _label(self, model: str) -> str:
        """Clients choose names, and a series of its own for each would be without limit."""
        if model.startswith("auto:"):
            return "auto:K"
        if model not in self._models:
            if len(self._models) >= MOST_MODELS:
                return "other"
            self._models.add(model)
        return model

    def generated(self, tokens: Mapping[str, int]) -> None:
        """By a step, for each model."""
        for model, count in tokens.items():
            self._tokens.labels(self._label(model)).inc(count)

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(self._label(model)).observe(seconds)

    def read(self, model: str, tokens: int) -> None:
        self._prompt.labels(self._label(model)).inc(tokens)

    def ended(self, model: str, reason: str) -> None:
        self._ended.labels(self._label(model), reason).inc()

    def answered(self, path: str, code: int) -> None:
        self._requests.labels(path, str(code)).inc()

    def queue(self, running: int, waiting: int, pages: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._pages.set(pages)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
