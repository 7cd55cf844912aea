"""A long run stays as it began: memory, speed of saving, and the number of files."""

import json
from typing import Any

import pytest
from finished_runs import events

STEPS = 3000


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_thousands_of_steps_leave_nothing_behind(new_run: Any, launch: Any) -> None:
    run_dir = new_run(
        "soak",
        train={"steps": STEPS, "batch_tokens": 200},
        sharding={"zero": 2},
        checkpoint={"every": 10},
    )
    launch(2, run_dir, timeout=1700)
    attempt = run_dir / "attempts" / "1"
    rows = [json.loads(line) for line in (attempt / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert len(list((attempt / "checkpoints").iterdir())) == 2
    assert sum(event["event"] == "checkpoint" for event in events(run_dir)) == STEPS // 10
    settled, last = rows[STEPS // 6]["peak_memory_bytes"], rows[-1]["peak_memory_bytes"]
    assert last < 1.05 * settled, f"memory grew from {settled:,} to {last:,} bytes in {STEPS * 5 // 6} steps"
