"""The engine's thread: what it does when who asked has gone, and when the engine fails."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.engine import Engine
from serving.gateway.engine_thread import EngineThread
from serving.gateway.refusal import ApiRefusal
from serving.gateway.stream import TokenStream
from serving.sequence import Request


@pytest.fixture
def thread(tiny_base: Path) -> Iterator[EngineThread]:
    """A thread with a small engine."""
    made = EngineThread(Engine(tiny_base, rows=4, positions=64, tokens=256, adapter_bytes=2**18))
    made.start()
    yield made
    made.stop()


async def all_tokens(stream: TokenStream) -> list[int]:
    return [token for lot in [lot async for lot in stream.tokens()] for token in lot]


def test_who_goes_before_its_request_is_taken_leaves_nothing(thread: EngineThread) -> None:
    async def ask() -> list[int]:
        held = threading.Event()
        busy = asyncio.ensure_future(thread.call(held.wait))
        await asyncio.sleep(0)
        for _ in range(3):
            gone = asyncio.ensure_future(thread.submit([Request((5, 6), new_tokens=9)]))
            await asyncio.sleep(0)
            gone.cancel()
        held.set()
        await busy
        (stream,) = await thread.submit([Request((5, 6), new_tokens=9)])
        return await all_tokens(stream)

    assert len(asyncio.run(ask())) == 9
    assert not thread.streams and not thread.broken


def test_requests_are_taken_all_or_none(thread: EngineThread) -> None:
    async def ask() -> None:
        with pytest.raises(ApiRefusal, match="found an id of no token"):
            await thread.submit([Request((5, 6), new_tokens=30), Request((-5, 6))])
        assert await thread.call(lambda: thread.engine.scheduler.idle)
        assert not thread.streams

    asyncio.run(ask())


def test_a_failed_step_is_told_to_all_and_ends_the_service(
    thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        (stream,) = await thread.submit([Request((5, 6), new_tokens=60)])
        monkeypatch.setattr(thread.engine, "step", lambda: 1 / 0)
        with pytest.raises(ApiRefusal, match="the engine has failed"):
            await all_tokens(stream)
        with pytest.raises(ApiRefusal, match="the engine has failed"):
            await thread.submit([Request((5, 6))])

    asyncio.run(ask())
    assert thread.broken
