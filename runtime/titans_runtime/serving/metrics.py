"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from titans_runtime.serving.scheduler import Scheduler

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """A registry of its own: several servers in one process do not mix."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Read the scheduler's figures when asked for them."""
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerFigures(scheduler))
        self.requests = Counter(
            "titans_http_requests", "Answers by path and status.", ["path", "status"], registry=self._registry
        )
        self.saves = Counter("titans_memory_saves", "Memories saved.", registry=self._registry)
        self.conflicts = Counter(
            "titans_memory_conflicts", "Saves refused: someone else was first.", registry=self._registry
        )
        self.first_token = Histogram(
            "titans_first_token_seconds",
            "Time to the first token drawn.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.completion = Histogram(
            "titans_completion_seconds", "Time of a completion.", buckets=_SECONDS, registry=self._registry
        )

    def render(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


class _SchedulerFigures:
    """Asked for at every scrape."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Any]:
        scheduler, counters = self._scheduler, self._scheduler.counters
        yield GaugeMetricFamily("titans_requests_running", "Requests that hold a slot.", scheduler.running)
        yield GaugeMetricFamily("titans_requests_waiting", "Requests that wait.", scheduler.waiting)
        for name, text, value in (
            ("titans_tokens_read", "Tokens of prompts.", counters.read),
            ("titans_tokens_drawn", "Tokens drawn.", counters.drawn),
            ("titans_steps", "Steps of the scheduler.", counters.steps),
        ):
            yield CounterMetricFamily(name, text, value)
        ends = CounterMetricFamily("titans_streams_finished", "Streams by how they ended.", labels=["reason"])
        for reason, count in dict(counters.finished).items():
            ends.add_metric([reason], count)
        yield ends
