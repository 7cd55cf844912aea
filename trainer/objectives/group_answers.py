"""The answers to the prompts of a batch: written, judged, and for prompts without a signal once more to others.

All draws are functions of the job's seed, the step, the place in the batch and the number of the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from runfolder.group_objectives import GroupOptions
from trainer.data.examples import GlobalBatch
from trainer.data.tokens import EvaluationPrompt, Tokens
from trainer.end_tokens import until_end
from trainer.group_writer import AskedAnswer, GroupWriter, WrittenAnswer
from trainer.objectives.base import ObjectiveSetup
from trainer.objectives.group_tokens import JudgedGroup
from trainer.reward_journal import HELD_OUT, RewardJournal, answer_key
from trainer.rewards import RewardSample, WeightedRewards


@dataclass(frozen=True)
class PromptRow:
    """What is asked for a row, and the row as it stands."""

    prompt: EvaluationPrompt
    record: Mapping[str, Any]


@dataclass(frozen=True)
class PlacedRow:
    """A row at a place of a batch; `draw` counts from 1 the rows that came there in the place of others."""

    place: int
    row: PromptRow
    draw: int = 0


RowsByNumber = dict[int, PromptRow]
RowsOf = Mapping[Tokens, RowsByNumber]


class GroupAnswers:
    """Writes answers by an engine, and has them judged."""

    def __init__(
        self,
        setup: ObjectiveSetup,
        rows: RowsOf,
        writer: GroupWriter,
        rewards: WeightedRewards,
    ) -> None:
        options = setup.job.objective
        assert isinstance(options, GroupOptions)
        self.writer = writer
        self._setup = setup
        self._options = options
        self._rows = rows
        self._rewards = rewards

    def to_places(
        self,
        batch: GlobalBatch,
        places: Sequence[int],
        step: int,
    ) -> list[JudgedGroup]:
        """The groups of answers at some places of a batch, with what each answer is worth.

        Where all are worth the same, another prompt comes in the place of theirs, as often as the job says: the one
        that (seed, step, place, draw) chooses from all rows. Held-out prompts stay.
        """
        attempt = self._setup.attempt
        assert attempt is not None
        rank = dist.get_rank()
        journal = RewardJournal(attempt, step, rank)
        asked = []
        for place in places:
            example = batch.chosen[place]
            row = self._row(batch, example)
            placed = PlacedRow(place, row)
            asked.append(placed)
        groups = self._judged(asked, step, journal)
        redraws = 0
        if step != HELD_OUT:
            redraws = self._options.redraws
        for draw in range(1, redraws + 1):
            others = self._others(batch, groups, step, draw)
            rows = list(others.values())
            drawn = self._judged(rows, step, journal)
            for number, group in zip(others, drawn, strict=True):
                groups[number] = group
        return groups

    def _others(
        self,
        batch: GlobalBatch,
        groups: Sequence[JudgedGroup],
        step: int,
        draw: int,
    ) -> dict[int, PlacedRow]:
        """The rows that come in the place of groups without signal, by the number of the group."""
        others = {}
        for number, group in enumerate(groups):
            if group.is_dead:
                others[number] = self._other(
                    batch,
                    group.place,
                    step,
                    draw,
                )
        return others

    def _judged(
        self,
        asked: Sequence[PlacedRow],
        step: int,
        journal: RewardJournal,
    ) -> list[JudgedGroup]:
        """The groups of answers to some rows."""
        answers = self._written(asked, step)
        samples = self._options.samples
        groups = []
        for number, placed in enumerate(asked):
            self._setup.progress(number)
            first = number * samples
            stop = first + samples
            of_prompt = answers[first:stop]
            judged = self._samples(placed, of_prompt)
            rewards, by_name = self._rewards.judge(judged, journal)
            ids = placed.row.prompt.ids
            group = JudgedGroup(
                placed.place,
                ids,
                of_prompt,
                rewards,
                by_name,
                placed.draw,
            )
            groups.append(group)
        return groups

    def _written(
        self,
        asked: Sequence[PlacedRow],
        step: int,
    ) -> list[WrittenAnswer]:
        """The answers to some rows: all to the first of them, and so on."""
        options = self._options
        job_seed = self._setup.job.train.seed
        questions = []
        for placed in asked:
            room = room_left(self._setup, placed.row)
            prompt = tuple(placed.row.prompt.ids)
            for sample in range(options.samples):
                seed = draw_seed(
                    job_seed,
                    step,
                    placed.place,
                    sample,
                    placed.draw,
                )
                question = AskedAnswer(
                    prompt,
                    room,
                    seed,
                )
                questions.append(question)
        ends = self._setup.reading.ends
        return self.writer.write(
            questions,
            ends,
            options.temperature,
        )

    def _samples(
        self,
        placed: PlacedRow,
        answers: Sequence[WrittenAnswer],
    ) -> list[RewardSample]:
        """What is judged of the answers to a row."""
        tokenizer = self._setup.tokenizer
        ends = self._setup.reading.ends
        row = placed.row
        prompt = row.prompt
        asked = tokenizer.decode(prompt.ids, skip_special_tokens=True)
        samples = []
        for number, answer in enumerate(answers):
            ids = until_end(answer.ids, ends)
            as_array = np.array(ids, np.int64)  # of a list, each id is looked at before it is decoded
            text = tokenizer.decode(as_array, skip_special_tokens=True)
            key = answer_key(
                placed.place,
                number,
                prompt.ids,
                answer.ids,
            )
            whole = [*prompt.ids, *answer.ids]
            sample = RewardSample(
                asked,
                text,
                prompt.answer,
                row.record,
                key,
                whole,
            )
            samples.append(sample)
        return samples

    def _row(
        self,
        batch: GlobalBatch,
        example: int,
    ) -> PromptRow:
        """What is asked by an example of the source that a batch is of."""
        examples = batch.examples
        tokens = examples.tokens
        document = examples.starts[example]
        number = int(tokens.rows[document])
        rows = self._rows[tokens]
        return rows[number]

    def _other(
        self,
        batch: GlobalBatch,
        place: int,
        step: int,
        draw: int,
    ) -> PlacedRow:
        """The row that comes to a place in this draw."""
        job_seed = self._setup.job.train.seed
        behind_all = self._options.samples
        chosen = draw_seed(
            job_seed,
            step,
            place,
            behind_all,
            draw,
        )
        example = chosen % len(batch.examples)
        row = self._row(batch, example)
        return PlacedRow(
            place,
            row,
            draw,
        )


def room_left(setup: ObjectiveSetup, row: PromptRow) -> int:
    """How many tokens the answer to a row's prompt may have; one place is the engine's, when it scores."""
    options = setup.job.objective
    assert isinstance(options, GroupOptions)
    prompt = len(row.prompt.ids)
    left = setup.reading.max_tokens - prompt - 1
    return min(options.new_tokens, left)


def draw_seed(
    job_seed: int,
    step: int,
    place: int,
    sample: int,
    draw: int = 0,
) -> int:
    """What all draws of an answer come from: a function of job, step, prompt and sample, of no rank and no order."""
    counter = [job_seed, step, place, sample]
    if draw:
        counter.append(draw)
    sequence = np.random.SeedSequence(counter)
    (state,) = sequence.generate_state(1)
    return int(state)
