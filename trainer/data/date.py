"""Today's date in a chat template: fixed, so that tokens are the same on every day; the standard library suffices."""

import datetime
import json
import re
from functools import partial

from trainer.data.files import RowError, SourceName

_DATE = re.compile(r"strftime_now(?!\s+is\b)")  # `strftime_now is defined` writes nothing
_DATE_CALL = re.compile(
    r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<form>(?:(?!(?P=quote)).)*)(?P=quote)\s*\)"""
)


def asks_for_date(template: str | None) -> bool:
    """Whether a chat template writes today's date into what it renders."""
    if template is None:
        return False
    return _DATE.search(template) is not None


def dated(template: str, date: datetime.date | None, source: SourceName) -> str:
    """A chat template with a fixed date in place of today's, so that every day and machine gives the same tokens.

    Raises RowError where there is no date, or where the form of the date is not written in the template.
    """
    if date is None and asks_for_date(template):
        raise RowError(f"{source}: the chat template writes today's date: say which in data.date")
    if date is None:
        return template
    fixed = _DATE_CALL.sub(partial(_literal, date), template)
    if asks_for_date(fixed):
        raise RowError(f"{source}: the chat template computes the form of the date; take one that writes it")
    return fixed


def _literal(date: datetime.date, call: re.Match[str]) -> str:
    """The literal that stands in a template for a call: the date in the form that the call asks for."""
    form = call["form"]
    written = date.strftime(form)
    return json.dumps(written)
