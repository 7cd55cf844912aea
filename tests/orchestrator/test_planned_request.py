"""What a plan shows of a submission is what a submission is, but for the run id."""

import re
from pathlib import Path

import pytest
import yaml
from jobs import make_job

import fleetune
from clusters.base import Capacity, ClusterRequest
from clusters.local import Local
from clusters.slurm import Slurm
from orchestrator.runs import RUN_ID

IDS = re.compile(r"\bsums-[0-9a-z]{10}")


@pytest.mark.parametrize("cluster", ["local", "hpc"])
def test_a_plan_shows_what_is_submitted(
    cluster: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters = tmp_path / "clusters.yaml"
    clusters.write_text(yaml.safe_dump({"hpc": {"kind": "slurm", "root": str(home / "hpc"), "account": "ml"}}))
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(clusters))
    sent: list[ClusterRequest] = []
    for backend in (Local, Slurm):
        monkeypatch.setattr(backend, "submit", lambda _, request: sent.append(request))
        monkeypatch.setattr(backend, "forecast", lambda *_: None)
        monkeypatch.setattr(backend, "capacity", lambda _: Capacity("cpu", 4, 4))
    job = make_job(tmp_path, env={"NCCL_DEBUG": "INFO"})
    shown = fleetune.plan(job, cluster=cluster).request
    fleetune.submit(job, cluster=cluster)
    (request,) = sent
    assert shown is not None
    assert IDS.sub("RUN", shown) == IDS.sub("RUN", request.text)
    assert IDS.search(shown) and RUN_ID.fullmatch(request.run_id)
