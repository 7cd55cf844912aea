"""Where tokenised data is kept."""

import os
from pathlib import Path


def cache() -> Path:
    """FLEETUNE_CACHE, or FLEETUNE_HOME/cache."""
    home = Path(os.environ.get("FLEETUNE_HOME") or "~/.fleetune")
    return Path(os.environ.get("FLEETUNE_CACHE") or home / "cache").expanduser()
