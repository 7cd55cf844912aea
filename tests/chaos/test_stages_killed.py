"""Constitutional AI whose processes are killed again and again, in every stage. CHAOS_SEED=n chooses other kills."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from jobs import only_queued
from killer import HEAD, Killer
from scene import lives, mlflow_run, signal_all, until
from stages_here import do_all_stages

from clusters.local import Local
from orchestrator.submit import submit
from orchestrator.tracking.store import PARENT_TAG, client, resolve
from runfolder.chain import attempts, result
from runfolder.delivered import is_delivered
from runfolder.generation_job import GenerationJob
from runfolder.record import load_any_job
from runfolder.staged_job import StagedJob
from runfolder.stages import stage_folders

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("CHAOS_STAGE_KILLS", "20"))
MOST_OF_A_STAGE = 4  # a fifth attempt without progress would end the run
SEED = int(os.environ.get("CHAOS_SEED", "0"))


def outputs(run_dir: Path) -> dict[str, bytes]:
    """What each stage has left: rows, or the weights of an adapter."""
    job = load_any_job(run_dir)
    assert isinstance(job, StagedJob)
    found = {}
    for stage, folder in stage_folders(run_dir, job.stages).items():
        writes = isinstance(load_any_job(folder), GenerationJob)
        found[stage] = (folder / "output" / ("rows.jsonl" if writes else "adapter_model.safetensors")).read_bytes()
    return found


@pytest.mark.chaos
def test_kills_in_every_stage_change_nothing(cluster: Local, tmp_path: Path, launch: Callable[..., None]) -> None:
    folder = ROOT / "examples" / "constitution"
    plain = yaml.safe_load((folder / "job.yaml").read_text())
    plain["base"] = str(ROOT / "examples" / "tiny")
    for stage in plain["stages"].values():
        for field in ("rows", "principles"):
            if "generate" in stage and (folder / stage["generate"].get(field, "-")).is_file():
                stage["generate"][field] = str(folder / stage["generate"][field])
    run_dir = submit(plain).run_dir
    stages = list(plain["stages"])
    rng = random.Random(SEED)
    of_stage = dict.fromkeys(stages, 0)
    killed = 0
    while killed < KILLS and result(run_dir) is None:
        stage = until(lambda: [*stage_folders(run_dir, stages)][-1:])[0]
        if of_stage[stage] == MOST_OF_A_STAGE:
            time.sleep(0.1)
            continue
        time.sleep(rng.uniform(0, 6))
        newest = [*stage_folders(run_dir, stages)][-1]
        if of_stage[newest] == MOST_OF_A_STAGE or result(run_dir) is not None:
            continue
        killer = Killer(cluster, stage_folders(run_dir, stages)[newest], rng, run_dir.name)
        victim = rng.choice(["controller", "controller", "worker", "driver", rng.choice(HEAD), "supervisor"])
        pids = killer.find(victim)
        if not pids:
            continue
        signal_all(pids, signal.SIGKILL)
        until(lambda pids=pids: not any(map(lives, pids)))
        if victim in ("supervisor", "everything"):
            cluster.start()
        killed += 1
        of_stage[newest] += 1
        print(f"kill {killed}: {victim} in {newest}", flush=True)
    ended = until(lambda: result(run_dir), 1800)
    assert ended["state"] == "succeeded", ended
    until(lambda: is_delivered(run_dir))
    print(of_stage, {stage: len(attempts(path)) for stage, path in stage_folders(run_dir, stages).items()})
    assert killed >= min(KILLS, 12), "there was time for most of them"
    disturbed = outputs(run_dir)
    parent = mlflow_run(resolve(None), run_dir)
    below = f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"
    children = client(resolve(None)).search_runs([parent.info.experiment_id], below)
    assert sorted(child.info.status for child in children) == ["FINISHED"] * len(stages)
    cluster.stop()

    home = tmp_path / "undisturbed"
    with pytest.MonkeyPatch.context() as patch, only_queued(home):
        patch.setenv("FLEETUNE_HOME", str(home))
        alone = submit(plain).run_dir
        assert do_all_stages(alone, launch)["state"] == "succeeded"
        assert outputs(alone) == disturbed
