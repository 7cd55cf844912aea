"""The base of a stage that writes, which is asked for one column after another."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.evaluation.questions import Preparation
from orchestrator.evaluation.request import base_tokenizer
from orchestrator.evaluation.task import TaskSpec
from orchestrator.generation.written import WrittenRow, cut_at, id_of_row, prompt_of
from orchestrator.planning.model import folder_of_base
from runfolder.draws import Principle, seed_of_row
from runfolder.generation_job import AnswerColumn, GenerationJob, JudgedColumns
from serving.kept import AnswersFile, KeptAnswer
from serving.question import Question

_DIGITS_OF_P = 3  # of a probability, so that rounding in another batch shows nowhere
_LARGEST_POWER = 700.0  # of e, that a float holds
Counted = Callable[[int], None]  # how many questions of a column are answered


class AskedBase:
    """A base that is loaded when something is asked that has no answer yet."""

    def __init__(self, job: GenerationJob, principles: list[Principle], base_digest: str | None) -> None:
        from serving.lone_base import LoneBase

        self.job = job
        self.principles = principles
        tokenizer, ends = base_tokenizer(job.base)
        self._preparation = Preparation(tokenizer, ends)
        base = job.base
        digest = base_digest or f"{base.model}@{base.revision}"
        folder = folder_of_base(base)
        place = str(folder or base.model)
        self._base = LoneBase(place, base.revision, digest, tokenizer)

    def file(self, kept: Path, name: str) -> AnswersFile:
        """The file of the answers from which a column is made."""
        stage = self.job.name
        task = f"{stage}.{name}"
        return self._base.file(kept, task)

    def write(
        self, name: str, column: AnswerColumn, rows: list[WrittenRow], file: AnswersFile, done: Counted
    ) -> None:
        """Give each row what the base writes in a column."""
        prompts = []
        for row in rows:
            prompt = self._prompt(column.prompt, row, column.round)
            prompts.append(prompt)
        task = self._task(max_new_tokens=column.max_new_tokens, stop=column.stop)
        questions = []
        greedy = self._preparation.answers_to(task, prompts)
        for row, question in zip(rows, greedy, strict=True):
            row_id = id_of_row(row)
            seed = seed_of_row(row_id, self.job.generate.seed, name)
            drawn = _with_draw(question, column.temperature, seed)
            questions.append(drawn)
        answers = self._answers(questions, file, done)
        for row, answer in zip(rows, answers, strict=True):
            text = answer.text or ""
            row[name] = cut_at(text, column.stop)

    def judge(
        self,
        column: JudgedColumns,
        rows: list[WrittenRow],
        file: AnswersFile,
        done: Counted,
    ) -> None:
        """Give each row the better and the worse one of two columns, and how likely the first is that."""
        prompts = []
        for row in rows:
            first = row[column.first]
            second = row[column.second]
            in_order = {**row, "first": first, "second": second}
            swapped_row = {**row, "first": second, "second": first}
            for either in (in_order, swapped_row):
                prompt = self._prompt(column.judge, either, column.round)
                prompts.append(prompt)
        task = self._task()
        questions = self._preparation.choices_after(task, prompts, column.answers)
        answers = self._answers(questions, file, done)
        of_first = answers[0::2]
        of_second = answers[1::2]
        for row, straight, swapped in zip(rows, of_first, of_second, strict=True):
            likely = _likely_first(straight)
            likely += 1 - _likely_first(swapped)
            p_first = round(likely / 2, _DIGITS_OF_P)
            better, worse = column.first, column.second
            if p_first < 1 / 2:
                better, worse = worse, better
            chosen = row[better]
            rejected = row[worse]
            row |= {"chosen": chosen, "rejected": rejected, "p_first": p_first}

    def _prompt(self, template: str, row: WrittenRow, round_number: int) -> str:
        principles = self.principles
        seed = self.job.generate.seed
        return prompt_of(template, row, principles, seed, round_number)

    def _task(self, **how: Any) -> TaskSpec:
        """How prompts are asked, as tasks say it."""
        generate = self.job.generate
        return TaskSpec(
            name="generate",
            kind="exact_match",
            data=generate.rows,
            chat=generate.chat,
            date=generate.date,
            **how,
        )

    def _answers(
        self,
        questions: Sequence[Question],
        file: AnswersFile,
        done: Counted,
    ) -> list[KeptAnswer]:
        """The answers to questions, of which those are asked that have none."""
        missing: dict[str, Question] = {}
        for question in questions:
            if question.key not in file.answers:
                missing[question.key] = question
        before = len(questions) - len(missing)
        if missing:
            asked = list(missing.values())
            self._base.ask(asked, file, lambda answered: done(before + answered))
        answers = []
        for question in questions:
            answer = file.answers[question.key]
            answers.append(answer)
        return answers


def _with_draw(question: Question, temperature: float, seed: int) -> Question:
    """A question whose answer is drawn, where that is wanted."""
    if temperature == 0:
        return question
    return replace(question, temperature=temperature, seed=seed)


def _likely_first(answer: KeptAnswer) -> float:
    """How likely the first of two texts is, of both."""
    first, second = answer.log_likelihoods
    difference = min(second - first, _LARGEST_POWER)
    odds = math.exp(difference)
    return 1 / (1 + odds)
