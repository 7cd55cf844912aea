"""The tokens that a tenant may have in a day: reserved before they are used, and kept where a restart finds them.

What is written down runs ahead of what is used, by a lot, so few requests wait for the disk. After a crash the tenant
has used what was written down: at most a lot more than it had, and the reservations of the last seconds, never less.
"""

import asyncio
import time
from collections.abc import Callable

from runfolder.files import Damaged
from serving.gateway.refusal import ApiRefusal
from serving.gateway.usage import UsageFolder

DAY_S = 86400.0
LOTS = 100  # of a day's quota
Clock = Callable[[], float]


class TokenQuota:
    """What a tenant used of a day's tokens. A request reserves the most that it can take, and gives back the rest."""

    def __init__(self, tenant: str, quota: int, usage: UsageFolder | None, clock: Clock = time.time) -> None:
        """Without a folder, the count begins anew with the server."""
        self._tenant = tenant
        self._quota = quota
        self._usage = usage
        self._clock = clock
        self._lot = max(1, quota // LOTS)
        self._day = -1
        self._tokens = 0  # reserved or used here
        self._kept = 0  # of them and of what comes next, what is written down
        self._elsewhere = 0  # by other servers, or before this one was started
        self._writing = asyncio.Lock()

    async def reserve(self, tokens: int) -> int:
        """Count tokens that will be used, and give the day of it; raises ApiRefusal where that is over the quota."""
        async with self._writing:
            day = await self._begun_day()
            await self._check(tokens, day)
            if self._tokens + tokens > self._kept:
                await self._write(day, self._tokens + tokens + self._lot)
            self._tokens += tokens
            return day

    def give_back(self, tokens: int, day: int) -> None:
        """Count reserved tokens out again that were not used, if it is still the same day."""
        if day == self._day:
            self._tokens -= tokens

    async def settle(self, margin: int | None = None) -> None:
        """Write down what is used now, where what was written is a margin above it; raises ApiRefusal."""
        if margin is None:
            margin = 2 * self._lot
        async with self._writing:
            if self._kept > self._tokens + margin:
                await self._write(self._day, self._tokens)

    async def _begun_day(self) -> int:
        """The day that it is, with the counts of that day; a clock that is set back begins no new one."""
        day = max(self._day, day_now(self._clock))
        if day != self._day:
            elsewhere = await self._read(day)
            self._day = day
            self._tokens = 0
            self._kept = 0
            self._elsewhere = elsewhere
        return day

    async def _check(self, tokens: int, day: int) -> None:
        """Raise ApiRefusal where so many tokens are more than what is left, looking at what others used."""
        if self._tokens + tokens > self._kept:
            self._elsewhere = await self._read(day)
        used = self._elsewhere + self._tokens
        left = max(0, self._quota - used)
        if used + tokens <= self._quota:
            return
        tomorrow = (day + 1) * DAY_S
        seconds = tomorrow - self._clock()
        message = f"tokens: found a request for up to {tokens}; allowed: {left}, which is left of {self._quota} today"
        raise ApiRefusal(429, message, "insufficient_quota", seconds)

    async def _read(self, day: int) -> int:
        """What is used of a day elsewhere; raises ApiRefusal where that cannot be known."""
        if self._usage is None:
            return 0
        try:
            return await asyncio.to_thread(self._usage.elsewhere, self._tenant, day)
        except (OSError, Damaged) as error:
            raise not_kept() from error

    async def _write(self, day: int, tokens: int) -> None:
        """Write down how much is used after a crash; raises ApiRefusal where that cannot be."""
        if self._usage is not None:
            try:
                await asyncio.to_thread(self._usage.keep, self._tenant, day, tokens)
            except OSError as error:
                raise not_kept() from error
        self._kept = tokens


def not_kept() -> ApiRefusal:
    """What tenants with a quota get while the disk takes nothing: nobody has more than the quota by that."""
    return ApiRefusal(503, "what is used of quotas cannot be written down here", "usage_not_kept", 5.0)


def day_now(clock: Clock = time.time) -> int:
    """The number of the day that it is, since 1970, by UTC."""
    return int(clock() // DAY_S)
