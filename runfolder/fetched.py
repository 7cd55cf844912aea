"""What `fetch` brings of a run: its output, its result and its job, whole or in parts."""

from pathlib import Path

from runfolder.files import list_names

FETCHED = ("job.yaml", "output", "result.json")  # the job first: it says whose output comes


def paths_to_fetch(run_dir: Path) -> list[Path]:
    """Those of them that are there."""
    names = list_names(run_dir)
    existing = [name for name in FETCHED if name in names]
    return [run_dir / name for name in existing]


def is_fetched(path: str) -> bool:
    """Whether a path in a run folder is one of them, or below one."""
    parts = Path(path).parts
    if not parts or ".." in parts:
        return False
    return parts[0] in FETCHED


def part(run_dir: Path, path: str, offset: int, length: int) -> bytes:
    """Bytes of a file from an offset on."""
    with (run_dir / path).open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)
