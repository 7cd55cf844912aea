"""A new SQLite store of MLflow, which is there whole or not at all.

MLflow makes its tables one after another in the file itself. Killed meanwhile, it finds some of them there from then
on, and fails at each later start.
"""

import os
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path


def make_database(file: Path, make: Callable[[str], object]) -> None:
    """Have `make(uri)` make a store beside a file that is missing, and give it that name, unless somebody was faster.

    Where the file system has no hard links, the file stays missing.
    """
    unique = uuid.uuid4().hex
    draft = file.with_name(f".{file.name}.{unique}")
    copy = file.with_name(f"{draft.name}.whole")  # a file that no connection of MLflow's knows
    try:
        make(f"sqlite:///{draft}")
        with closing(sqlite3.connect(draft)) as made, closing(sqlite3.connect(copy)) as whole:
            made.backup(whole)
        with suppress(OSError):
            os.link(copy, file)
    finally:
        draft.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)
