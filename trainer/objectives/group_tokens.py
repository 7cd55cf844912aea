"""Answers that a model wrote to the prompts of a batch: as they are recorded, and as documents to learn from.

Shapes: D answers, N of their tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from trainer.data.counts import Counts
from trainer.data.shards import join_examples
from trainer.data.tokens import Tokens
from trainer.group_writer import WrittenAnswer
from trainer.objectives.advantages import RewardArray
from trainer.objectives.base import Arrays, TensorsByName
from trainer.rewards import RewardsByName

_STANDS_IN: Arrays = {
    "document": np.array([-1], np.int64),
    "labels": np.ones(1, np.int64),
    "is_real": np.zeros(1),
}
# Log-probabilities of tokens: the engine's, the trainer's before its updates, and those of the policy at the start.
OF_LABELS = ("engine", "policy", "reference")
DRAWS = "redraws"  # how many other prompts were tried at a place, in a rollout and among what is logged


@dataclass(frozen=True)
class JudgedGroup:
    """The answers to one prompt of a batch, by its place there, and what each is worth, in all and by each reward.

    `draw` is the number of prompts that stood at the place before.
    """

    place: int
    prompt: list[int]
    answers: list[WrittenAnswer]
    rewards: list[float]
    by_name: RewardsByName
    draw: int

    @property
    def is_dead(self) -> bool:
        """Whether all answers are worth the same, so that nothing is to be learned from them."""
        values = set(self.rewards)
        return len(values) == 1


class WrittenTokens(Tokens):
    """Prompts with the answers that were written to them; the answers are the labels.

    What is known `of_answers` are arrays [D] by name: `advantage`, `reward`, `is_dead` (all rewards of its group are
    equal), `is_cut` (it did not come to its end), and where a job has several rewards what each gives.
    """

    def __init__(
        self,
        rollout: Arrays,
        of_answers: Arrays,
        virtual: int,
    ) -> None:
        documents = []
        prompts_D = rollout["prompts"]
        ids_of_documents = in_documents(rollout["ids"], rollout["ends"])
        for ids, prompt in zip(ids_of_documents, prompts_D, strict=True):
            place = np.arange(len(ids))
            is_label = place >= prompt
            documents.append((ids, is_label))
        count = len(documents)
        shard = join_examples(
            documents,
            range(count),
            Counts(),
        )
        super().__init__([shard], virtual)
        self._of_answers = of_answers
        self._of_labels = {}
        label_ends = np.cumsum(self.targets)
        for name in OF_LABELS:
            if name in rollout:
                values_N = rollout[name]
                self._of_labels[name] = in_documents(values_N, label_ends)

    def known(self, numbers: Sequence[int]) -> Arrays:
        """Of some answers what is known of each [D], and what is known of their tokens [N].

        Where there are none, one with one token stands in that is worth nothing.
        """
        arrays: Arrays = {}
        if not numbers:
            arrays |= _STANDS_IN
            for name in self._of_answers:
                arrays[name] = np.zeros(1)
            for name in self._of_labels:
                arrays[name] = np.zeros(1, np.float32)
            return arrays
        chosen = np.array(numbers, np.int64)
        arrays["document"] = chosen
        arrays["labels"] = self.targets[chosen]
        arrays["is_real"] = np.ones(len(chosen))
        for name, values_D in self._of_answers.items():
            exact_D = values_D.astype(np.float64)
            arrays[name] = exact_D[chosen]
        for name, of_documents in self._of_labels.items():
            values = []
            for number in numbers:
                values.append(of_documents[number])
            arrays[name] = np.concatenate(values)
        return arrays


def in_documents(values: npt.NDArray[np.generic], ends_D: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
    """Values that stand document by document, one array for each; `ends` says where each one's end."""
    inner_ends = ends_D[:-1]
    return np.split(values, inner_ends)


def recorded_groups(groups: Iterable[JudgedGroup], ends: Sequence[int]) -> Arrays:
    """What is kept of a rollout: ids of prompts and answers, where they end, log-probabilities and rewards.

    `cut` [D] says which answers did not come to their end, `redraws` [D] how many prompts gave way to theirs.
    """
    ids: list[int] = []
    ends_D: list[int] = []
    prompts_D: list[int] = []
    cut_D: list[bool] = []
    engine_N: list[float] = []
    rewards_D: list[float] = []
    draws_D: list[int] = []
    by_name: RewardsByName = {}
    for group in groups:
        rewards_D += group.rewards
        answers = len(group.answers)
        draws_D += [group.draw] * answers
        for name, values in group.by_name.items():
            so_far = by_name.setdefault(name, [])
            so_far += values
        for answer in group.answers:
            ids += group.prompt
            ids += answer.ids
            ends_D.append(len(ids))
            prompts_D.append(len(group.prompt))
            last = answer.ids[-1]
            cut_D.append(last not in ends)
            engine_N += answer.log_probabilities
    recorded: Arrays = {
        "ids": np.array(ids, np.int32),
        "ends": np.array(ends_D, np.int64),
        "prompts": np.array(prompts_D, np.int64),
        "cut": np.array(cut_D, np.bool_),
        "engine": np.array(engine_N, np.float32),
        "rewards": np.array(rewards_D, np.float64),
        DRAWS: np.array(draws_D, np.int64),
    }
    for name, of_reward_D in by_name.items():
        recorded[of_reward(name)] = np.array(of_reward_D, np.float64)
    return recorded


def of_reward(name: str) -> str:
    """What the values of one reward are called, in a rollout and among what is logged."""
    return f"reward_{name}"


def policy_of_all(
    rollout: Arrays,
    passes: Sequence[TensorsByName],
    policy: Callable[[TensorsByName], torch.Tensor],
) -> npt.NDArray[np.float32]:
    """What `policy` gives each token of a rollout [N], from this rank's micro-batches of it; a collective."""
    engine_N = torch.from_numpy(rollout["engine"])
    total_N = torch.zeros_like(engine_N)
    ranks_N = torch.zeros_like(engine_N)  # those that share a row all have what is known of it
    lengths_D = np.diff(rollout["ends"], prepend=0)
    labels_D = lengths_D - rollout["prompts"]
    ends_D = np.cumsum(labels_D)
    device = engine_N.device
    for batch in passes:
        policy_N = policy(batch)
        device = policy_N.device
        counts: list[int] = batch["labels"].tolist()
        of_answers = policy_N.cpu().split(counts)
        numbers: list[int] = batch["document"].tolist()
        for number, values in zip(numbers, of_answers, strict=True):
            if number < 0:
                continue
            stop = int(ends_D[number])
            start = stop - len(values)
            total_N[start:stop] = values
            ranks_N[start:stop] = 1
    both_2N = torch.stack([total_N, ranks_N])
    both_2N = both_2N.to(device)
    dist.all_reduce(both_2N)
    all_N, found_N = both_2N.cpu()
    mean_N = all_N / found_N
    on_host: npt.NDArray[np.float32] = mean_N.numpy()
    return on_host


def dead_answers(rewards_PG: RewardArray, equal_P: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which answers [D] are of a group whose rewards are all equal."""
    _, answers = rewards_PG.shape
    return equal_P.repeat(answers)
