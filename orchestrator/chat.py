"""The verb `chat`: a prompt, and what the base and adapters answer, each in a conversation of its own."""

import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

from orchestrator.child import asked_child
from orchestrator.errors import InputError, JobFailed
from orchestrator.evaluation.adapters import AdapterSource, resolve_adapters
from orchestrator.evaluation.evaluate import TRAIN, base_named, require_packages
from orchestrator.evaluation.report import UNTUNED
from orchestrator.evaluation.request import base_tokenizer
from orchestrator.planning.model import folder_of_base
from trainer.data.chats import Message
from trainer.data.encode import Encoder, Reading
from trainer.data.rows import Row

ANSWERER = [sys.executable, "-P", "-m", "serving.chat"]
_SOURCE = "the prompt"  # what errors name
_LONGEST_ROW = 1 << 30  # tokens


@dataclass(frozen=True)
class ChatSettings:
    """How answers are written: at most how long, and drawn or (at temperature 0) the likeliest token each time."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    plain: bool = False  # the prompt as it is, without the base's chat template


@dataclass(frozen=True)
class ChatAnswer:
    """What one of those that were asked has written."""

    label: str
    text: str
    tokens: int


class Conversations:
    """What was said so far, to each of those that are asked; without a chat template every prompt stands alone."""

    def __init__(
        self, process: "EngineProcess", tokenizer: Any, ends: tuple[int, ...], settings: ChatSettings
    ) -> None:
        self._process = process
        self._settings = settings
        self._ends = ends
        reading = Reading(_LONGEST_ROW, ends=ends, date=datetime.date.today())
        self._encoder = Encoder(_SOURCE, tokenizer, reading)
        self._has_turns = bool(tokenizer.chat_template) and not settings.plain
        self._messages: dict[str, list[Message]] = {}
        self.begin_anew()

    @property
    def labels(self) -> list[str]:
        """Those that are asked, the base first."""
        return self._process.labels

    def begin_anew(self) -> None:
        """Forget what was said."""
        for label in self.labels:
            self._messages[label] = []

    def ask(self, prompt: str) -> list[ChatAnswer]:
        """What each of them answers to a prompt; raises InputError where it cannot be asked."""
        rows = []
        for label in self.labels:
            row = self._row(label, prompt)
            rows.append(row)
        try:
            all_ids = self._encoder.prompts(rows)
        except ValueError as error:  # a RowError
            raise InputError(str(error)) from error
        turn = {
            "prompts": self._process.addressed(all_ids),
            "stop": self._ends,
            "new_tokens": self._settings.max_new_tokens,
            "temperature": self._settings.temperature,
            "seed": self._settings.seed,
        }
        answers: list[ChatAnswer] = []
        for label, answer in zip(self.labels, self._process.answer(turn), strict=True):
            text = answer["text"]
            text = text.strip()
            tokens = answer["tokens"]
            chat_answer = ChatAnswer(label, text, tokens)
            answers.append(chat_answer)
            self._remember(label, prompt, text)
        return answers

    def _row(self, label: str, prompt: str) -> Row:
        """What is asked of one of them: the prompt behind what was said before."""
        if not self._has_turns:
            return Row(1, prompt, "")
        asked = {"role": "user", "content": prompt}
        awaited = {"role": "assistant", "content": "?"}  # what stands last is not sent
        turns = (*self._messages[label], asked, awaited)
        return Row(1, "", "", turns)

    def _remember(self, label: str, prompt: str, text: str) -> None:
        """Keep a turn, whose answer the next one goes on from; an empty one no template takes."""
        if self._has_turns and text:
            asked = {"role": "user", "content": prompt}
            answered = {"role": "assistant", "content": text}
            self._messages[label] += [asked, answered]


class EngineProcess:
    """A process with an engine that answers turns until its input ends."""

    def __init__(self, labels: list[str], stdin: IO[str], stdout: IO[str], stderr: IO[str]) -> None:
        self.labels = labels
        self._stdin = stdin
        self._stdout = stdout
        self._stderr = stderr

    def addressed(self, all_ids: Sequence[list[int]]) -> list[dict[str, Any]]:
        """The prompts of a turn, each with whom it is for."""
        prompts = []
        for number, ids in enumerate(all_ids):
            adapter = self.labels[number] if number else None
            prompts.append({"adapter": adapter, "ids": ids})
        return prompts

    def send(self, line: Any) -> None:
        """Tell the process something; where it has ended, its last line says so."""
        text = json.dumps(line)
        with suppress(BrokenPipeError):
            print(text, file=self._stdin, flush=True)

    def received(self) -> dict[str, Any]:
        """What the process says next; raises JobFailed where it has ended, with its last line."""
        line = self._stdout.readline()
        if line:
            said: dict[str, Any] = json.loads(line)
            return said
        self._stderr.seek(0)
        text = self._stderr.read()
        lines = text.splitlines()
        last = "it said nothing"
        if lines:
            last = lines[-1]
        raise JobFailed(f"the engine has ended: {last}")

    def answer(self, turn: dict[str, Any]) -> list[dict[str, Any]]:
        """What a turn's prompts are answered with; raises InputError where they never can be."""
        self.send(turn)
        said = self.received()
        if "refused" in said:
            raise InputError(f"{_SOURCE}: {said['refused']}")
        answers: list[dict[str, Any]] = said["answers"]
        return answers


@contextmanager
def chat(
    adapters: Sequence[str],
    *,
    base: str | None = None,
    settings: ChatSettings | None = None,
    cluster: str | None = None,
) -> Iterator[Conversations]:
    """Conversations with a base and adapters (runs and folders, as `evaluate` takes them), while the block lasts.

    Raises InputError with a line for each error.
    """
    sources = resolve_adapters(adapters, cluster)
    require_packages(TRAIN)
    place = base_named(base, sources)
    tokenizer, ends = base_tokenizer(place)
    folder = str(folder_of_base(place) or place.model)
    named = _named_folders(sources)
    request = {"base": folder, "revision": place.revision, "adapters": named}
    labels = [UNTUNED, *(source.label for source in sources)]
    with _engine_process(labels, request) as process:
        yield Conversations(process, tokenizer, ends, settings or ChatSettings())


def _named_folders(sources: Sequence[AdapterSource]) -> list[dict[str, str]]:
    """Where adapters lie, by their names."""
    folders = []
    for source in sources:
        folder = str(source.folder)
        named = {"name": source.label, "folder": folder}
        folders.append(named)
    return folders


@contextmanager
def _engine_process(labels: list[str], request: dict[str, Any]) -> Iterator[EngineProcess]:
    """A process that is ready to answer; raises InputError with a line for each thing that is wrong."""
    with asked_child(ANSWERER) as child:
        process = EngineProcess(labels, child.questions, child.answers, child.errors)
        process.send(request)
        said = process.received()
        if "problem" in said:
            rest = map(json.loads, child.answers)
            problems = [said["problem"], *(more["problem"] for more in rest)]
            raise InputError("\n".join(problems))
        yield process
