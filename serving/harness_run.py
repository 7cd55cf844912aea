"""`python -m serving.harness_run < request.json`: tasks of lm-evaluation-harness, many adapters at once, kept whole.

The request: {base, revision, base_digest, adapters: [{name, folder}], out, task, limit}; `task` is a name of the
harness, or the path of one of its YAML files. The answers are lines of JSON as those of `serving.evaluate`:
{problem}, {file, task, adapter, digest, change}, {answered, seconds}. A file has one line of JSON for each row:
{task, filter, number, prompt, expected, answer, measures}. Adapters that have a file already are not asked again.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serving.changes import ChangeByName, changes_of
from serving.evaluate import Candidate, adapters_in, base_key, versions_of
from serving.harness import evaluate_by_harness
from serving.kept import PlainLine
from serving.question import KEY_SHOWN
from serving.sizes import sizes_of_chat
from serving.starting import ReadyEngine, RequestData, ready_engine, say

ROWS = 64  # of a batch
PROBE = "The quick brown fox jumps over the lazy dog."  # on which it is seen whether an adapter changes anything


def main(request: RequestData) -> int:
    """Do what a request asks for, and print what comes of it; gives the exit code."""
    began = time.monotonic()
    found, problems = adapters_in(request["adapters"])
    candidates = [Candidate(), *found]
    folder = folder_of(request)
    missing = [candidate for candidate in candidates if not (folder / candidate.file_name).exists()]
    answered = 0
    if missing and not problems:
        made = ready_engine(request, sizes_of_harness)
        if isinstance(made, list):
            problems = made
        else:
            answered, problems = asked_of(request, made, missing, folder)
    for problem in problems:
        say(problem=problem)
    if problems:
        return 2
    for candidate in candidates:
        path = folder / candidate.file_name
        head = json.loads(path.open().readline())
        say(
            file=str(path),
            task=request["task"],
            adapter=candidate.name,
            digest=candidate.digest,
            change=head["change"],
            left_out=head.get("left_out", 0.0),
        )
    say(answered=answered, seconds=time.monotonic() - began)
    return 0


def folder_of(request: RequestData) -> Path:
    """Where the answers to a task are: under the digests of the base and of all else that decides on them."""
    task = request["task"]
    path = Path(task)
    content = path.read_text() if path.is_file() else task
    facts = (content, request["limit"], version("lm_eval"))
    digest = hashlib.sha256(repr(facts).encode())
    key = digest.hexdigest()[:KEY_SHOWN]
    head = versions_of(request["base_digest"])
    base = base_key(head)
    of_base = Path(request["out"]) / base
    return of_base / f"lm_eval-{path.stem}-{key}"


def sizes_of_harness(config: Any, adapters: int) -> dict[str, int]:
    """The sizes of an engine for questions of a length that is not known."""
    sizes = sizes_of_chat(config, adapters)
    return {**sizes, "rows": ROWS}


def asked_of(
    request: RequestData, ready: ReadyEngine, missing: Sequence[Candidate], folder: Path
) -> tuple[int, list[str]]:
    """Ask those that have no file; gives how many rows that were, and what is wrong with the task."""
    try:
        return ask_missing(request, ready, missing, folder), []
    except (KeyError, ValueError, OSError) as error:  # the task's own, or of where its data should be
        kind = type(error).__name__
        lines = str(error).strip().splitlines() or [kind]
        return 0, [f"task lm_eval:{request['task']}: {lines[0]}"]


def ask_missing(request: RequestData, ready: ReadyEngine, missing: Sequence[Candidate], folder: Path) -> int:
    """Ask those that have no file, and write one for each; gives how many rows that were."""
    task = request["task"]
    names = [candidate.name for candidate in missing]
    results = evaluate_by_harness(
        ready.engine, ready.tokenizer, names, [task], limit=request["limit"], bootstrap_iters=0
    )
    changes = changes_at_probe(names, ready)
    count = 0
    for candidate in missing:
        lines = list(lines_of(results[candidate.name]))
        left_out = 0.0 if candidate.name is None else ready.engine.left_out(candidate.name)
        change = changes.get(candidate.name)
        head = {"task": task, "adapter": candidate.digest, "change": change, "left_out": left_out}
        write_at_once(folder / candidate.file_name, [head, *lines])
        count += len(lines)
    return count


def changes_at_probe(names: Sequence[str | None], ready: ReadyEngine) -> ChangeByName:
    """How much adapters change what the base says of one text."""
    ids = ready.tokenizer.encode(PROBE)
    prompts = [tuple(ids)]
    return changes_of(ready.engine, names, prompts)


def lines_of(results: Mapping[str, Any]) -> Iterator[PlainLine]:
    """The rows of all tasks that the harness has asked, with what it says of each."""
    for task, samples in results["samples"].items():
        for sample in samples:
            measures = {}
            for name in sample["metrics"]:
                value = sample[name]
                if isinstance(value, int | float):
                    measures[name] = float(value)
            first = sample["arguments"][0]
            yield {
                "task": task,
                "filter": sample["filter"],
                "number": sample["doc_id"] + 1,
                "prompt": str(first[0]),
                "expected": str(sample["target"]),
                "answer": shown_answer(sample),
                "measures": measures,
            }


def shown_answer(sample: Mapping[str, Any]) -> str:
    """What was answered, as people read it: the text, or the likeliest of several."""
    responses = sample["filtered_resps"]
    if len(responses) == 1 and isinstance(responses[0], str):
        return responses[0].strip()
    likelihoods = []
    for response in responses:
        if isinstance(response, list | tuple):
            likelihoods.append(response[0])
    if len(likelihoods) < 2:
        return str(responses[0])
    highest = max(likelihoods)
    number = likelihoods.index(highest)
    chosen = sample["arguments"][number]
    return str(chosen[1]).strip()


def write_at_once(path: Path, lines: Sequence[PlainLine]) -> None:
    """Write lines of JSON into a file, all of them or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ""
    for line in lines:
        written = json.dumps(line)
        text += f"{written}\n"
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        sys.exit(main(json.load(sys.stdin)))
