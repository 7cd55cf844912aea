"""`python -m trainer.data`: look at a job's rows as tokens; one JSON request on stdin, answers as lines of JSON.

Request: {job, folder, sources: {key: source}}. Answers: {key, done: rows so far}, and for each key at the end
{key, survey} or {key, problem: one line}.
"""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any


def main(request: Mapping[str, Any]) -> None:
    """Make tokens of each source that a request names; say what they look like, or why there are none."""
    from runfolder.folders import cache
    from runfolder.job import Job
    from trainer.data.encode import Reading
    from trainer.data.survey import survey
    from trainer.data.tokenizer import TokenizerError, end_ids, load_tokenizer
    from trainer.data.tokens import tokenise

    job = Job.model_validate(request["job"])
    folder = Path(request["folder"])
    for key, source in request["sources"].items():
        try:
            tokenizer = load_tokenizer(job.base, folder)
            ends = end_ids(tokenizer, job.base, folder)
            reading = Reading.of(job, ends)
            tokens = tokenise(source, tokenizer, reading, cache(), partial(report_progress, key))
            survey_of_rows = survey(tokens, tokenizer, reading)
            print_answer(key, survey=survey_of_rows.dump())
        except TokenizerError as error:
            print_answer(key, problem=str(error))
        except ValueError as error:  # a RowError, or a cache that cannot be written
            print_answer(key, problem=f"data.{key}: {error}")


def report_progress(key: str, done: int) -> None:
    """Say how many rows of the source under `key` are tokens by now."""
    print_answer(key, done=done)


def print_answer(key: str, **content: Any) -> None:
    """Write an answer about the source under `key`: one line of JSON, at once."""
    line = json.dumps({"key": key, **content})
    print(line, flush=True)


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers imports it where it is: seconds for nothing
    main(json.load(sys.stdin))
