"""What an evaluation found of each held-out row, for comparisons: attempts/N/evaluations/step-S.jsonl.

A line for each row: `row`, its number in the file; `digest`, of its content; `loss`, what it adds to the sum that
the evaluation's loss is the mean of, and `weight`, what it adds to the divisor (for sft: its labels); `answer`, what
the model wrote, and `correct`, whether that is the answer of the data. What was not asked, or is not finite, is null.
`test` says whether it is a test row, by which nothing is chosen.

A file is there whole or not at all, and before the evaluation is reported in metrics.jsonl. It counts where the
report does: who was interrupted has reported nothing, and the next attempt judges all rows.
"""

import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from runfolder.appended import read_lines
from runfolder.chain import Attempt, attempts
from runfolder.files import Damaged, list_names, sync_folder

EVALUATIONS = "evaluations"
_FILE = re.compile(r"step-(\d{1,15})\.jsonl")


@dataclass(frozen=True)
class RowResult:
    """What an evaluation found of one row."""

    row: int
    digest: str
    loss: float | None = None
    weight: float | None = None
    correct: bool | None = None
    answer: str | None = None
    test: bool = False


def write_row_results(attempt: Attempt, step: int, results: Iterable[RowResult]) -> None:
    """Write what the evaluation after a step found, whole or not at all."""
    folder = attempt.folder / EVALUATIONS
    folder.mkdir(exist_ok=True)
    draft = folder / f".{uuid.uuid4().hex}"
    with draft.open("w", encoding="utf-8") as stream:
        for result in results:
            line = json.dumps(_as_json(result), ensure_ascii=False, allow_nan=False)
            stream.write(f"{line}\n")
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(folder / f"step-{step}.jsonl")
    sync_folder(folder)


def last_row_results(run_dir: Path) -> Path | None:
    """The file of the last evaluation that was reported of a run; of two reports the first one counts."""
    newest: tuple[int, Path] | None = None
    for attempt in attempts(run_dir):
        for step, path in _reported_evaluations(attempt):
            if newest is None or step > newest[0]:
                newest = (step, path)
    return newest[1] if newest else None


def read_row_results(path: Path) -> list[RowResult]:
    """The rows of a file, in their order; raises Damaged."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [RowResult(**json.loads(line)) for line in lines if line]
    except (ValueError, TypeError) as error:
        raise Damaged(f"{path}: {error}") from None


def _reported_evaluations(attempt: Attempt) -> Iterator[tuple[int, Path]]:
    """The evaluations of an attempt that were reported: the step, and the file."""
    folder = attempt.folder
    if EVALUATIONS not in list_names(folder):
        return
    steps = set()
    for row in read_lines(attempt, "metrics.jsonl"):
        if "eval_loss" in row:
            steps.add(row["step"])
    for name in list_names(folder / EVALUATIONS):
        found = _FILE.fullmatch(name)
        if found and int(found[1]) in steps:
            yield int(found[1]), folder / EVALUATIONS / name


def _as_json(result: RowResult) -> dict[str, object]:
    """A result as JSON can hold it."""
    record = asdict(result)
    loss = result.loss
    if loss is not None and not math.isfinite(loss):
        record["loss"] = None
    return record
