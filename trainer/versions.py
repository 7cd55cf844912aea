"""Which versions of other packages are known: those whose private names Fleetune uses.

Their public names change seldom and with a word; private ones change in any release, at times without an error. So a
worker refuses versions that nobody has tried, before it trains anything. DeepSpeed's one version: zero/engine.py.
"""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

# From the first version on, and below the second; pyproject.toml says the same.
VersionBounds = Mapping[str, tuple[str, str]]
KNOWN: VersionBounds = {
    "bitsandbytes": ("0.49", "0.51"),  # how a 4-bit weight keeps its constants (methods/parts/quantised.py)
    "peft": ("0.19", "0.22"),  # the SVD of EVA, and the insides of LoRA's layers (methods/parts/)
    "transformers": ("5.10", "5.24"),  # attention functions and masks, whether a base takes them, files of a hub id
}


def unknown(known: VersionBounds = KNOWN) -> list[str]:
    """What is installed in a version that is not known: one line each, with how to fix it."""
    lines = []
    for name, (first, beyond) in known.items():
        installed = _installed(name)
        if not installed:
            continue
        inside = _major_and_minor(first) <= _major_and_minor(installed) < _major_and_minor(beyond)
        if not inside:
            lines.append(
                f"{name} {installed} is installed, whose private names are not known; "
                f"allowed: pip install '{name}>={first},<{beyond}'"
            )
    return lines


def check_versions(known: VersionBounds = KNOWN) -> None:
    """Raise RuntimeError where a package is installed in a version that is not known."""
    lines = unknown(known)
    if lines:
        problem = "; ".join(lines)
        raise RuntimeError(problem)


def _installed(name: str) -> str | None:
    """The version of a package that is installed; None where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _major_and_minor(version: str) -> tuple[int, ...]:
    """Major and minor number; `5.24.0.dev0` counts as 5.24, whose names it may have already."""
    parts = re.findall(r"\d+", version)
    numbers = map(int, parts[:2])
    return tuple(numbers)
