"""Which objectives there are, with their options: plain data, so that a laptop imports no torch.

Another package adds one by an entry point of the group `fleetune.objectives`: its name, and `module:Class`.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from runfolder.group_objectives import GrpoOptions, RlooOptions
from runfolder.objective import GENTLE, ObjectiveOptions, RowsRead

OBJECTIVES_GROUP = "fleetune.objectives"
_FROM_OUTSIDE = "another package's"
_NO_END = "behind vectors in front, transformers does not find the end of a padded answer; nearest: prefix"
_REFERENCE = "one forward pass over all answers before the first step, kept for jobs with the same start"


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
    rate_factor: ClassVar[float] = GENTLE
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
    rate_factor: ClassVar[float] = GENTLE
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
    rate_factor: ClassVar[float] = GENTLE
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


def shares_prompts(options: ObjectiveOptions) -> bool:
    """Whether a prompt is computed once for both of its answers."""
    if isinstance(options, PairOptions):
        return options.share_prompts
    return False


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
    names = [*OBJECTIVES, *outside()]
    return sorted(names)


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
