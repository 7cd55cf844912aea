"""Trials of one submission each, in which a seed breaks link, client, far side and SLURM: `python ... FOLDER`.

A line of the input is the seed of a trial, a line of the output what came of it, as JSON. A client is the real
`submit` with the real far side, which are forked, not started; the pipes between them are cut after a byte of some
message. SLURM's commands alone stand in for something (slurm_model.py).
"""

import datetime
import gc
import io
import json
import os
import random
import select
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import IO, Any

import yaml
from slurm_model import MISHAPS, SlurmModel, TimeoutExpired

import clusters.slurm
from clusters import allocation, answer, closing, slurm_commands
from clusters.base import Unreachable
from clusters.config import SshLink
from clusters.remote import cluster as remote_cluster
from clusters.remote import far_side
from clusters.remote import site as remote_site
from clusters.remote.code import Code
from clusters.remote.link import ThisHost
from clusters.remote.lock import installed_lock
from clusters.remote.machine import FarMachine
from clusters.slurm_script import SlurmConfig
from orchestrator import backends, begun, runs, submit
from orchestrator.errors import InputError
from orchestrator.planning import freeze, preflight, survey
from runfolder import files, record, secrets
from runfolder.site import LocalSite

Plan = dict[str, Any]
Ending = tuple[str, str]  # how a client ended, and what it said
MOST_TRIES = 12
REFUSED_TRIES = 4  # where an earlier one may have been taken, a refusal leaves that open
CLIENT = [module.__file__ for module in (submit, begun, far_side, remote_cluster, remote_site)]
KEPT: list[far_side.FarSide] = []
THERE = [module.__file__ for module in (clusters.slurm, slurm_commands, record, secrets, files)]


def kill_at_line(number: int, modules: list[str | None]) -> None:
    """Die by SIGKILL before the so-manieth line that this process runs in these modules."""
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if event == "call":
            return trace if frame.f_code.co_filename in modules else None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def forked(action: Callable[[], object], *kept: int) -> int:
    """A process that does something and ends, with these descriptors alone beside its input and outputs."""
    pid = os.fork()
    if pid:
        return pid
    try:
        below = 3
        for descriptor in sorted(kept):
            os.closerange(below, descriptor)
            below = descriptor + 1
        os.closerange(below, 256)
        action()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)


class Trial:
    """One submission, its site, and the laptops that it is made from."""

    def __init__(self, root: Path, seed: int, job: Plan) -> None:
        self.rng = random.Random(seed)
        self.name = f"t{seed}"
        self.job = {**job, "name": self.name}
        self.root = root
        self.there = root / "there"
        self.slurm = SlurmModel(root)
        self.alive, self.held = os.pipe()  # every process of the trial holds the writing end
        self.run_id = runs.new_id(self.name) if self.rng.random() < 0.5 else None
        self.refuses = self.rng.random() < 0.1
        self.day = 0  # of the month: each try is made on another one
        self.happened: Counter[str] = Counter()
        # What one of two laptops is refused, the other may not be: then it is cancelled.
        kinds = ["", "", *MISHAPS, "late", "killed"] + ([] if self.run_id else ["refused"])
        mishaps = [self.rng.choice(kinds) for _ in range(self.rng.randrange(3))]
        failures = [self.rng.randrange(12) for _ in range(self.rng.choice([0, 0, 0, 1]))]
        starts = [self.rng.randrange(40) for _ in range(self.rng.choice([0, 0, 1, 8]))]
        self.happened.update(mishap for mishap in mishaps if mishap)
        lateness = self.rng.randrange(1, 12)
        takes_one = not failures and self.rng.random() < 0.2
        self.happened["lost"] += len(failures)
        self.slurm.begin(
            mishaps=mishaps,
            starts=starts,
            failures=failures,
            lateness=lateness,
            refuses=self.refuses,
            tells=self.rng.random() < 0.5,
            takes_one=takes_one,
        )

    def run(self) -> Plan:
        """Submit until it answers, and have all jobs run; gives what came of it."""
        endings: list[Ending] = []
        problem = ""
        troubled = self.rng.choice([1, 1, 1, 2])
        try:
            for number in range(REFUSED_TRIES if self.refuses else MOST_TRIES):
                plan = self.trouble() if number < troubled else {}
                endings += self.attempts(plan)
                if any(ending in ("submitted", "refused") for ending, _ in endings):
                    break
            self.await_all()
            self.check(endings)
        except AssertionError as error:
            problem = str(error)
        os.close(self.alive)
        return {"name": self.name, "endings": endings, "happened": self.happened, "problem": problem}

    def trouble(self) -> Plan:
        """What breaks in one try."""
        kind = self.rng.choice(["none", "request", "request", "answer", "answer", "client", "far side", "two"])
        if kind == "none":
            return {}
        if kind == "two" and self.run_id is None:
            kind = "far side"
        self.happened[kind] += 1
        plan: Plan = {"two": kind == "two"}
        if kind in ("request", "answer") or (kind == "two" and self.rng.random() < 0.5):
            way = kind if kind != "two" else "answer"
            plan["cut"] = {"way": way, "line": self.rng.randrange(15), "share": self.rng.choice([0, 0.3, 0.9, 1])}
        if kind == "client":
            plan["kill client"] = self.rng.randrange(1, 1200)
        if kind == "far side":
            plan["kill far side"] = self.rng.randrange(1, 130)
        return plan

    def attempts(self, plan: Plan) -> list[Ending]:
        """A try by one laptop, or by two at once; the first that says it has submitted nothing has not."""
        self.day += 1
        endings = self.endings_of(plan)
        if self.day == 1 and all("this try has submitted nothing" in said for _, said in endings):
            assert self.slurm.asked == 0, endings
        return endings

    def endings_of(self, plan: Plan) -> list[Ending]:
        """How a try of one laptop ends, or those of two at once."""
        if plan.get("two"):
            pipes = [os.pipe() for _ in range(2)]
            for number, (_, told) in enumerate(pipes):
                forked(partial(self.told, plan, number, told), told, self.held)
                os.close(told)
            return [read_ending(reading) for reading, _ in pipes]
        if "kill client" in plan:
            reading, told = os.pipe()
            forked(lambda: self.told(plan, 0, told), told, self.held)
            os.close(told)
            return [read_ending(reading)]
        return [self.client(plan, 0, lambda _: None)]

    def told(self, plan: Plan, laptop: int, told: int) -> None:
        """Be a client, and tell how it ended."""
        if "kill client" in plan:
            kill_at_line(plan["kill client"], CLIENT)

        def tell(ending: Ending) -> None:
            os.write(told, json.dumps(ending).encode() + b"\n")

        ending = self.client(plan, laptop, lambda done: tell(("submitted", done.run_id)))
        sys.settrace(None)
        tell(ending)

    def client(self, plan: Plan, laptop: int, announce: Callable[[submit.Submission], None]) -> Ending:
        """Submit as the command does; gives how it ended."""
        os.environ["FLEETUNE_HOME"] = str(self.root / f"laptop-{laptop}")
        survey.datetime = SimpleNamespace(date=SimpleNamespace(today=self.today))  # type: ignore[attr-defined]
        side = self.far_side(plan)
        backends.CLUSTERS["hpc"] = lambda: remote_cluster.RemoteCluster(side)
        try:
            done = submit.submit(self.job, cluster="hpc", run_id=self.run_id, announce=announce)
            return "submitted", done.run_id
        except InputError as error:
            return "refused", str(error)
        except Unreachable as error:
            return "unknown", str(error)
        finally:
            if plan:
                side.close()

    def today(self) -> datetime.date:
        """The date of the try that is made."""
        return datetime.date(2026, 11, self.day)

    def far_side(self, plan: Plan) -> far_side.FarSide:
        """A connection to where the runs are; the same one for all clients for which nothing breaks."""
        far_side.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
            Popen=lambda *_, stderr, **__: Connection(self, plan, stderr), PIPE=-1, TimeoutExpired=TimeoutExpired
        )
        if not plan and KEPT:
            return KEPT[0]
        config = SlurmConfig(kind="slurm", link=SshLink(ssh="there"), root=str(self.there), partition="low")
        side = far_side.FarSide(FarMachine("hpc", ThisHost(), config, Code({}, "0"), installed_lock()))
        if not plan:
            KEPT.append(side)
        return side

    def await_all(self) -> None:
        """Wait until no process of the trial is left."""
        os.close(self.held)
        assert os.read(self.alive, 1) == b""
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def check(self, endings: list[Ending]) -> None:
        """One job did work, or none where it was refused; raises AssertionError."""
        kinds = {kind for kind, _ in endings}
        assert kinds <= {"submitted", "refused", "unknown", "killed"}, endings
        folders = [name for name in LocalSite(self.there / "runs").ids() if runs.name_of(name) == self.name]
        if self.refuses or "refused" in kinds:
            assert "submitted" not in kinds and self.slurm.taken == 0, endings
            assert not self.slurm.drain(self.work_together), endings
            return
        assert "submitted" in kinds, endings
        told = {run_id for kind, run_id in endings if kind == "submitted"}
        assert told == set(folders), (told, folders)
        (run_id,) = told
        worked = self.slurm.drain(self.work_together)
        if not worked and self.happened["lost"]:  # SLURM lost it afterwards: once more, and it has one again
            self.run_id = run_id
            ending = self.client({}, 0, lambda _: None)
            for _ in range(MOST_TRIES):  # until it is known what becomes of the one that was lost
                if ending[0] == "unknown":
                    ending = self.client({}, 0, lambda _: None)
            assert ending == ("submitted", run_id)
            worked = self.slurm.drain(self.work_together)
        assert len(set(worked)) == 1, f"jobs that did work: {worked} of {self.slurm.taken}; {endings}"
        run_dir = self.there / "runs" / run_id
        assert secrets.read_secrets(run_dir) == {"HF_TOKEN": "hf_secret"}
        assert (run_dir / "secrets.json").stat().st_mode & 0o077 == 0
        assert record.load_job(run_dir).name == self.name
        self.happened["redundant job"] += self.slurm.taken > 1

    def work_together(self, jobs: list[Plan]) -> None:
        """Run jobs at the same time; a node may be lost as its job begins, which is requeued then."""
        lost = {}
        for job in jobs:
            line = self.rng.choice([None, None, self.rng.randrange(1, 16)])

            def start(job: Plan = job, line: int | None = line) -> None:
                if line:
                    kill_at_line(line, [allocation.__file__])
                self.slurm.do(job)

            if len(jobs) == 1 and not line:
                self.slurm.do(job)
            else:
                lost[forked(start)] = job
        for pid, job in lost.items():
            if os.waitpid(pid, 0)[1]:
                self.happened["node lost"] += 1
                self.slurm.do(job)


class Connection:
    """What FarSide takes for its ssh: the far side itself, whose input and output are cut as the plan says."""

    def __init__(self, trial: Trial, plan: Plan, stderr: IO[bytes]) -> None:
        self._status: int | None = None
        asked, ask = os.pipe()
        said, say = os.pipe()
        descriptors = [asked, say, stderr.fileno(), *([trial.held] if plan else [])]
        is_pooled = os.getpid() == POOL.owner and "kill far side" not in plan and POOL.serve(plan, descriptors)
        if not is_pooled:
            self._pid = forked(partial(answer_on, trial.root, plan, descriptors), *descriptors)
        self._is_awaited = not is_pooled and "cut" not in plan
        os.close(asked)
        os.close(say)
        self.stdin, self.stdout = os.fdopen(ask, "wb"), os.fdopen(said, "rb")

    def wait(self, timeout: float | None = None) -> int:  # noqa: ARG002
        """The exit code, once the process has ended, or that of a broken link, whose far side may go on."""
        if not self._is_awaited:
            return far_side.BROKEN
        if self._status is None:
            self._status = os.waitpid(self._pid, 0)[1]
        return os.waitstatus_to_exitcode(self._status)

    def kill(self) -> None:
        """End the link, not the far side: that ends with its input."""


def answer_on(root: Path, plan: Plan, descriptors: list[int]) -> None:
    """Be the far side, `python -m clusters.answer`, on these descriptors, and close them."""
    for number, descriptor in enumerate(descriptors):
        if number < 3:
            os.dup2(descriptor, number)
            os.close(descriptor)
    os.environ["FLEETUNE_HOME"] = str(root / "there")
    os.environ.pop("HF_TOKEN", None)
    for module in (slurm_commands, closing):
        module.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
            run=SlurmModel(root).run, TimeoutExpired=TimeoutExpired
        )
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    if cut := plan.get("cut"):
        cut_lines = partial(CutLines, line=cut["line"], share=cut["share"])
        if cut["way"] == "request":
            sys.stdin = cut_lines(sys.stdin)  # type: ignore[assignment]
        else:
            sys.stdout = cut_lines(sys.stdout)  # type: ignore[assignment]
    if "kill far side" in plan:
        kill_at_line(plan["kill far side"], THERE)
    with suppress(SystemExit, BrokenPipeError):
        answer.main()


class Pool:
    """Far sides that serve one connection after the other, as a fork costs more than all that it does."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.root = Path()
        self._idle: list[socket.socket] = []
        self._busy: list[socket.socket] = []

    def serve(self, plan: Plan, descriptors: list[int]) -> bool:
        """Have a connection served."""
        for asking in list(self._busy):
            if select.select([asking], [], [], 0)[0]:
                self._busy.remove(asking)
                if asking.recv(1):  # else it was killed
                    self._idle.append(asking)
        if not self._idle:
            ours, theirs = socket.socketpair()
            forked(partial(self._answer, theirs), theirs.fileno())
            theirs.close()
            self._idle.append(ours)
        asking = self._idle.pop()
        socket.send_fds(asking, [json.dumps(plan).encode()], descriptors)
        self._busy.append(asking)
        return True

    def _answer(self, asked: socket.socket) -> None:
        answer.os = SimpleNamespace(_exit=sys.exit, umask=os.umask)  # type: ignore[attr-defined]
        nothing = os.open(os.devnull, os.O_RDWR)
        while True:
            text, descriptors, _, _ = socket.recv_fds(asked, 1 << 16, 4)
            if not text:
                return
            answer_on(self.root, json.loads(text), descriptors)
            for number in range(3):
                os.dup2(nothing, number)
            for descriptor in descriptors[3:]:
                os.close(descriptor)
            asked.send(b".")


POOL = Pool()


class CutLines(io.TextIOBase):
    """What comes to a far side, or from it: lines up to the one in the middle of which the link is cut."""

    def __init__(self, stream: IO[str], line: int, share: float) -> None:
        self._stream = stream
        self._left = line
        self._share = share
        self._text = ""

    def readline(self, size: int | None = -1) -> str:  # type: ignore[override]  # noqa: ARG002
        """The next request; with the last one, who asks sees the cut while it is still worked on."""
        if self._left < 0:
            return ""
        line = self._stream.readline()
        self._left -= 1
        if self._left >= 0:
            return line
        hang_up()
        return line[: int(len(line) * self._share)]

    def write(self, text: str) -> int:
        """Pass on an answer, or a part of it and nothing more."""
        self._text += text
        if text.endswith("\n"):
            self._left -= 1
            end = len(self._text) if self._left >= 0 else int(len(self._text) * self._share)
            os.write(1, self._text[:end].encode())
            self._text = ""
        if self._left < 0:
            hang_up()
            raise BrokenPipeError
        return len(text)


def hang_up() -> None:
    """Let who reads this process's output see its end, and what is written to it from now on be lost."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def read_ending(reading: int) -> Ending:
    """How a client ended that tells it, by the last line that it wrote."""
    with os.fdopen(reading) as stream:
        lines = stream.read().splitlines()
    if not lines:
        return "killed", ""
    kind, said = json.loads(lines[-1])
    return kind, said


def main(root: Path) -> None:
    """Run the trials whose seeds come in, one after the other."""
    os.environ |= {"PATH": "/nowhere", "HF_TOKEN": "hf_secret"}  # no git
    os.environ["FLEETUNE_HOME"] = str(root / "home")
    POOL.root = root
    job, _ = freeze.read_job(root / "job.yaml")
    model, _ = preflight._checked_base(job, by_config=False)
    assert model
    findings = preflight.Findings(model, None, None, ())
    found = freeze.versions()
    freeze.versions = lambda: found
    freeze.git_state = lambda _: None
    os.fsync = lambda _: None  # no machine loses its power
    record.yaml.safe_dump = partial(yaml.dump, Dumper=yaml.CSafeDumper)  # half of what a trial takes, otherwise

    def checked(_job: object, cluster: remote_cluster.RemoteCluster, progress: object) -> object:  # noqa: ARG001
        cluster.capacity()
        return findings

    submit._checked = checked  # type: ignore[assignment]  # of the same job each time
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(Trial(root, int(line), job.dump()).run()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
