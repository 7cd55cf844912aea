"""Whether the container of a SLURM site can be used, looked at on its login node. It needs Python alone."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clusters.checks import Check
from clusters.package_checks import VERSIONS, package_in, packages_check
from clusters.probe import probe

_LOOK_INSIDE_S = 120.0  # a runtime without privileges may unpack the image first
_ON_NODES = "where the nodes have it, this is no problem: fleetune doctor --test-job; else load it in `setup`"


def check_container(container: dict[str, Any], requirements: list[str]) -> Iterator[Check]:
    """Whether the image is there, its runtime, and in it a Python with the packages that runs need."""
    image = Path(container["image"]).expanduser()
    if not os.access(image, os.R_OK):
        yield Check("image", "fail", f"{image} is not there, or cannot be read", "change it in the clusters file")
        return
    yield Check("image", "ok", str(image))
    runtime = container["runtime"]
    found = shutil.which(runtime)
    if found is None:
        yield Check("container", "warn", f"{runtime} is not on PATH here", _ON_NODES)
        return
    names = map(package_in, requirements)
    said = probe([*command_in(container), "-P", "-c", VERSIONS, *names], _LOOK_INSIDE_S)
    if said.problem:
        mend = f"see what this says: {runtime} exec {image} {container['python']} --version (3.11 or newer)"
        yield Check("container", "fail", said.problem, mend)
        return
    yield Check("container", "ok", found)
    versions = json.loads(said.output.strip().rpartition("\n")[2])
    mend = "install them in the image, in these versions: pip install 'fleetune[train]'"
    yield packages_check("in the image", requirements, versions, mend)


def command_in(container: dict[str, Any], has_gpus: bool = False) -> list[str]:
    """The command of Python in a container, for a look at it."""
    command = [container["runtime"], "exec"]
    if has_gpus:
        command.append("--nv")
    command += ["--env", "PYTHONNOUSERSITE=1", "--bind", "/tmp"]
    image = Path(container["image"]).expanduser()
    return [*command, str(image), container["python"]]
