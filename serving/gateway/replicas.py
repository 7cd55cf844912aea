"""Several engines behind one gateway: who answers, and what happens when one of them dies.

A replica that lacks an adapter, or lost it when it was started again, is given its files when it is asked. An answer
depends on its request alone, not on what runs beside it; so one whose replica dies is asked for again elsewhere, and
goes on behind the tokens that have come already.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.error import AdapterRefused
from serving.gateway.adapter_files import AdapterFiles, files_of_folder
from serving.gateway.answering import Loaded
from serving.gateway.refusal import ApiRefusal, invalid, unknown_model
from serving.gateway.routing import Router
from serving.gateway.stream import TokenStream
from serving.sequence import Request

if TYPE_CHECKING:
    from serving.gateway.replica import Saying

ACCEPT_S = 30.0  # that a replica may take to say whether it takes a request
LOAD_S = 120.0  # that one may take to read an adapter
PROBE_S = 0.5  # between two looks at a replica that is down
MOST_FAILURES = 3  # of replicas that a request is given to: it may be what ends them
WAIT_S = 120.0  # that a request waits for any replica to be up


@dataclass(frozen=True)
class NamedAdapter:
    """What a name means: an adapter's identity, and its files for replicas that lack it."""

    loaded: Loaded
    files: AdapterFiles


class Replicas:
    """Answers requests with several replicas, like an EngineThread with one engine."""

    def __init__(self, handles: list[Any], positions: int, owned: bool = True) -> None:
        """`handles` are those of Ray Serve; sequences have at most so many positions. `owned`: they end with this."""
        self._owned = owned
        self.handles = handles
        self.positions = positions
        self.broken = False
        self.router = Router(len(handles))
        self._names: dict[str, NamedAdapter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._by_stream: dict[TokenStream, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Wait for work: replicas do so since they were started."""

    def stop(self) -> None:
        """End the replicas, and what they do, where nobody else does."""
        if not self._owned:
            return
        from serving.gateway.replica import end_replicas

        end_replicas()

    def load_folder(self, name: str, folder: Path) -> Loaded:
        """Let a name mean the adapter of a folder, before `start`; raises AdapterRefused."""
        files = files_of_folder(folder)
        loaded = loaded_or_refused(self.handles[0].load.remote(files).result())
        self._names[name] = NamedAdapter(loaded, files)
        return loaded

    async def load_files(self, name: str, files: AdapterFiles) -> Loaded:
        """Let a name mean an adapter that nobody has loaded_or_refused yet; raises AdapterRefused."""
        number = self.router.choose(None)
        if number is None:
            raise no_engine()
        try:
            loaded = await self.load(number, files)
        finally:
            self.router.done(number)
        before = self._names.get(name)
        self._names[name] = NamedAdapter(loaded, files)
        if before is not None:
            self._forget(before.loaded.digest)
        return loaded

    async def unload(self, name: str) -> None:
        """Forget a name; what was asked with it is answered still."""
        named = self._names.pop(name)
        self._forget(named.loaded.digest)

    async def resident(self) -> set[str]:
        """The digests of the adapters on any replica's device."""
        found: set[str] = set()
        for number in self.router.up:
            try:
                found |= await asyncio.wait_for(self.handles[number].resident.remote(), ACCEPT_S)
            except Exception:
                self.lose(number)
        return found

    async def submit(self, requests: list[Request]) -> list[TokenStream]:
        """Let requests wait for their turn at replicas, all or none; raises ApiRefusal."""
        streams: list[TokenStream] = []
        answers: list[RemoteAnswer] = []
        for request in requests:
            named = self._named(request)
            stream = TokenStream(request)
            streams.append(stream)
            answers.append(RemoteAnswer(self, stream, named))
        for answer in answers:
            task = self.begin(answer.run())
            self._by_stream[answer.stream] = task
            task.add_done_callback(answer.over)
        try:
            for answer in answers:
                await answer.accepted
        except BaseException:
            for stream in streams:
                self.cancel(stream)
            raise
        return streams

    def cancel(self, stream: TokenStream) -> None:
        """Let a stream end as it is, whose reader has gone or has enough."""
        task = self._by_stream.get(stream)
        if task is not None:
            task.cancel()

    def forget_stream(self, stream: TokenStream) -> None:
        """Say that nothing more comes of a stream."""
        self._by_stream.pop(stream, None)

    async def load(self, number: int, files: AdapterFiles) -> Loaded:
        """Give a replica the files of an adapter; raises AdapterRefused."""
        replica = self.handles[number]
        loading = replica.load.remote(files)
        answer = await asyncio.wait_for(loading, LOAD_S)
        return loaded_or_refused(answer)

    def lose(self, number: int) -> None:
        """Send nothing to a replica until it answers again."""
        if number in self.router.up:
            self.router.failed(number)
            self.begin(self._probe(number))

    def begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Let a coroutine run beside everything else."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _probe(self, number: int) -> None:
        """Look at a replica until it answers."""
        while number not in self.router.up:
            await asyncio.sleep(PROBE_S)
            try:
                await asyncio.wait_for(self.handles[number].about.remote(), ACCEPT_S)
            except Exception:
                continue
            self.router.recovered(number)

    def _named(self, request: Request) -> NamedAdapter | None:
        """What a request's adapter is, None for the base; raises ApiRefusal where there is none."""
        if request.adapter is None:
            return None
        named = self._names.get(request.adapter)
        if named is None:
            raise unknown_model(request.adapter)
        return named

    def _forget(self, digest: str) -> None:
        """Let replicas forget an adapter that has no name any more."""
        for named in self._names.values():
            if named.loaded.digest == digest:
                return
        for number in self.router.up:
            self.handles[number].forget.remote(digest)


class RemoteAnswer:
    """One answer, from whichever replicas it takes to have it whole."""

    def __init__(self, replicas: Replicas, stream: TokenStream, named: NamedAdapter | None) -> None:
        self.stream = stream
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._replicas = replicas
        self._named = named
        self._digest = named.loaded.digest if named else None
        self._request = replace(stream.request, adapter=self._digest)

    async def run(self) -> None:
        """Ask replicas until one has given all of the answer."""
        router = self._replicas.router
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_S
        failures = 0
        while loop.time() < deadline and failures < MOST_FAILURES:
            number = router.choose(self._digest)
            if number is None:
                await asyncio.sleep(PROBE_S)
                continue
            try:
                await self._ask(number)
                return
            except (ApiRefusal, AdapterRefused) as refusal:
                self._refuse(refusal)
                return
            except Exception:
                failures += 1
                self._replicas.lose(number)
            finally:
                router.done(number)
        self._refuse(no_engine())

    def over(self, _: "asyncio.Task[None]") -> None:
        """Let nobody wait any more."""
        self._replicas.forget_stream(self.stream)
        if not self.accepted.done():
            self.accepted.cancel()

    def _refuse(self, refusal: Exception) -> None:
        """Tell who waits for the beginning, or else who reads."""
        if not isinstance(refusal, ApiRefusal):
            refusal = invalid(str(refusal))
        if not self.accepted.done():
            self.accepted.set_exception(refusal)
        self.stream.put([], True, refusal)

    async def _ask(self, number: int) -> None:
        """All that a replica says, up to the end; raises what happens to it, or ApiRefusal."""
        sayings = self._replicas.handles[number].options(stream=True).answer.remote(self._request)
        try:
            first = await asyncio.wait_for(anext(sayings), ACCEPT_S)
            if not first.lacks_adapter:
                await self._read(first, sayings)
                return
        finally:
            sayings.cancel()
        assert self._named is not None
        await self._replicas.load(number, self._named.files)
        await self._ask(number)

    async def _read(self, first: "Saying", sayings: Any) -> None:
        """Hand on tokens, without those that have come from another replica."""
        check_saying(first)
        if not self.accepted.done():
            self.accepted.set_result(None)
        known = self.stream.count
        async for saying in sayings:
            check_saying(saying)
            fresh = saying.tokens[known:]
            known = max(0, known - len(saying.tokens))
            if fresh:
                self.stream.put(fresh, False)
        self.stream.put([], True)


def check_saying(saying: "Saying") -> None:
    """Raise ApiRefusal where a replica refuses."""
    if saying.refusal:
        raise invalid(saying.refusal)


def loaded_or_refused(loaded: Loaded | str) -> Loaded:
    """What a replica has read; raises AdapterRefused where it has not."""
    if isinstance(loaded, str):
        raise AdapterRefused(loaded)
    return loaded


def no_engine() -> ApiRefusal:
    """What is said while all replicas are down."""
    return ApiRefusal(503, "no engine is up", "no_engine", 5.0)
