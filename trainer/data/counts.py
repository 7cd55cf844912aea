"""What is counted of rows while they become tokens; the standard library suffices."""

from dataclasses import dataclass, field

UNUSED = "unused "  # how the kind begins under which a column that nobody reads is noticed

Seen = tuple[int, int]  # how often something was seen, and the number of the first row where it was
Noticed = dict[str, Seen]  # by kind
# Why a pair teaches nothing, by the kind under which it is counted.
WHY_LEFT_OUT = {
    "identical": "have two answers that are the same",
    "branched": "have two chats that differ before their last turn",
    "tied": "have a list of answers that all rank alike",
    "no_reply": "have a last turn without text",
}


@dataclass
class Counts:
    """Rows that were read, examples that they made, tokens of the longest, and what was noticed on the way.

    `noticed` has, by kind, how often something was seen and the number of the first row where it was.
    """

    rows: int = 0
    examples: int = 0
    longest: int = 0
    noticed: Noticed = field(default_factory=dict)

    def notice(self, kind: str, row: int, times: int = 1) -> None:
        """Count something that was seen in a row; rows come in order."""
        count = times
        first = row
        if kind in self.noticed:
            earlier, first = self.noticed[kind]
            count += earlier
        self.noticed[kind] = (count, first)

    def number(self, kind: str) -> int:
        """How often something was noticed."""
        if kind not in self.noticed:
            return 0
        count, _ = self.noticed[kind]
        return count

    def of_examples(self) -> Noticed:
        """What was noticed by kind, but for columns that nobody reads."""
        of_examples = {}
        for kind, seen in self.noticed.items():
            if not kind.startswith(UNUSED):
                of_examples[kind] = seen
        return of_examples

    def unused(self) -> Noticed:
        """The columns that nobody reads, and how often each had a value."""
        unused = {}
        for kind, seen in self.noticed.items():
            if kind.startswith(UNUSED):
                column = kind.removeprefix(UNUSED)
                unused[column] = seen
        return unused

    def summary(self) -> dict[str, int | dict[str, int]]:
        """What a run's record says of its data: rows, examples, the longest, and how often each kind was noticed."""
        return {
            "rows": self.rows,
            "examples": self.examples,
            "longest": self.longest,
            **_count_by_kind(self.of_examples()),
            "unused": _count_by_kind(self.unused()),
        }

    def add(self, later: "Counts") -> None:
        """Add what was counted in later rows."""
        self.rows += later.rows
        self.examples += later.examples
        self.longest = max(self.longest, later.longest)
        for kind, seen in later.noticed.items():
            count, first = seen
            self.notice(kind, first, count)


def _count_by_kind(noticed: Noticed) -> dict[str, int]:
    """How often each kind was seen."""
    numbers = {}
    for kind, seen in noticed.items():
        count, _ = seen
        numbers[kind] = count
    return numbers
