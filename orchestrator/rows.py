"""Rows as the trainer sees them: examples as text and tokens, what is learned of them, and how they are packed."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError
from orchestrator.planning import base
from orchestrator.planning.freeze import Source, read
from orchestrator.planning.model import Model
from orchestrator.planning.preflight import few_steps
from orchestrator.planning.survey import Progress, missing, with_date
from runfolder.folders import cache
from runfolder.job import Job
from trainer.data.rows import Row
from trainer.data.rows import rows as read_rows
from trainer.data.survey import Survey, survey, unknown_id, warnings
from trainer.data.tokenizer import TokenizerError, end_ids, load_tokenizer

if TYPE_CHECKING:
    from trainer.data.encode import Encoded, Reading
    from trainer.data.tokens import Tokens

_EXAMPLES = 3  # of the first rows, unless one is asked for
_SEQUENCES = 3  # of the first step


@dataclass(frozen=True)
class Token:
    """A token of an example: its id, what it stands for, and whether the loss counts it."""

    id: int
    text: str
    learned: bool


@dataclass(frozen=True)
class Shown:
    """An example whole. `kept` tokens of it are trained on; `fate` says why not all are: truncated or dropped."""

    row: int
    tokens: list[Token]
    kept: int
    fate: str | None

    @property
    def parts(self) -> Iterator[tuple[str, bool, bool]]:
        """Its text in parts that are alike: the text, whether it is learned, whether it is trained on at all."""
        text, state = "", (False, True)
        for place, token in enumerate(self.tokens):
            now = (token.learned, place < self.kept)
            if now != state and text:
                yield text, *state
                text = ""
            text, state = text + token.text, now
        yield text, *state


@dataclass(frozen=True)
class Sequence:
    """What is packed together: of each example its row, first token and the one behind its last; and the padding."""

    examples: list[tuple[int, int, int]]
    padding: int


@dataclass(frozen=True)
class Look:
    """A data source of a job, as its trainer sees it."""

    source: str
    survey: Survey
    warnings: list[str]
    examples: list[Shown]
    sequences: list[Sequence]

    def dump(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def rows(
    source: Source,
    *,
    overrides: Iterable[str] = (),
    row: int | None = None,
    evaluation: bool = False,
    progress: Progress = lambda _source, _rows: None,
) -> Look:
    """Look at a job's training rows, or at its evaluation rows; with `row` at this one, by its number from 1.

    The base's tokenizer is fetched from the hub where it is not here. Raises InputError.
    """
    job, _ = read(source, overrides)
    if absent := missing():
        raise InputError(f"rows: needs {', '.join(absent)}; allowed: pip install 'fleetune[data]'")
    data = job.data.eval if evaluation else job.data.train
    if data is None:
        raise InputError("data.eval: missing; the job names no evaluation rows")
    try:
        return _look(with_date(job), data, base.find_model(job), row, progress)
    except TokenizerError as error:
        raise InputError(str(error)) from error
    except InputError:
        raise
    except ValueError as error:  # a RowError, or a cache that cannot be written
        raise InputError(f"data.{'eval' if evaluation else 'train'}: {error}") from error


def _look(job: Job, source: str, model: Model, row: int | None, progress: Progress) -> Look:
    from trainer.data.encode import Encoder, Reading
    from trainer.data.tokens import tokenise

    tokenizer = load_tokenizer(job.base, model.folder)
    reading = Reading.of(job, end_ids(tokenizer, job.base, model.folder))
    examples = []
    for number, encoded in Encoder(source, tokenizer, reading).examples(_chosen(job, source, row)):
        examples += [_shown(example, number.number, tokenizer, reading) for example in encoded]
    tokens = tokenise(source, tokenizer, reading, cache(), lambda done: progress(source, done))
    found = survey(tokens, tokenizer)
    said = [*filter(None, [unknown_id(found, model.embeddings)]), *warnings(found, job.data.seq_len)]
    if source != job.data.train:  # what is evaluated on is in no step
        return Look(source, found, said, examples, [])
    said += few_steps(job, found.tokens)
    return Look(source, found, said, examples, _sequences(job, tokens))


def _chosen(job: Job, source: str, number: int | None) -> list[Row]:
    """The row of this number, or the first ones."""
    stream = read_rows(source, job.data.columns)
    if number is None:
        return list(islice(stream, _EXAMPLES))
    chosen = [found for found in stream if found.number == number]
    if not chosen:
        raise InputError(f"--row: found {number}; allowed: the number of a row, from 1 (in .jsonl: its line)")
    return chosen


def _shown(example: "Encoded", row: int, tokenizer: Any, reading: "Reading") -> Shown:
    from trainer.data.tokens import fate_of

    room = reading.seq_len - reading.virtual
    fate = fate_of(example, room, reading.too_long == "drop")
    ids = example.ids.tolist()
    texts = _texts(ids, tokenizer)
    tokens = [Token(*parts) for parts in zip(ids, texts, example.target.tolist(), strict=True)]
    return Shown(row, tokens, 0 if fate == "dropped" else min(room, len(ids)), fate)


def _texts(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with the last of them."""

    def decoded(start: int, stop: int) -> str:
        return str(tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts = []
    shown = last = 0  # tokens before `shown` are shown; decoding begins one text earlier, which may carry its space
    for stop in range(1, len(ids) + 1):
        before, text = decoded(last, shown), decoded(last, stop)
        if text.endswith("\ufffd") and stop < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        last, shown = shown, stop
    return texts


def _sequences(job: Job, tokens: "Tokens") -> list[Sequence]:
    """The first sequences of the first step that differ, as one worker would be given them."""
    from trainer.data.batches import Batches
    from trainer.data.examples import Examples

    micro_batches = Batches.of(job, Examples.of_each(tokens)).deal(0, 0, 1)
    different = dict.fromkeys(tuple(row) for micro in micro_batches for row in micro.rows)
    return [_sequence(job, tokens, row) for row in islice(different, _SEQUENCES)]


def _sequence(job: Job, tokens: "Tokens", documents: tuple[int, ...]) -> Sequence:
    places, stop = [], 0
    for document in documents:
        start, stop = stop, stop + int(tokens.lengths[document])
        places.append((int(tokens.rows[document]), start, stop))
    return Sequence(places, job.data.seq_len - stop if job.data.packing else 0)
