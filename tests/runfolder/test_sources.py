"""What a job's `data.train` says, told once."""

from pathlib import Path

import pytest

from runfolder.sources import ClusterFile, HubDataset, SubmitterFile, file_of, parse_source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("/data/a.jsonl", SubmitterFile(Path("/data/a.jsonl"))),
        ("/data/no-suffix", SubmitterFile(Path("/data/no-suffix"))),
        ("data/a.jsonl.gz", SubmitterFile(Path("data/a.jsonl.gz"))),
        ("rows.csv", SubmitterFile(Path("rows.csv"))),
        ("cluster:/scratch/a.jsonl", ClusterFile(Path("/scratch/a.jsonl"))),
        ("cluster:/scratch/my set", ClusterFile(Path("/scratch/my set"))),
        ("owner/name", HubDataset("owner/name", None, "train")),
        ("owner/name:main", HubDataset("owner/name", "main", "train")),
        ("owner/name:main:test[:5]", HubDataset("owner/name", "main", "test[:5]")),
        ("owner/name::test", HubDataset("owner/name", None, "test")),
        ("owner/v1.5", HubDataset("owner/v1.5", None, "train")),
        ("-rf/name", HubDataset("-rf/name", None, "train")),
        ("a/b/c", SubmitterFile(Path("a/b/c"))),
        ("cluster:relative", SubmitterFile(Path("cluster:relative"))),
    ],
)
def test_forms(text: str, source: SubmitterFile | ClusterFile | HubDataset) -> None:
    assert parse_source(text) == source
    assert file_of(text) == (None if isinstance(source, HubDataset) else source.path)
