"""A submission is exactly once, whatever breaks at whichever point: trials by the thousand, each from its seed."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from jobs import make_job
from sampling import SEED
from slurm_model import MISHAPS, REFUSAL

from clusters.config import SshLink
from clusters.remote.code import Code
from clusters.remote.far_side import FarSide
from clusters.remote.link import ThisHost
from clusters.remote.lock import installed_lock
from clusters.remote.machine import FarMachine
from clusters.slurm_script import SlurmConfig

ROOT = Path(__file__).parents[2]
TRIALS = 10_000
BREAKS = ("request", "answer", "client", "far side", "two", "lost", "node lost", "redundant job")
REFUSED = re.compile(
    rf"SLURM does not take this job: {REFUSAL}(; t\d+-\w+ is cancelled)?|run t\d+-\w+: it is cancelled; go on .*"
)
AGAIN = "; the same command again is safe, and makes one run"
UNKNOWN = f"whether it was submitted is not known{AGAIN}"
NOTHING = f"this try has submitted nothing{AGAIN}"


@pytest.mark.parametrize("number", [300, pytest.param(TRIALS, marks=pytest.mark.chaos)])
def test_whatever_breaks_one_job_does_the_work(number: int, tmp_path: Path) -> None:
    seeds = random.Random(SEED).sample(range(TRIALS), number)
    script = Path(__file__).with_name("submission_trials.py")
    make_job(tmp_path)
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ strftime_now('%d %B %Y') }}")  # which fixes the day
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(script.parent)])}
    text = "".join(f"{seed}\n" for seed in seeds)
    ran = subprocess.run(
        [sys.executable, "-P", script, tmp_path], input=text, env=environment, text=True, stdout=subprocess.PIPE
    )
    trials = [json.loads(line) for line in ran.stdout.splitlines()]
    problems = [trial for trial in trials if trial["problem"]]
    assert not problems, problems
    assert (ran.returncode, len(trials)) == (0, number)
    happened: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    for trial in trials:
        happened.update(trial["happened"])
        endings.update(kind for kind, _ in trial["endings"])
        for kind, said in trial["endings"]:
            assert kind != "unknown" or said.endswith((f"\n{UNKNOWN}", f"\n{NOTHING}")), said
            happened["known to be nothing"] += kind == "unknown" and said.endswith(NOTHING)
            assert kind != "refused" or REFUSED.fullmatch(said), said
    print(happened, endings)
    assert all(happened[name] > number // 100 for name in (*BREAKS, *MISHAPS, "known to be nothing")), happened
    assert all(endings[kind] > number // 100 for kind in ("submitted", "refused", "unknown", "killed")), endings


def test_a_request_that_was_interrupted_leaves_no_answer_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(tmp_path)
    config = SlurmConfig(kind="slurm", link=SshLink(ssh="there"), root=str(tmp_path), python=sys.executable)
    side = FarSide(FarMachine("hpc", ThisHost(), config, Code({}, "here"), installed_lock()))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "here").symlink_to(ROOT)
    try:
        assert side.ask({"verb": "ids"}) == []

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(side, "_line", interrupted)
            side.ask({"verb": "digest", "path": str(tmp_path / "job.yaml")})
        assert side.ask({"verb": "ids"}) == []
    finally:
        side.close()
