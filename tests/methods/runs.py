"""What finished runs reported."""

import json
from pathlib import Path

Curve = list[tuple[float, float]]


def curve(run_dir: Path) -> Curve:
    """Loss and gradient norm of each step, over all attempts."""
    rows: dict[int, tuple[float, float]] = {}
    for path in sorted(run_dir.glob("attempts/*/metrics.jsonl"), key=lambda path: int(path.parent.name)):
        for row in map(json.loads, path.read_text().splitlines()):
            if "loss" in row:
                rows[row["step"]] = (row["loss"], row["grad_norm"])
    return [rows[step] for step in sorted(rows)]


def difference(a: Curve, b: Curve) -> float:
    """The largest relative difference between two curves."""
    assert len(a) == len(b) > 0
    return max(abs(x - y) / abs(y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
