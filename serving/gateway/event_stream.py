"""A stream of events, cut where its reader goes, or takes nothing for too long."""

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from serving.gateway.answers import OpenAnswers, failed_event
from serving.gateway.body import disconnected
from serving.gateway.refusal import ApiRefusal


class EventStream(StreamingResponse):
    """OpenAnswers as server-sent events. However it ends, what is under way for it is cancelled."""

    def __init__(self, answers: OpenAnswers, wants_usage: bool, stalled_s: float) -> None:
        """`stalled_s` is how long a reader may take nothing."""
        super().__init__(events_of(answers, wants_usage), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-store"
        self._answers = answers
        self._stalled_s = stalled_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the events, until the reader has gone."""

        async def patiently(message: Message) -> None:
            async with asyncio.timeout(self._stalled_s):
                await send(message)

        sending = asyncio.ensure_future(self.stream_response(patiently))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait([sending, gone], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except TimeoutError:
            return  # what is not complete is closed
        finally:
            sending.cancel()
            gone.cancel()
            self._answers.close()


async def events_of(answers: OpenAnswers, wants_usage: bool) -> AsyncIterator[str]:
    """The events of answers; one that will not come is told in the last event."""
    try:
        async for event in answers.events(wants_usage):
            yield event
    except ApiRefusal as refusal:
        yield failed_event(refusal.body())
