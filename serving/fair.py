"""Sequences that wait, by tenant: next is one of the tenant that was served least.

This is the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models" (arXiv
2401.00588): each tenant has a counter of the service that it got, and one that begins to wait is lifted to the least
of those that wait already, so nobody saves up service while away. With one tenant it is first come, first served.
"""

from collections import Counter, deque

from serving.sequence import Sequence

PROMPT_PRICE = 1.0  # of a token of a prompt
ANSWER_PRICE = 2.0  # of a token of an answer: the prices of the paper

WaitingLine = deque[Sequence]


class FairQueue:
    """The sequences that wait, and what each tenant got so far."""

    def __init__(self) -> None:
        self._waiting: dict[str, WaitingLine] = {}  # by tenant, only those that wait
        self._service: dict[str, float] = {}  # by tenant
        self._last_to_leave = ""

    def __len__(self) -> int:
        """The number of sequences that wait."""
        lengths = map(len, self._waiting.values())
        return sum(lengths)

    def __contains__(self, sequence: Sequence) -> bool:
        """Whether a sequence waits."""
        tenant = sequence.request.tenant
        waiting = self._waiting.get(tenant, ())
        return sequence in waiting

    @property
    def tenants(self) -> int:
        """How many tenants have come so far."""
        return len(self._service)

    def service(self, tenant: str) -> float:
        """What a tenant got so far, and was lifted by."""
        return self._service.get(tenant, 0.0)

    def append(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        tenant = sequence.request.tenant
        if tenant not in self._waiting:
            self._lift(tenant)
            self._waiting[tenant] = deque()
        self._waiting[tenant].append(sequence)

    def first(self) -> Sequence:
        """The one whose turn it is; of tenants that got as much, the last one that came."""
        tenants = reversed(self._waiting)
        tenant = min(tenants, key=self.service)
        return self._waiting[tenant][0]

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence not wait any more."""
        tenant = sequence.request.tenant
        queue = self._waiting[tenant]
        queue.remove(sequence)
        if not queue:
            del self._waiting[tenant]
            self._last_to_leave = tenant

    def charge_prompt(self, sequence: Sequence) -> None:
        """Count the tokens of a prompt that is about to be computed."""
        request = sequence.request
        price = len(request.prompt) * PROMPT_PRICE
        self._charge(request.tenant, price)

    def charge_tokens(self, sequences: list[Sequence]) -> None:
        """Count one token of each of these sequences' answers."""
        tenants = [sequence.request.tenant for sequence in sequences]
        tokens_of = Counter(tenants)
        for tenant, tokens in tokens_of.items():
            price = tokens * ANSWER_PRICE
            self._charge(tenant, price)

    def in_turn(self, sequences: list[Sequence]) -> list[Sequence]:
        """Sequences in the order of their tenants' turns; those of one tenant stay in their order."""
        return sorted(sequences, key=self._service_of)

    def _service_of(self, sequence: Sequence) -> float:
        return self.service(sequence.request.tenant)

    def _charge(self, tenant: str, price: float) -> None:
        before = self.service(tenant)
        self._service[tenant] = before + price

    def _lift(self, tenant: str) -> None:
        """Raise a tenant's counter to the least of those that wait; to the last one's where nobody does."""
        least = self.service(self._last_to_leave)
        if self._waiting:
            least = min(map(self.service, self._waiting))
        own = self.service(tenant)
        self._service[tenant] = max(own, least)
