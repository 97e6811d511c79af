"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from polygpt.server.jobs import Job

if TYPE_CHECKING:
    from polygpt.server.served import Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self, models: Iterable[Served]):
        self.registry = CollectorRegistry()
        by_model = {"labelnames": ("model",), "registry": self.registry}
        self.requests = Counter(
            "polygpt_requests", "Answered requests.", ("route", "method", "status"), registry=self.registry
        )
        self.prompt_tokens = Counter("polygpt_prompt_tokens", "Tokens of prompts.", **by_model)
        self.cached_tokens = Counter(
            "polygpt_cached_tokens", "Tokens of prompts whose state was kept from earlier requests.", **by_model
        )
        self.generated_tokens = Counter("polygpt_generated_tokens", "Tokens given to clients.", **by_model)
        self.first_token = Histogram(
            "polygpt_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_FIRST,
            **by_model,
        )
        self.each_token = Histogram(
            "polygpt_time_per_token_seconds",
            "Between the tokens of a sequence, averaged over it.",
            buckets=_EACH,
            **by_model,
        )
        self.registry.register(_Gauges(list(models)))

    def count(self, model: str, job: Job, prompts: list[list[int]]) -> None:
        """Counts a finished job, however it ended."""
        self.count_tokens(model, sum(map(len, prompts)), sum(job.tokens))
        self.cached_tokens.labels(model).inc(job.cached_tokens(len(prompts)))
        firsts = [timing.first for timing in job.times if timing.first is not None]
        if firsts:
            self.first_token.labels(model).observe(min(firsts) - job.arrived)
        for timing, tokens in zip(job.times, job.tokens, strict=True):
            if tokens > 1:
                self.each_token.labels(model).observe((timing.last - timing.first) / (tokens - 1))

    def count_tokens(self, model: str, prompted: int, generated: int) -> None:
        """Counts tokens in and out."""
        self.prompt_tokens.labels(model).inc(prompted)
        self.generated_tokens.labels(model).inc(generated)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)


class _Gauges:
    """Gauges that are read from the runners at each scrape."""

    def __init__(self, models: list[Served]):
        self.models = models

    def collect(self) -> Iterator[Metric]:
        """Queue, slots, health and speculation of each model."""
        told = {
            "polygpt_queue_length": "Sequences that wait for a slot.",
            "polygpt_slots_in_use": "Sequences that are being decoded.",
            "polygpt_slots": "Slots there are.",
            "polygpt_engine_up": "Whether the engine works.",
            "polygpt_engine_restarts": "How often the engine was made anew.",
        }
        counted = {
            "polygpt_drafted_tokens": "Tokens that speculation proposed.",
            "polygpt_accepted_tokens": "Tokens that speculation proposed and that turned out right.",
        }
        families = [GaugeMetricFamily(name, text, labels=("model",)) for name, text in told.items()]
        families += [CounterMetricFamily(name, text, labels=("model",)) for name, text in counted.items()]
        for served in self.models:
            runner, engine = served.runner, served.runner.statistics
            values = [engine.queued, engine.slots_in_use, runner.slots, int(runner.healthy), runner.restarts]
            values += [engine.drafted, engine.accepted]
            for family, value in zip(families, values, strict=True):
                family.add_metric((served.name,), value)
        yield from families
