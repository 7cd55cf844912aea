"""Which objectives there are, with their options: plain data, so that a laptop imports no torch.

Another package adds one by an entry point of the group `fleetune.objectives`: its name, and `module:Class`.
"""

import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from runfolder.resources import Section

RowsRead = Literal["answers", "pairs", "margins", "judged"]
OBJECTIVES_GROUP = "fleetune.objectives"
_FROM_OUTSIDE = "another package's"
_GENTLE = 0.05  # 1e-6 in TRL, where supervised tuning of all weights has 2e-5
_NO_END = "behind vectors in front, transformers does not find the end of a padded answer; nearest: prefix"
_BY_ANSWER = "exact_match"
_BY_FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")
_WEIGHTS_MOVE = "it changes the base's own weights, of which the generating engine has no second copy; nearest: lora"
_NOT_TRIED = "generating beside training was not tried with it yet; nearest: lora"
_REFERENCE = "one forward pass over all answers before the first step, kept for jobs with the same start"


class ObjectiveOptions(Section):
    """What all objectives share: a kind, and the rows that they read."""

    kind: str  # how a job names the objective: a Literal with a default, in each class that stands for one
    implementation: ClassVar[str]  # "module:class" of what is imported where it trains
    rows: ClassVar[RowsRead] = "answers"
    rate_factor: ClassVar[float] = 1.0  # of the method's default learning rate, which is one for supervised tuning
    needs: ClassVar[str] = ""  # what it takes beside a forward and a backward pass over its rows, in words
    refused_methods: ClassVar[Mapping[str, str]] = {}  # the methods that do not work with it, and why
    generates: ClassVar[bool] = False  # it learns from what the model itself writes in each step
    replaces_head: ClassVar[bool] = False  # what is trained has a head of the objective's, not the vocabulary's

    @property
    def reward_file(self) -> str | None:
        """The file whose function judges what the model writes; None where there is none."""
        return None


class SftOptions(ObjectiveOptions):
    """Supervised fine-tuning: the cross-entropy of a row's answer."""

    kind: Literal["sft"] = "sft"
    implementation: ClassVar[str] = "trainer.objectives.sft:Supervised"


class PairOptions(ObjectiveOptions):
    """What objectives on pairs of answers share."""

    rows: ClassVar[RowsRead] = "pairs"
    share_prompts: bool = Field(
        False, description="compute a pair's prompt once, for both answers; pays where prompts are long"
    )


class DpoOptions(PairOptions):
    """Direct preference optimisation: the policy itself is the reward, against the policy before the first step."""

    kind: Literal["dpo"] = "dpo"
    implementation: ClassVar[str] = "trainer.objectives.dpo:DirectPreference"
    rate_factor: ClassVar[float] = _GENTLE
    needs: ClassVar[str] = _REFERENCE
    loss: Literal["sigmoid", "ipo", "hinge"] = Field(
        "sigmoid", description="what a margin costs: log-sigmoid, distance to 1/(2 beta) squared, or below 1 linear"
    )
    beta: float = Field(0.1, gt=0, description="how strongly a change of log-likelihood counts; of ipo: its tau")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="how many labels are taken to be wrong (sigmoid)")
    per_token: bool | None = Field(
        None, description="log-likelihoods per token of the answer, not summed; null: for ipo alone"
    )

    @model_validator(mode="after")
    def _smooths_sigmoid_alone(self) -> "DpoOptions":
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing with loss {self.loss}, which has none; allowed: loss sigmoid")
        return self

    @property
    def normalised(self) -> bool:
        """Whether log-likelihoods are taken per token."""
        if self.per_token is None:
            return self.loss == "ipo"
        return self.per_token


class SimpoOptions(PairOptions):
    """SimPO: the log-likelihood per token is the reward, without a reference; the chosen one leads by `gamma`."""

    kind: Literal["simpo"] = "simpo"
    implementation: ClassVar[str] = "trainer.objectives.simpo:SimplePreference"
    rate_factor: ClassVar[float] = _GENTLE
    beta: float = Field(2.0, gt=0, description="how strongly a log-likelihood per token counts")
    gamma: float = Field(1.0, ge=0, description="by how much the chosen answer's reward is to lead")


class OrpoOptions(PairOptions):
    """ORPO: the chosen answer's cross-entropy, and the odds of the chosen against the rejected answer beside it."""

    kind: Literal["orpo"] = "orpo"
    implementation: ClassVar[str] = "trainer.objectives.orpo:OddsRatio"
    rate_factor: ClassVar[float] = 0.4  # 8e-6 in the paper
    weight: float = Field(0.1, ge=0, description="of the odds, beside the cross-entropy (the paper's lambda)")


class KtoOptions(ObjectiveOptions):
    """KTO: answers that were judged one by one, as desirable or not, against the policy before the first step."""

    kind: Literal["kto"] = "kto"
    implementation: ClassVar[str] = "trainer.objectives.kto:ProspectTheory"
    rate_factor: ClassVar[float] = _GENTLE
    rows: ClassVar[RowsRead] = "judged"
    needs: ClassVar[str] = f"{_REFERENCE}; in each step one more over the answers of neighbours"
    beta: float = Field(0.1, gt=0, description="how strongly a change of log-likelihood counts")
    desirable: float = Field(1.0, ge=0, description="what a desirable answer weighs")
    undesirable: float = Field(1.0, ge=0, description="what an undesirable answer weighs")


class RewardOptions(PairOptions):
    """A reward model: a score of a whole answer, higher for the chosen one of a pair."""

    kind: Literal["reward"] = "reward"
    implementation: ClassVar[str] = "trainer.objectives.reward:RewardModel"
    rows: ClassVar[RowsRead] = "margins"
    refused_methods: ClassVar[Mapping[str, str]] = {
        "prompt": _NO_END,
        "ptuning": _NO_END,
        "bottleneck": "neither transformers nor PEFT would load its adapters with a head; nearest: lora",
    }
    replaces_head: ClassVar[bool] = True
    centring: float = Field(
        0.0, ge=0, description="weight of the square of both scores' sum, to keep scores around zero; 0.01 is usual"
    )


class GroupOptions(ObjectiveOptions):
    """What objectives share that learn from several answers of their own to each prompt."""

    rate_factor: ClassVar[float] = _GENTLE
    generates: ClassVar[bool] = True
    needs: ClassVar[str] = "the answers to its prompts, which it writes before each update"
    refused_methods: ClassVar[Mapping[str, str]] = {
        "full": _WEIGHTS_MOVE,
        "galore": _WEIGHTS_MOVE,
        "relora": _WEIGHTS_MOVE,
        "qlora": "its base is in 4 bits, which the generating engine does not read; nearest: lora",
        "longlora": "its attention in training is by places in a row, and generating has none; nearest: lora",
        "adalora": _NOT_TRIED,
        "bottleneck": _NOT_TRIED,
        "fourierft": _NOT_TRIED,
        "prefix": _NOT_TRIED,
        "prompt": _NOT_TRIED,
        "ptuning": _NOT_TRIED,
        "vera": _NOT_TRIED,
    }
    reward: str = Field(
        _BY_ANSWER,
        description="what an answer is worth: exact_match (1 for the one in its row, else 0), or file.py:function",
    )
    reward_seconds: float = Field(10.0, gt=0, description="longest that one call of the reward's function may take")
    samples: int = Field(8, ge=2, description="answers to each prompt, which are compared with each other")
    new_tokens: int = Field(256, ge=1, description="longest answer that is written")
    temperature: float = Field(1.0, gt=0, description="what logits are divided by, in writing and in learning")
    updates: int = Field(
        1, ge=1, description="steps that learn from the same answers; from 2 on, a step's prompts are the first one's"
    )
    clip_low: float = Field(
        0.2, gt=0, lt=1, description="how far below 1 the ratio of new to old probability counts (from 2 updates on)"
    )
    clip_high: float = Field(0.2, gt=0, description="the same above 1; DAPO takes 0.28")
    importance_cap: float | None = Field(
        2.0,
        gt=0,
        description="most that a token weighs by how much likelier the trainer finds it than the engine that wrote "
        "it; null: all weigh 1",
    )

    @field_validator("reward")
    @classmethod
    def _is_reward(cls, reward: str) -> str:
        if reward != _BY_ANSWER and not _BY_FUNCTION.fullmatch(reward):
            raise ValueError(f"found {reward!r}; allowed: {_BY_ANSWER}, or file.py:function")
        return reward

    @property
    def reward_file(self) -> str | None:
        """The file whose function judges answers; None where none does."""
        file, _, _ = self.reward.rpartition(":")
        return file or None

    @property
    def reward_function(self) -> str:
        """The name of the function that judges answers."""
        _, _, function = self.reward.rpartition(":")
        return function

    def with_reward_file(self, file: str) -> "GroupOptions":
        """The options with the file of the reward in another place."""
        reward = f"{file}:{self.reward_function}"
        return self.model_copy(update={"reward": reward})


class GrpoOptions(GroupOptions):
    """GRPO: an answer is better or worse than the others to the same prompt, in units of their spread."""

    kind: Literal["grpo"] = "grpo"
    implementation: ClassVar[str] = "trainer.objectives.groups:GroupPolicy"
    scale: bool = Field(True, description="divide rewards by their standard deviation in the group")
    average: Literal["answers", "tokens", "length"] = Field(
        "answers",
        description="what a step is the mean of: its answers, each of them that of its tokens (favours short right "
        "ones); its tokens (DAPO); or its answers as if all had new_tokens (Dr. GRPO)",
    )
    ratio: Literal["token", "answer"] = Field(
        "token", description="whose ratio of probabilities is clipped: each token's, or the answer's mean (GSPO)"
    )


class RlooOptions(GroupOptions):
    """RLOO: an answer is better or worse than the mean of the others, and is one action, whatever its length."""

    kind: Literal["rloo"] = "rloo"
    implementation: ClassVar[str] = "trainer.objectives.groups:GroupPolicy"


def shares_prompts(options: ObjectiveOptions) -> bool:
    """Whether a prompt is computed once for both of its answers."""
    return isinstance(options, PairOptions) and options.share_prompts


class OutsideOptions(ObjectiveOptions):
    """An objective of another package, which has no options here."""

    @field_validator("kind")
    @classmethod
    def _is_registered(cls, kind: str) -> str:
        implementation_of(kind)
        return kind


OBJECTIVES: Mapping[str, type[ObjectiveOptions]] = {
    "sft": SftOptions,
    "dpo": DpoOptions,
    "simpo": SimpoOptions,
    "orpo": OrpoOptions,
    "kto": KtoOptions,
    "reward": RewardOptions,
    "grpo": GrpoOptions,
    "rloo": RlooOptions,
}


def outside() -> dict[str, str]:
    """The objectives of other packages by their names, as `module:Class`; none replaces one of Fleetune."""
    found = {}
    for point in entry_points(group=OBJECTIVES_GROUP):
        if point.name not in OBJECTIVES:
            found[point.name] = point.value
    return found


def known() -> list[str]:
    """The name of every objective that is installed here."""
    return sorted([*OBJECTIVES, *outside()])


def implementation_of(kind: str) -> str:
    """Where an objective is written, as `module:Class`; raises KeyError for one that is not installed here."""
    if kind in OBJECTIVES:
        options = OBJECTIVES[kind]
        return options.implementation
    return outside()[kind]


def _tag_of(value: Any) -> str:
    """Under which tag an objective is validated; what other packages have is read only where it must be."""
    kind = getattr(value, "kind", None)
    if isinstance(value, Mapping):
        kind = value.get("kind")
    tag = str(kind)
    if tag in OBJECTIVES:
        return tag
    if tag in outside():
        return _FROM_OUTSIDE
    return tag


if TYPE_CHECKING:
    AnyObjective = ObjectiveOptions
else:
    _TAGGED = []
    for _kind, _options in OBJECTIVES.items():
        _TAGGED.append(Annotated[_options, Tag(_kind)])
    _TAGGED.append(Annotated[OutsideOptions, Tag(_FROM_OUTSIDE)])
    _ANY = Union[tuple(_TAGGED)]  # noqa: UP007 (as many as there are)
    AnyObjective = Annotated[_ANY, Discriminator(_tag_of)]
