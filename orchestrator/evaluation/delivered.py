"""The output of a run that evaluated: files of answers, and answers.json, which says what they are."""

from pathlib import Path

from orchestrator.evaluation.process import AllAnswers, AnsweredSheet
from runfolder.files import Damaged, read_json
from serving.kept import merge_answers

ANSWERS_FILE = "answers.json"


def delivered_answers(output: Path, out: Path) -> AllAnswers:
    """What a run has delivered, with its files merged into those of `out`; raises Damaged."""
    record = read_json(output / ANSWERS_FILE)
    sheets = []
    for plain in record["sheets"]:
        place = Path(plain.pop("file"))
        if place.is_absolute() or ".." in place.parts:
            raise Damaged(f"{output / ANSWERS_FILE}: found the path {str(place)!r}; allowed: one below it")
        merge_answers(output / place, out / place)
        sheet = AnsweredSheet(**plain, path=out / place)
        sheets.append(sheet)
    return AllAnswers(sheets, record["asked"], record["seconds"])
