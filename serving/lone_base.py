"""A base without adapters that is asked in this process, and loaded where something has no answer yet."""

from pathlib import Path
from typing import Any

from serving.asking import AnswersProgress, Asking, Assignment
from serving.base import FrozenBase
from serving.evaluate import base_key, versions_of
from serving.kept import AnswersFile
from serving.loading import loaded
from serving.question import Question
from serving.sizes import sizes_for
from serving.starting import base_dtype, engine_with


class LoneBase:
    """Answers questions with one engine after another, each as large as its questions need."""

    def __init__(self, place: str, revision: str | None, digest: str, tokenizer: Any) -> None:
        """`place` is a folder or hub id, `digest` that of its files."""
        self._place = place
        self._revision = revision or "main"
        self._tokenizer = tokenizer
        self._head = versions_of(digest)
        self._model: Any = None

    def file(self, kept: Path, task: str) -> AnswersFile:
        """The file of the answers to a task below a folder, by what decides on them."""
        folder = kept / base_key(self._head) / task
        file = AnswersFile(folder / "base.jsonl")
        head = {**self._head, "task": task}
        file.begin(head)
        return file

    def ask(self, questions: list[Question], file: AnswersFile, progress: AnswersProgress) -> None:
        """Ask questions, and write each answer into a file soon after it is there."""
        if self._model is None:
            dtype = base_dtype()
            self._model = loaded(self._place, dtype, self._revision)
        sizes = sizes_for(self._model.config, questions, adapters=0)
        base = FrozenBase(self._model)
        engine = engine_with(base, {}, sizes)
        asking = Asking(engine, self._decode, progress)
        assignments = [Assignment(question, None, file) for question in questions]
        asking.ask(assignments)

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return str(text)
