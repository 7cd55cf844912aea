"""What jobs of a scheduler printed, in files that may be of any size."""

import os
from pathlib import Path

import pytest

from clusters import run_files
from clusters.run_files import joined_logs

HUGE = 1 << 40  # bytes, which no machine of ours has in memory


def write_logs(folder: Path, *texts: str) -> list[Path]:
    """Files with these texts, the oldest first."""
    paths = []
    for number, text in enumerate(texts):
        path = folder / f"a-s{number}.log"
        path.write_text(text)
        os.utime(path, (number, number))
        paths.append(path)
    return paths


def test_the_end_of_a_huge_log_is_read_alone(tmp_path: Path) -> None:
    (path,) = write_logs(tmp_path, "")
    with path.open("r+b") as stream:
        stream.seek(HUGE)
        stream.write(b"the end\n")
    assert joined_logs([path], HUGE).text == "the end\n"
    assert joined_logs([path], HUGE).offset == HUGE + 8


@pytest.mark.parametrize("most", [7, 16, 1000])
def test_logs_come_part_by_part(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_files, "_MOST_BYTES", most)
    texts = ("früh\nspät\n", "", "a line of two files", " and more\nthe last one\n")
    paths = write_logs(tmp_path, *texts)
    whole = "".join(texts)
    read = []
    offset = 0
    while part := joined_logs(reversed(paths), offset).text:
        assert len(part.encode()) <= most
        read.append(part)
        offset += len(part.encode())
    assert "".join(read) == whole
    for start in range(offset):
        rest = joined_logs(paths, start)
        assert whole.encode()[start : rest.offset].decode(errors="replace") == rest.text != ""
