"""Rows as the trainer sees them: examples as text and tokens, what is learned of them, and how they are packed."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.errors import InputError
from orchestrator.planning import base
from orchestrator.planning.freeze import JobSource, read_job
from orchestrator.planning.model import Model
from orchestrator.planning.preflight import few_steps
from orchestrator.planning.survey import SourceProgress, missing_packages, with_date
from runfolder.folders import cache
from runfolder.job import Job
from trainer.data.preferences import PREFERENCES, Preference
from trainer.data.rows import Row, read_rows
from trainer.data.survey import Survey, row_warnings, survey, unknown_id
from trainer.data.tokenizer import TokenizerError, end_ids, load_tokenizer

if TYPE_CHECKING:
    from trainer.data.encode import Encoded, Encoder, Reading
    from trainer.data.tokens import Tokens

RowOrPreference = TypeVar("RowOrPreference", Row, Preference)
_EXAMPLES = 3  # of the first rows, unless one is asked for
_SEQUENCES = 3  # of the first step
_OWN_ANSWER = "a prompt with the answer of the data, which rewards see"


@dataclass(frozen=True)
class ShownToken:
    """A token of an example: its id, what it stands for, and whether the loss counts it."""

    id: int
    text: str
    learned: bool


@dataclass(frozen=True)
class ShownExample:
    """An example whole, of whose first `kept` tokens all are trained on but those of [cut_from, cut_to).

    `fate` says why not all are: truncated, dropped, or of a pair that teaches nothing, why (as Preference has it).
    `answer` says which one of a preference it is, as Preference.titles has them.
    """

    row: int
    tokens: list[ShownToken]
    kept: int
    fate: str | None
    cut_from: int = 0
    cut_to: int = 0
    answer: str | None = None

    def keeps(self, index: int) -> bool:
        """Whether the token at this place is trained on."""
        if index >= self.kept:
            return False
        is_cut = self.cut_from <= index < self.cut_to
        return not is_cut

    @property
    def parts(self) -> Iterator[tuple[str, bool, bool]]:
        """Its text in parts that are alike: the text, whether it is learned, whether it is trained on at all."""
        text = ""
        state = (False, True)
        for index, token in enumerate(self.tokens):
            kept = self.keeps(index)
            token_state = (token.learned, kept)
            if token_state != state and text:
                yield text, *state
                text = ""
            text += token.text
            state = token_state
        yield text, *state


@dataclass(frozen=True)
class PackedSequence:
    """What is packed together: of each example its row, first token and the one behind its last; and the padding."""

    examples: list[tuple[int, int, int]]
    padding: int


@dataclass(frozen=True)
class RowsView:
    """A data source of a job, as its trainer sees it."""

    source: str
    survey: Survey
    warnings: list[str]
    examples: list[ShownExample]
    sequences: list[PackedSequence]

    def dump(self) -> dict[str, Any]:
        """The view as plain data, for JSON."""
        return asdict(self)


def rows(
    source: JobSource,
    *,
    overrides: Iterable[str] = (),
    row: int | None = None,
    evaluation: bool = False,
    progress: SourceProgress = lambda _source, _rows: None,
) -> RowsView:
    """Look at a job's training rows, or at its evaluation rows; with `row` at this one, by its number from 1.

    The base's tokenizer is fetched from the hub where it is not here. Raises InputError.
    """
    job, _ = read_job(source, overrides)
    missing = missing_packages()
    if missing:
        packages = ", ".join(missing)
        raise InputError(f"rows: needs {packages}; allowed: pip install 'fleetune[data]'")
    key = "train"
    data: str | None = job.data.train
    if evaluation:
        key = "eval"
        data = job.data.eval
    if data is None:
        raise InputError("data.eval: missing; the job names no evaluation rows")
    try:
        return _look_at(with_date(job), data, base.find_model(job), row, progress)
    except TokenizerError as error:
        raise InputError(str(error)) from error
    except InputError:
        raise
    except ValueError as error:  # a RowError, or a cache that cannot be written
        raise InputError(f"data.{key}: {error}") from error


def _look_at(job: Job, source: str, model: Model, row_number: int | None, progress: SourceProgress) -> RowsView:
    """Look at one data source of a job, whose date is fixed, with the tokenizer of its base."""
    from trainer.data.encode import Encoder, Reading
    from trainer.data.tokens import tokenise

    tokenizer = load_tokenizer(job.base, model.folder)
    ends = end_ids(tokenizer, job.base, model.folder)
    reading = Reading.of(job, ends)
    encoder = Encoder(source, tokenizer, reading)
    if reading.rows == "answers":
        stream = read_rows(source, job.data.columns)
        chosen = _chosen_rows(stream, row_number)
        shown = _shown_examples(chosen, encoder, tokenizer, reading)
        if job.objective.generates:
            shown = list(map(_as_asked, shown))
    else:
        read = PREFERENCES[reading.rows]
        preferences = read(source, job.data.columns)
        chosen_preferences = _chosen_rows(preferences, row_number)
        shown = _shown_answers(chosen_preferences, encoder, tokenizer, reading)
    report_done = partial(progress, source)
    tokens = tokenise(source, tokenizer, reading, cache(), report_done)
    counts = survey(tokens, tokenizer, reading)
    warnings = []
    unknown = unknown_id(counts, model.embeddings)
    if unknown:
        warnings.append(unknown)
    warnings += row_warnings(counts, job)
    sequences: list[PackedSequence] = []
    if source == job.data.train and not job.objective.generates:  # what is evaluated on, or only asked, is in no step
        warnings += few_steps(job, counts.tokens)
        sequences = _first_sequences(job, tokens, reading.documents)
    return RowsView(source, counts, warnings, shown, sequences)


def _chosen_rows(stream: Iterator[RowOrPreference], number: int | None) -> list[RowOrPreference]:
    """The row of this number, or the first ones."""
    if number is None:
        return list(islice(stream, _EXAMPLES))
    chosen = []
    for row in stream:
        if row.number == number:
            chosen.append(row)
    if not chosen:
        raise InputError(f"--row: found {number}; allowed: the number of a row, from 1 (in .jsonl: its line)")
    return chosen


def _shown_examples(rows: list[Row], encoder: "Encoder", tokenizer: Any, reading: "Reading") -> list[ShownExample]:
    """The examples of some rows with an answer."""
    from trainer.data.making import fate_of

    drops = reading.too_long == "drop"
    shown = []
    for row, examples in encoder.examples(rows):
        for example in examples:
            fate = fate_of(example, reading.max_tokens, drops)
            tokens = _shown_tokens(example, tokenizer)
            kept = min(reading.max_tokens, len(tokens))
            if fate == "dropped":
                kept = 0
            shown_example = ShownExample(row.number, tokens, kept, fate)
            shown.append(shown_example)
    return shown


def _as_asked(example: ShownExample) -> ShownExample:
    """An example whose prompt is asked: rewards may look at its own answer, and nobody learns it."""
    tokens = []
    for token in example.tokens:
        tokens.append(replace(token, learned=False))
    return replace(example, tokens=tokens, answer=_OWN_ANSWER)


def _shown_answers(
    preferences: list[Preference], encoder: "Encoder", tokenizer: Any, reading: "Reading"
) -> list[ShownExample]:
    """Both answers of some preferences, of which the prompt may have lost its beginning."""
    from trainer.data.answers import Fitting

    shown = []
    for preference in preferences:
        if not preference.answers:
            nothing = ShownExample(preference.number, [], 0, preference.left_out)
            shown.append(nothing)
            continue
        answers = []
        rows_of_both = list(preference.answers)
        for _, examples in encoder.examples(rows_of_both):
            answers += examples
        opening = encoder.opening(answers[0].ids)
        fitting = Fitting(answers, opening, reading)
        fate = preference.left_out or fitting.fate
        start, stop = fitting.cut_place
        for title, answer in zip(preference.titles, answers, strict=True):
            tokens = _shown_tokens(answer, tokenizer)
            capacity = reading.max_tokens + fitting.cut
            kept = min(capacity, len(tokens))
            if fate not in (None, "truncated"):
                kept = 0
            shown_answer = ShownExample(preference.number, tokens, kept, fate, start, stop, title)
            shown.append(shown_answer)
    return shown


def _shown_tokens(example: "Encoded", tokenizer: Any) -> list[ShownToken]:
    ids = example.ids.tolist()
    texts = _token_texts(ids, tokenizer)
    learned = example.target.tolist()
    tokens = []
    for token_id, text, is_learned in zip(ids, texts, learned, strict=True):
        token = ShownToken(token_id, text, is_learned)
        tokens.append(token)
    return tokens


def _token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with the last of them."""

    def decoded(start: int, stop: int) -> str:
        part = ids[start:stop]
        text = tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    texts = []
    shown = last = 0  # tokens before `shown` are shown; decoding begins one text earlier, which may carry its space
    for stop in range(1, len(ids) + 1):
        before = decoded(last, shown)
        text = decoded(last, stop)
        if text.endswith("\ufffd") and stop < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        last, shown = shown, stop
    return texts


def _first_sequences(job: Job, tokens: "Tokens", documents_of_each: int) -> list[PackedSequence]:
    """The first sequences of the first step that differ, as one worker would be given them."""
    from trainer.data.batches import Batches
    from trainer.data.examples import Examples

    batches = Batches.of(job, Examples.of_each(tokens, documents_of_each))
    different: dict[tuple[int, ...], None] = {}  # in the order of the step
    for micro_batch in batches.deal(0, 0, 1):
        for documents in micro_batch.rows:
            different[tuple(documents)] = None
    first = islice(different, _SEQUENCES)
    return [_packed_sequence(job, tokens, documents) for documents in first]


def _packed_sequence(job: Job, tokens: "Tokens", documents: tuple[int, ...]) -> PackedSequence:
    places = []
    stop = 0
    for document in documents:
        start = stop
        stop += int(tokens.lengths[document])
        row = int(tokens.rows[document])
        places.append((row, start, stop))
    padding = 0
    if job.data.packing:
        padding = job.data.seq_len - stop
    return PackedSequence(places, padding)
