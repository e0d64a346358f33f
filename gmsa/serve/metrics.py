"""What the server counts, for Prometheus. Never what anybody asked."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        ProcessCollector(registry=registry)  # processor time, memory, open files
        self.requests = Counter(
            "gmsa_requests",
            "Requests answered; status 499: the client left first",
            ["route", "status"],
            registry=registry,
        )
        self.duration = Histogram(
            "gmsa_request_seconds", "From a request to its last byte", ["route"], buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "gmsa_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=registry
        )
        self.tokens = Counter(
            "gmsa_tokens",
            "Tokens by kind: text and soft ones read, origin ones that the soft ones stood for, generated ones",
            ["kind"],
            registry=registry,
        )
        self.saved = Counter(
            "gmsa_saved_tokens", "Tokens that did not have to be read, as soft tokens stood for them", registry=registry
        )
        self.compressed = Counter("gmsa_compressed_tokens", "Tokens of texts compressed", registry=registry)
        self.compress_seconds = Counter("gmsa_compress_seconds", "Time spent compressing", registry=registry)
        self.memories = Counter(
            "gmsa_memory_lookups", "Texts to be compressed: found in the store or made", ["result"], registry=registry
        )
        self.open = Gauge("gmsa_open_requests", "Requests admitted and not yet answered", registry=registry)
        self.batch = Gauge("gmsa_batch_rows", "Answers being written", registry=registry)
        self.waiting = Gauge("gmsa_waiting_rows", "Answers waiting for a place in the batch", registry=registry)
        self.turns = Counter("gmsa_decoder_turns", "Steps of the batch", registry=registry)
        self.decoder_up = Gauge("gmsa_decoder_up", "1 while a decoder elsewhere answers", registry=registry)
        self.decoder_failures = Counter(
            "gmsa_decoder_failures", "Times that a decoder elsewhere could not be used", registry=registry
        )

    def on_step(self, batch: int, waiting: int) -> None:
        """Note a turn of the scheduler."""
        self.batch.set(batch)
        self.waiting.set(waiting)
        self.turns.inc()

    def render(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
