"""What Prometheus reads at /metrics: latency, batch size, queue, refusals, feedback, and drift of the scores.

Drift is the running mean of served values minus the mean that the reward card says test users got; a model that is
asked about other conversations than it was tested on shows it here first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rluf.serve.batching import Round

WINDOW = 500
"""Scores that the running mean looks back on (its weight for the newest is 1 / WINDOW, more while there are fewer)."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768)


class RunningMean:
    """Mean of the last values: plain until WINDOW values were seen, exponentially forgetting after that."""

    def __init__(self) -> None:
        self.count, self.mean = 0, 0.0

    def add(self, value: float) -> float:
        """Take one value in; returns the mean."""
        self.count += 1
        self.mean += (value - self.mean) / min(self.count, WINDOW)
        return self.mean


class ServeMetrics:
    """Counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry, by_route, by_model = self.registry, ("route", "status"), ("objective", "version")
        self.seconds = Histogram(
            "rluf_request_seconds", "Seconds from request to answer", by_route, registry=registry, buckets=SECONDS
        )
        self.batch_items = Histogram("rluf_batch_items", "Responses scored together", registry=registry, buckets=ITEMS)
        self.batch_tokens = Histogram(
            "rluf_batch_tokens", "Tokens scored together (estimated)", registry=registry, buckets=TOKENS
        )
        self.batch_seconds = Histogram("rluf_batch_seconds", "Seconds a batch took", registry=registry, buckets=SECONDS)
        self.waiting = Gauge("rluf_waiting_items", "Responses that wait to be scored", registry=registry)
        self.running = Gauge("rluf_running_requests", "Requests under way", registry=registry)
        self.scores = Counter("rluf_scores", "Responses scored", by_model, registry=registry)
        self.mean = Gauge("rluf_score_mean", "Running mean of served values", by_model, registry=registry)
        self.drift = Gauge(
            "rluf_score_drift", "Running mean of served values minus the reward card's", by_model, registry=registry
        )
        self.feedback = Counter("rluf_feedback", "Feedback requests by outcome", ("outcome",), registry=registry)
        self.retries = Counter("rluf_scorer_retries", "Batches sent again as a replica had died", registry=registry)
        self._means: dict[tuple[str, str], RunningMean] = {}

    def round(self, done: Round) -> None:
        """One batch has been scored."""
        self.batch_items.observe(done.items)
        self.batch_tokens.observe(done.tokens)
        self.batch_seconds.observe(done.seconds)

    def scored(self, objective: str, version: str, values: Iterable[float], expected: Mapping[str, float]) -> None:
        """Values of one objective were served; `expected` holds the card's mean value of each objective it has."""
        mean = self._means.setdefault((objective, version), RunningMean())
        count = 0
        for value in values:
            mean.add(value)
            count += 1
        self.scores.labels(objective, version).inc(count)
        self.mean.labels(objective, version).set(mean.mean)
        if objective in expected:
            self.drift.labels(objective, version).set(mean.mean - expected[objective])

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
