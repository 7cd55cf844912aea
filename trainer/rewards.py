"""What an answer that the model wrote is worth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runfolder.group_objectives import BY_ANSWER, BY_FORMAT, BY_FUNCTION, BY_MODEL, GroupOptions
from trainer.answers import ends_in_number, matches
from trainer.reward_function import RewardProcess
from trainer.reward_journal import RewardJournal

RewardsByName = dict[str, list[float]]  # of the same samples
ENDS_LATER_S = 10.0  # than allowed, a call has surely ended whose worker was killed


@dataclass(frozen=True)
class RewardSample:
    """An answer that the model wrote, what it was asked, the answer that the row has, and the row as it stands.

    `key` tells it from all others of its step; `ids` are those of the prompt and of the answer, with its end.
    """

    prompt: str
    written: str
    answer: str
    row: Mapping[str, Any]
    key: str = ""
    ids: Sequence[int] = ()


class Reward(Protocol):
    """What judges the answers that a model wrote."""

    def judge(
        self,
        samples: Sequence[RewardSample],
        journal: RewardJournal,
    ) -> list[float]:
        """What each sample of the journal's step is worth: a finite number."""
        ...


class RuleReward:
    """1 where a rule holds of a sample, else 0."""

    def __init__(self, rule: Callable[[RewardSample], bool]) -> None:
        self._rule = rule

    def judge(
        self,
        samples: Sequence[RewardSample],
        journal: RewardJournal,  # noqa: ARG002
    ) -> list[float]:
        """Whether the rule holds of each sample."""
        rewards = []
        for sample in samples:
            holds = self._rule(sample)
            rewards.append(float(holds))
        return rewards


def is_exact(sample: RewardSample) -> bool:
    """Whether what was written is the answer that the row has."""
    return matches(sample.written, sample.answer)


def has_answer_format(sample: RewardSample) -> bool:
    """Whether a number behind `####` ends what was written, right or wrong."""
    return ends_in_number(sample.written)


class FunctionReward:
    """What a function of the user says: `function(prompt, completion, row)`."""

    def __init__(
        self,
        file: str,
        function: str,
        seconds: float,
    ) -> None:
        self._process = RewardProcess(
            file,
            function,
            seconds,
        )
        self._is_checked = False
        self._longest_wait = seconds + ENDS_LATER_S

    def judge(
        self,
        samples: Sequence[RewardSample],
        journal: RewardJournal,
    ) -> list[float]:
        """What the function gives each sample, or has given it; none is asked twice, however often a run is killed.

        At first it is seen that it gives a row's own answer the same twice. Raises RewardFailed.
        """
        if samples and not self._is_checked:
            first = samples[0]
            self._process.check_repeats(arguments_of(first, first.answer))
            self._is_checked = True
        rewards = []
        for sample in samples:
            value = journal.value(sample.key)
            if value is None:
                journal.settle(self._longest_wait)
                value = journal.value(sample.key)
            if value is None:
                arguments = arguments_of(sample, sample.written)
                value = self._process.value(
                    arguments,
                    journal.path,
                    sample.key,
                )
            rewards.append(value)
        return rewards


def arguments_of(sample: RewardSample, completion: str) -> dict[str, Any]:
    """What a function is called with, for a completion of a sample's prompt."""
    row = dict(sample.row)
    return {"prompt": sample.prompt, "completion": completion, "row": row}


class WeightedRewards:
    """The rewards of a job, each with its weight."""

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
    ) -> None:
        self._rewards = rewards
        self._weights = weights

    def judge(
        self,
        samples: Sequence[RewardSample],
        journal: RewardJournal,
    ) -> tuple[list[float], RewardsByName]:
        """What each sample is worth in all, and by each reward."""
        totals = [0.0] * len(samples)
        by_name: RewardsByName = {}
        for name, reward in self._rewards.items():
            values = reward.judge(samples, journal)
            by_name[name] = values
            weight = self._weights[name]
            for number, value in enumerate(values):
                totals[number] += weight * value
        return totals, by_name


def rewards_of(options: GroupOptions, model: Reward | None = None) -> WeightedRewards:
    """What a job's answers are judged by; raises RewardFailed where its file cannot be loaded."""
    rewards: dict[str, Reward] = {}
    for name in options.weights:
        if name == BY_ANSWER:
            rewards[name] = RuleReward(is_exact)
        elif name == BY_FORMAT:
            rewards[name] = RuleReward(has_answer_format)
        elif name == BY_FUNCTION:
            file = options.reward_file
            assert file is not None
            rewards[name] = FunctionReward(
                file,
                options.reward_function,
                options.reward_seconds,
            )
        elif name == BY_MODEL:
            assert model is not None
            rewards[name] = model
    return WeightedRewards(rewards, options.weights)
