"""What a model wrote in its steps, for people to read: samples.jsonl of each attempt, an answer a line.

A line has `step`, `time`, `number` (which answer to the prompt), `prompt`, `written`, `reward`, `cut` (it did not
come to its end), and `rewards` by name where a job has several.
"""

from collections.abc import Iterable

from runfolder.appended import ChunkSource, Follower, parse_lines
from runfolder.files import Record

SAMPLES_FILE = "samples.jsonl"


def samples_of(source: ChunkSource) -> list[Record]:
    """All samples of a run, each once, by step: what an attempt wrote again after a checkpoint is the same."""
    follower = Follower()
    found: dict[tuple[int, int], Record] = {}
    is_behind = True
    while is_behind:
        chunks = list(source(follower.since))
        is_behind = any(chunk.is_full for chunk in chunks)
        for _, data in follower.take(chunks):
            for sample in parse_lines(data, SAMPLES_FILE):
                key = (sample["step"], sample["number"])
                found.setdefault(key, sample)
    return [found[key] for key in sorted(found)]


def of_step(samples: Iterable[Record], step: int) -> list[Record]:
    """The samples of one step."""
    found = []
    for sample in samples:
        if sample["step"] == step:
            found.append(sample)
    return found
