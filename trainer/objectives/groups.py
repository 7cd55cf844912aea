"""GRPO and RLOO: learning from several answers of the model's own to each prompt, by what each of them is worth.

The answers are written by the model's own engine (group_writer.py), are worth what a reward says (rewards.py), are
recorded before the update, and become examples of their own, each with its advantage (advantages.py) and its tokens'
losses (group_loss.py).

Shapes: D documents, each a prompt with one answer; N labels; P prompts, G answers to each.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from runfolder.files import Record
from runfolder.group_objectives import GroupOptions, GrpoOptions
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.files import RowError, records
from trainer.data.layout import MicroBatch
from trainer.data.tokens import EvaluationPrompt, Tokens, read_prompts, tokenise
from trainer.group_writer import GroupWriter
from trainer.objectives.advantages import RewardArray, advantages_over_others, are_equal, group_advantages
from trainer.objectives.base import Arrays, HostArrays, Objective, ObjectiveSetup, Shares, TensorsByName, Totals
from trainer.objectives.group_answers import GroupAnswers, PromptRow, RowsByNumber, room_left
from trainer.objectives.group_loss import group_figures, label_weights, token_costs
from trainer.objectives.group_tokens import (
    DRAWS,
    WrittenTokens,
    dead_answers,
    in_documents,
    of_reward,
    policy_of_all,
    recorded_groups,
)
from trainer.objectives.labels import label_arrays
from trainer.objectives.likelihood import label_losses
from trainer.reward_model import judge_of, shares_base
from trainer.rewards import rewards_of


class StepRefused(ValueError):
    """Trainer and engine differ so much on a step's answers that they teach something else than they should."""


class GroupPolicy(Objective):
    """To write what is worth more than the other answers to the same prompt."""

    generates = True

    def __init__(self, setup: ObjectiveSetup) -> None:
        super().__init__(setup)
        options = setup.job.objective
        assert isinstance(options, GroupOptions)
        self._options = options
        self._rows: WeakKeyDictionary[Tokens, RowsByNumber] = WeakKeyDictionary()
        self._answers: GroupAnswers | None = None

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
            if room_left(setup, row) < 1:
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
        if self._answers is None:
            self._answers = self._created(model)
        digest = self._answers.writer.load()
        world_size = dist.get_world_size()
        places = range(dist.get_rank(), len(batch.chosen), world_size)
        own = self._answers.to_places(batch, places, step)
        dealt = [own] * world_size
        if world_size > 1:
            dist.all_gather_object(dealt, own)
        groups = list(chain.from_iterable(dealt))
        groups.sort(key=attrgetter("place"))
        rollout = recorded_groups(groups, self.setup.reading.ends)
        letters = digest.encode()
        rollout["adapter"] = np.frombuffer(letters, np.uint8)
        return rollout

    def complete_rollout(
        self,
        model: nn.Module,
        rollout: Arrays,
        passes: Iterable[TensorsByName],
    ) -> None:
        """Add what the policy before several updates gives each token, and that before the first step, if asked."""
        options = self._options
        is_held = isinstance(options, GrpoOptions) and options.beta > 0
        if options.updates == 1 and not is_held:
            return
        batches = list(passes)
        policy = partial(self._policy, model)
        if options.updates > 1:
            rollout["policy"] = policy_of_all(rollout, batches, policy)
        if is_held:
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
        if self._options.redraws:
            of_answers[DRAWS] = rollout[DRAWS]
        if len(self._options.weights) > 1:
            for reward in self._options.weights:
                name = of_reward(reward)
                of_answers[name] = rollout[name]
        tokens = WrittenTokens(rollout, of_answers, self.setup.reading.virtual)
        examples = Examples.of_each(tokens)
        every = np.arange(len(examples))
        return GlobalBatch(examples, every)

    def samples(self, rollout: Arrays) -> list[Record]:
        """The answers to the first prompt of a rollout, with what each is worth: in all, and by each reward."""
        tokenizer = self.setup.tokenizer
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        answers = in_documents(rollout["ids"], rollout["ends"])
        weights = self._options.weights
        shown = []
        for number in range(self._options.samples):
            ids = answers[number]
            prompt = rollout["prompts"][number]
            sample: Record = {
                "number": number,
                "prompt": decode(ids[:prompt]),
                "written": decode(ids[prompt:]),
                "reward": float(rollout["rewards"][number]),
                "cut": bool(rollout["cut"][number]),
            }
            if len(weights) > 1:
                sample["rewards"] = {name: float(rollout[of_reward(name)][number]) for name in weights}
            shown.append(sample)
        return shown

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

    def check_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raise StepRefused where engine and trainer are farther apart than the job allows."""
        bound = self._options.most_apart
        distance = metrics["engine_distance"]
        if bound is None or distance <= bound:
            return
        raise StepRefused(
            f"step {step}: trainer and engine are {distance:.2g} nats a token apart on its answers "
            f"(objective.most_apart allows {bound:g}), so it is not taken; train.precision: fp32 brings them nearer, "
            "and objective.most_apart: null takes such steps"
        )

    def _created(self, model: nn.Module) -> GroupAnswers:
        """What writes answers beside a model in training, and has them judged."""
        job = self.setup.job
        model_folder = self._options.reward_model
        if model_folder is None:
            writer = GroupWriter(model, self.method, job.data.seq_len)
            judge = None
        else:
            folder = Path(model_folder)
            is_adapter = shares_base(folder, job.base.model)
            on_base = folder if is_adapter else None
            writer = GroupWriter(model, self.method, job.data.seq_len, on_base)
            judge = judge_of(folder, is_adapter, writer.engine)
        rewards = rewards_of(self._options, judge)
        return GroupAnswers(self.setup, self._rows, writer, rewards)

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
