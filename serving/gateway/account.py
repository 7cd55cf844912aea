"""What each tenant used, and whether it may have more now: tokens of a day, requests of a minute and at once.

Accounts are in memory: they begin anew with the server.
"""

import time
from collections.abc import Callable

from serving.gateway.refusal import ApiRefusal
from serving.gateway.tenants import Tenant

DAY_S = 86400.0
MINUTE_S = 60.0
Clock = Callable[[], float]


class Account:
    """What one tenant used. A request reserves the most that it can take, and gives back what it did not."""

    def __init__(self, tenant: Tenant, clock: Clock = time.time) -> None:
        self._tenant = tenant
        self._clock = clock
        self._day = 0
        self._tokens = 0
        self._allowance = float(tenant.requests_per_minute or 0)
        self._counted_at = clock()
        self.answers = 0  # at once

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

    def reserve(self, tokens: int) -> int:
        """Count tokens that will be used, and give the day of it; raises ApiRefusal where that is over the quota."""
        now_s = self._clock()
        day = int(now_s // DAY_S)
        if day != self._day:
            self._day = day
            self._tokens = 0
        quota = self._tenant.tokens_per_day
        if quota is not None and self._tokens + tokens > quota:
            left = max(0, quota - self._tokens)
            tomorrow_s = (day + 1) * DAY_S - now_s
            message = f"tokens: found a request for up to {tokens}; allowed: {left}, which is left of {quota} today"
            raise ApiRefusal(429, message, "insufficient_quota", tomorrow_s)
        self._tokens += tokens
        return day

    def give_back(self, tokens: int, day: int) -> None:
        """Count reserved tokens out again that were not used, if it is still the same day."""
        if day == self._day:
            self._tokens -= tokens

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
