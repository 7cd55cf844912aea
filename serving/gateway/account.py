"""Whether a tenant may ask for more now: answers at once, requests of a minute, and tokens of a day.

Requests are counted in memory, and begin anew with the server; tokens are not (`quota.py`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from serving.gateway.quota import Clock, TokenQuota
from serving.gateway.refusal import ApiRefusal
from serving.gateway.tenants import Tenant
from serving.gateway.usage import UsageFolder

MINUTE_S = 60.0
UPLOADS_AT_ONCE = 4


class Account:
    """What one tenant has under way, and has used."""

    def __init__(self, tenant: Tenant, usage: UsageFolder | None = None, clock: Clock = time.time) -> None:
        self.quota: TokenQuota | None = None
        if tenant.tokens_per_day is not None:
            self.quota = TokenQuota(tenant.name, tenant.tokens_per_day, usage, clock)
        self._tenant = tenant
        self._clock = clock
        self._allowance = float(tenant.requests_per_minute or 0)
        self._counted_at = clock()
        self.answers = 0  # at once
        self.uploads = 0  # at once

    def begin(self, answers: int = 1) -> None:
        """Count a request for so many answers; raises ApiRefusal where they, or a minute's requests, are too many."""
        most = self._tenant.answers_at_once
        if self.answers + answers > most:
            message = f"answers: found {self.answers} and {answers} more at once; allowed: {most}"
            raise ApiRefusal(429, message, "too_many", 1.0)
        self._take_turn()
        self.answers += answers

    def end(self, answers: int = 1) -> None:
        """Say that so many answers are over."""
        self.answers -= answers

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Count an adapter on its way, which lies on the disk meanwhile; raises ApiRefusal for one too many."""
        self.begin()
        try:
            if self.uploads >= UPLOADS_AT_ONCE:
                message = f"adapters: found {self.uploads} on their way; allowed: {UPLOADS_AT_ONCE} at once"
                raise ApiRefusal(429, message, "too_many", 1.0)
            self.uploads += 1
            try:
                yield
            finally:
                self.uploads -= 1
        finally:
            self.end()

    async def reserve(self, tokens: int) -> int:
        """Count tokens that will be used, and give the day of it; raises ApiRefusal where that is over the quota."""
        if self.quota is None:
            return 0
        return await self.quota.reserve(tokens)

    def give_back(self, tokens: int, day: int) -> None:
        """Count reserved tokens out again that were not used, if it is still the same day."""
        if self.quota is not None:
            self.quota.give_back(tokens, day)

    def _take_turn(self) -> None:
        """Take one of the requests of a minute, which come back evenly."""
        rate = self._tenant.requests_per_minute
        if rate is None:
            return
        now_s = self._clock()
        passed_s = max(0.0, now_s - self._counted_at)
        self._counted_at = now_s
        returned = passed_s * rate / MINUTE_S
        self._allowance = min(float(rate), self._allowance + returned)
        if self._allowance < 1:
            missing_s = (1 - self._allowance) * MINUTE_S / rate
            message = f"requests: found more than {rate} in a minute, which are allowed"
            raise ApiRefusal(429, message, "rate_limited", missing_s)
        self._allowance -= 1
