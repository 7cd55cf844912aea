"""SLURM for real, on nodes of namespaces: a run is submitted once, trains over two nodes, and survives their loss."""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from slurm_site import WHY_NOT, SlurmSite, can_serve

import fleetune
from clusters.config import SlurmConfig
from clusters.slurm import Slurm
from orchestrator import backends
from runfolder.chain import attempts
from runfolder.job import Job

pytestmark = pytest.mark.usefixtures("home")
GOLDEN = Path(__file__).parent / "golden" / "slurm.sh"


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


@pytest.fixture(scope="module")
def site() -> Iterator[SlurmSite]:
    """Two nodes of four cores."""
    if not can_serve():
        pytest.skip(WHY_NOT)
    with tempfile.TemporaryDirectory(prefix="ft-") as folder, SlurmSite(Path(folder) / "slurm", nodes=2) as site:
        yield site


@pytest.fixture
def hpc(site: SlurmSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clusters file with that site; gives the FLEETUNE_HOME of its runs."""
    root = tmp_path / "hpc"
    root.mkdir()
    config = {"kind": "slurm", "root": str(root), "partition": "low", "cpus_per_worker": 1}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"hpc": config}))
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
    monkeypatch.setenv("SLURM_CONF", str(site.environment["SLURM_CONF"]))
    return root


def wait_for(run_id: str, states: tuple[str, ...], timeout_s: float) -> fleetune.Status:
    """The status of a run, once it is in one of these states."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = fleetune.status(run_id)
        if status.state in states:
            return status
        assert time.monotonic() < deadline, f"{status}\n{backends.open_cluster('hpc').logs(run_id).text[-3000:]}"
        time.sleep(0.5)


def make_job(tmp_path: Path, base: Path, rows: Path, **changes: object) -> Path:
    """A job over two nodes."""
    job = {
        "name": "sums",
        "base": str(base),
        "method": {"kind": "lora", "rank": 2},
        "data": {"train": str(rows), "seq_len": 64},
        "train": {"steps": 12, "batch_tokens": 256},
        "sharding": {"zero": 3},
        "resources": {"nodes": 2, "workers_per_node": 1},
        "evaluation": {"max_new_tokens": 0},
        **changes,
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_over_two_nodes_that_loses_one_finishes(
    hpc: Path, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path
) -> None:
    train = {"steps": 60, "batch_tokens": 128}
    job = make_job(tmp_path, tiny_base, sums, train=train, checkpoint={"every": 5})
    done = fleetune.submit(job, cluster="hpc")
    run_dir = hpc / "runs" / done.run_id
    again = fleetune.submit(job, cluster="hpc", run_id=done.run_id)
    assert again.adopted
    names = site.run("squeue", "--noheader", "-o", "%j").split()
    assert names == [f"{done.run_id}-s1"]
    while fleetune.status(done.run_id).step < 8:
        wait_for(done.run_id, ("queued", "starting", "running", "preempted"), 200)
        time.sleep(0.2)
    site.kill("node2")
    time.sleep(1)
    site.boot("node2")
    ended = wait_for(done.run_id, ("succeeded", "failed", "cancelled"), 400)
    assert ended.state == "succeeded", (ended, fleetune.logs(done.run_id)[-3000:])
    assert len(attempts(run_dir)) >= 2 and attempts(run_dir)[1].start is not None
    assert (run_dir / "output" / "adapter_model.safetensors").exists()


def test_a_queued_run_is_cancelled(hpc: Path, site: SlurmSite, tmp_path: Path, tiny_base: Path, sums: Path) -> None:
    site.run("scontrol", "update", "nodename=node[1-2]", "state=drain", "reason=test")
    try:
        done = fleetune.submit(make_job(tmp_path, tiny_base, sums), cluster="hpc")
        status = wait_for(done.run_id, ("queued",), 10)
        assert "SLURM job" in str(status.reason)
        fleetune.cancel(done.run_id)
        assert wait_for(done.run_id, ("cancelled",), 30).state == "cancelled"
    finally:
        site.run("scontrol", "update", "nodename=node[1-2]", "state=resume")
    assert site.run("squeue", "--noheader") == "" and hpc.exists()
