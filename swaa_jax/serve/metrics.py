"""What `/metrics` tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from swaa_jax.serve.worker import EngineWorker

__all__ = ["Metrics"]

_LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/")


class Metrics:
    """Counts of one server.

    Attributes:
        first_token, token: seconds, histograms.
        cancelled: requests whose client left.
        open: requests that are being answered, those that need no key apart.
    """

    def __init__(self, worker: EngineWorker):
        self._registry = CollectorRegistry()
        about = {"registry": self._registry, "namespace": "swaa"}
        self._requests = Counter(
            "requests", "Requests by path and status.", ("path", "status"), **about
        )
        self._seconds = Histogram(
            "request_seconds", "Seconds of a whole request.", buckets=_LATENCIES, **about
        )
        self.first_token = Histogram(
            "first_token_seconds", "From a request to its first token.", buckets=_LATENCIES, **about
        )
        self.token = Histogram(
            "token_seconds", "From the first token to the last, by token.",
            buckets=(0.001, 0.0025, *_LATENCIES), **about,
        )  # fmt: skip
        self.cancelled = Counter("cancelled", "Requests whose client left.", **about)
        self.open = Gauge("open_requests", "Requests that are being answered.", **about)
        self._registry.register(_OfEngine(worker))

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request; paths that nobody serves are counted as one."""
        shown = path if path in _PATHS else "other"
        self._requests.labels(shown, str(status)).inc()
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    """Numbers that the engine keeps."""

    def __init__(self, worker: EngineWorker):
        self._worker = worker

    def collect(self):
        clock = self._worker.clock
        counts = {
            "prompt_tokens": (clock.read_tokens, "Prompt tokens that were read."),
            "reused_tokens": (clock.reused_tokens, "Prompt tokens that had been read before."),
            "new_tokens": (clock.new_tokens, "Tokens that were drawn."),
            "decode_steps": (clock.decode_steps, "Steps of the decode program."),
            "read_seconds": (clock.read_s, "Seconds of reading prompts."),
            "decode_seconds": (clock.decode_s, "Seconds of decoding."),
        }
        for name, (value, about) in counts.items():
            yield CounterMetricFamily(f"swaa_{name}", about, value=value)
        levels = GaugeMetricFamily("swaa_engine", "Of each model.", labels=("model", "what"))
        for model, load in self._worker.loads.items():
            for what, value in load.items():
                levels.add_metric((model, what), value)
        yield levels
        alive = self._worker.failure is None
        yield GaugeMetricFamily("swaa_up", "Whether requests are answered.", value=alive)
