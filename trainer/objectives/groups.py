"""GRPO and RLOO: learning from several answers of the model's own to each prompt, by what each of them is worth.

The answers are written by the model's own engine (group_writer.py), are worth what a reward says (rewards.py), are
recorded before the update, and become examples of their own, each with its advantage (advantages.py) and its tokens'
losses (group_loss.py).

Shapes: D documents, each a prompt with one answer; N labels; P prompts, G answers to each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from runfolder.group_objectives import GroupOptions, GrpoOptions
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.files import RowError, records
from trainer.data.layout import MicroBatch
from trainer.data.tokens import EvaluationPrompt, Tokens, read_prompts, tokenise
from trainer.end_tokens import until_end
from trainer.group_writer import AskedAnswer, GroupWriter, WrittenAnswer
from trainer.objectives.advantages import RewardArray, advantages_over_others, are_equal, group_advantages
from trainer.objectives.base import Arrays, HostArrays, Objective, ObjectiveSetup, Shares, TensorsByName, Totals
from trainer.objectives.group_loss import group_figures, label_weights, token_costs
from trainer.objectives.group_tokens import (
    JudgedGroup,
    WrittenTokens,
    dead_answers,
    policy_of_all,
    recorded_groups,
)
from trainer.objectives.labels import label_arrays
from trainer.objectives.likelihood import label_losses
from trainer.rewards import Reward, RewardSample, reward_of


@dataclass(frozen=True)
class PromptRow:
    """What is asked for a row, and the row as it stands."""

    prompt: EvaluationPrompt
    record: Mapping[str, Any]


RowsByNumber = dict[int, PromptRow]


class GroupPolicy(Objective):
    """To write what is worth more than the other answers to the same prompt."""

    generates = True

    def __init__(self, setup: ObjectiveSetup) -> None:
        super().__init__(setup)
        options = setup.job.objective
        assert isinstance(options, GroupOptions)
        self._options = options
        self._rows: WeakKeyDictionary[Tokens, RowsByNumber] = WeakKeyDictionary()
        self._writer: GroupWriter | None = None
        self._reward: Reward | None = None

    def read(self, source: str) -> Examples:
        """The rows of a source, of which each has a prompt, and the answer that the data has."""
        setup = self.setup
        tokens = tokenise(
            source,
            setup.tokenizer,
            setup.reading,
            setup.folder,
            setup.progress,
        )
        by_number = dict(records(source))
        rows: RowsByNumber = {}
        for prompt in self.prompts(source):
            record = by_number[prompt.row]
            rows[prompt.row] = PromptRow(prompt, record)
        for number in tokens.rows.tolist():
            where = f"{source}, row {number}"
            if number not in rows:
                raise RowError(f"{where}: found no prompt, allowed: rows with a prompt to answer")
            row = rows[number]
            if self._room(row) < 1:
                seq_len = setup.reading.seq_len
                raise RowError(f"{where}: its prompt leaves no room for an answer in data.seq_len {seq_len}")
        self._rows[tokens] = rows
        return Examples.of_each(tokens)

    def prompts(self, source: str) -> list[EvaluationPrompt]:
        """The rows of a source without their last answer."""
        setup = self.setup
        return read_prompts(source, setup.tokenizer, setup.reading)

    def rollout_step(self, step: int) -> int:
        """The first of the steps that learn from the same answers."""
        before = (step - 1) % self._options.updates
        return step - before

    def rollout(self, model: nn.Module, batch: GlobalBatch, step: int) -> Arrays:
        """Answers to the prompts of a batch, each rank those to its own, and what they are worth."""
        if self._writer is None:
            positions = self.setup.job.data.seq_len
            self._writer = GroupWriter(model, self.method, positions)
            self._reward = reward_of(self._options)
        digest = self._writer.load()
        world_size = dist.get_world_size()
        rank = dist.get_rank()
        places = range(rank, len(batch.chosen), world_size)
        answers = self._written(self._writer, batch, places, step)
        own = self._judged(batch, places, answers)
        dealt: list[list[JudgedGroup]] = [[] for _ in range(world_size)]
        dist.all_gather_object(dealt, own)
        groups = list(chain.from_iterable(dealt))
        groups.sort(key=attrgetter("place"))
        rollout = recorded_groups(groups, self.setup.reading.ends)
        rollout["adapter"] = np.frombuffer(digest.encode(), np.uint8)
        return rollout

    def complete_rollout(
        self,
        model: nn.Module,
        rollout: Arrays,
        passes: Iterable[TensorsByName],
    ) -> None:
        """Add what the policy before several updates gives each token, and that before the first step, if asked."""
        options = self._options
        batches = list(passes)
        policy = partial(self._policy, model)
        if options.updates > 1:
            rollout["policy"] = policy_of_all(rollout, batches, policy)
        if isinstance(options, GrpoOptions) and options.beta > 0:
            with self.method.reference(model):
                rollout["reference"] = policy_of_all(rollout, batches, policy)

    def rolled_out(self, batch: GlobalBatch, rollout: Arrays) -> GlobalBatch:
        """Each answer as an example of its own: its advantage is known, and needs the others no more."""
        samples = self._options.samples
        prompts = len(batch.chosen)
        rewards_D: RewardArray = rollout["rewards"]
        rewards_PG = rewards_D.reshape(prompts, samples)
        equal_P = are_equal(rewards_PG)
        advantages_PG = self._advantages(rewards_PG)
        of_answers: Arrays = {
            "advantage": advantages_PG.ravel(),
            "reward": rewards_D,
            "is_dead": dead_answers(rewards_PG, equal_P),
            "is_cut": rollout["cut"],
        }
        tokens = WrittenTokens(rollout, of_answers, self.setup.reading.virtual)
        examples = Examples.of_each(tokens)
        every = np.arange(len(examples))
        return GlobalBatch(examples, every)

    def totals(self, batch: GlobalBatch) -> Totals:
        """The answers of a global batch, and their tokens."""
        answers = len(batch.chosen)
        return {"answers": answers, "labels": batch.targets}

    def arrays(self, examples: Examples, micro: MicroBatch) -> HostArrays:
        """The documents of a micro-batch, and what is known of each answer and of its tokens."""
        tokens = examples.tokens
        assert isinstance(tokens, WrittenTokens)
        pad_id = self.setup.tokenizer.pad_token_id
        made: HostArrays = label_arrays(micro.rows, tokens, pad_id)
        numbers = list(chain.from_iterable(micro.rows))
        arrays = dict(made)
        arrays |= tokens.known(numbers)
        return arrays

    def loss(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:  # noqa: ARG002
        """What a micro-batch's answers add to the step's loss, and how the trainer differs from the engine."""
        policy_N = self._policy(model, batch)
        old_N = policy_N.detach()
        if "policy" in batch:
            old_N = batch["policy"]
        found = token_costs(self._options, policy_N, old_N, batch)
        weight_N = label_weights(self._options, batch, totals)
        weighted_N = weight_N * found.costs
        metrics = group_figures(
            old_N,
            found,
            batch,
            totals,
        )
        return Shares(weighted_N.sum(), metrics)

    def _policy(self, model: nn.Module, batch: TensorsByName) -> torch.Tensor:
        """The log-probability [N] of each token of the answers, at the temperature at which they are written."""
        losses_N = label_losses(
            model,
            batch,
            self.kernels,
            self._options.temperature,
        )
        return -losses_N

    def _advantages(self, rewards_PG: RewardArray) -> RewardArray:
        """How much better each answer is than the others to its prompt [P, G]."""
        options = self._options
        if isinstance(options, GrpoOptions):
            return group_advantages(rewards_PG, options.scale)
        return advantages_over_others(rewards_PG)

    def _written(
        self,
        writer: GroupWriter,
        batch: GlobalBatch,
        places: Sequence[int],
        step: int,
    ) -> list[WrittenAnswer]:
        """The answers to the prompts at some places of a batch: all to the first of them, and so on."""
        options = self._options
        job_seed = self.setup.job.train.seed
        asked = []
        for place in places:
            row = self._row(batch, place)
            room = self._room(row)
            prompt = tuple(row.prompt.ids)
            for sample in range(options.samples):
                seed = draw_seed(job_seed, step, place, sample)
                asked.append(AskedAnswer(prompt, room, seed))
        ends = self.setup.reading.ends
        return writer.write(asked, ends, options.temperature)

    def _judged(
        self,
        batch: GlobalBatch,
        places: Sequence[int],
        answers: Sequence[WrittenAnswer],
    ) -> list[JudgedGroup]:
        """The groups of answers at some places of a batch, with what each answer is worth."""
        samples = self._options.samples
        groups = []
        for number, place in enumerate(places):
            self.setup.progress(number)
            row = self._row(batch, place)
            first = number * samples
            stop = first + samples
            of_prompt = list(answers[first:stop])
            rewards = self._rewards(row, of_prompt)
            group = JudgedGroup(
                place,
                row.prompt.ids,
                of_prompt,
                rewards,
            )
            groups.append(group)
        return groups

    def _rewards(self, row: PromptRow, answers: Sequence[WrittenAnswer]) -> list[float]:
        """What each answer to a prompt is worth."""
        tokenizer = self.setup.tokenizer
        ends = self.setup.reading.ends
        prompt = row.prompt
        asked = tokenizer.decode(prompt.ids, skip_special_tokens=True)
        samples = []
        for answer in answers:
            ids = until_end(answer.ids, ends)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            sample = RewardSample(asked, text, prompt.answer, row.record)
            samples.append(sample)
        assert self._reward is not None
        return self._reward.judge(samples)

    def _row(self, batch: GlobalBatch, place: int) -> PromptRow:
        """What is asked at a place of a batch."""
        examples = batch.examples
        tokens = examples.tokens
        example = batch.chosen[place]
        document = examples.starts[example]
        number = int(tokens.rows[document])
        rows = self._rows[tokens]
        return rows[number]

    def _room(self, row: PromptRow) -> int:
        """How many tokens the answer to a row's prompt may have; one place is the engine's, when it scores."""
        prompt = len(row.prompt.ids)
        limit = self.setup.reading.max_tokens
        left = limit - prompt - 1
        return min(self._options.new_tokens, left)


def draw_seed(job_seed: int, step: int, place: int, sample: int) -> int:
    """What all draws of an answer come from: a function of job, step, prompt and sample, of no rank and no order."""
    counter = (job_seed, step, place, sample)
    sequence = np.random.SeedSequence(counter)
    (state,) = sequence.generate_state(1)
    return int(state)
