"""Answers to one prompt, side by side where the terminal is wide enough, else one below the other."""

import sys
from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from orchestrator.chat import ChatAnswer
from orchestrator.terminal.render import output_width, print_markup

_LEAST_COLUMN = 24  # characters
_BETWEEN = 3  # columns between two answers


def show_answers(answers: Sequence[ChatAnswer], typed: bool, prompt: str) -> None:
    """Show the answers, below the prompt where nobody has typed that here."""
    if not typed:
        print_markup(f"[bold]> {escape(prompt)}[/]")
    number = len(answers)
    needed = number * (_LEAST_COLUMN + _BETWEEN)
    is_terminal = sys.stdout.isatty()
    if is_terminal and number > 1 and needed <= output_width():
        grid = columns_of(answers)
        print_markup(grid)
        return
    for answer in answers:
        label = escape(answer.label)
        print_markup(f"[bold]{label}[/]: {escape(answer.text)}")
    print_markup("")


def columns_of(answers: Sequence[ChatAnswer]) -> Table:
    """A table with a column of the same width for each answer."""
    grid = Table(box=box.SIMPLE_HEAD, expand=True)
    grid.pad_edge = False
    grid.padding = (0, 1, 0, 0)
    texts = []
    for answer in answers:
        label = escape(answer.label)
        grid.add_column(label, ratio=1, overflow="fold")
        texts.append(escape(answer.text))
    grid.add_row(*texts)
    return grid
