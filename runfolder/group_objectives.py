"""The options of objectives that learn from several answers of the model's own to each prompt."""

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from runfolder.objective import GENTLE, ObjectiveOptions

_BY_ANSWER = "exact_match"
_BY_FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")
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
    beta: float = Field(
        0.0,
        ge=0,
        description="weight of the divergence from the policy before the first step; takes one pass more",
    )


class RlooOptions(GroupOptions):
    """RLOO: an answer is better or worse than the mean of the others, and is one action, whatever its length."""

    kind: Literal["rloo"] = "rloo"
    implementation: ClassVar[str] = "trainer.objectives.groups:GroupPolicy"
