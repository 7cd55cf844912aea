"""SLURM for real, on nodes of namespaces: a run is submitted once, trains over two nodes, and survives their loss."""

import json
import os
import queue
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from contract import NodeContract, QueueContract, RunContract
from cut_proxy import CutProxy, cut_somewhere
from evaluations import make_adapter
from jobs import make_job as make_queued_job
from place import Place
from readable import files_with, submit_unseen
from sampling import SEED
from slurm_place import SlurmPlace
from slurm_site import WHY_NOT, SlurmSite, can_serve
from ssh_server import WHY_NOT as WHY_NO_SSH
from ssh_server import can_serve as can_serve_ssh
from ssh_server import ssh_server
from training_runs import LONG, assert_undisturbed, begin, train_job, wait_for
from waiting import until
from worker import OUTSIDE

import fleetune
from clusters.base import Unreachable
from clusters.checks import Check
from clusters.remote.code import installed_code
from clusters.remote.link import sockets_folder
from clusters.slurm import Slurm
from clusters.slurm_script import SlurmConfig
from orchestrator.errors import InputError
from orchestrator.serve import Serving
from orchestrator.serve_on_cluster import serve_on_cluster
from runfolder.appended import read_lines
from runfolder.chain import attempts
from runfolder.job import Job
from runfolder.resources import Resources
from serving.gateway.tenants import hash_of

pytestmark = pytest.mark.usefixtures("home")
GOLDEN = Path(__file__).parent / "golden" / "slurm.sh"
TINY = Path(__file__).parents[2] / "examples" / "tiny"


def test_the_script_is_a_pure_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    config = SlurmConfig(kind="slurm", partition="gpu", account="ml", gpu_type="h100", setup=("module load cuda",))
    resources = {"nodes": 2, "gpus_per_node": 4, "walltime": "3h"}
    plain = {"base": "b", "data": "d.jsonl", "train": {"steps": 1}, "env": {"QUOTED": "a 'b' $(c)\n`d`"}}
    job = Job.model_validate(plain | {"resources": resources})
    request = Slurm(config, tmp_path).request(job, "a-1", 1, ("HF_TOKEN",))
    text = request.text.replace(str(tmp_path), "HOME").replace(sys.executable, "PYTHON")
    assert text == GOLDEN.read_text()
    assert "hf_secret" not in request.text


def test_the_script_of_a_container_is_a_pure_function(tmp_path: Path) -> None:
    container = {
        "image": "/images/fleetune.sif",
        "python": "/opt/fleetune/bin/python",
        "mounts": ["/scratch", "/a:/b:ro"],
    }
    config = SlurmConfig.model_validate({"kind": "slurm", "container": container, "setup": ["module load apptainer"]})
    plain = {
        "base": "b",
        "data": "cluster:/data/d.jsonl",
        "train": {"steps": 1},
        "env": {"PYTHONPATH": "/scratch/mine"},
    }
    job = Job.model_validate(plain | {"resources": {"gpus_per_node": 1}})
    text = Slurm(config, tmp_path).request(job, "a-1", 1).text
    text = (
        text.replace(str(tmp_path), "HOME").replace(sys.executable, "PYTHON").replace(installed_code().digest, "CODE")
    )
    assert text == GOLDEN.with_name("slurm_container.sh").read_text()


def test_an_elastic_job_asks_for_a_range_and_keeps_what_is_left(tmp_path: Path) -> None:
    plain = {"base": "b", "data": "d.jsonl", "train": {"steps": 1}, "resources": {"nodes": "2-4"}}
    text = Slurm(SlurmConfig(kind="slurm"), tmp_path).request(Job.model_validate(plain), "a-1").text
    assert {"#SBATCH --nodes=2-4", "#SBATCH --no-kill"} < set(text.splitlines())
    assert "ntasks-per-node" not in text


@pytest.fixture(scope="module")
def site() -> Iterator[SlurmSite]:
    """Two nodes of four cores."""
    if not can_serve():
        pytest.skip(WHY_NOT)
    with tempfile.TemporaryDirectory(prefix="ft-") as folder, SlurmSite(Path(folder) / "slurm", nodes=2) as site:
        yield site


def write_clusters(folder: Path, **changes: object) -> None:
    """A clusters file with that site."""
    options = {"partition": "low", "cpus_per_worker": 1, "walltime": "60", **changes}
    config = {"kind": "slurm", "root": str(folder / "hpc"), **options}
    (folder / "clusters.yaml").write_text(yaml.safe_dump({"hpc": config}))


@contextmanager
def drained(site: SlurmSite) -> Iterator[None]:
    """Let the site's jobs wait."""
    site.run("scontrol", "update", "nodename=node[1-2]", "state=drain", "reason=test")
    try:
        yield
    finally:
        site.run("scancel", "--user=root")
        site.run("scontrol", "update", "nodename=node[1-2]", "state=resume")


@pytest.fixture
def hpc(site: SlurmSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The FLEETUNE_HOME of that site's runs."""
    root = tmp_path / "hpc"
    root.mkdir(mode=0o700)
    write_clusters(tmp_path)
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
    monkeypatch.setenv("SLURM_CONF", str(site.environment["SLURM_CONF"]))
    return root


@contextmanager
def administrator(site: SlurmSite) -> Iterator[None]:
    """Have somebody give nodes back that SLURM drained, as it does where a job's last start still ran."""
    done = threading.Event()

    def resume_nodes() -> None:
        while not done.wait(2):
            for node, state in map(str.split, site.run("sinfo", "-hN", "-p", "low", "-o", "%N %t").splitlines()):
                if state == "drain":
                    site.run("scontrol", "update", f"nodename={node}", "state=resume")

    thread = threading.Thread(target=resume_nodes)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture
def place(hpc: Path, site: SlurmSite) -> Place:
    """That site for the contract of clusters."""
    return SlurmPlace("hpc", site, hpc)


class TestQueue(QueueContract):
    """Runs that wait."""


@pytest.mark.chaos
class TestRuns(RunContract):
    """Runs on one node."""


class TestNodes(NodeContract):
    """Runs over both nodes."""


Slow = dict[str, Any]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """What makes a job's steps take two seconds and more, on any machine."""
    monkeypatch.syspath_prepend(OUTSIDE)
    return {"objective": "slow", "env": {"PYTHONPATH": OUTSIDE}}


def make_job(tmp_path: Path, base: Path, rows: Path, **changes: object) -> Path:
    """A job over two nodes."""
    both = {"sharding": {"zero": 3}, "resources": {"nodes": 2, "workers_per_node": 1}}
    return train_job(tmp_path, base, rows, **{**both, **changes})


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a site whose runs are in a container that has this Python, and of Fleetune nothing."""
    runtime, image = tmp_path / "bin" / "apptainer", tmp_path / "image"
    runtime.parent.mkdir()
    shutil.copy(Path(__file__).with_name("apptainer_stand_in.sh"), runtime)
    image.mkdir()
    paths = dict.fromkeys(["/usr", "/etc", sys.base_prefix, sys.prefix])
    (image / "paths").write_text("\n".join(paths))
    monkeypatch.setenv("PATH", f"{runtime.parent}:{os.environ['PATH']}")
    return {
        "container": {"image": str(image), "python": sys.executable},
        "setup": [f"export PATH={runtime.parent}:$PATH"],
    }


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_in_a_container_is_preempted_and_goes_on(
    container: dict[str, Any],
    place: Place,
    site: SlurmSite,
    tmp_path: Path,
    tiny_base: Path,
    sums: Path,
    launch: Any,
) -> None:
    until(lambda: "*" not in site.run("sinfo", "--noheader", "--Node", "-o", "%t"))  # all nodes answer
    write_clusters(tmp_path, **container)
    checks = {check.name: check for check in fleetune.doctor("hpc", test_job=True)}
    assert [(name, check.found) for name, check in checks.items() if check.level != "ok"] == []
    assert "torch" in checks["in the image"].found and checks["test job"].found == "CPU only"
    before = len(commands_in(container))
    site.signal_user_at_preemption(True)
    run_dir = begin(place.name, make_job(tmp_path, tiny_base, sums, **LONG))
    place.warn(run_dir.name)
    assert_undisturbed(run_dir, launch)
    assert attempts(run_dir)[0].verdict and attempts(run_dir)[0].verdict["kind"] == "preemption"
    modules = [re.search(r" -P -m (\S+)", line) for line in commands_in(container)[before:]]
    assert sorted(found[1] for found in modules if found) == (
        ["clusters.ray_process"] * 4 + ["orchestrator.controller"] * 2
    )


def commands_in(container: dict[str, Any]) -> list[str]:
    """What the stand-in for Apptainer was asked, line by line."""
    return Path(container["container"]["image"]).with_name("bin").joinpath("apptainer.asked").read_text().splitlines()


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_an_elastic_run_goes_on_with_the_nodes_that_are_left(
    place: Place, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path, launch: Any
) -> None:
    until(lambda: site.run("sinfo", "-hN", "-p", "low", "-o", "%t").split() == ["idle", "idle"])  # else it takes one
    resources = {"nodes": "1-2", "workers_per_node": 1}
    run_dir = begin(place.name, make_job(tmp_path, tiny_base, sums, **LONG, resources=resources))
    first = attempts(run_dir)[0]
    assert len(list((first.folder / "logs").glob("rank-*.log"))) == 2
    site.kill("node2")
    try:
        assert_undisturbed(run_dir, launch)
    finally:
        site.boot("node2")
    last = attempts(run_dir)[-1]
    assert len(list((last.folder / "logs").glob("rank-*.log"))) == 1
    assert [path.name for path in (run_dir / "starts").glob("*")] == ["1.0"]  # in the same allocation


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_watched", [False, True])
def test_an_elastic_run_that_loses_its_first_node_as_it_starts_goes_back_to_the_queue(
    is_watched: bool, place: Place, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path, launch: Any
) -> None:
    until(lambda: site.run("sinfo", "-hN", "-p", "low", "-o", "%t").split() == ["idle", "idle"])
    resources = {"nodes": "1-2", "workers_per_node": 1}
    run_id = fleetune.submit(make_job(tmp_path, tiny_base, sums, resources=resources), cluster="hpc").run_id
    run_dir = place.root / "runs" / run_id
    until((run_dir / "starts" / "1.0").exists, 300)
    if is_watched:
        until(lambda: "clusters.ray_node" in site.run_on("node2", "ps", "-eo", "args"))
    site.kill("node1")
    try:  # else who looks at the run sends it back, once SLURM has given the node up
        until(lambda: (run_dir / "starts" / "1.1").exists() or (not is_watched and not fleetune.status(run_id)), 300)
        assert_undisturbed(run_dir, launch)
    finally:
        site.boot("node1")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_an_elastic_run_that_loses_another_node_as_it_starts_goes_on_without_it(
    place: Place, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path, launch: Any
) -> None:
    until(lambda: site.run("sinfo", "-hN", "-p", "low", "-o", "%t").split() == ["idle", "idle"])
    resources = {"nodes": "1-2", "workers_per_node": 1}
    run_id = fleetune.submit(make_job(tmp_path, tiny_base, sums, resources=resources), cluster="hpc").run_id
    run_dir = place.root / "runs" / run_id
    until((run_dir / "starts" / "1.0").exists, 300)
    site.kill("node2")
    try:
        assert_undisturbed(run_dir, launch)
    finally:
        site.boot("node2")
    assert [path.name for path in (run_dir / "starts").glob("*")] == ["1.0"]


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_whose_first_node_dies_finishes(
    place: Place, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path, launch: Any
) -> None:
    run_dir = begin(place.name, make_job(tmp_path, tiny_base, sums, **LONG))
    site.kill("node1")
    time.sleep(1)
    site.boot("node1")
    assert_undisturbed(run_dir, launch)
    assert attempts(run_dir)[1].start is not None
    until(place.is_idle)
    assert not list(place.root.glob(".ray-*"))


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_node_that_was_cut_off_and_comes_back_changes_nothing(
    node: str, place: Place, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path, launch: Any
) -> None:
    run_dir = begin(place.name, make_job(tmp_path, tiny_base, sums, **LONG))
    with site.spare_node():
        site.cut(node)
        until(lambda: (run_dir / "starts" / "1.1").exists(), 300)  # on the other two, while what was cut off lives on
        site.heal(node)
        assert_undisturbed(run_dir, launch)
    assert [path.name for path in sorted((run_dir / "starts").iterdir())] == ["1.0", "1.1"]


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_job_that_waits_for_the_node_that_was_cut_off_goes_on(
    place: Place, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path, launch: Any
) -> None:
    run_dir = begin(place.name, make_job(tmp_path, tiny_base, sums, **LONG))
    site.cut("node1")
    until(lambda: fleetune.status(run_dir.name).state == "preempted", 300)
    site.heal("node1")
    with administrator(site):
        assert_undisturbed(run_dir, launch)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_does_not_notice_that_slurmctld_was_restarted(
    place: Place, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path, launch: Any
) -> None:
    run_dir = begin(place.name, make_job(tmp_path, tiny_base, sums, **LONG))
    site.restart_controller()
    assert_undisturbed(run_dir, launch)
    assert len(attempts(run_dir)) == 1


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("signals_user", [True, False])
def test_a_preempted_run_saves_and_goes_on_later(
    signals_user: bool,
    place: Place,
    site: SlurmSite,
    tmp_path: Path,
    tiny_base: Path,
    sums: Path,
    launch: Any,
    slow: Slow,
) -> None:
    site.signal_user_at_preemption(signals_user)
    job = make_job(tmp_path, tiny_base, sums, train={"steps": 20, "batch_tokens": 128}, **slow)
    run_dir = begin(place.name, job, steps=3)
    place.warn(run_dir.name)
    assert_undisturbed(run_dir, launch)
    first, second = attempts(run_dir)
    assert first.verdict and first.verdict["kind"] == "preemption"
    rows = read_lines(first, "metrics.jsonl")
    assert second.start and second.start.step >= rows[-1]["step"] - 1
    figures = fleetune.status(run_dir.name).figures
    assert figures and figures.goodput.queued > 5  # seconds that the other job takes


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_whose_job_was_cancelled_by_hand_waits_for_somebody_to_resume_it(
    place: Place, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path, launch: Any
) -> None:
    run_dir = begin(place.name, make_job(tmp_path, tiny_base, sums, **LONG))
    site.run("scancel", "--name", f"{run_dir.name}-s1")
    status = wait_for(run_dir.name, "unknown")
    assert re.match(r"SLURM job \d+ ended: CANCELLED .*; fleetune resume submits it again", str(status.reason))
    assert place.is_idle() and status.step >= 8
    fleetune.resume(run_dir.name)
    assert_undisturbed(run_dir, launch)
    assert [path.name for path in sorted((run_dir / "starts").iterdir())] == ["1.0", "2.0"]


@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_a_job_longer_than_its_walltime_is_a_chain(
    place: Place, tmp_path: Path, tiny_base: Path, sums: Path, launch: Any, slow: Slow
) -> None:
    resources = {"nodes": 2, "workers_per_node": 1, "walltime": "3m", "grace": 20}
    train = {"steps": 60, "batch_tokens": 128}  # which take two minutes and more; one allocation has less
    run_dir = begin(
        place.name, make_job(tmp_path, tiny_base, sums, train=train, resources=resources, **slow), steps=3
    )
    assert_undisturbed(run_dir, launch, 2400)
    saved = [attempt.verdict["kind"] for attempt in attempts(run_dir)[:-1] if attempt.verdict]
    assert saved and set(saved) == {"walltime"}


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("hpc")
def test_a_service_answers_on_its_node_until_it_is_cancelled(site: SlurmSite, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f"tenants:\n- name: alice\n  keys: ['{hash_of('ft-key')}']\n  adapters: [tiny]\n")
    served = Serving(str(TINY), (), tenants, "127.0.0.1", 0, None)
    run_id = serve_on_cluster(served, "hpc", "mine", Resources(grace=5)).run_id

    def address() -> str:
        """Where it answers, by the address of its node: names of nodes are known on nodes alone."""
        found = until(lambda: fleetune.status(run_id).address, 240)
        node, _, port = found.removeprefix("http://").partition(":")
        return f"http://{site.network}.{site.nodes.index(node) + 1}:{port}/v1/completions"

    def ask(key: str) -> int:
        body = {"model": "tiny", "prompt": "1 + 2 =", "max_tokens": 5}
        answer = httpx2.post(address(), json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        return answer.status_code

    assert (ask("ft-key"), ask("another")) == (200, 401)
    assert fleetune.status(run_id).state == "running"
    (job,) = site.run("squeue", "-h", "-o", "%i").split()
    site.run("scontrol", "requeue", job)

    def answers_again() -> bool:
        """Whether a later attempt answers; SLURM may start the job twice after this."""
        try:
            return fleetune.status(run_id).attempt > 1 and ask("ft-key") == 200
        except httpx2.TransportError:
            return False

    until(answers_again, 240)
    fleetune.cancel(run_id)
    until(lambda: fleetune.status(run_id).state == "cancelled", 120)
    until(lambda: not site.run("squeue", "-h", "-t", "RUNNING,PENDING,COMPLETING"), 60)


def test_what_would_never_start_is_refused_before_anything_is_made(
    hpc: Path, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path
) -> None:
    config = {"kind": "slurm", "root": str(hpc), "partition": "none"}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"hpc": config}))
    with pytest.raises(InputError, match="SLURM does not take this job: Invalid partition name specified"):
        fleetune.submit(make_job(tmp_path, tiny_base, sums), cluster="hpc")
    assert not list((hpc / "runs").glob("*")) and site.run("squeue", "--noheader") == ""


def test_what_slurm_does_not_take_is_cancelled(
    hpc: Path, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path
) -> None:
    # More memory than a node has: a test says of it what it says of nodes that are down.
    config = {"kind": "slurm", "root": str(hpc), "memory_per_worker": 900}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"hpc": config}))
    job = make_job(tmp_path, tiny_base, sums)
    with pytest.raises(InputError, match="Requested node configuration is not available; sums-.* is cancelled"):
        fleetune.submit(job, cluster="hpc")
    (run_dir,) = (hpc / "runs").glob("sums-*")
    status = fleetune.status(run_dir.name)
    assert status.state == "cancelled" and site.run("squeue", "--noheader") == ""
    assert "Requested node configuration is not available" in str(status.reason)


def test_the_doctor_asks_slurm(hpc: Path, site: SlurmSite, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> list[tuple[str, str]]:
        return [(check.name, check.found) for check in fleetune.doctor("hpc") if check.level == "fail"]

    until(lambda: "*" not in site.run("sinfo", "--noheader", "--Node", "-o", "%t"))  # all nodes answer
    checks = {check.name: check for check in fleetune.doctor("hpc")}
    assert [*checks] == ["run root", "disk", "python", "packages", "slurm", "partition", "options"]
    assert (wrong(), checks["partition"].found) == ([], "low")
    assert "slurm" in checks["slurm"].found
    write_clusters(hpc.parent, partition=None)
    assert (wrong(), fleetune.doctor("hpc")[-2].found) == ([], "main")
    write_clusters(hpc.parent, partition="gpu")
    assert wrong() == [("partition", "no 'gpu'; there are: main, low")]
    for option in ({"constraint": "h100"}, {"gpu_type": "h100"}, {"reservation": "mine"}):
        write_clusters(hpc.parent, **option)
        ((name, found),) = wrong()
        assert name == "options", found
    monkeypatch.setenv("PATH", "/nowhere")
    assert wrong() == [("slurm", "sinfo: No such file or directory")]


@pytest.mark.chaos
def test_a_test_job_says_what_torch_sees(hpc: Path) -> None:
    assert fleetune.doctor("hpc", test_job=True)[-1] == Check("test job", "ok", "CPU only"), hpc


def test_secrets_are_in_one_file_of_mode_0600_and_nowhere_else(
    hpc: Path, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path
) -> None:
    secret = f"hf_{random.getrandbits(64)}"
    with drained(site):
        run_id = submit_unseen(make_job(tmp_path, tiny_base, sums), "hpc", secret)
        site.run("scontrol", "write", "batch_script", site.run("squeue", "-ho", "%A").strip(), str(hpc / "taken.sh"))
        (hpc / "shown").write_text(site.run("scontrol", "show", "job", "--details", "--details"))
    (holder,) = files_with(secret, hpc, site.folder)
    assert holder == hpc / "runs" / run_id / "secrets.json" and holder.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("hpc")
@pytest.mark.skipif(not can_serve_ssh(), reason=WHY_NO_SSH)
@pytest.mark.parametrize("number", [3, pytest.param(100, marks=[pytest.mark.chaos, pytest.mark.timeout(0)])])
def test_a_link_that_is_cut_somewhere_makes_one_job_of_a_repeated_command(
    number: int, site: SlurmSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(SEED)
    make_queued_job(tmp_path)
    setup = [f"export SLURM_CONF={site.environment['SLURM_CONF']}"]
    write_clusters(tmp_path, link={"ssh": "far"}, python=sys.executable, setup=setup)
    with tempfile.TemporaryDirectory(prefix="ft-") as folder, ssh_server(Path(folder) / "s") as server, drained(site):
        proxy = CutProxy(server.port)
        server.alias("far", proxy.port)
        monkeypatch.setenv("PATH", f"{server.binaries}:{os.environ['PATH']}")
        done = [fleetune.submit(tmp_path / "job.yaml", cluster="hpc").run_id]
        for cut in range(number):
            began = time.monotonic()
            cut_somewhere(proxy, rng, lambda: server.kill_connection("far", sockets_folder()))
            with pytest.raises(Unreachable, match="the same command again is safe, and makes one run$") as said:
                while not proxy.was_cut:
                    done.append(fleetune.submit(tmp_path / "job.yaml", cluster="hpc").run_id)
            done.append(fleetune.submit(tmp_path / "job.yaml", cluster="hpc").run_id)
            names = site.run("squeue", "--noheader", "-o", "%j").split()
            assert sorted(names) == sorted(f"{run_id}-s1" for run_id in done)
            print(f"cut {cut}: {str(said.value).splitlines()[0]}; {time.monotonic() - began:.1f} s", flush=True)
        proxy.close()


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_an_evaluation_is_one_job_that_is_preempted_and_goes_on(
    place: Place, tmp_path: Path, tiny_base: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    number = 2000  # of rows, so many that it is not over before the preemption
    rows = [{"prompt": f"{row} + {7 * row} =", "completion": f" {8 * row}"} for row in range(number)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "task.yaml"
    task.write_text(yaml.safe_dump({"kind": "exact_match", "data": "rows.jsonl", "max_new_tokens": 60}))

    def evaluate(out: Path, **options: Any) -> fleetune.EvaluationReport:
        return fleetune.evaluate([str(adapter)], [task], base=str(tiny_base), out=out, **options)

    here = evaluate(tmp_path / "here", limit=50)
    submitted: queue.Queue[fleetune.Submission] = queue.Queue()
    with ThreadPoolExecutor() as threads:
        there = threads.submit(evaluate, tmp_path / "there", cluster=place.name, announce=submitted.put)
        run_dir = submitted.get(timeout=300).run_dir
        until(lambda: there.done() or fleetune.status(run_dir.name).step > 0, 300)
        place.warn(run_dir.name)
        report = there.result(timeout=600)
    assert [answers[:50] for answers in shown(report)] == shown(here)
    first, second, *_ = attempts(run_dir)
    assert first.verdict and first.verdict["kind"] == "preemption"
    assert second.start and 0 < second.start.step < 2 * number and report.asked == 2 * number - second.start.step
    assert fleetune.status(run_dir.name).state == "succeeded"
    again = evaluate(tmp_path / "again", cluster=place.name, announce=submitted.put)
    assert submitted.get(timeout=1).run_id == run_dir.name and shown(again) == shown(report)
    assert "questions answered" in fleetune.logs(run_dir.name)
    until(place.is_idle)


def shown(report: fleetune.EvaluationReport) -> list[list[str]]:
    """What the base and each adapter answered."""
    return [[score.shown for score in result.scores] for result in report.tasks[0].results]
