"""The thread that owns the engine: it alone touches it, and whoever wants something from it leaves it a message."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from serving.engine import Engine
from serving.error import RequestRefused, UnknownAdapter
from serving.gateway.adapter_files import AdapterFiles, read_files
from serving.gateway.answering import Loaded
from serving.gateway.refusal import ApiRefusal, broken, invalid, unknown_model
from serving.gateway.stream import TokenStream
from serving.packed import Packed
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
        self.streams: dict[TokenStream, Sequence] = {}
        self._sent: dict[TokenStream, int] = {}  # tokens that its loop was told
        self._tasks: SimpleQueue[Task] = SimpleQueue()
        self._stopping = False
        self._loader = ThreadPoolExecutor(1, "loader")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to wait for work."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what is under way, and end."""
        self._stopping = True
        self._loader.shutdown()
        self._thread.join()

    @property
    def positions(self) -> int:
        """Positions of a sequence, at most."""
        return self.engine.positions

    def load_folder(self, name: str, folder: Path) -> Loaded:
        """Let a name mean the adapter of a folder, before `start`; raises AdapterRefused."""
        self.engine.load(name, folder)
        packed = self.engine.pool.packed_of(name)
        return loaded_of(packed)

    async def load_files(self, name: str, files: AdapterFiles) -> Loaded:
        """Let a name mean an adapter that nobody has checked yet; raises AdapterRefused."""
        engine = self.engine
        loop = asyncio.get_running_loop()
        packed = await loop.run_in_executor(self._loader, read_files, engine.pool, files)
        await self.call(lambda: engine.give(name, packed))
        return loaded_of(packed)

    async def unload(self, name: str) -> None:
        """Forget a name; what was asked with it is answered still."""
        engine = self.engine
        await self.call(lambda: engine.unload(name))

    async def resident(self) -> set[str]:
        """The digests of the adapters on the device."""
        pool = self.engine.pool
        return await self.call(lambda: pool.resident)

    async def call(self, function: Callable[[], Called]) -> Called:
        """What a function gives that the thread runs between two steps, or raises."""
        future: Future[Called] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # who asked has gone
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
        streams = [TokenStream(request) for request in requests]
        try:
            await self.call(lambda: self._add(streams))
        except asyncio.CancelledError:
            for stream in streams:
                self.cancel(stream)
            raise
        return streams

    def cancel(self, stream: TokenStream) -> None:
        """Let a stream end as it is, whose reader has gone or has enough."""
        task = partial(self._cancel, stream)
        self._tasks.put(task)

    def _add(self, streams: list[TokenStream]) -> None:
        """Let requests wait, all or none; raises ApiRefusal."""
        added: list[Sequence] = []
        try:
            for stream in streams:
                added.append(self.engine.add(stream.request))
        except (UnknownAdapter, RequestRefused) as error:
            for sequence in added:
                self.engine.cancel(sequence)
            if isinstance(error, UnknownAdapter):
                raise unknown_model(streams[0].request.adapter or "") from error
            raise invalid(str(error)) from error
        for stream, sequence in zip(streams, added, strict=True):
            self.streams[stream] = sequence
            self._sent[stream] = 0

    def _cancel(self, stream: TokenStream) -> None:
        sequence = self.streams.pop(stream, None)
        if sequence is not None:
            del self._sent[stream]
            self.engine.cancel(sequence)

    def _run(self) -> None:
        """Work until it is told to stop."""
        while not self._stopping:
            try:
                self._work()
            except Exception:
                logging.getLogger(__name__).exception("the engine failed; nothing is answered any more")
                self.broken = True
                self._give_up()

    def _work(self) -> None:
        """Do what others want, then a step; what that raises but a refusal leaves the engine in an unknown state."""
        self._read_tasks()
        if self.idle:
            return
        with suppress(RequestRefused):  # its sequence knows, and its reader is told
            self.engine.step()
        self._deliver()

    @property
    def idle(self) -> bool:
        """Whether there is nothing that the engine could do."""
        if self.broken:
            return True
        return self.engine.scheduler.idle

    def _read_tasks(self) -> None:
        """Do what others want; where there is nothing else to do, wait for it a while."""
        try:
            task = self._tasks.get(self.idle, LOOK_S)
            while True:
                task()
                task = self._tasks.get_nowait()
        except Empty:
            return

    def _give_up(self) -> None:
        """Tell every reader that there will be no answer, and forget what was under way."""
        streams = list(self.streams)
        self.streams.clear()
        self._sent.clear()
        for stream in streams:
            _tell(stream.loop, [(stream, [], True, broken())])

    def _deliver(self) -> None:
        """Hand out the tokens that are new, in one message for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Arrival]] = {}
        for stream, sequence in list(self.streams.items()):
            arrival = self._arrival(stream, sequence)
            if arrival is None:
                continue
            arrivals = by_loop.setdefault(stream.loop, [])
            arrivals.append(arrival)
        for loop, arrivals in by_loop.items():
            _tell(loop, arrivals)

    def _arrival(self, stream: TokenStream, sequence: Sequence) -> Arrival | None:
        """What is new of a stream, if anything is; one that has ended is forgotten."""
        refusal = None
        if sequence.refusal is not None:
            refusal = invalid(str(sequence.refusal))
        tokens = sequence.answer[self._sent[stream] :]
        ended = sequence.finished or refusal is not None
        if ended:
            del self.streams[stream]
            del self._sent[stream]
        elif not tokens:
            return None
        else:
            self._sent[stream] += len(tokens)
        return stream, tokens, ended, refusal


def loaded_of(packed: Packed) -> Loaded:
    """What others know of an adapter on the host."""
    virtual = packed.adapter.virtual
    return Loaded(packed.digest, virtual)


def _tell(loop: asyncio.AbstractEventLoop, arrivals: list[Arrival]) -> None:
    """Leave arrivals to an event loop, if it still runs."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(_put_all, arrivals)


def _put_all(arrivals: list[Arrival]) -> None:
    for stream, tokens, ended, refusal in arrivals:
        stream.put(tokens, ended, refusal)
