"""Make the pictures of the README: `python docs/pictures.py`, in the project's virtual environment."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
WIDTH = 110
TABLE = [
    {"query": "How many red cats?", "schema": "cats(name, colour)", "sql": "SELECT count(*) FROM cats", "id": 1},
    {
        "query": "Which dogs are old?",
        "schema": "dogs(name, age)",
        "sql": "SELECT name FROM dogs WHERE age > 9",
        "id": 2,
    },
    {"query": "Say it all. " * 7, "schema": "all(text)", "sql": "SELECT text FROM all", "id": 3},
]
JOB = {
    "name": "sql",
    "base": str(HERE.parent / "examples" / "tiny"),
    "method": "lora",
    "data": {
        "train": "rows.jsonl",
        "columns": {"prompt": "{schema}\n{query}\nSQL:", "completion": " {sql}"},
        "seq_len": 64,
        "too_long": "cut",
    },
    "train": {"steps": 100, "batch_tokens": 96},
}


def main() -> None:
    """Write docs/rows.svg: what `fleetune rows` shows of a small table."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TABLE))
        (place / "job.yaml").write_text(json.dumps(JOB))
        shown = subprocess.run(
            [sys.executable, "-m", "orchestrator", "rows", "job.yaml"],
            cwd=place,
            env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "FLEETUNE_HOME": f"{place}/home"},
            capture_output=True,
            text=True,
            check=True,
        )
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(Text.from_ansi(shown.stdout.replace(f"{place}/", "")))
    console.save_svg(str(HERE / "rows.svg"), title="fleetune rows job.yaml")


if __name__ == "__main__":
    main()
