"""Rows of the data in a terminal: what is learned of each example in green, and how examples are packed."""

import unicodedata
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.text import Text

from orchestrator.rows import PackedSequence, RowsView, ShownExample
from orchestrator.terminal.render import print_markup, show_fields

if TYPE_CHECKING:
    from trainer.data.survey import Survey

_CUT_PROMPT = ", longer than data.seq_len: the beginning of its prompt is cut"
_FATES = {
    "truncated": ", longer than data.seq_len: its end is cut",
    "dropped": ", left out: it is too long",
    "identical": ", left out: both answers are the same",
    "branched": ", left out: the chats differ before their last turn",
    "tied": ", left out: all of its answers rank alike",
    "no_reply": ", left out: a last turn has no text",
}


def show_rows(view: RowsView) -> None:
    """Examples with what is learned in green, how they are packed, and the numbers of all rows."""
    for example in view.examples:
        _show_example(example)
    for number, sequence in enumerate(view.sequences, 1):
        _show_sequence(number, sequence)
    print_markup("")
    fields = _survey_fields(view.survey)
    fields["source"] = view.source
    show_fields(fields)
    for warning in view.warnings:
        print_markup(f"[yellow]warning[/]: {escape(warning)}")


def _show_example(example: ShownExample) -> None:
    learned = 0
    for index, token in enumerate(example.tokens):
        if example.keeps(index):
            learned += token.learned
    tokens = len(example.tokens)
    fate = _FATES.get(example.fate or "", "")
    if example.cut_to > example.cut_from and example.kept:
        fate = _CUT_PROMPT
    title = f"row {example.row}"
    if example.answer:
        title = f"{title}, {example.answer}"
    print_markup(f"[bold]{title}[/]  {tokens} tokens, {learned} learned{fate}")
    print_markup(_coloured_text(example))
    print_markup(_coloured_tokens(example))
    print_markup("")


def _show_sequence(number: int, sequence: PackedSequence) -> None:
    title = f"sequence {number} of step 1"
    places = []
    for row, start, stop in sequence.examples:
        places.append(f"row {row} [{start}, {stop})")
    shown_places = escape("  ".join(places))
    print_markup(f"[bold]{title}[/]  {shown_places}  padding {sequence.padding}")


def _coloured_text(example: ShownExample) -> Text:
    text = Text()
    for part, learned, kept in example.parts:
        text.append(_visible(part), style=_style(learned, kept))
    return text


def _visible(text: str) -> str:
    """A text whose control characters cannot move the cursor or change colours."""
    return "".join(map(_visible_character, text))


def _visible_character(char: str) -> str:
    is_control = unicodedata.category(char) == "Cc"
    if is_control and char not in "\n\t":
        return f"\\x{ord(char):02x}"
    return char


def _coloured_tokens(example: ShownExample) -> Text:
    """The ids, each with its text as a word without spaces."""
    text = Text("tokens  ", style="dim")
    for index, token in enumerate(example.tokens):
        kept = example.keeps(index)
        style = _style(token.learned, kept)
        word = f"{token.id}:{token.text!r}"
        text.append(word, style=style)
        text.append(" ")
    return text


def _style(learned: bool, kept: bool) -> str:
    if not kept:
        return "red strike"
    if learned:
        return "bold green"
    return ""


def _survey_fields(survey: "Survey") -> dict[str, str]:
    share = 100 * survey.learned / survey.tokens
    truncated = survey.number("truncated")
    dropped = survey.number("dropped")
    fields = {
        "rows": f"{survey.rows:,}, which make {survey.examples:,} examples",
        "tokens": f"{survey.tokens:,}, learned {survey.learned:,} ({share:.3g} %)",
        "lengths": f"{survey.shortest:,} to {survey.longest:,} tokens, median {survey.median:,}",
        "duplicates": f"{survey.duplicates:,}",
        "cut, left out": f"{truncated:,}, {dropped:,}",
    }
    columns = []
    for name, seen in survey.unused.items():
        count, _ = seen
        columns.append(f"{name} ({count:,} rows)")
    if columns:
        fields["not used"] = ", ".join(columns)
    return fields
