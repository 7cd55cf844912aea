"""Tokens of one answer, on their way from the engine's thread to the coroutine that reads them."""

import asyncio
import time
from collections.abc import AsyncIterator

from serving.gateway.refusal import ApiRefusal
from serving.sequence import Sequence


class TokenStream:
    """One sequence's tokens as they come. As many as its answer has at most are kept for a slow reader."""

    def __init__(self, sequence: Sequence) -> None:
        """Belongs to the event loop that runs now."""
        self.sequence = sequence
        self.loop = asyncio.get_running_loop()
        self.started_at = time.monotonic()
        self.sent = 0  # tokens; the engine's thread counts them
        self.ended = False
        self.first_token_s: float | None = None
        self._arrived: list[int] = []
        self._refusal: ApiRefusal | None = None
        self._changed = asyncio.Event()

    def put(self, tokens: list[int], ended: bool, refusal: ApiRefusal | None) -> None:
        """More tokens, and whether they are the last ones; on the loop's thread."""
        if tokens and self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.started_at
        self._arrived += tokens
        self._refusal = refusal
        self.ended = ended
        self._changed.set()

    async def tokens(self) -> AsyncIterator[list[int]]:
        """The tokens in the lots that have come; raises ApiRefusal where there will be no more."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            arrived = self._arrived
            self._arrived = []
            ended = self.ended
            if arrived:
                yield arrived
            if self._refusal is not None:
                raise self._refusal
            if ended:
                return
