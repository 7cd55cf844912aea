"""The answers to one request of a client: read as text, counted, and cancelled where nobody waits any more."""

from collections.abc import AsyncIterator, Callable

from serving.gateway.replies import DONE, CompletionReply, JsonObject, Usage, event_text
from serving.gateway.stream import TokenStream
from serving.gateway.text import Codec, Detokenizer, StopFilter

Cancel = Callable[[TokenStream], None]


class AnswerText:
    """One answer: its chunks of text as they become sure, and why it ends."""

    def __init__(self, stream: TokenStream, codec: Codec, stops: list[str], cancel: Cancel) -> None:
        self.stream = stream
        self.reason = "length"
        self.tokens = 0
        self._text = Detokenizer(codec, stream.request.prompt)
        self._filter = StopFilter(stops)
        self._cancel = cancel

    async def chunks(self) -> AsyncIterator[str]:
        """The text that becomes sure with each lot of tokens, if any does; raises ApiRefusal."""
        ends = self.stream.request.stop
        last_token = -1
        async for lot in self.stream.tokens():
            self.tokens += len(lot)
            last_token = lot[-1]
            chunk = self._filter.push(self._text.push(lot))
            if chunk:
                yield chunk
            if self._filter.stopped:
                self.reason = "stop"
                self._cancel(self.stream)
                return
        if last_token in ends:
            self.reason = "stop"
        rest = self._text.push([], last=True)
        chunk = self._filter.push(rest, last=True)
        if self._filter.stopped:
            self.reason = "stop"
        if chunk:
            yield chunk


class OpenAnswers:
    """All answers to one request, in the order of its prompts, n to each."""

    def __init__(self, answers: list[AnswerText], reply: CompletionReply, choices: int, closed: "Closed") -> None:
        """`choices` is n; `closed` is told once when nobody reads any more."""
        self.answers = answers
        self._reply = reply
        self._choices = choices
        self._closed: Closed | None = closed

    @property
    def usage(self) -> Usage:
        """The tokens of the prompts, each counted once, and of the answers so far."""
        usage = Usage()
        for number, answer in enumerate(self.answers):
            usage.answer += answer.tokens
            if number % self._choices == 0:
                usage.prompt += len(answer.stream.request.prompt)
        return usage

    async def whole(self) -> JsonObject:
        """The reply when all answers are there; raises ApiRefusal."""
        choices: list[JsonObject] = []
        for index, answer in enumerate(self.answers):
            text = ""
            async for chunk in answer.chunks():
                text += chunk
            choices.append(self._reply.choice(index, text, answer.reason))
        return self._reply.whole(choices, self.usage)

    async def events(self, wants_usage: bool) -> AsyncIterator[str]:
        """The reply as events, one answer after the other, which are all computed meanwhile."""
        for index, answer in enumerate(self.answers):
            first = True
            async for chunk in answer.chunks():
                yield self._reply.event([self._reply.chunk(index, chunk, None, first)])
                first = False
            yield self._reply.event([self._reply.chunk(index, "", answer.reason, first)])
        if wants_usage:
            yield self._reply.event([], self.usage)
        yield DONE

    def close(self) -> None:
        """Cancel what is not complete, and say that nobody reads any more; nothing the second time."""
        if self._closed is not None:
            closed = self._closed
            self._closed = None
            closed(self)


Closed = Callable[[OpenAnswers], None]


def failed_event(error: JsonObject) -> str:
    """The event that a stream ends with whose answer will not come."""
    return event_text(error)
