"""How long a cluster takes to acknowledge a submission, to tell of 500 runs, to report a failure, and to train again.

    python benchmarks/recovery.py --site slurm --out benchmarks/results/recovery-slurm.json
    python benchmarks/recovery.py --cluster hpc --out hpc.json

`--site` starts one of the tests' own: `slurm`, two nodes that are namespaces of this machine, or `ssh`, the local
cluster of another home behind an sshd on loopback. There a worker of a run is killed, and then a node. On a cluster
of the clusters file nothing is killed: the run is paused and resumed.

A submission is a whole command `fleetune submit`, over a connection that is open, with all files there. The times of
an attempt are seconds since its nodes were granted, or, where the run kept them, since its predecessor was seen to
have ended: as this program sees that, which looks five times a second. What follows is from the run folder.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / part) for part in ("", "orchestrator", "clusters"))]

from layouts import commit  # noqa: E402
from local_place import LocalPlace  # noqa: E402
from place import Place  # noqa: E402
from run_folders import claim, make_run, plan, steps  # noqa: E402
from slurm_place import SlurmPlace  # noqa: E402
from slurm_site import SlurmSite  # noqa: E402
from ssh_server import close_far_sides, ssh_server  # noqa: E402

import fleetune  # noqa: E402
from clusters.local import Local  # noqa: E402
from orchestrator.backends import open_cluster  # noqa: E402
from orchestrator.runs import find, new_id  # noqa: E402
from runfolder.appended import Position, parse_lines  # noqa: E402

RUNS, ATTEMPTS = 500, 5
LOOK_S = 0.2
STEPS = 8  # that an attempt takes before something happens to it
FLEETUNE = str(Path(sys.executable).with_name("fleetune"))


def main() -> None:
    """Measure a cluster and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--site", choices=["slurm", "ssh"])
    where.add_argument("--cluster", help="a name in the clusters file")
    parser.add_argument("--workers", type=int, default=1, help="of each node of a cluster, without GPUs")
    parser.add_argument("--submissions", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "commit": commit(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "cluster": arguments.cluster or arguments.site,
    }
    with tempfile.TemporaryDirectory(prefix="ft-") as folder, ExitStack() as stack:
        job = write_job(Path(folder), {"workers_per_node": arguments.workers})
        if arguments.cluster:
            result["submit"] = submissions(arguments.cluster, job, arguments.submissions)
            result["status"] = looks(arguments.cluster)
            result["attempts"] = paused_and_resumed(arguments.cluster, job)
        else:
            own = {"slurm": slurm_place, "ssh": ssh_place}[arguments.site]
            place = stack.enter_context(own(Path(folder)))
            job = write_job(Path(folder), place.resources)
            with place.filled():
                result["submit"] = submissions(place.name, job, arguments.submissions)
            make_runs(place.root / "runs")
            result["status"] = looks(place.name)
            result |= killed(place, job)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


@contextmanager
def slurm_place(folder: Path) -> Iterator[Place]:
    """A SLURM of two nodes of four cores, from its login node."""
    with SlurmSite(folder / "slurm", nodes=2) as site:
        os.environ.update(site.environment)
        root = folder / "hpc"
        root.mkdir(mode=0o700)
        declare(folder, "hpc", {"kind": "slurm", "root": str(root), "partition": "low", "cpus_per_worker": 1})
        yield SlurmPlace("hpc", site, root)
        site.run("scancel", "--user=root")


@contextmanager
def ssh_place(folder: Path) -> Iterator[Place]:
    """The local cluster of another home, behind an sshd."""
    root = folder / "there"
    with ssh_server(folder / "s") as server:
        os.environ["PATH"] = f"{server.binaries}:{os.environ['PATH']}"
        link = {"link": {"ssh": "there"}, "python": sys.executable}
        declare(folder, "there", {"kind": "local", "root": str(root), **link})
        yield LocalPlace("there", root)
        close_far_sides()
        Local(root).stop()


def declare(folder: Path, name: str, config: dict[str, Any]) -> None:
    """Let a clusters file have one cluster, and a laptop of its own use that."""
    (folder / "clusters.yaml").write_text(yaml.safe_dump({name: config}))
    os.environ |= {"FLEETUNE_CLUSTERS": str(folder / "clusters.yaml"), "FLEETUNE_HOME": str(folder / "laptop")}


def write_job(folder: Path, resources: dict[str, int]) -> Path:
    """A job on the tiny base that takes many small steps, with a checkpoint after every five."""
    rows = [{"prompt": f"{number} + {number} =", "completion": f" {2 * number}"} for number in range(200)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "name": "recovery",
        "base": str(ROOT / "examples" / "tiny"),
        "method": {"kind": "lora", "rank": 4},
        "data": {"train": "sums.jsonl", "seq_len": 64},
        "train": {"steps": 100_000, "batch_tokens": 256},
        "checkpoint": {"every": 5},
        "resources": resources,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def submissions(cluster: str, job: Path, number: int) -> dict[str, Any]:
    """Seconds of submissions of the same job, each cancelled then; the first one sends the files, and is left out."""
    seconds = []
    for _ in range(number + 1):
        began = time.monotonic()
        command = [FLEETUNE, "submit", str(job), "--cluster", cluster]
        run_id = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        seconds.append(time.monotonic() - began)
        fleetune.cancel(run_id)
    return {"first": seconds[0], **summary(seconds[1:])}


def make_runs(root: Path) -> None:
    """Run folders with some attempts each."""
    first = make_run(root, new_id("many"), None)
    for number in range(ATTEMPTS):
        attempt = claim(first, 10 * number or None)
        plan(attempt)
        steps(attempt, 10 * number + 1, 10 * number + 12)
        attempt.write_verdict({"kind": "node_lost", "reason": "", "evidence": ""})
    for _ in range(RUNS - 1):
        shutil.copytree(first, root / new_id("many"), copy_function=os.link)


def looks(cluster: str) -> dict[str, Any]:
    """Seconds of looks at all runs of a cluster over a connection that is open, and of the shortest request."""
    backend = open_cluster(cluster)
    runs = len(fleetune.list_runs(cluster))
    seconds = [timed(lambda: fleetune.list_runs(cluster)) for _ in range(5)]
    shortest = [timed(backend.capacity) for _ in range(5)]
    return {"runs": runs, **summary(seconds), "capacity_alone": statistics.median(shortest)}


def killed(place: Place, job: Path) -> dict[str, Any]:
    """A run whose worker is killed, and then a node: when that was reported, and when it trained again."""
    submitted = time.time()
    run_id = fleetune.submit(job, cluster=place.name).run_id
    has_its_node = isinstance(place, LocalPlace)  # always
    reported = {}
    with nullcontext([submitted]) if has_its_node else seen_grants(run_id) as grants:
        victims = {"worker": lambda: place.end_worker(run_id), "node": place.lose_node}
        for attempt, (name, kill) in enumerate(victims.items(), 1):
            await_steps(run_id, attempt)
            began = time.monotonic()
            kill()
            await_end(run_id, attempt)
            grants.append(time.time())
            reported[name] = time.monotonic() - began
        await_steps(run_id, 3)
    fleetune.cancel(run_id)
    return {"reported_after": reported, "attempts": breakdowns(run_id, grants)}


def paused_and_resumed(cluster: str, job: Path) -> list[dict[str, float]]:
    """A run that is paused, and resumed."""
    run_id = fleetune.submit(job, cluster=cluster).run_id
    with seen_grants(run_id) as grants:
        await_steps(run_id, 1)
        fleetune.pause(run_id)
        fleetune.wait(run_id)
        fleetune.resume(run_id)
        await_steps(run_id, 2)
    fleetune.cancel(run_id)
    return breakdowns(run_id, grants)


def await_steps(run_id: str, attempts: int) -> None:
    """Wait until the last of so many attempts has taken some steps."""
    while len(rows := of_attempts(run_id, "metrics.jsonl")) < attempts or len(rows[-1]) < STEPS:
        time.sleep(LOOK_S)


def await_end(run_id: str, attempt: int) -> None:
    """Wait until somebody who looks is told that an attempt has ended."""
    while (status := fleetune.status(run_id)).attempt == attempt and status.verdict is None:
        time.sleep(LOOK_S)


def of_attempts(run_id: str, file: str) -> list[list[dict[str, Any]]]:
    """The lines of an appended file of each attempt that has it, oldest first."""
    chunks = find(run_id).site.read(run_id, {file: Position()})[file]
    return [parse_lines(chunk.whole_lines().data, file) for chunk in chunks]


@contextmanager
def seen_grants(run_id: str) -> Iterator[list[float]]:
    """The times at which the cluster began to work on a run, after it had not, as somebody sees it who looks on."""
    grants: list[float] = []
    ended = threading.Event()

    def look_on() -> None:
        worked = False
        while not ended.wait(LOOK_S):
            state = find(run_id).cluster.look([run_id])[run_id].on_cluster.state
            works = state in ("starting", "running")
            if works and not worked:
                grants.append(time.time())
            worked = works or (worked and state == "unknown")

    thread = threading.Thread(target=look_on, daemon=True)
    thread.start()
    yield grants
    ended.set()
    thread.join()


def breakdowns(run_id: str, grants: list[float]) -> list[dict[str, float]]:
    """For each attempt, the seconds from the grant of its nodes until each part of its start was over."""
    events = of_attempts(run_id, "events.jsonl")
    rows = of_attempts(run_id, "metrics.jsonl")
    found = []
    for its_events, its_rows in zip(events, rows, strict=True):
        at = {event["event"]: event["time"] for event in reversed(its_events)}
        claimed = next(event for event in its_events if event["event"] == "claimed")
        granted = max(grant for grant in grants if grant < claimed["time"])
        times = {
            **nodes_up(Path(fleetune.status(run_id).run_dir), granted, claimed["time"]),
            "ray_up": claimed["controller_began"],
            "claimed": claimed["time"],
            "workers_up": at["workers_up"],
            "base_loaded": at["base_loaded"],
            "checkpoint_loaded": at["plan"],
            "first_step": its_rows[0]["time"],
        }
        found.append({name: round(value - granted, 2) for name, value in times.items()})
    return found


def nodes_up(run_dir: Path, granted: float, claimed: float) -> dict[str, float]:
    """When the batch job of an attempt began, where its run folder is on this machine, and it has one."""
    starts = [path.stat().st_mtime for path in (run_dir / "starts").glob("*")]
    its = [start for start in starts if granted - 2 < start < claimed]
    return {"nodes_up": its[-1]} if its else {}


def timed(act: Callable[[], object]) -> float:
    """Seconds that something takes."""
    began = time.monotonic()
    act()
    return time.monotonic() - began


def summary(seconds: list[float]) -> dict[str, Any]:
    """What is told of several measurements."""
    median = statistics.median(seconds)
    return {"count": len(seconds), "median": median, "least": min(seconds), "most": max(seconds)}


if __name__ == "__main__":
    main()
