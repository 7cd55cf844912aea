"""Where Fleetune keeps what it makes: all of it below FLEETUNE_HOME, whether HOME can be written or not."""

import os
from pathlib import Path


def home() -> Path:
    """FLEETUNE_HOME, or ~/.fleetune; raises OSError where there is neither."""
    try:
        folder = Path(os.environ.get("FLEETUNE_HOME") or Path.home() / ".fleetune")
        return folder.expanduser().absolute()
    except RuntimeError:  # of pathlib, about a user whom the system does not know
        raise OSError(
            "FLEETUNE_HOME: not set, and this user has no home; set it to a folder to keep runs in"
        ) from None


def cache_folder() -> Path:
    """Where tokenised data is kept: FLEETUNE_CACHE, or FLEETUNE_HOME/cache."""
    folder = home() / "cache"
    wanted = os.environ.get("FLEETUNE_CACHE")
    if wanted:
        folder = Path(wanted)
    return folder.expanduser().absolute()


def cache() -> Path:
    """`cache_folder`, created where it is missing; raises ValueError where it cannot be written."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(_unwritable(folder, str(error.strerror))) from None
    if not writable(folder):
        raise ValueError(_unwritable(folder, "no permission"))
    return folder


def library_folders() -> dict[str, str]:
    """Variables by which libraries keep what they build below FLEETUNE_HOME, where HOME has no place for it.

    Variables that are set already are left out. A cache of the hub in HOME is kept, where there is one, to be read.
    """
    if _home_has_place():
        return {}
    libraries = str(home() / "cache" / "libraries")
    folders = {"XDG_CACHE_HOME": libraries, "TRITON_HOME": libraries}
    hub = Path("~/.cache/huggingface").expanduser()
    if hub.is_dir():
        folders["HF_HOME"] = str(hub)
    unset = {}
    for name, folder in folders.items():
        if name not in os.environ:
            unset[name] = folder
    return unset


def writable(folder: Path) -> bool:
    """Whether a folder can be written, or created where it is missing."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        return False
    return os.access(existing, os.W_OK | os.X_OK)


def nearest_existing(folder: Path) -> Path:
    """The folder, or the first of its parents that exists."""
    candidates = (folder, *folder.parents)
    existing = filter(Path.exists, candidates)
    return next(existing)


def _home_has_place() -> bool:
    try:
        home_dir = Path.home()
        return writable(home_dir / ".cache") and writable(home_dir / ".triton")
    except RuntimeError:  # nobody knows this user's home
        return False


def _unwritable(folder: Path, why: str) -> str:
    name = "FLEETUNE_HOME"
    if os.environ.get("FLEETUNE_CACHE"):
        name = "FLEETUNE_CACHE"
    return f"{name}: {folder} for tokenised data cannot be written ({why}); set {name} to a folder that can"
