"""What a sweep concludes of trials whose results are made up."""

from pathlib import Path

from jobs import make_job
from run_folders import claim, eval_row, steps
from test_driver import write_sweep

from orchestrator.sweeps.driver import SweepDriver
from orchestrator.sweeps.result import conclude

STEPS = 9
# By method and rate: the loss on the rows that choose, and on those that judge.
LOSSES = {
    ("lora", 1e-4): (1.5, 1.9),
    ("lora", 1e-3): (1.6, 1.2),
    ("dora", 1e-4): (1.7, 1.3),
    ("dora", 1e-3): (1.8, 1.4),
}


def finish(driver: SweepDriver, home: Path) -> None:
    """Have every trial that goes on come to its end."""
    found, _ = driver.look()
    for trial, reached in found.items():
        if reached.state != "going":
            continue
        attempt = claim(home / "runs" / driver.run_id(trial), None)
        steps(attempt, 1, STEPS)
        attempt.event("plan", steps=STEPS, parameters=9, trained=9, data={})
        loss, of_test = LOSSES[trial.configuration.method, trial.configuration.settings["train.lr"]]
        seed_effect = 0.01 * trial.seed * loss
        eval_row(attempt, STEPS, eval_loss=loss + seed_effect, eval_test_loss=of_test + seed_effect)
        attempt.write_verdict({"kind": "success", "reason": "", "evidence": ""})
        attempt.close({"state": "succeeded", "reason": None})


def test_the_rate_of_the_reference_is_chosen_by_the_rows_that_choose(tmp_path: Path, home: Path) -> None:
    """On the rows that judge, LoRA's other rate has the lower loss by chance."""
    data = {"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16}
    make_job(tmp_path, data=data, train={"steps": STEPS, "batch_tokens": 16}, resources={"workers_per_node": 1})
    axes = {"train.lr": [1e-4, 1e-3]}
    path = write_sweep(tmp_path, rule="grid", methods=["lora", "dora"], axes=axes, seeds=[0, 1], widen=False)
    driver = SweepDriver.of(path, None)
    for _ in range(20):
        decision, found = driver.tick()
        if decision.done:
            break
        finish(driver, home)
    assert decision.done
    comparison = conclude(driver, found, lambda _cluster, _runs: None).comparison
    assert comparison.quality.key == "eval_test_loss"
    (ranking,) = comparison.rankings
    row = comparison.rows[ranking.reference.number]
    assert {run.params["method.kind"] for run in row.runs} == {"lora"}
    assert {float(run.params["train.lr"]) for run in row.runs} == {1e-4}
