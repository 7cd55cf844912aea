"""Values that a shell would take for something else: each is refused in one line, or arrives as it is.

The batch script runs in a real bash whose `exec` prints what it would start, and the command for a far machine in the
shell that ssh would give it to.
"""

import random
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from sampling import SEED

from clusters.base import SubmissionRefused
from clusters.container import Container, python_in
from clusters.environment import SECRETS
from clusters.remote.code import Code, installed_code
from clusters.remote.link import Ssh
from clusters.remote.lock import installed_lock
from clusters.remote.machine import FarMachine
from clusters.slurm import Slurm
from clusters.slurm_script import SlurmConfig
from orchestrator.clusters_file import read_clusters
from orchestrator.errors import InputError
from orchestrator.planning import spec
from runfolder.job import Job
from runfolder.record import load_job
from runfolder.site import LocalSite

CASES = 300
LONGEST_LINE = 1000  # characters of a message
_PARTS = (
    *("'", '"', "`touch CANARY`", "$(touch CANARY)", "; touch CANARY; ", "\ntouch CANARY\n", "&& touch CANARY"),
    *(
        "\n#SBATCH --wrap=id\n",
        "\\",
        "\\\n",
        "$HOME",
        "${IFS}",
        "!!",
        "*",
        "~",
        "%j",
        "%",
        "#",
        " ",
        "\t",
        "\r",
        "\x1b[2J",
    ),
    *(
        "-",
        "--",
        "-rf",
        "--wrap=id",
        "EOF",
        "\u2028",
        "\x85",
        "ü",
        "日本",
        "\U0001f600",
        "\u202e",
        "\ud800",
        "\0",
        "x" * 65536,
    ),
    *("a", "b1", "_", "/tmp", "=", "'\"'\"'", "$'\\n'", "|", ">CANARY", "<(id)", "{a,b}", "[x]"),
)
_NAMES = (
    *("PATH", "LD_PRELOAD", "BASH_ENV", "IFS", "PS4", "UID", "SHLVL", "RANDOM", "_", "PWD", "SLURM_JOB_ID", "LC_ALL"),
    *("HF_TOKEN", "FLEETUNE_HOME", "A\n", "é", "A-B", "A=B", "1A", "BASH_FUNC_x%%", "PYTHONPATH"),
)
_PRINTED = """
exec() { for last in "$@"; do printf '%s\\0' "$last"; done; printf '\\0'; /usr/bin/env -0; }
. "$1"
"""


@dataclass
class Case:
    """A job and a cluster with hostile values somewhere in them."""

    rng: random.Random
    job: dict[str, Any] = field(default_factory=lambda: {"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
    cluster: dict[str, Any] = field(default_factory=lambda: {"kind": "slurm", "link": {"ssh": "there"}})

    def __post_init__(self) -> None:
        for _ in range(self.rng.choice([1, 1, 2])):
            where = self.rng.randrange(9)
            if where < 3:
                name = self.rng.choice([self.text(), *_NAMES, "PLAIN", "PLAIN2", "PLAIN3"])
                self.job.setdefault("env", {})[name] = self.text()
            elif where == 3:
                self.cluster.setdefault("env", {})[self.rng.choice(["PLAIN", self.text()])] = self.text()
            elif where == 4:
                self.job["name"] = self.text()
            elif where == 5:
                self.job["data"] = self.rng.choice(["", "cluster:/", "/"]) + self.text()
                if self.rng.random() < 0.5:
                    self.cluster["container"] = "/images/a.sif"
            elif where == 6:
                self.cluster["container"] = self.container()
            else:
                keys = ["partition", "account", "qos", "constraint", "reservation", "gpu_type", "walltime"]
                self.cluster[self.rng.choice([*keys, "root", "root", "python", "python", "link"])] = self.text()

    def container(self) -> object:
        """A container with a hostile value in it."""
        container: dict[str, Any] = {"image": f"/images/{self.text()}"}
        key = self.rng.choice(["image", "python", "mounts", "runtime", None])
        if key is None:
            return self.text()
        if key != "image":
            container["image"] = "/images/a.sif"
            container[key] = [f"/a{self.text()}"] if key == "mounts" else self.text()
        return container

    def text(self) -> str:
        """A few parts in a row."""
        return "".join(self.rng.choices(_PARTS, k=self.rng.randrange(1, 5)))


def run(command: list[str], folder: Path) -> bytes:
    """What a command prints in a folder, with as little in its environment as a batch job has."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True).stdout


def check(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take a case as far as it goes; gives what refused it, or nothing."""
    clusters = folder / "clusters.yaml"
    clusters.write_text(yaml.safe_dump({"hpc": case.cluster}))
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(clusters))
    root = case.cluster.get("root")
    try:
        config = read_clusters()["hpc"]
        assert isinstance(config, SlurmConfig)
        job = spec.validate(case.job)
        home = folder / root if root else folder / "home"
        site = LocalSite(folder / "runs")
        site.create("a-0123456789", {"cluster": "hpc", "submitted": 0.0, "job": job.dump()})
        assert load_job(folder / "runs" / "a-0123456789") == job
        check_far_command(config, folder)
        request = Slurm(config, home).request(job, "a-0123456789", 1, ("HF_TOKEN",))
    except (InputError, SubmissionRefused) as error:
        return str(error)
    assert "hf_secret" not in request.text
    environment = {**config.env, **job.env, "FLEETUNE_HOME": str(home)}
    inside: list[str] = []
    if config.container:
        paths = [str(home / "code" / installed_code().digest), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = ":".join(filter(None, paths))
        inside = check_container(config.container, job.data.train, home)
    check_script(request.text, environment, [request.run_dir, "a-0123456789-s1", *inside], folder)
    return ""


def check_container(container: Container, source: str, home: Path) -> list[str]:
    """The command of Python in a container, whose options are one path each; gives it."""
    command = python_in(container, home, Job.model_validate({"base": "b", "data": source, "train": {"steps": 1}}))
    *options, image, python = command[4:]
    assert all(option == "--bind" for option in options[::2])
    assert all(re.fullmatch(r"/[^\s,'\"$`;&|<>(){}*!#%\\~]+", value) for value in (*options[1::2], image)), command
    assert python and not python.startswith("-")
    return command


def check_far_command(config: SlurmConfig, folder: Path) -> None:
    """The command for the far machine has there the arguments that it has here."""
    machine = FarMachine("hpc", Ssh("there"), config, Code({}, "0123"), installed_lock())
    line = machine.command("printf '%s\\0' \"$@\"")[-1]
    assert run(["sh", "-c", line], folder).split(b"\0") == [
        *(value.encode() for value in (config.root or "", "0123", config.python or "", machine.lock.digest, "0")),
        b"",
    ]


def check_script(text: str, environment: dict[str, str], arguments: list[str], folder: Path) -> None:
    """The batch script has nothing but these variables and this command, and options that are one word each."""
    path = folder / "script.sh"
    path.write_text(text)
    run(["bash", "-n", str(path)], folder)
    head = text.partition("\ntrap ")[0].splitlines()[1:]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=([^\s'\"\\#%]+|'[^\s'\"\\]+'))?", line) for line in head), head
    command, _, variables = run(["bash", "-c", _PRINTED, "bash", str(path)], folder).partition(b"\0\0")
    expected = [sys.executable, "-P", "-m", "clusters.allocation", *arguments]
    assert command.decode().split("\0") == expected
    found = dict(line.split("=", 1) for line in variables.decode().split("\0") if line)
    assert {name: found.get(name) for name in environment} == environment
    assert found.keys() - environment.keys() <= {"PATH", "HOME", "PWD", "SHLVL", "_", "OLDPWD"}


def test_hostile_values_arrive_or_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    refused = 0
    for number in range(CASES):
        case = Case(random.Random(SEED * CASES + number))
        folder = tmp_path / str(number)
        folder.mkdir()
        lines = check(case, folder, monkeypatch).splitlines()
        refused += bool(lines)
        assert len(lines) <= 2 and all(len(line) < LONGEST_LINE and line.isprintable() for line in lines), lines
        assert not list(folder.rglob("*CANARY*")), number
    assert CASES // 4 < refused < CASES * 3 // 4, refused
