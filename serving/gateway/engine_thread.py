"""The thread that owns the engine: it alone touches it, and whoever wants something from it leaves it a message."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

from serving.engine import Engine
from serving.error import RequestRefused, UnknownAdapter
from serving.gateway.refusal import ApiRefusal, invalid, unknown_model
from serving.gateway.stream import TokenStream
from serving.sequence import Request, Sequence

Task = Callable[[], None]
Arrival = tuple[TokenStream, list[int], bool, ApiRefusal | None]
Called = TypeVar("Called")
LOOK_S = 1.0  # between two looks at whether to stop


class EngineThread:
    """Steps the engine while there is something to do, and hands its tokens to event loops."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.broken = False  # a step failed: nothing is answered any more
        self.streams: dict[Sequence, TokenStream] = {}
        self._tasks: SimpleQueue[Task] = SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to wait for work."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what is under way, and end."""
        self._stopping = True
        self._thread.join()

    async def call(self, function: Callable[[], Called]) -> Called:
        """What a function gives that the thread runs between two steps, or raises."""
        future: Future[Called] = Future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._tasks.put(run)
        return await asyncio.wrap_future(future)

    async def submit(self, requests: list[Request]) -> list[TokenStream]:
        """Let requests wait for their turn, all or none; raises ApiRefusal."""
        if self.broken:
            raise broken()
        sequences = await self.call(lambda: self._sequences(requests))
        streams: list[TokenStream] = []
        for sequence in sequences:
            streams.append(TokenStream(sequence))
        self._tasks.put(lambda: self._add(streams))
        return streams

    def cancel(self, stream: TokenStream) -> None:
        """Let a stream end as it is, whose reader has gone or has enough."""
        self._tasks.put(lambda: self._cancel(stream))

    def _sequences(self, requests: list[Request]) -> list[Sequence]:
        """Sequences for requests, not waiting yet; raises ApiRefusal."""
        sequences: list[Sequence] = []
        for request in requests:
            try:
                sequences.append(self.engine.sequence(request))
            except UnknownAdapter as error:
                raise unknown_model(request.adapter or "") from error
            except RequestRefused as error:
                raise invalid(str(error)) from error
        return sequences

    def _add(self, streams: list[TokenStream]) -> None:
        for stream in streams:
            self.streams[stream.sequence] = stream
            self.engine.scheduler.add(stream.sequence)

    def _cancel(self, stream: TokenStream) -> None:
        self.streams.pop(stream.sequence, None)
        self.engine.cancel(stream.sequence)

    def _run(self) -> None:
        """Work until it is told to stop."""
        while not self._stopping:
            self._read_tasks()
            if not self.idle:
                self._step()
                self._deliver()

    @property
    def idle(self) -> bool:
        """Whether there is nothing that the engine could do."""
        return self.broken or self.engine.scheduler.idle

    def _read_tasks(self) -> None:
        """Do what others want; where there is nothing else to do, wait for it a while."""
        try:
            task = self._tasks.get(self.idle, LOOK_S)
            while True:
                task()
                task = self._tasks.get_nowait()
        except Empty:
            return

    def _step(self) -> None:
        """One step of the engine. What fails otherwise than by a refusal leaves it in an unknown state."""
        try:
            self.engine.step()
        except RequestRefused:
            return  # the sequence knows, and its reader is told
        except Exception:
            logging.getLogger(__name__).exception("a step of the engine failed; nothing is answered any more")
            self.broken = True
            self._give_up()

    def _give_up(self) -> None:
        """Tell every reader that there will be no answer, and forget what was under way."""
        streams = list(self.streams.values())
        self.streams.clear()
        for stream in streams:
            _tell(stream.loop, [(stream, [], True, broken())])

    def _deliver(self) -> None:
        """Hand out the tokens that are new, in one message for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Arrival]] = {}
        for sequence, stream in list(self.streams.items()):
            arrival = _arrival(stream)
            if arrival is None:
                continue
            arrivals = by_loop.setdefault(stream.loop, [])
            arrivals.append(arrival)
            if arrival[2]:
                del self.streams[sequence]
        for loop, arrivals in by_loop.items():
            _tell(loop, arrivals)


def broken() -> ApiRefusal:
    """What everybody gets after a step has failed."""
    return ApiRefusal(503, "the engine has failed: this server must be started again", "engine_failed")


def _arrival(stream: TokenStream) -> Arrival | None:
    """What is new of a stream's sequence, if anything is."""
    sequence = stream.sequence
    refusal = None
    if sequence.refusal is not None:
        refusal = invalid(str(sequence.refusal))
    tokens = sequence.answer[stream.sent :]
    ended = sequence.finished or refusal is not None
    if not tokens and not ended:
        return None
    stream.sent += len(tokens)
    return stream, tokens, ended, refusal


def _tell(loop: asyncio.AbstractEventLoop, arrivals: list[Arrival]) -> None:
    """Leave arrivals to an event loop, if it still runs."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(_put_all, arrivals)


def _put_all(arrivals: list[Arrival]) -> None:
    for stream, tokens, ended, refusal in arrivals:
        stream.put(tokens, ended, refusal)
