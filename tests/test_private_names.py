"""Private names of other packages: where they stand, and that only versions are taken that have them."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.versions import KNOWN, check_versions, unknown

ROOT = Path(__file__).parent.parent
# What DeepSpeed hangs on parameters, and what it keeps in its optimizers.
DEEPSPEED = re.compile(r"\bds_(id|shape|numel|tensor|status)\b|\bpartition_numel\b|\bfp16_groups\b|round_robin_bit16")


def lines(*folders: str) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield from ((str(path.relative_to(ROOT)), line) for line in path.read_text().splitlines())


def test_deepspeeds_stand_in_one_folder() -> None:
    packages = ("orchestrator", "clusters", "runfolder", "k8s", "trainer", "methods", "serving")
    found = {path for path, line in lines(*packages) if DEEPSPEED.search(line)}
    assert found == {"trainer/zero/gather.py", "trainer/zero/layout.py"}


def test_the_packages_that_have_them_are_bounded_and_checked() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    bounds = {f"{name}>={first},<{beyond}" for name, (first, beyond) in KNOWN.items()}
    wanted = {
        line for name in ("data", "train", "serve") for line in extras[name] if re.split("[><=]", line)[0] in KNOWN
    }
    assert wanted == bounds
    check_versions()
    with pytest.raises(RuntimeError, match=r"^peft [\d.]+ is installed, .*; allowed: pip install 'peft>=0.1,<0.2'$"):
        check_versions({"peft": ("0.1", "0.2"), "a-package-that-is-nowhere": ("1", "2")})
    assert len(unknown({"peft": ("0.1", "0.2"), "transformers": ("5.9999", "6.0")})) == 2
