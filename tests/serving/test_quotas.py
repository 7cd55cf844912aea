"""Quotas of tokens: what is reserved and given back, and that no end of a server gives anybody more than a quota."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from orchestrator.errors import InputError
from orchestrator.serve import Serving, serve
from serving.gateway.quota import DAY_S, TokenQuota, day_now
from serving.gateway.refusal import ApiRefusal
from serving.gateway.tenants import hash_of
from serving.gateway.usage import UsageFolder

ROOT = Path(__file__).parent.parent.parent
DAY = 20000
KEY = "ft-key-of-alice"
HEADERS = {"Authorization": f"Bearer {KEY}"}


def quota_of(folder: Path | None, tokens: int = 1000, now: Callable[[], float] = lambda: DAY * DAY_S) -> TokenQuota:
    """A quota of alice in a server that has just been started."""
    return TokenQuota("alice", tokens, UsageFolder(folder) if folder else None, now)


def refused(quota: TokenQuota, tokens: int) -> str:
    """Why so many tokens are not given."""
    with pytest.raises(ApiRefusal) as refusal:
        asyncio.run(quota.reserve(tokens))
    return refusal.value.message


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_not_used_is_given_back_and_each_day_begins_anew(on_disk: bool, tmp_path: Path) -> None:
    now = [1000.0]
    quota = quota_of(tmp_path if on_disk else None, 100, lambda: now[0])
    day = asyncio.run(quota.reserve(100))
    assert "allowed: 0, which is left of 100" in refused(quota, 1)
    quota.give_back(40, day)
    asyncio.run(quota.reserve(40))
    now[0] += DAY_S
    quota.give_back(40, day)  # of yesterday
    asyncio.run(quota.reserve(100))
    now[0] -= DAY_S  # a clock that is set back
    assert "allowed: 0" in refused(quota, 1)


def test_after_a_crash_nothing_that_was_reserved_can_be_had_again(tmp_path: Path) -> None:
    """Who dies writes nothing more: a server begins with what is on disk, and the one before is not asked."""
    asyncio.run(quota_of(tmp_path).reserve(600))
    again = quota_of(tmp_path)
    asyncio.run(again.reserve(390))  # a lot of 10 more than was reserved is written down
    assert "found a request for up to 1; allowed: 0, which is left of 1000 today" in refused(quota_of(tmp_path), 1)
    tomorrow = quota_of(tmp_path, now=lambda: (DAY + 1) * DAY_S)
    asyncio.run(tomorrow.reserve(1000))


def test_what_settles_is_exact_and_is_written_before_more_is_given(tmp_path: Path) -> None:
    quota = quota_of(tmp_path)
    day = asyncio.run(quota.reserve(600))
    quota.give_back(500, day)
    asyncio.run(quota.settle(margin=0))
    asyncio.run(quota.reserve(50))
    assert "allowed: 840" in refused(quota_of(tmp_path), 841)  # 150, and a lot


def test_two_servers_of_one_service_share_a_quota(tmp_path: Path) -> None:
    one, other = quota_of(tmp_path), quota_of(tmp_path)
    given = 0
    for _ in range(40):
        for quota in (one, other):
            try:
                asyncio.run(quota.reserve(30))
            except ApiRefusal:
                continue
            given += 30
    assert 900 < given <= 1000


def test_many_at_once_get_no_more_than_one_after_the_other(tmp_path: Path) -> None:
    quota = quota_of(tmp_path)

    async def ask() -> list[object]:
        return await asyncio.gather(*(quota.reserve(7) for _ in range(300)), return_exceptions=True)

    given = [answer for answer in asyncio.run(ask()) if answer == DAY]
    assert len(given) == 1000 // 7


def test_tenants_are_written_down_beside_each_other(tmp_path: Path) -> None:
    usage = UsageFolder(tmp_path)
    quotas = [TokenQuota(name, 100, usage, lambda: DAY * DAY_S) for name in ("alice", "bob")]

    async def ask() -> None:
        await asyncio.gather(*(quota.reserve(1) for quota in quotas for _ in range(50)))

    asyncio.run(ask())
    assert UsageFolder(tmp_path).elsewhere("alice", DAY) == UsageFolder(tmp_path).elsewhere("bob", DAY) >= 50
    usage.keep("bob", DAY + 1, 3)
    usage.keep("alice", DAY, 70)  # who comes late, for a day that is over
    assert UsageFolder(tmp_path).elsewhere("bob", DAY + 1) == 3
    UsageFolder(tmp_path).clear(DAY + 2)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_down_nothing_is_given(tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    quota = quota_of(folder)
    asyncio.run(quota.reserve(10))
    folder.rename(tmp_path / "gone")
    assert "cannot be written down" in refused(quota, 100)
    (tmp_path / "gone").rename(folder)
    asyncio.run(quota.reserve(100))
    (folder / "mine.json").write_text('{"day": 20000, "tokens": {"alice": "none"}}')
    assert "cannot be written down" in refused(quota, 800)


def served(folder: Path, base: Path, tenants: Path) -> subprocess.Popen[str]:
    """`fleetune serve` in a process of its own."""
    command = [sys.executable, "-m", "orchestrator", "serve", "--base", str(base), "--port", "0", "--no-ray"]
    command += ["--tenants", str(tenants), "--folder", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def completion(tokens: int) -> dict[str, Any]:
    """The body of a request of the base, whose answer has so many tokens."""
    return {"model": "tiny", "prompt": "1 + 2 =", "max_tokens": tokens, "temperature": 0}


def ask(address: str, tokens: int) -> httpx2.Response:
    """A completion of the base."""
    return httpx2.post(f"{address}/v1/completions", json=completion(tokens), headers=HEADERS, timeout=60)


def drained(process: subprocess.Popen[str], address: str) -> int:
    """Tell a server to end while it streams, and see it end the answer first; gives the tokens that it counts."""
    asked = completion(200) | {"stream": True, "stream_options": {"include_usage": True}}
    stream = partial(httpx2.stream, "POST", f"{address}/v1/completions", json=asked, headers=HEADERS)
    with httpx2.Client() as kept, stream() as response:
        assert kept.get(f"{address}/health").status_code == 200
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-2]["choices"][0]["finish_reason"] in ("length", "stop")
    assert process.wait(60) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{address}/health")
    return int(events[-1]["usage"]["total_tokens"])


def test_a_server_that_is_killed_and_one_that_drains_leave_what_was_used(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "tiny"
    base.symlink_to(tiny_base)
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(
        f"tenants:\n- name: alice\n  keys: ['{hash_of(KEY)}']\n  adapters: [tiny]\n  tokens_per_day: 800\n"
    )
    if DAY_S - time.time() % DAY_S < 120:
        pytest.skip("a new day begins in two minutes")
    used = 0
    for is_killed in (True, False):
        with served(tmp_path / "usage", base, tenants) as process:
            try:
                assert process.stdout
                address = process.stdout.readline().removeprefix("serving on ").strip()
                answer = ask(address, 100)
                assert answer.status_code == 200, answer.text
                used += answer.json()["usage"]["total_tokens"]
                refusal = ask(address, 800 - used + 1)
                assert refusal.status_code == 429, (used, refusal.text)
                used += 0 if is_killed else drained(process, address)
            finally:
                process.kill()
                process.wait(60)
    assert used <= UsageFolder(tmp_path / "usage").elsewhere("alice", day_now()) <= 800


def test_a_folder_that_cannot_be_used_is_said_before_anything_is_served(tiny_base: Path, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text("tenants:\n- name: alice\n")
    folder = tmp_path / "file"
    folder.write_text("")
    with pytest.raises(InputError, match="--folder: .*; allowed: a folder that can be written"):
        serve(Serving(str(tiny_base), (), tenants, "127.0.0.1", 0, 1, folder))
