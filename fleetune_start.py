"""Where Fleetune starts: it sees to it that Fleetune's folders, which are common words, are found before a user's.

The current folder and PYTHONPATH come before installed packages on sys.path, so a user's `trainer.py` there would be
imported instead of ours. This module's name is nobody else's, and it mends that before it imports anything of ours.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

NAMES = frozenset({"clusters", "fleetune", "k8s", "methods", "orchestrator", "runfolder", "serving", "trainer"})
_HERE = Path(__file__).resolve().parent


class _Ours(MetaPathFinder):
    """Finds our modules beside this file, wherever else there are some of these names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None and fullname in NAMES:
            return PathFinder.find_spec(fullname, [str(_HERE)], target)
        return None


def first() -> None:
    """Let our modules be found first in this process; raises ImportError where one of a user was imported already."""
    imported = NAMES & sys.modules.keys()
    for name in sorted(imported):
        file = getattr(sys.modules[name], "__file__", None)
        if file is None or not _is_ours(Path(file)):
            where = file or "a folder of the user"
            raise ImportError(f"{where} was imported as {name!r}, which is a name of Fleetune's: give it another one")
    if not any(isinstance(finder, _Ours) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Ours())


def _is_ours(file: Path) -> bool:
    return file.resolve().is_relative_to(_HERE)


def unshadowed(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for processes that we start: PYTHONPATH without the folders that hold modules of our names."""
    python_path = environment.get("PYTHONPATH", "")
    kept = []
    for folder in python_path.split(os.pathsep):
        if folder and not _shadows(Path(folder)):
            kept.append(folder)
    cleaned = dict(environment)
    cleaned.pop("PYTHONPATH", None)
    if kept:
        cleaned["PYTHONPATH"] = os.pathsep.join(kept)
    return cleaned


def _shadows(folder: Path) -> bool:
    """Whether a folder has a module or package of one of our names that is not ours."""
    if folder.resolve() == _HERE:
        return False
    for name in NAMES:
        spec = PathFinder.find_spec(name, [str(folder)])
        if spec is not None and spec.origin is not None:  # without an origin, a plain folder: it comes after packages
            return True
    return False


def main() -> None:
    """Run the command `fleetune`, with our modules found first."""
    first()
    from orchestrator.cli import main as command

    command()
