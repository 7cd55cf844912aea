"""The options of objectives that learn from several answers of the model's own to each prompt."""

import re
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from runfolder.objective import GENTLE, ObjectiveOptions

BY_ANSWER, BY_FORMAT, BY_MODEL, BY_FUNCTION = "exact_match", "format", "model", "function"
_FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")
_REWARDS = f"{BY_ANSWER}, {BY_FORMAT}, {BY_MODEL}, or file.py:function"
_WEIGHTS_MOVE = "it changes the base's own weights, of which the generating engine has no second copy; nearest: lora"
_NOT_TRIED = "generating beside training was not tried with it yet; nearest: lora"


class GroupOptions(ObjectiveOptions):
    """What objectives share that learn from several answers of their own to each prompt."""

    rate_factor: ClassVar[float] = GENTLE
    generates: ClassVar[bool] = True
    needs: ClassVar[str] = "the answers to its prompts, which it writes before each update"
    refused_methods: ClassVar[Mapping[str, str]] = {
        "full": _WEIGHTS_MOVE,
        "galore": _WEIGHTS_MOVE,
        "relora": _WEIGHTS_MOVE,
        "qlora": "its base is in 4 bits, which the generating engine does not read; nearest: lora",
        "longlora": "its attention in training is by places in a row, and generating has none; nearest: lora",
        "bottleneck": _NOT_TRIED,
        "prefix": _NOT_TRIED,
        "prompt": _NOT_TRIED,
        "ptuning": _NOT_TRIED,
    }
    reward: str | dict[str, float] = Field(
        BY_ANSWER,
        description="what an answer is worth: exact_match (1 for the one in its row, else 0), format (1 where a "
        "number behind #### ends it, else 0), model (see reward_model), or file.py:function; or weights of several",
    )
    reward_model: str | None = Field(
        None, description="folder of a reward model, as objective reward leaves it, for the reward `model`"
    )
    reward_seconds: float = Field(
        10.0, gt=0, le=1e6, description="longest that one call of the reward's function may take"
    )
    samples: int = Field(8, ge=2, description="answers to each prompt, which are compared with each other")
    new_tokens: int = Field(256, ge=1, description="longest answer that is written, if data.seq_len has room for it")
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
    most_apart: float | None = Field(
        0.05,
        gt=0,
        description="largest mean distance, in nats a token, between what trainer and engine say of a step's "
        "answers: above it the step is refused, and the run ends; null: none is",
    )
    redraws: int = Field(
        0,
        ge=0,
        description="how often a prompt whose answers are all worth the same gives way to another one, within a step "
        "(DAPO's dynamic sampling)",
    )

    @field_validator("reward")
    @classmethod
    def _is_reward(cls, reward: str | dict[str, float]) -> str | dict[str, float]:
        names = [reward] if isinstance(reward, str) else list(reward)
        unknown = []
        functions = []
        for name in names:
            if _FUNCTION.fullmatch(name):
                functions.append(name)
            elif name not in (BY_ANSWER, BY_FORMAT, BY_MODEL):
                unknown.append(name)
        found = "" if isinstance(reward, str) else f"found {reward}; "  # a text is told by whoever reads the job
        if unknown or not names:
            raise ValueError(f"{found}allowed: {_REWARDS}")
        if len(functions) > 1:
            raise ValueError(f"{found}allowed: one function, which may add up others")
        return reward

    @model_validator(mode="after")
    def _names_its_model(self) -> Self:
        if self.reward_model is None and BY_MODEL in self.weights:
            raise ValueError("reward_model: found none with reward model; allowed: the folder of a reward model")
        if self.reward_model is not None and BY_MODEL not in self.weights:
            raise ValueError(f"reward_model: found {self.reward_model}, which no reward asks; allowed: reward: model")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """What each reward weighs in what an answer is worth, by its name; a function's is `function`."""
        if isinstance(self.reward, str):
            kind = _kind_of(self.reward)
            return {kind: 1.0}
        by_kind: dict[str, float] = {}
        for name, weight in self.reward.items():
            kind = _kind_of(name)
            by_kind[kind] = weight
        return by_kind

    @property
    def reward_file(self) -> str | None:
        """The file whose function judges answers; None where none does."""
        file, _, _ = self._function.rpartition(":")
        return file or None

    @property
    def reward_folder(self) -> str | None:
        """The folder of the reward model that judges answers; None where none does."""
        return self.reward_model

    @property
    def reward_function(self) -> str:
        """The name of the function that judges answers; empty where none does."""
        _, _, function = self._function.rpartition(":")
        return function

    @property
    def _function(self) -> str:
        """The reward that is file.py:function; empty where none is."""
        for name in [self.reward] if isinstance(self.reward, str) else self.reward:
            if _kind_of(name) == BY_FUNCTION:
                return name
        return ""

    def with_reward_file(self, file: str) -> "GroupOptions":
        """The options with the file of the reward in another place."""
        there = f"{file}:{self.reward_function}"
        if isinstance(self.reward, str):
            return self.model_copy(update={"reward": there})
        reward: dict[str, float] = {}
        for name, weight in self.reward.items():
            placed = there if name == self._function else name
            reward[placed] = weight
        return self.model_copy(update={"reward": reward})

    def with_reward_model(self, folder: str) -> "GroupOptions":
        """The options with the folder of the reward model in another place."""
        return self.model_copy(update={"reward_model": folder})


def _kind_of(name: str) -> str:
    """What kind of reward a name means: `function` for file.py:function, else itself."""
    return BY_FUNCTION if _FUNCTION.fullmatch(name) else name


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
    beta: float = Field(
        0.0,
        ge=0,
        description="weight of the divergence from the policy before the first step; takes one pass more",
    )


class RlooOptions(GroupOptions):
    """RLOO: an answer is better or worse than the mean of the others, and is one action, whatever its length."""

    kind: Literal["rloo"] = "rloo"
    implementation: ClassVar[str] = "trainer.objectives.groups:GroupPolicy"
