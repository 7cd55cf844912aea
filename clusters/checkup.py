"""`python -m clusters.checkup FOLDER`: look at the machine of a cluster, where it is, and print the checks as JSON.

FOLDER is that of the environment; "" where the cluster names a Python. Standard input says what the cluster is to be:
{name, cluster: its section of the clusters file, requirements, test_job}. It needs Python alone.
"""

import json
import os
import platform
import shlex
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clusters import slurm_checkup
from clusters.checks import DEVICES, Check, disk_check
from clusters.probe import probe
from clusters.remote.setup import is_ready
from runfolder.folders import home, writable

_TORCH_S = 90.0  # importing torch from a cold disk takes long
_BUILD = "have the image made anew, from this version: docker build -f k8s/image/Dockerfile ."
_OTHER_ROOT = "name another `root` in the clusters file"


def main() -> None:
    """Print the checks as one line of JSON."""
    wanted = json.load(sys.stdin)
    folder = Path(sys.argv[1]) if sys.argv[1] else None
    checks = [asdict(check) for check in check_cluster(wanted, home(), folder)]
    print(json.dumps(checks))


def check_cluster(wanted: dict[str, Any], root: Path, environment: Path | None) -> Iterator[Check]:
    """All checks of the cluster of this machine; `environment` is its folder where Fleetune makes one."""
    config = wanted["cluster"]
    is_pod = config["kind"] == "kubernetes"
    yield _mounted_check(root) if is_pod else _root_check(root)
    yield disk_check(root, f"free some space, or {_OTHER_ROOT}")
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    has_packages = environment is None or is_ready(environment)
    if environment:
        yield _environment_check(environment, wanted["name"])
    if has_packages:
        found = _packages_check(wanted["requirements"], environment)
        yield replace(found, mend=_BUILD) if is_pod else found
    if config["kind"] == "slurm":
        yield from slurm_checkup.check_slurm(config)
    if wanted["test_job"] and has_packages:
        yield _test_job(config)


def _root_check(root: Path) -> Check:
    """Whether the run root is the user's own, for nobody else."""
    try:
        found = root.stat()
    except FileNotFoundError:
        if writable(root):
            return Check("run root", "ok", f"{root} is made by the first job")
        return Check("run root", "fail", f"{root} cannot be made", _OTHER_ROOT)
    except OSError as error:
        return Check("run root", "fail", f"{root}: {error.strerror}", _OTHER_ROOT)
    if found.st_uid != os.geteuid():
        return Check("run root", "fail", f"{root} is of another user", _OTHER_ROOT)
    mode = stat.S_IMODE(found.st_mode)
    mend = f"chmod 700 {shlex.quote(str(root))}"
    if mode & 0o700 != 0o700 or not writable(root):
        return Check("run root", "fail", f"{root} cannot be written ({mode:04o})", mend)
    if mode & 0o077:
        return Check("run root", "warn", f"{root} is open to others ({mode:04o})", mend)
    return Check("run root", "ok", str(root))


def _mounted_check(root: Path) -> Check:
    """Whether the user of a pod can write to the claim, which is its cluster's."""
    if writable(root):
        return Check("claim", "ok", f"{root} can be written")
    mend = "its storage must let the group of the pods (`user`) write: fsGroup, or the export's own settings"
    return Check("claim", "fail", f"{root} cannot be written by user {os.geteuid()}", mend)


def _environment_check(environment: Path, name: str) -> Check:
    """Whether the environment that Fleetune makes is there."""
    if is_ready(environment):
        return Check("environment", "ok", str(environment))
    return Check("environment", "fail", "not made yet", f"fleetune clusters setup {name}")


def _packages_check(requirements: list[str], environment: Path | None) -> Check:
    """Whether this Python has what runs need, in versions that Fleetune takes."""
    if environment:
        mend = f"rm -r {shlex.quote(str(environment))} there, then have it made again"
    else:
        mend = "pip install 'fleetune[train]' there, or remove `python` from the cluster: then Fleetune installs them"
    problems = []
    installed = []
    for requirement in requirements:
        name = _name_in(requirement)
        try:
            found = version(name)
        except PackageNotFoundError:
            problems.append(f"no {requirement}")
            continue
        installed.append(f"{name} {found}")
        if not _is_met(requirement, found):
            problems.append(f"{name} {found}, wanted: {requirement}")
    if problems:
        return Check("packages", "fail", "; ".join(problems), mend)
    return Check("packages", "ok", ", ".join(installed))


def _name_in(requirement: str) -> str:
    """The package in a requirement like `ray[default,train]==2.60.0`."""
    for sign in "[<>=!~; ":
        requirement = requirement.partition(sign)[0]
    return requirement


def _is_met(requirement: str, found: str) -> bool:
    """Whether a version fits a requirement; without the package that compares versions, any does."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(found, prereleases=True)


def _test_job(config: dict[str, Any]) -> Check:
    """What torch sees where workers run."""
    if config["kind"] == "slurm":
        return slurm_checkup.run_test_job(config)
    said = probe([sys.executable, "-P", "-c", DEVICES], _TORCH_S)
    if said.problem:
        return Check("test job", "fail", said.problem, "look at nvidia-smi there")
    return Check("test job", "ok", said.output.strip())


if __name__ == "__main__":
    main()
