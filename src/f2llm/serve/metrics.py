"""What Prometheus is told: requests, texts and tokens, what waits, and batches; a registry for each server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from f2llm.serve.models import Served

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
POWERS = tuple(float(2**power) for power in range(18))

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("f2llm_requests", "Requests", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "f2llm_request_seconds", "Seconds of a request", ["route"], buckets=SECONDS, registry=registry
        )
        self.texts = Counter("f2llm_texts", "Texts that were computed", ["model"], registry=registry)
        self.tokens = Counter("f2llm_tokens", "Their tokens, EOS included", ["model"], registry=registry)
        self.truncated = Counter("f2llm_truncated_texts", "Texts that were cut", ["model"], registry=registry)
        self.tokenizing = Histogram(
            "f2llm_tokenization_seconds",
            "Tokenising a request",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.waiting_texts = Gauge("f2llm_waiting_texts", "Texts that wait", ["model"], registry=registry)
        self.waiting_tokens = Gauge("f2llm_waiting_tokens", "Tokens that wait", ["model"], registry=registry)
        self.batch_texts = Histogram(
            "f2llm_batch_texts", "Texts of a batch", ["model"], buckets=POWERS, registry=registry
        )
        self.batch_tokens = Histogram(
            "f2llm_batch_tokens", "Tokens of a batch", ["model"], buckets=POWERS, registry=registry
        )
        self.batch_seconds = Histogram(
            "f2llm_batch_seconds", "Seconds of a batch", ["model"], buckets=SECONDS, registry=registry
        )

    def watch(self, served: Served) -> None:
        """Read the queue of a model when asked, and count its batches."""
        name, scheduler = served.name, served.scheduler
        self.waiting_texts.labels(name).set_function(lambda: scheduler.waiting_texts)
        self.waiting_tokens.labels(name).set_function(lambda: scheduler.waiting_tokens)

        def on_batch(texts: int, tokens: int, seconds: float) -> None:
            self.batch_texts.labels(name).observe(texts)
            self.batch_tokens.labels(name).observe(tokens)
            self.batch_seconds.labels(name).observe(seconds)

        scheduler.on_batch = on_batch

    def page(self) -> bytes:
        """All of it in the text format."""
        return generate_latest(self._registry)
