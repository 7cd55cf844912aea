"""What Prometheus reads: tokens, times to the first token and residency, by tenant and adapter.

What is known of an adapter is forgotten with it, so names that come and go do not fill the memory.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

OWNER = ("tenant", "adapter")
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
Residency = Iterable[tuple[str, str, bool]]  # owner, name, and whether it is on the device


class Measured:
    """What is measured of one gateway."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._prompt = _counter("prompt_tokens", "Tokens of prompts.", OWNER, registry)
        self._answer = _counter("answer_tokens", "Tokens of answers.", OWNER, registry)
        self._first = _counter("first_token_seconds", "Waited for first tokens, all together.", OWNER, registry)
        self._answers = _counter("answers", "Answers that had a first token.", OWNER, registry)
        self._requests = _counter("requests", "Requests by HTTP status.", ("tenant", "status"), registry)
        self._waited = Histogram(
            "fleetune_time_to_first_token_seconds",
            "From request to first token.",
            ("tenant",),
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self.under_way = Gauge("fleetune_requests_under_way", "Answers that wait or run.", registry=registry)
        about = "Whether an adapter is on the device."
        self._resident = Gauge("fleetune_adapter_resident", about, OWNER, registry=registry)

    def request(self, tenant: str, status: int) -> None:
        """Count a request that was answered or refused."""
        counter = self._requests.labels(tenant, str(status))
        counter.inc()

    def answer(self, tenant: str, adapter: str, prompt: int, tokens: int, first_token_s: float | None) -> None:
        """Count the tokens of an answer, and how long its first one took."""
        of_adapter = (tenant, adapter)
        self._prompt.labels(*of_adapter).inc(prompt)
        self._answer.labels(*of_adapter).inc(tokens)
        if first_token_s is None:
            return
        self._first.labels(*of_adapter).inc(first_token_s)
        self._answers.labels(*of_adapter).inc()
        waited = self._waited.labels(tenant)
        waited.observe(first_token_s)

    def forget(self, owner: str, adapter: str) -> None:
        """Drop what is counted of an adapter that is gone, which its owner alone could use."""
        labels = {"tenant": owner, "adapter": adapter}
        counters = (self._prompt, self._answer, self._first, self._answers)
        for counter in counters:
            counter.remove_by_labels(labels)

    def text(self, residency: Residency) -> bytes:
        """All of it, as Prometheus reads it."""
        self._resident.clear()
        for owner, name, is_resident in residency:
            self._resident.labels(owner, name).set(float(is_resident))
        return generate_latest(self._registry)


def _counter(name: str, about: str, labels: tuple[str, ...], registry: CollectorRegistry) -> Counter:
    full_name = f"fleetune_{name}"
    return Counter(full_name, about, labels, registry=registry)
