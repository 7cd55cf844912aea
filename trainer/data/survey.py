"""What of a source is trained on, counted: for `rows`, `plan` and `submit` before a run, for its record after."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from runfolder.job import Job
from trainer.data.counts import WHY_LEFT_OUT, Noticed
from trainer.data.files import RowError

if TYPE_CHECKING:
    from trainer.data.encode import Reading
    from trainer.data.tokens import Tokens

SAMPLED = 128  # examples
Sample = tuple[tuple[int, int], ...]  # tokens and labels of examples


@dataclass(frozen=True)
class Survey:
    """Rows of a source, and the examples that they make.

    Lengths are in tokens, after cutting; `longest` is before. `noticed` has, by kind, how often something was seen,
    and the first row where it was; `unused` has the same for each column that is no part of the examples.
    `largest_id` is the largest token id, with its token and the first row that has it. `sample` has the tokens and
    the labels of examples that stand for all, the longest among them.
    """

    rows: int
    examples: int
    tokens: int
    learned: int
    shortest: int
    median: int
    longest: int
    duplicates: int
    largest_id: tuple[int, str, int]
    noticed: Noticed
    unused: Noticed
    sample: Sample

    def dump(self) -> dict[str, Any]:
        """The survey as plain data, for JSON."""
        return asdict(self)

    @classmethod
    def load(cls, plain: dict[str, Any]) -> "Survey":
        """What `dump` gave, perhaps as JSON has it."""
        largest_id = tuple(plain["largest_id"])
        noticed = _as_tuples(plain["noticed"])
        unused = _as_tuples(plain["unused"])
        pairs = plain["sample"]
        sample = tuple((tokens, labels) for tokens, labels in pairs)
        fields = {**plain, "largest_id": largest_id, "noticed": noticed, "unused": unused, "sample": sample}
        return cls(**fields)

    def number(self, kind: str) -> int:
        """How often something was noticed."""
        if kind not in self.noticed:
            return 0
        count, _ = self.noticed[kind]
        return count

    def row(self, kind: str) -> int:
        """The first row in which something was noticed."""
        _, row = self.noticed[kind]
        return row


def _as_tuples(plain: Mapping[str, Any]) -> Noticed:
    """Pairs as they were before JSON made lists of them."""
    pairs = {}
    for kind, pair in plain.items():
        count, row = pair
        pairs[kind] = (count, row)
    return pairs


def survey(tokens: "Tokens", tokenizer: Any, reading: "Reading") -> Survey:
    """The survey of tokenised data, as they were read: what is in it, counted."""
    counts = tokens.counts
    lengths = tokens.lengths
    largest, row = tokens.largest()
    token = str(tokenizer.convert_ids_to_tokens(largest))
    return Survey(
        rows=counts.rows,
        examples=counts.examples,
        tokens=int(lengths.sum()),
        learned=int(tokens.targets.sum()),
        shortest=int(lengths.min()),
        median=int(median(lengths.tolist())),
        longest=counts.longest,
        duplicates=tokens.duplicates(reading.documents, reading.learned_documents),
        largest_id=(largest, token, row),
        noticed=counts.of_examples(),
        unused=counts.unused(),
        sample=lengths_sample(tokens),
    )


def lengths_sample(tokens: "Tokens") -> Sample:
    """The tokens and labels of examples at even distances in the order of their lengths, from the longest on."""
    lengths = tokens.lengths.tolist()
    targets = tokens.targets.tolist()
    pairs = list(zip(lengths, targets, strict=True))
    pairs.sort(reverse=True)
    last = len(pairs) - 1
    places = set()
    for number in range(SAMPLED):
        place = number * last // (SAMPLED - 1)
        places.add(place)
    sample = []
    for place in sorted(places):
        sample.append(pairs[place])
    return tuple(sample)


def summary_line(summary: Mapping[str, Any]) -> str:
    """What a trainer counted of its rows (see Counts.summary), in one line."""
    names = {"truncated": "cut", "dropped": "left out", "longest": "tokens in the longest", "split": "chats split up"}
    parts = []
    for key, value in summary.items():
        if isinstance(value, int):
            name = names.get(key, key)
            parts.append(f"{value:,} {name}")
    if summary.get("unused"):
        unused = summary["unused"]
        columns = ", ".join(unused)
        parts.append(f"columns not used: {columns}")
    return ", ".join(parts)


def unknown_id(found: Survey, embeddings: int | None) -> str | None:
    """What is wrong with the largest id where the base has too few embeddings for it."""
    id_, token, row = found.largest_id
    if embeddings is None or id_ < embeddings:
        return None
    return _beyond(id_, token, row, embeddings)


def check_ids(tokens: "Tokens", tokenizer: Any, embeddings: int, source: str) -> None:
    """Raise RowError where a base has too few embeddings for the tokens of a source."""
    id_, row = tokens.largest()
    if id_ >= embeddings:
        token = str(tokenizer.convert_ids_to_tokens(id_))
        problem = _beyond(id_, token, row, embeddings)
        raise RowError(f"{source}, {problem}")


def _beyond(id_: int, token: str, row: int, embeddings: int) -> str:
    return (
        f"row {row}: the token {token!r} has the id {id_}, and the base has {embeddings} embeddings; "
        "base.resize_embeddings: true adds what is missing, and trains it"
    )


def _left_out(found: Survey) -> Iterator[str]:
    """Of how many pairs nothing can be learned, and why."""
    for kind, reason in WHY_LEFT_OUT.items():
        count = found.number(kind)
        if count:
            first = found.row(kind)
            yield f"{count} pairs (first: row {first}) {reason}: left out"


def row_warnings(found: Survey, job: Job) -> Iterator[str]:
    """What a user should know of a job's rows, a line each."""
    seq_len = job.data.seq_len
    if found.unused and job.objective.reward_file is None:  # a reward sees all columns
        columns = []
        for name, seen in found.unused.items():
            count, _ = seen
            columns.append(f"{name!r} (in {count} of {found.rows} rows)")
        yield f"not used are the columns {', '.join(columns)}; data.columns says what is read"
    if found.number("unanswered"):
        yield (
            f"the turns behind the last answer of {found.number('unanswered')} chats (first: row "
            f"{found.row('unanswered')}) are left out, as nothing of them is learned"
        )
    if found.number("empty"):
        yield f"{found.number('empty')} examples (first: row {found.row('empty')}) have nothing to learn: left out"
    yield from _left_out(found)
    cut = found.number("truncated")
    lost = found.number("dropped")
    if cut or lost:
        yield (
            f"of {found.examples} examples, {cut} are cut and {lost} left out, as they are longer than data.seq_len "
            f"{seq_len} (the longest has {found.longest} tokens)"
        )
    if found.number("split"):
        yield (
            f"the chat template rewrites earlier turns: {found.number('split')} chats with several answers became an "
            f"example for each answer (first: row {found.row('split')}), {found.examples} in all"
        )
    if found.number("straddles"):
        yield (
            f"in {found.number('straddles')} examples (first: row {found.row('straddles')}) prompt and answer share "
            "tokens, so that the model learns from other tokens than it is asked with later: best end prompts "
            "without a space, and begin answers with it"
        )
    if found.number("control"):
        yield (
            f"{found.number('control')} examples (first: row {found.row('control')}) have names of control tokens in "
            "their text, which are read as text; data.parse_special: true takes them as control tokens"
        )
