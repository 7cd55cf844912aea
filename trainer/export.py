"""What a run leaves: attempts/N/output, which the attempt that closes the run moves to RUN_DIR/output."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from methods.base import MergeRefused
from trainer.attempt import attempts, read_lines
from trainer.base import load_pretrained
from trainer.run import Run


def export(run: Run) -> None:
    """Write the adapter or model, its tokenizer and its card; every rank calls it, rank 0 writes."""
    weights = dict(run.shards.whole_weights())
    if not run.world.leads:
        return
    folder = run.attempt.folder / "output"
    unfinished = folder.with_name("output.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    whole_model = run.job.method.makes_model
    if whole_model:
        weights = {name: value.to(run.dtype) for name, value in weights.items()}
        run.model.config.dtype = run.dtype
    run.model.config.use_cache = True
    run.method.export(run.model, weights, unfinished)
    run.tokenizer.save_pretrained(unfinished)
    if run.job.output.merge and not whole_model:
        save_merged(run, unfinished)
    (unfinished / "README.md").write_text(card(run))
    unfinished.rename(folder)
    run.attempt.event("exported", output=str(folder))


def save_merged(run: Run, folder: Path) -> None:
    """Write the merged model beside its adapter; where the method refuses, only say so: the adapter is whole."""
    try:
        merge(run, folder).save_pretrained(folder / "merged")
        run.tokenizer.save_pretrained(folder / "merged")
    except MergeRefused as refusal:
        run.attempt.event("merge_refused", reason=str(refusal))
        print(f"no merged model: {refusal}", flush=True)
    if run.method.merge_report:
        (folder / "merge_report.json").write_text(json.dumps(dict(run.method.merge_report), indent=1))


def merge(run: Run, adapter: Path) -> nn.Module:
    """The base, loaded anew, with the exported adapter merged into it."""
    from peft import PeftModel
    from transformers import AutoConfig

    # A method that changes the base's config leaves it beside the adapter.
    changed = (adapter / "config.json").exists()
    config = AutoConfig.from_pretrained(adapter) if changed else None
    base = load_pretrained(run.job.base, run.dtype, config)
    return run.method.merge(PeftModel.from_pretrained(base, adapter))


def card(run: Run) -> str:
    """The model card: base, data, method, result."""
    record: dict[str, Any] = yaml.safe_load((run.attempt.run_dir / "job.yaml").read_text())
    front = {"base_model": run.job.base.model, "library_name": "transformers"}
    if not run.job.method.makes_model:
        front["library_name"] = "peft"
    options = ", ".join(f"{key} {value}" for key, value in run.job.method.model_dump().items() if key != "kind")
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        f"# {run.job.name}",
        "",
        f"`{run.job.base.model}` tuned with **{run.job.method.kind}**" + (f" ({options})." if options else "."),
        "",
        "| | |",
        "|---|---|",
        f"| run | `{run.attempt.run_dir.name}` |",
        f"| data | `{run.job.data.train}` |",
        *(f"| sha256 of {name} | `{digest}` |" for name, digest in record.get("digests", {}).items()),
        f"| steps | {run.batches.steps} of {run.job.train.batch_tokens} tokens |",
        f"| learning rate | {run.job.lr:g}, {run.job.train.schedule} |",
        *(f"| {key} | {value:.4f} |" for key, value in results(run.attempt.run_dir).items()),
        "",
    ]
    return "\n".join(lines)


def results(run_dir: Path) -> dict[str, float]:
    """The last figure of each evaluation, over all attempts."""
    last: dict[str, float] = {}
    for attempt in attempts(run_dir):
        for row in read_lines(run_dir, attempt, "metrics.jsonl"):
            last |= {key: value for key, value in row.items() if key.startswith("eval_")}
    return last
