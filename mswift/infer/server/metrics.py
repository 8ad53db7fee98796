"""What /metrics tells Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server; `load` says how many answers grow and how many wait."""

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "mswift_requests", "Requests by route and HTTP status.", ("route", "status"), registry=self._registry
        )
        self.left = Counter("mswift_clients_left", "Requests whose client went away.", registry=self._registry)
        self.prompt_tokens = Counter("mswift_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.new_tokens = Counter("mswift_generated_tokens", "Tokens of answers.", registry=self._registry)
        self.first_token = Histogram(
            "mswift_time_to_first_token_seconds", "From a request to its first text.", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.whole = Histogram(
            "mswift_request_seconds", "From a request to the end of its answer.", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        running = Gauge("mswift_answers_running", "Answers that grow.", registry=self._registry)
        waiting = Gauge("mswift_answers_waiting", "Answers that wait for room.", registry=self._registry)
        running.set_function(lambda: load()[0])
        waiting.set_function(lambda: load()[1])

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
