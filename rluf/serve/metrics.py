"""Prometheus metrics of the gateway (/metrics): latency, batches, queue, rejections, feedback and score drift.

Drift is the running mean of served values minus the mean over test users on the reward card. It is the first sign of
traffic that differs from the data that the model was tested on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rluf.serve.batching import BatchStats

RUNNING_MEAN_WINDOW = 500
"""Time constant of the running mean in scores: the newest has a weight of 1 / window, or more while there are fewer."""
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ITEM_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKEN_BUCKETS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768)


class RunningMean:
    """Running mean: arithmetic over the first RUNNING_MEAN_WINDOW values, exponential after that."""

    def __init__(self) -> None:
        self.count, self.mean = 0, 0.0

    def add_value(self, value: float) -> float:
        """Add one value and return the mean."""
        self.count += 1
        self.mean += (value - self.mean) / min(self.count, RUNNING_MEAN_WINDOW)
        return self.mean


class ServeMetrics:
    """Metrics of one gateway."""

    def __init__(self) -> None:
        # Not the global registry: tests and a restarted gateway would register the same names twice.
        self.registry = CollectorRegistry()
        registry, by_route, by_model = self.registry, ("route", "status"), ("objective", "version")
        self.request_seconds = Histogram(
            "rluf_request_seconds",
            "Seconds from request to response",
            by_route,
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self.batch_items = Histogram("rluf_batch_items", "Responses per batch", registry=registry, buckets=ITEM_BUCKETS)
        self.batch_tokens = Histogram(
            "rluf_batch_tokens", "Tokens per batch (estimated)", registry=registry, buckets=TOKEN_BUCKETS
        )
        self.batch_seconds = Histogram(
            "rluf_batch_seconds", "Seconds per batch", registry=registry, buckets=SECONDS_BUCKETS
        )
        self.queued_items = Gauge("rluf_waiting_items", "Queued responses", registry=registry)
        self.running_requests = Gauge("rluf_running_requests", "Requests in progress", registry=registry)
        self.scored_responses = Counter("rluf_scores", "Scored responses", by_model, registry=registry)
        self.score_mean = Gauge("rluf_score_mean", "Running mean of served values", by_model, registry=registry)
        self.score_drift = Gauge(
            "rluf_score_drift", "Running mean of served values minus the reward card's", by_model, registry=registry
        )
        self.feedback_requests = Counter(
            "rluf_feedback", "Feedback requests by outcome", ("outcome",), registry=registry
        )
        self.scorer_retries = Counter(
            "rluf_scorer_retries", "Batches sent again because their replica died", registry=registry
        )
        self._running_means: dict[tuple[str, str], RunningMean] = {}

    def record_batch(self, batch_stats: BatchStats) -> None:
        """Record a scored batch."""
        self.batch_items.observe(batch_stats.item_count)
        self.batch_tokens.observe(batch_stats.token_count)
        self.batch_seconds.observe(batch_stats.seconds)

    def record_scores(
        self, objective: str, version: str, values: Iterable[float], expected_means: Mapping[str, float]
    ) -> None:
        """Record served values of one objective; `expected_means` are the reward cards' mean values by objective."""
        running_mean = self._running_means.setdefault((objective, version), RunningMean())
        value_count = 0
        for value in values:
            running_mean.add_value(value)
            value_count += 1
        self.scored_responses.labels(objective, version).inc(value_count)
        self.score_mean.labels(objective, version).set(running_mean.mean)
        if objective in expected_means:
            self.score_drift.labels(objective, version).set(running_mean.mean - expected_means[objective])

    def to_prometheus_text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
