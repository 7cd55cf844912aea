"""What clients send, checked: OpenAI's names, and nothing that is ignored though it should change the answer.

Lists are bounded and left at their first flaw, and objects have few keys: a body of flaws alone would otherwise be
listed flaw by flaw, in gigabytes and for as long as everybody waits.
"""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from serving.gateway.refusal import invalid

MOST_CHOICES = 32  # of a request: prompts times n
MOST_STOPS = 16
MOST_IDS = 2**20  # of a prompt, more than any base has positions
MOST_TURNS = 4096
MOST_KEYS = 64  # of an object
TokenIds = Annotated[list[StrictInt], Field(min_length=1, max_length=MOST_IDS, fail_fast=True)]
TextList = Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0, le=0)]


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    include_usage: bool = False


class Sampling(BaseModel):
    """What both kinds of completions ask for."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    model: Annotated[str, Field(min_length=1, max_length=200)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # These are taken at the values that change nothing.
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        if self.stop is None:
            return []
        if isinstance(self.stop, str):
            return [self.stop]
        return self.stop

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        if self.stream_options is None:
            return False
        return self.stream_options.include_usage


class CompletionBody(Sampling):
    """The body of /v1/completions."""

    prompt: str | TokenIds | TextList | TokenLists
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Annotated[bool, Field(le=False)] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or its tokens."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    @property
    def tokens(self) -> int | None:
        """How many tokens an answer has at most."""
        return self.max_tokens


class TextPart(BaseModel):
    """A part of a message; there are no others than text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Annotated[str, Field(pattern="^text$")]
    text: str


class ChatTurn(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Annotated[str, Field(pattern="^(system|developer|user|assistant|tool)$")]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_TURNS, fail_fast=True)]
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        content = self.content
        if not isinstance(content, str):
            texts = [part.text for part in content]
            content = "".join(texts)
        return {"role": self.role, "content": content}


class ChatBody(Sampling):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=MOST_TURNS, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: Annotated[bool, Field(le=False)] | None = None

    @property
    def tokens(self) -> int | None:
        """How many tokens an answer has at most."""
        return self.max_completion_tokens or self.max_tokens


def parsed_completion(raw: bytes) -> CompletionBody:
    """The body of a completion; raises ApiRefusal."""
    try:
        return CompletionBody.model_validate(_parsed_json(raw))
    except ValidationError as error:
        raise invalid(_first_problem(error)) from error


def parsed_chat(raw: bytes) -> ChatBody:
    """The body of a chat; raises ApiRefusal."""
    try:
        return ChatBody.model_validate(_parsed_json(raw))
    except ValidationError as error:
        raise invalid(_first_problem(error)) from error


def _parsed_json(raw: bytes) -> Any:
    """What a body says; raises ApiRefusal where it is no JSON in UTF-8."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"body: found bytes that are no UTF-8 at {error.start}; allowed: JSON in UTF-8") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_small_object)
    except (ValueError, RecursionError) as error:
        raise invalid(f"body: found no JSON: {str(error)[:200]}") from error


def _small_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; raises ValueError for one of so many keys that no body has."""
    if len(pairs) > MOST_KEYS:
        raise ValueError(f"found an object of {len(pairs)} keys; allowed: {MOST_KEYS}")
    return dict(pairs)


def _refuse_constant(name: str) -> float:
    """Python would read NaN and Infinity, which are no JSON."""
    raise ValueError(f"found {name}, which is no JSON")


def _first_problem(error: ValidationError) -> str:
    """The first problem of a body in one line, without repeating what may be long; a list too long goes first.

    Of a value that may be of several types there is a problem for each, and most are that it is none of the others.
    """
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    problem = problems[0]
    for other in problems:
        if other["type"] == "too_long":
            problem = other
            break
    place = ".".join(map(str, problem["loc"]))
    return f"{place[:100]}: {problem['msg'][:200]}"
