"""Texts in the lines of a terminal: broken between words, but not before a unit or the version of a package."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.measure import Measurement
    from rich.text import Text

_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:[KMG]iB|B|GB|MB|s|m|h|d|M|k|tokens/s|steps/s)\b|%)")
_BEFORE_VERSION = re.compile(r"(?<=[a-z]) (?=\d+\.\d+\.\d)")
_NO_BREAK = "\N{NO-BREAK SPACE}"


def wrapped_lines(text: str, width: int, indent: str = "") -> list[str]:
    """The lines of a text that fit a width, later ones indented; a word that is longer than a line is left whole."""
    lines = []
    for line in text.splitlines():
        bound = _BEFORE_UNIT.sub(_NO_BREAK, line)
        bound = _BEFORE_VERSION.sub(_NO_BREAK, bound)
        parts = wrap(bound, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += [part.replace(_NO_BREAK, " ") for part in parts or [""]]
    return lines


@dataclass(frozen=True)
class WrappedText:
    """A text as a part of a table, which is as wide as there is room."""

    text: str

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Text]":
        from rich.text import Text

        for line in wrapped_lines(self.text, options.max_width):
            yield Text(line)

    def __rich_measure__(self, console: "Console", options: "ConsoleOptions") -> "Measurement":
        from rich.measure import Measurement

        widest = max(map(len, self.text.splitlines()), default=0)
        words = self.text.split()
        longest_word = max(map(len, words), default=0)
        return Measurement(longest_word, widest).with_maximum(options.max_width)
