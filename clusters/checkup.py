"""`python -m clusters.checkup FOLDER`: look at the machine of a cluster, where it is, and print the checks as JSON.

FOLDER is that of the environment; "" where the cluster names a Python. Standard input says what the cluster is to be:
{name, cluster: its section of the clusters file, requirements: of this Python, in_image: of the one in its container,
server: a name that every pod can resolve, test_job}. It needs Python alone.
"""

import json
import os
import platform
import shlex
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clusters import slurm_checkup
from clusters.checks import DEVICES, Check, disk_check
from clusters.container_checkup import check_container
from clusters.package_checks import installed_here, packages_check
from clusters.probe import probe
from clusters.remote.setup import is_ready
from runfolder.folders import home, writable

_NAMES_S = 20.0  # a packet that nobody answers is sent again several times
_TORCH_S = 90.0  # importing torch from a cold disk takes long
_RESOLVE = "import socket, sys; socket.getaddrinfo(sys.argv[1], None)"
_BUILD = "have the image made anew, from this version: docker build -f k8s/image/Dockerfile ."
_OTHER_ROOT = "name another `root` in the clusters file"


def main() -> None:
    """Print the checks as one line of JSON."""
    wanted = json.load(sys.stdin)
    folder = None
    if sys.argv[1]:
        folder = Path(sys.argv[1])
    checks = check_cluster(wanted, home(), folder)
    plain = [asdict(check) for check in checks]
    print(json.dumps(plain))


def check_cluster(wanted: dict[str, Any], root: Path, environment: Path | None) -> Iterator[Check]:
    """All checks of the cluster of this machine; `environment` is its folder where Fleetune makes one."""
    config = wanted["cluster"]
    is_pod = config["kind"] == "kubernetes"
    yield _mounted_check(root) if is_pod else _root_check(root)
    if is_pod:
        yield _names_check(wanted["server"], wanted["name"])
        yield _ray_check()
    yield disk_check(root, f"free some space, or {_OTHER_ROOT}")
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    has_packages = environment is None or is_ready(environment)
    if environment:
        yield _environment_check(environment, wanted["name"])
    if has_packages:
        mend = _BUILD if is_pod else _mend_packages(environment, config)
        yield packages_check("packages", wanted["requirements"], installed_here(wanted["requirements"]), mend)
    if config["kind"] == "slurm":
        yield from slurm_checkup.check_slurm(config)
        if config["container"]:
            yield from check_container(config["container"], wanted["in_image"])
    if wanted["test_job"] and has_packages:
        yield _test_job(config, root)


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


def _names_check(server: str, cluster: str) -> Check:
    """Whether pods can resolve names, which network policies may keep them from."""
    question = [sys.executable, "-P", "-c", _RESOLVE, server]
    said = probe(question, _NAMES_S)
    if not said.problem:
        return Check("names", "ok", f"{server} is resolved")
    mend = f"fleetune k8s install --cluster {cluster}, whose network policies let pods ask at ports 53 and 5353"
    return Check("names", "fail", f"pods cannot resolve names ({server}: {said.problem}), so no run starts", mend)


def _ray_check() -> Check:
    """Whether KubeRay can start Ray, which it does by that name, whatever Python the runs have."""
    found = shutil.which("ray")
    if found:
        return Check("ray", "ok", found)
    mend = "have the image's PATH name its folder, as k8s/image/Dockerfile does"
    return Check("ray", "fail", "no `ray` is on the PATH of the image, so no pod of a run starts", mend)


def _environment_check(environment: Path, name: str) -> Check:
    """Whether the environment that Fleetune makes is there."""
    if is_ready(environment):
        return Check("environment", "ok", str(environment))
    return Check("environment", "fail", "not made yet", f"fleetune clusters setup {name}")


def _mend_packages(environment: Path | None, config: dict[str, Any]) -> str:
    """How the Python of a cluster gets the packages that it is to have."""
    if environment:
        return f"rm -r {shlex.quote(str(environment))} there, then have it made again"
    package = "fleetune" if config.get("container") else "'fleetune[train]'"
    return f"pip install {package} there, or remove `python` from the cluster: then Fleetune installs them"


def _test_job(config: dict[str, Any], root: Path) -> Check:
    """What torch sees where workers run."""
    if config["kind"] == "slurm":
        return slurm_checkup.run_test_job(config, root)
    said = probe([sys.executable, "-P", "-c", DEVICES], _TORCH_S)
    if said.problem:
        return Check("test job", "fail", said.problem, "look at nvidia-smi there")
    return Check("test job", "ok", said.output.strip())


if __name__ == "__main__":
    main()
