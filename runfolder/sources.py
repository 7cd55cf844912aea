"""Sources of rows: what `data.train` and `data.eval` of a job mean, in one place for everybody who reads them."""

import re
from dataclasses import dataclass
from pathlib import Path

_ON_CLUSTER = "cluster:"
_OF_STAGE = re.compile(r"stage:([^/]+)(?:/(.+))?")
_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+(:.*)?")
_DATA_FILE = re.compile(r"\.(jsonl|json|csv|parquet|txt)(\.gz)?$")


@dataclass(frozen=True)
class SubmitterFile:
    """A file of the machine that submits."""

    path: Path


@dataclass(frozen=True)
class ClusterFile:
    """A file that the cluster has: `cluster:/path`."""

    path: Path


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub: `owner/name`, or `owner/name:config:split`."""

    name: str
    config: str | None
    split: str


@dataclass(frozen=True)
class StageOutput:
    """What an earlier stage of the same job leaves: `stage:name`, or one file of its output, `stage:name/file`."""

    stage: str
    file: str | None


Source = SubmitterFile | ClusterFile | HubDataset | StageOutput


def parse_source(text: str) -> Source:
    """What a source is by its form alone; a relative path with the suffix of a data file is none of the hub's."""
    if text.startswith(f"{_ON_CLUSTER}/"):
        path = text.removeprefix(_ON_CLUSTER)
        return ClusterFile(Path(path))
    of_stage = _OF_STAGE.fullmatch(text)
    if of_stage:
        return StageOutput(of_stage[1], of_stage[2])
    if _HUB.fullmatch(text) and not _DATA_FILE.search(text):
        name, _, selection = text.partition(":")
        config, _, split = selection.partition(":")
        return HubDataset(name, config or None, split or "train")
    return SubmitterFile(Path(text))


def file_of(text: str) -> Path | None:
    """The file that a source is where a run works; None for one that no path names yet, or never."""
    source = parse_source(text)
    if isinstance(source, HubDataset | StageOutput):
        return None
    return source.path
