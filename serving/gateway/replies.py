"""What clients get, in the shapes that OpenAI's have."""

import json
import time
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

JsonObject = dict[str, Any]
DONE = "data: [DONE]\n\n"


@dataclass
class Usage:
    """Tokens that a request took."""

    prompt: int = 0
    answer: int = 0

    def to_json(self) -> JsonObject:
        """The same in the API's names."""
        counts = {"prompt_tokens": self.prompt, "completion_tokens": self.answer}
        counts["total_tokens"] = self.prompt + self.answer
        return counts


class CompletionReply:
    """Builds the replies of /v1/completions."""

    prefix = "cmpl-"
    kind = "text_completion"
    kind_of_chunk = "text_completion"

    def __init__(self, model: str) -> None:
        """Reply in the name of a model."""
        random = uuid4().hex
        name = f"{self.prefix}{random}"
        now = int(time.time())
        self._head = {"id": name, "created": now, "model": model}

    def choice(self, index: int, text: str, reason: str) -> JsonObject:
        """An answer that is whole."""
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": None}

    def chunk(self, index: int, text: str, reason: str | None, first: bool) -> JsonObject:  # noqa: ARG002
        """A chunk of an answer; the last one says why it ends."""
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": None}

    def whole(self, choices: list[JsonObject], usage: Usage) -> JsonObject:
        """The reply that is not streamed."""
        body: JsonObject = {"object": self.kind, "choices": choices}
        body["usage"] = usage.to_json()
        return self._head | body

    def event(self, choices: list[JsonObject], usage: Usage | None = None) -> str:
        """An event of a stream."""
        body = self._head | {"object": self.kind_of_chunk, "choices": choices}
        if usage is not None:
            body["usage"] = usage.to_json()
        return event_text(body)


class ChatReply(CompletionReply):
    """Builds the replies of /v1/chat/completions."""

    prefix = "chatcmpl-"
    kind = "chat.completion"
    kind_of_chunk = "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: str) -> JsonObject:
        """An answer that is whole."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": None}

    def chunk(self, index: int, text: str, reason: str | None, first: bool) -> JsonObject:
        """A chunk of an answer; the first one says who speaks."""
        delta = {"content": text}
        if first:
            delta = {"role": "assistant", "content": text}
        return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}


def event_text(body: JsonObject) -> str:
    """A server-sent event, as text."""
    return f"data: {json.dumps(body)}\n\n"
