"""Tokens of one answer, on their way from where it is computed to the coroutine that reads them."""

import asyncio
import time
from collections.abc import AsyncIterator

from serving.gateway.refusal import ApiRefusal
from serving.sequence import Request


class TokenStream:
    """The tokens of one answer as they come. As many as it has at most are kept for a slow reader."""

    def __init__(self, request: Request) -> None:
        """Belongs to the event loop that runs now."""
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.started_at = time.monotonic()
        self.count = 0  # tokens that came
        self.ended = False
        self.first_token_s: float | None = None
        self._arrived: list[int] = []
        self._refusal: ApiRefusal | None = None
        self._changed = asyncio.Event()

    def put(self, tokens: list[int], ended: bool, refusal: ApiRefusal | None = None) -> None:
        """More tokens, and whether they are the last ones; on the loop's thread."""
        if tokens and self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.started_at
        self.count += len(tokens)
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
