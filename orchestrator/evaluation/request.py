"""What an evaluating process is asked: a base, adapters, and the questions of tasks."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.evaluation.adapters import AdapterSource
from orchestrator.evaluation.questions import PreparedTask
from orchestrator.planning.model import folder_of_base
from runfolder.digests import folder_digest
from runfolder.job import Base
from trainer.data.tokenizer import end_ids, load_tokenizer


def base_tokenizer(place: Base, option: str = "--base") -> tuple[Any, tuple[int, ...]]:
    """The tokenizer of a base, and the ids at which its generation stops; raises InputError for the option."""
    folder = folder_of_base(place)
    try:
        tokenizer = load_tokenizer(place, folder)
        return tokenizer, end_ids(tokenizer, place, folder)
    except (ValueError, OSError) as error:
        raise InputError(f"{option}: {line_of(error)}") from error


def evaluation_request(
    place: Base, sources: Sequence[AdapterSource], prepared: Sequence[PreparedTask], out: Path
) -> dict[str, Any]:
    """What the evaluating process is asked."""
    folder = folder_of_base(place)
    adapters = []
    for source in sources:
        adapter = {"name": source.label, "folder": str(source.folder)}
        adapters.append(adapter)
    tasks = [task.dump() for task in prepared]
    return {
        "base": str(folder or place.model),
        "revision": None if folder else place.revision,
        "base_digest": _base_digest(place, folder),
        "adapters": adapters,
        "out": str(out.absolute()),
        "tasks": tasks,
    }


def _base_digest(place: Base, folder: Path | None) -> str:
    """The digest of a base's folder; of one that is not here yet, of its name."""
    if folder is not None:
        return folder_digest(folder, scratch=False)
    named = f"{place.model}@{place.revision}"
    digest = hashlib.sha256(named.encode())
    return digest.hexdigest()


def line_of(error: Exception) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    if lines:
        return lines[0]
    return type(error).__name__
