"""From rows to shards of tokens: what becomes of each example, and what is noticed about it."""

from trainer.data.counts import UNUSED, Counts
from trainer.data.encode import Encoded, Encoder, Reading
from trainer.data.rows import ColumnNames, Row
from trainer.data.shards import Shard, join_examples


def shard_of_rows(encoder: Encoder, chunk: list[Row], reading: Reading) -> Shard:
    """The examples of some rows, each cut to the tokens that it may have, and what was noticed about them."""
    counts = Counts(rows=len(chunk))
    max_tokens = reading.max_tokens
    drop = reading.too_long == "drop"
    kept = []
    numbers = []
    for row, examples in encoder.examples(chunk):
        _notice_row(counts, row)
        if len(examples) > 1:
            counts.notice("split", row.number)
        for example in examples:
            fate = fate_of(example, max_tokens, drop)
            _notice_example(counts, example, row.number, fate)
            if fate in ("dropped", "empty"):
                continue
            ids = example.ids[:max_tokens]
            target = example.target[:max_tokens]
            kept.append((ids, target))
            numbers.append(row.number)
    return join_examples(kept, numbers, counts)


def fate_of(example: Encoded, max_tokens: int, drop: bool) -> str | None:
    """What becomes of an example that is too long (truncated, or dropped), or has nothing to learn (empty).

    It is left out if that is asked for, or if no label remains.
    """
    if not example.target.any():
        return "empty"
    if len(example.ids) <= max_tokens:
        return None
    remaining = example.target[:max_tokens]
    if drop or not remaining.any():
        return "dropped"
    return "truncated"


def notice_columns(counts: Counts, unused: ColumnNames, row: int) -> None:
    """Count the columns of a row that nobody reads."""
    for column in unused:
        kind = UNUSED + column
        counts.notice(kind, row)


def _notice_row(counts: Counts, row: Row) -> None:
    notice_columns(counts, row.unused, row.number)
    if row.messages:
        counts.notice("chat", row.number)
        last = row.messages[-1]
        if last["role"] != "assistant":
            counts.notice("unanswered", row.number)


def _notice_example(counts: Counts, example: Encoded, row: int, fate: str | None) -> None:
    length = len(example.ids)
    counts.examples += 1
    counts.longest = max(counts.longest, length)
    if fate is not None:
        counts.notice(fate, row)
    notice_text(counts, example, row)


def notice_text(counts: Counts, example: Encoded, row: int) -> None:
    """Count what an example's text makes of its tokens."""
    if example.straddles:
        counts.notice("straddles", row)
    if example.hidden:
        counts.notice("control", row)
