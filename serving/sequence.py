"""One request, and how far its answer is. Shapes: D width."""

from dataclasses import dataclass, field

from torch import Tensor

from serving.error import RequestRefused
from serving.packed import Packed
from serving.pool import Resident


@dataclass(frozen=True)
class Request:
    """What is asked: a prompt of token ids, an adapter by name (None: the base), and how to answer.

    A temperature of 0 is greedy. `top_k` 0 and `top_p` 1 leave every token in. The answer depends on the seed, not on
    what else is in the batch. It ends after `new_tokens`, or with the first token of `stop`, which is part of it.
    Tenants that wait take fair turns. With `scores_answer`, the log-probability of each token of the answer is kept.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    new_tokens: int = 16
    stop: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    tenant: str = ""
    scores_answer: bool = False

    @property
    def is_truncated(self) -> bool:
        """Whether a draw leaves tokens out."""
        if self.top_k > 0:
            return True
        return self.top_p < 1

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest token each time."""
        return self.temperature == 0


@dataclass(eq=False)
class Sequence:
    """A request on its way. Positions count the virtual tokens of its adapter, which stand in front."""

    request: Request
    packed: Packed | None  # found when the request was made
    resident: Resident | None = None
    pages: list[int] = field(default_factory=list)  # all it will need, those of its adapter included
    own_pages: list[int] = field(default_factory=list)  # of these, those that no other sequence has,
    joined_pages: list[int] = field(default_factory=list)  # and those that others may have, of equal beginnings
    page_keys: dict[int, bytes] | None = None  # by which pages of its prompt are found (prefixes.py)
    computed: int = 0  # positions whose keys and values are in the cache
    answer: list[int] = field(default_factory=list)
    scored_from: int | None = None  # instead of an answer, log-probabilities of the prompt from this token on
    scores: list[float] = field(default_factory=list)  # those, or of the answer's tokens
    are_likeliest: list[bool] = field(default_factory=list)  # of the scored tokens, whether no other is likelier
    keeps_output: bool = False  # what is asked is `output_D`
    output_D: Tensor | None = None  # the normed output of the last layer behind the prompt, in the base's type
    ended: bool = False  # whoever asked has seen that its answer need not go on
    refusal: RequestRefused | None = None

    @property
    def virtual(self) -> int:
        """Positions in front of the prompt."""
        if self.packed is None:
            return 0
        return self.packed.adapter.virtual

    @property
    def adapter_index(self) -> int:
        """The index of its adapter on the device; 0 for the base."""
        if self.resident is None:
            return 0
        return self.resident.index

    @property
    def prompted(self) -> int:
        """Positions that its prompt ends at, virtual tokens included."""
        tokens = len(self.request.prompt)
        return self.virtual + tokens

    @property
    def length(self) -> int:
        """Positions that it will take at most."""
        return self.prompted + self.request.new_tokens

    @property
    def uncomputed(self) -> int:
        """Tokens of the prompt that are not computed yet."""
        return self.prompted - self.computed

    def take(self, token: int, score: float) -> None:
        """One more token of the answer, and its log-probability."""
        self.answer.append(token)
        if self.request.scores_answer:
            self.scores.append(score)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete; where a prompt is scored, whether all of it is computed."""
        if self.scored_from is not None:
            return self.uncomputed == 0
        if not self.answer:
            return False
        if self.ended:
            return True
        request = self.request
        if len(self.answer) >= request.new_tokens:
            return True
        last = self.answer[-1]
        return last in request.stop

    @property
    def is_at_last_token(self) -> bool:
        """Whether its answer has all tokens with the one that is under way."""
        tokens = len(self.answer) + 1
        return tokens >= self.request.new_tokens

    def prompt_tokens(self, start: int, count: int) -> tuple[int, ...]:
        """The ids of so many tokens of the prompt, from the one at position `start` on."""
        first = start - self.virtual
        stop = first + count
        return self.request.prompt[first:stop]
