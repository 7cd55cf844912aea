"""What a run leaves: attempts/N/output, which the attempt that closes the run moves to RUN_DIR/output."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import yaml

from methods.base import MergeRefused
from runfolder.appended import read_lines
from runfolder.chain import Attempt, attempts
from runfolder.files import read_json, write_json
from trainer.data.survey import described
from trainer.missing import dispensable, missing, note
from trainer.progress import shown
from trainer.reload import load_base, load_model, load_output
from trainer.run import Run
from trainer.verify import OutputDiffers, Seen, compare, observe

CHECK, MERGED = "the check of the output", "the merged model"
DEATHS = 2  # attempts that may end between the export and the end before it is left at the export
MERGED_ROUNDING = 10  # times the rounding of a pass: a merge rounds each weight once more


def export(run: Run) -> None:
    """Deliver the adapter or model, see that it is what was trained, then merge; every rank calls it, rank 0 writes.

    From the moment that the weights are written they are delivered, whatever happens then: what cannot be made is
    left out and said (trainer/missing.py). Raises OutputDiffers where the output is another model than the trained.
    """
    weights = dict(run.shards.whole_weights())
    if run.world.leads:
        write(run, weights)
    weights.clear()
    died = deaths(run.attempt)
    seen = observed(run) if died < DEATHS else None
    dist.barrier()
    if not run.world.leads:
        return
    output = run.attempt.folder / "output"
    if died < DEATHS:
        with shown(run.attempt):
            accept(run, output, seen)
            if run.job.output.merge and not run.job.method.makes_model:
                save_merged(run, output, seen)
    else:
        note(run.attempt, "what follows the export", f"{died} workers ended in it: its check, or the merge")
    with dispensable(run.attempt, "the model card"):
        (output / "README.md").write_text(card(run, output))


def deaths(attempt: Attempt) -> int:
    """How many earlier attempts delivered their output and ended all the same: in its check, or in the merge."""
    return sum((earlier.folder / "output").exists() for earlier in attempts(attempt.run_dir) if earlier != attempt)


def write(run: Run, weights: dict[str, torch.Tensor]) -> None:
    """Write attempts/N/output: the weights whole or not at all, and beside them what belongs to them."""
    folder = run.attempt.folder / "output"
    unfinished = folder.with_name("output.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if run.job.method.makes_model:
        weights = {name: value.to(run.dtype) for name, value in weights.items()}
        cast(Any, run.model).config.dtype = run.dtype
    cast(Any, run.model).config.use_cache = True
    try:
        run.method.export(run.model, weights, unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # the last checkpoint has the weights
        raise
    with dispensable(run.attempt, "the tokenizer"):
        run.tokenizer.save_pretrained(unfinished)
    with dispensable(run.attempt, "generation_config.json"):
        write_ends(run, unfinished)
    with dispensable(run.attempt, "the model card"):
        (unfinished / "README.md").write_text(card(run, unfinished))
    unfinished.rename(folder)
    run.attempt.event("exported", output=str(folder))


def write_ends(run: Run, folder: Path) -> None:
    """Let generation_config.json name every token that ends an answer, where the base's does not.

    As plain JSON: transformers refuses to write a config that it would warn of, as those of some bases are.
    """
    ends = list(run.ends)
    generation = run.generation
    known = generation.get("eos_token_id")
    if not ends or set(ends) == set([known] if isinstance(known, int) else known or []):
        return
    path = folder / "generation_config.json"
    if path.exists():
        generation = read_json(path)
    write_json(path, generation | {"eos_token_id": ends if len(ends) > 1 else ends[0]})


def observed(run: Run) -> Seen | None:
    """What the trained model says of a few rows; None where that fails, as the output is delivered all the same."""
    guard = dispensable(run.attempt, CHECK) if run.world.leads else suppress(Exception)
    with guard:
        return observe(run)
    return None


def accept(run: Run, output: Path, seen: Seen | None) -> None:
    """Raise OutputDiffers, and put the output aside, where plain libraries load another model than the trained."""
    if seen is None:
        return
    finding = None
    with dispensable(run.attempt, CHECK):
        finding = compare(run, lambda place: load_output(run, output, place), seen)
    if finding is None or finding.holds:
        return
    aside = output.with_name("output.rejected")
    shutil.rmtree(aside, ignore_errors=True)
    output.rename(aside)
    raise OutputDiffers(
        f"the output, loaded anew, is not the model that was trained: logits differ by {finding.gap:.3g}, "
        f"allowed: {finding.allowed:.3g}. It is kept in {aside}"
    )


def save_merged(run: Run, output: Path, seen: Seen | None) -> None:
    """Write the merged model beside its adapter, where it can be made and is the trained one."""
    unfinished = run.attempt.folder / "merged.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    with dispensable(run.attempt, MERGED):
        try:
            write_merged(run, output, seen, unfinished)
            unfinished.rename(output / "merged")
        except MergeRefused as refusal:
            run.attempt.event("merge_refused", reason=str(refusal))
            raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # at once: where the disk is full, the note needs room
    if run.method.merge_report:
        with dispensable(run.attempt, "merge_report.json"):
            (output / "merge_report.json").write_text(json.dumps(dict(run.method.merge_report), indent=1))


def write_merged(run: Run, output: Path, seen: Seen | None, folder: Path) -> None:
    """Write the merged model; raises OutputDiffers where it is another model than the trained."""
    merge(run, output).save_pretrained(folder)
    write_ends(run, folder)
    run.tokenizer.save_pretrained(folder)
    # A merge that changes more than the update says how much, and has a bound of its own.
    if seen is None or any(run.method.merge_report.values()):
        return
    finding = compare(run, lambda place: load_model(run, folder, place), seen)
    if not finding.gap <= MERGED_ROUNDING * finding.allowed:
        raise OutputDiffers(f"its logits differ from the trained model's by {finding.gap:.3g}")


def merge(run: Run, adapter: Path) -> Any:
    """The base, loaded anew, with the exported adapter merged into it."""
    from peft import PeftModel

    return run.method.merge(PeftModel.from_pretrained(load_base(run, adapter, {}), adapter))


def card(run: Run, output: Path) -> str:
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
        f"| rows | {described(run.tokens.counts.summary())} |",
        *(f"| sha256 of {name} | `{digest}` |" for name, digest in record.get("digests", {}).items()),
        f"| steps | {run.batches.steps} of {run.job.train.batch_tokens} tokens |",
        f"| learning rate | {run.job.lr:g}, {run.job.train.schedule} |",
        *(f"| {key} | {value:.4f} |" for key, value in results(run.attempt.run_dir).items()),
        f"| answers end at the tokens | {', '.join(map(str, run.ends))} |",
        "",
        *ends_note(run, output),
        *(f"**Note:** {line}\n" for line in missing(run.attempt)),
    ]
    return "\n".join(lines)


def ends_note(run: Run, output: Path) -> list[str]:
    """How the users of an adapter make generation stop, where its base's generation config does not do."""
    if run.job.method.makes_model or not (output / "generation_config.json").exists():
        return []
    return [
        "The base's generation config does not name all tokens that end an answer. The one beside this adapter does:",
        "`model.generate(..., generation_config=GenerationConfig.from_pretrained(<this folder>))`.",
        "",
    ]


def results(run_dir: Path) -> dict[str, float]:
    """The last figure of each evaluation, over all attempts."""
    last: dict[str, float] = {}
    for attempt in attempts(run_dir):
        for row in read_lines(attempt, "metrics.jsonl"):
            last |= {key: value for key, value in row.items() if key.startswith("eval_")}
    return last
