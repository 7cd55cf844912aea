"""What an evaluation reports, and whether one has been reported after a step."""

import time

from runfolder.appended import read_lines
from runfolder.chain import attempts
from runfolder.row_results import RowResult, write_row_results
from trainer.run import Run


def report_evaluation(run: Run, step: int, metrics: dict[str, float], found: list[RowResult], began: float) -> None:
    """Keep what was found of each row, then append the metrics, so that these are never there without it."""
    attempt = run.attempt
    write_row_results(attempt, step, found)
    row = {"step": step, "time": time.time(), **metrics}
    attempt.append("metrics.jsonl", row)
    attempt.event("evaluated", step=step, seconds=row["time"] - began)
    words = [f"step {step}"]
    for name, value in metrics.items():
        words.append(f"{name} {value:.4f}")
    line = "  ".join(words)
    print(line, flush=True)


def is_reported(run: Run, step: int, metric: str = "eval_loss") -> bool:
    """Whether an attempt has reported an evaluation after a step, or there is none; every rank calls it."""
    if run.job.data.eval is None:
        return True
    found = False
    if run.world.leads:
        for attempt in attempts(run.attempt.run_dir):
            for row in read_lines(attempt, "metrics.jsonl"):
                of_step = row["step"] == step
                found |= of_step and metric in row
    return run.world.told(found)
