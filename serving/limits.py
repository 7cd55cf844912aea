"""What a request must keep to, so that it can ever be answered."""

from dataclasses import dataclass

from serving.cache import PAGE, pages_for
from serving.error import RequestRefused
from serving.sequence import Request, Sequence


@dataclass(frozen=True)
class Limits:
    """The capacity of an engine, and the vocabulary of its base."""

    positions: int  # of a sequence
    pages: int  # of the cache, nobody's included
    vocabulary: int

    def check(self, sequence: Sequence) -> None:
        """Raise RequestRefused where a request can never be answered."""
        request = sequence.request
        length = sequence.length
        last_id = self.vocabulary - 1
        prompt = request.prompt
        if not prompt or request.new_tokens < 1:
            raise RequestRefused("request: found no prompt, or no new tokens; allowed: at least one of each")
        if length > self.positions:
            raise RequestRefused(f"request: found {length} positions; allowed: at most {self.positions}")
        lowest = min(prompt)
        highest = max(prompt)
        if lowest < 0 or highest > last_id:
            raise RequestRefused(f"request.prompt: found an id of no token; allowed: 0 to {last_id}")
        needed = pages_for(length + PAGE)
        if needed >= self.pages:
            raise RequestRefused(f"request: found {length} positions, for which the cache has no room")


def check_start(start: int, request: Request) -> None:
    """Raise RequestRefused where a prompt has no token before `start`, or none from it on."""
    last = len(request.prompt) - 1
    if not 0 < start <= last:
        raise RequestRefused(f"start: found {start}; allowed: 1 to {last}")
