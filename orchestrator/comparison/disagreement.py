"""Answers side by side, of the rows on which configurations disagree: some have them right, others wrong."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path

from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.group import SEED
from orchestrator.comparison.outcomes import ResultsByKey, RowKey, read_results
from orchestrator.comparison.ranking import Ranking
from orchestrator.comparison.row import ComparisonRow
from orchestrator.comparison.run import TrackedRun
from runfolder.news import UNREADABLE
from runfolder.row_results import RowResult
from trainer.data.row_digests import picked_rows, row_digest

_MOST_CONFIGURATIONS = 12
_MOST_DISPUTED = 40
_LONGEST_TEXT = 600  # characters of a row, and of an answer

_DISPUTED = (
    "<h2>Answers on which they disagree</h2>"
    '<p class="soft">{shown} of {disputed} held-out rows that some have right and others wrong, of {all} that all '
    "answered; {seeds}. Those first on which opinions are most divided.</p>"
    '<p class="picked" hidden>rows that <select data-is="right"><option value="">any</option>{options}</select> has '
    'right and <select data-is="wrong"><option value="">any</option>{options}</select> wrong</p>{rows}'
)
_CHOICE_OF_ROW = '<option value="{number}">{label}</option>'
_DISPUTED_ROW = (
    '<details class="disputed" data-right="{right}" data-wrong="{wrong}"><summary>row {number}: {count} of {of} right'
    '</summary>{text}<div class="opinions">{answers}</div></details>'
)
_ASKED = '<pre class="asked">{text}</pre>'
_OPINION = '<div class="opinion {style}"><h3>{mark} {labels}</h3><pre>{text}</pre></div>'

_LabelsByAnswer = dict[str, list[str]]  # those who gave each answer


@dataclass(frozen=True)
class Answerer:
    """A configuration with the answers of one of its runs, by row."""

    label: str
    run: TrackedRun
    results: ResultsByKey


def answers_side_by_side(comparison: Comparison) -> str:
    """The answers of the largest ranking as HTML; empty where no row is answered by two, or nobody disagrees."""
    answerers: list[Answerer] = []
    for ranking in comparison.rankings[:1]:
        answerers = _answerers(comparison, ranking)
    if len(answerers) < 2:
        return ""
    shared = _answered_by_all(answerers)
    disputed = [key for key in shared if 0 < _count_right(answerers, key) < len(answerers)]
    if not disputed:
        return ""
    half = len(answerers) / 2
    divided_first = sorted(disputed, key=lambda key: abs(_count_right(answerers, key) - half))
    chosen = divided_first[:_MOST_DISPUTED]
    texts = _texts(answerers[0], chosen)
    rows = ""
    for key in chosen:
        rows += _disputed_row(answerers, key, texts.get(key, ""))
    options = ""
    for number, answerer in enumerate(answerers):
        options += _CHOICE_OF_ROW.format(number=number, label=escape(answerer.label))
    counts = {"shown": len(chosen), "disputed": len(disputed), "all": len(shared)}
    return _DISPUTED.format(options=options, rows=rows, seeds=_seeds(answerers), **counts)


def _answerers(comparison: Comparison, ranking: Ranking) -> list[Answerer]:
    """The best of a ranking, and the reference, where a run of theirs has answers; that of the first seed."""
    rows = {row.label: row for row in comparison.rows}
    labels = [ranked.contender.label for ranked in ranking.ranked]
    reference = ranking.reference.label
    labels.remove(reference)
    shown = [reference, *labels][:_MOST_CONFIGURATIONS]
    answerers: list[Answerer] = []
    for label in shown:
        answerers += _with_answers(rows[label])
    return answerers


def _with_answers(row: ComparisonRow) -> list[Answerer]:
    """A configuration with the answers of its first seed; nothing where its run has none here."""
    first_seed, *_ = row.seeds
    for run in row.runs:
        if run.params.get(SEED, "?") == first_seed:
            answered = {key: result for key, result in read_results(run).items() if result.correct is not None}
            if answered:
                return [Answerer(row.label, run, answered)]
    return []


def _answered_by_all(answerers: Sequence[Answerer]) -> list[RowKey]:
    """The rows that all have answered, in the order of the file."""
    first, *others = answerers
    shared = list(first.results)
    for other in others:
        shared = [key for key in shared if key in other.results]
    return shared


def _count_right(answerers: Sequence[Answerer], key: RowKey) -> int:
    """How many have a row right."""
    count = 0
    for answerer in answerers:
        result = answerer.results[key]
        count += bool(result.correct)
    return count


def _seeds(answerers: Sequence[Answerer]) -> str:
    """Of which seed the answers are, in words."""
    seeds = {answerer.run.params.get(SEED, "?") for answerer in answerers}
    if len(seeds) == 1:
        return f"seed {seeds.pop()}"
    return "of each its first seed"


def _texts(answerer: Answerer, keys: Sequence[RowKey]) -> dict[RowKey, str]:
    """What rows say, where their file lies on this machine and is as it was."""
    key_of = {answerer.results[key].row: key for key in keys}
    source = answerer.run.params.get("data.eval", "")
    texts: dict[RowKey, str] = {}
    if not Path(source).is_absolute():
        return texts
    with suppress(*UNREADABLE):
        for number, record in picked_rows(source, key_of):
            key = key_of[number]
            if row_digest(record) == key[0]:
                texts[key] = _as_text(record)
    return texts


def _as_text(record: object) -> str:
    """A row for people: a line for each of its fields."""
    if not isinstance(record, dict):
        return str(record)
    lines = []
    for name, value in record.items():
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


def _disputed_row(answerers: Sequence[Answerer], key: RowKey, text: str) -> str:
    """A row that is folded: what it says, and each answer with those who gave it, the right ones first."""
    right: list[str] = []
    wrong: list[str] = []
    labels_right: _LabelsByAnswer = {}
    labels_wrong: _LabelsByAnswer = {}
    for number, answerer in enumerate(answerers):
        result = answerer.results[key]
        numbers, labels = wrong, labels_wrong
        if result.correct:
            numbers, labels = right, labels_right
        numbers.append(str(number))
        answer = _answer_text(result)
        alike = labels.setdefault(answer, [])
        alike.append(answerer.label)
    answers = _opinions(labels_right, "right", "✓")
    answers += _opinions(labels_wrong, "wrong", "✗")
    who = {"right": " ".join(right), "wrong": " ".join(wrong)}
    first = answerers[0].results[key]
    counts = {"number": first.row, "count": len(right), "of": len(answerers)}
    asked = _asked_text(text)
    return _DISPUTED_ROW.format(text=asked, answers=answers, **who, **counts)


def _opinions(labels_by_answer: _LabelsByAnswer, style: str, mark: str) -> str:
    """Answers that are all right, or all wrong, each with those who gave it."""
    opinions = ""
    for answer, labels in labels_by_answer.items():
        names = ", ".join(labels)
        fields = {"labels": escape(names), "text": escape(answer)}
        opinions += _OPINION.format(style=style, mark=mark, **fields)
    return opinions


def _asked_text(text: str) -> str:
    """What a row says, cut where it is long; nothing where that is not known."""
    if not text:
        return ""
    beginning = _beginning_of(text)
    return _ASKED.format(text=escape(beginning))


def _answer_text(result: RowResult) -> str:
    """What was written for a row, cut where it is long."""
    if not result.answer:
        return "(nothing)"
    return _beginning_of(result.answer)


def _beginning_of(text: str) -> str:
    """A text, of which a long one loses its end."""
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]} …"
