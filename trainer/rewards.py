"""What an answer that the model wrote is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runfolder.group_objectives import GroupOptions
from trainer.answers import matches
from trainer.reward_function import RewardProcess


@dataclass(frozen=True)
class RewardSample:
    """An answer that the model wrote, what it was asked, the answer that the row has, and the row as it stands."""

    prompt: str
    written: str
    answer: str
    row: Mapping[str, Any]


class Reward(Protocol):
    """What judges the answers that a model wrote."""

    def judge(self, samples: Sequence[RewardSample]) -> list[float]:
        """What each sample is worth: a finite number."""
        ...


class ExactMatch:
    """1 for the answer that the row has, else 0."""

    def judge(self, samples: Sequence[RewardSample]) -> list[float]:
        """Whether each sample is right."""
        rewards = []
        for sample in samples:
            is_right = matches(sample.written, sample.answer)
            rewards.append(float(is_right))
        return rewards


class FunctionReward:
    """What a function of the user says: `function(prompt, completion, row)`."""

    def __init__(self, file: str, function: str, seconds: float) -> None:
        self._process = RewardProcess(file, function, seconds)
        self._is_checked = False

    def judge(self, samples: Sequence[RewardSample]) -> list[float]:
        """What the function gives each sample; at first, it is seen that it gives a row's own answer the same twice.

        Raises RewardFailed.
        """
        if samples and not self._is_checked:
            first = samples[0]
            self._process.check_repeats(arguments_of(first, first.answer))
            self._is_checked = True
        rewards = []
        for sample in samples:
            value = self._process.value(arguments_of(sample, sample.written))
            rewards.append(value)
        return rewards


def arguments_of(sample: RewardSample, completion: str) -> dict[str, Any]:
    """What a function is called with, for a completion of a sample's prompt."""
    row = dict(sample.row)
    return {"prompt": sample.prompt, "completion": completion, "row": row}


def reward_of(options: GroupOptions) -> Reward:
    """What a job's answers are judged by; raises RewardFailed where its file cannot be loaded."""
    file = options.reward_file
    if file is None:
        return ExactMatch()
    return FunctionReward(file, options.reward_function, options.reward_seconds)
