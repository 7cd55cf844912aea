"""What a job's `data.train` says, told once."""

from pathlib import Path

import pytest

from runfolder.sources import Here, Hub, There, file_of, parse


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("/data/a.jsonl", Here(Path("/data/a.jsonl"))),
        ("/data/no-suffix", Here(Path("/data/no-suffix"))),
        ("data/a.jsonl.gz", Here(Path("data/a.jsonl.gz"))),
        ("rows.csv", Here(Path("rows.csv"))),
        ("cluster:/scratch/a.jsonl", There(Path("/scratch/a.jsonl"))),
        ("cluster:/scratch/my set", There(Path("/scratch/my set"))),
        ("owner/name", Hub("owner/name", None, "train")),
        ("owner/name:main", Hub("owner/name", "main", "train")),
        ("owner/name:main:test[:5]", Hub("owner/name", "main", "test[:5]")),
        ("owner/name::test", Hub("owner/name", None, "test")),
        ("owner/v1.5", Hub("owner/v1.5", None, "train")),
        ("-rf/name", Hub("-rf/name", None, "train")),
        ("a/b/c", Here(Path("a/b/c"))),
        ("cluster:relative", Here(Path("cluster:relative"))),
    ],
)
def test_forms(text: str, source: Here | There | Hub) -> None:
    assert parse(text) == source
    assert file_of(text) == (None if isinstance(source, Hub) else source.path)
