"""What a run leaves: attempts/N/output, which the attempt that closes the run moves to RUN_DIR/output."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from methods.base import MergeRefused
from runfolder.appended import read_lines
from runfolder.chain import Attempt, attempts
from runfolder.files import read_json, write_json
from runfolder.requests import stop_requested
from trainer.data.survey import summary_line
from trainer.omissions import dispensable, note_omission, omissions
from trainer.progress import announce, noting_progress
from trainer.reload import load_base, load_output, load_whole_model
from trainer.run import Run
from trainer.stop import Stopped
from trainer.verify import Observation, OutputDiffers, compare_loaded, observe

CHECK, MERGED = "the check of the output", "the merged model"
DEATHS = 2  # attempts that may end between the export and the end before it is left at the export
MERGED_ROUNDING = 10  # times the rounding of a pass: a merge rounds each weight once more


def export(run: Run) -> None:
    """Deliver the adapter or model, see that it is what was trained, then merge; every rank calls it, rank 0 writes.

    From the moment that the weights are written they are delivered, whatever happens then: what cannot be made is
    left out and said (trainer/omissions.py). Raises OutputDiffers where the output is another model than the trained,
    and Stopped where there is no time left for all of this.
    """
    attempt = run.attempt
    job = run.job
    leads = run.world.leads
    steps = run.batches.steps
    run.stops.leave_if_warned(steps)
    announce(attempt, run.world, "exporting")
    weights = dict(run.sharded.whole_weights())
    if leads:
        write_output(run, weights)
    weights.clear()
    died = deaths(attempt)
    go_on = died < DEATHS
    observation = observed(run) if go_on else None
    dist.barrier()
    if not leads:
        return
    if run.stops.warned():
        raise Stopped(steps)
    output = attempt.folder / "output"
    if go_on:
        with noting_progress(attempt):
            accept(run, output, observation)
            if job.output.merge and not job.method.makes_model:
                save_merged(run, output, observation)
    else:
        note_omission(attempt, "what follows the export", f"{died} workers ended in it: its check, or the merge")
    with dispensable(attempt, "the model card"):
        (output / "README.md").write_text(card(run, output))


def deaths(attempt: Attempt) -> int:
    """How many earlier attempts delivered their output and died all the same: in its check, or in the merge."""
    count = 0
    for earlier in attempts(attempt.run_dir):
        output = earlier.folder / "output"
        if earlier != attempt and output.exists() and stop_requested(earlier) is None:
            count += 1
    return count


def write_output(run: Run, weights: dict[str, torch.Tensor]) -> None:
    """Write attempts/N/output: the weights whole or not at all, and beside them what belongs to them."""
    attempt = run.attempt
    model = run.model
    folder = attempt.folder / "output"
    unfinished = folder.with_name("output.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    config = model.config
    if run.job.method.makes_model:
        dtype = run.dtype
        weights = {name: value.to(dtype) for name, value in weights.items()}
        config.dtype = dtype
    config.use_cache = True
    try:
        run.objective.export(model, weights, unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # the last checkpoint has the weights
        raise
    with dispensable(attempt, "the tokenizer"):
        run.tokenizer.save_pretrained(unfinished)
    with dispensable(attempt, "generation_config.json"):
        write_ends(run, unfinished)
    with dispensable(attempt, "the model card"):
        text = card(run, unfinished)
        (unfinished / "README.md").write_text(text)
    unfinished.rename(folder)
    announce(attempt, run.world, "exported", output=str(folder))


def write_ends(run: Run, folder: Path) -> None:
    """Let generation_config.json name every token that ends an answer, where the base's does not.

    As plain JSON: transformers refuses to write a config that it would warn of, as those of some bases are.
    """
    ends = list(run.ends)
    generation = run.generation
    known = generation.get("eos_token_id")
    if isinstance(known, int):
        known = [known]
    named_by_base = set(known or [])
    if run.objective.scores or not ends or set(ends) == named_by_base:
        return
    path = folder / "generation_config.json"
    if path.exists():
        generation = read_json(path)
    single = len(ends) == 1
    value = ends[0] if single else ends
    write_json(path, generation | {"eos_token_id": value})


def observed(run: Run) -> Observation | None:
    """What the trained model says of a few rows; None where that fails, as the output is delivered all the same."""
    leads = run.world.leads
    guard = dispensable(run.attempt, CHECK) if leads else suppress(Exception)
    with guard:
        return observe(run)
    return None


def accept(run: Run, output: Path, observation: Observation | None) -> None:
    """Raise OutputDiffers, and put the output aside, where plain libraries load another model than the trained."""
    if observation is None:
        return
    finding = None
    with dispensable(run.attempt, CHECK):
        finding = compare_loaded(run, lambda placement: load_output(run, output, placement), observation)
    if finding is None or finding.holds:
        return
    aside = output.with_name("output.rejected")
    shutil.rmtree(aside, ignore_errors=True)
    output.rename(aside)
    raise OutputDiffers(
        f"the output, loaded anew, is not the model that was trained: logits differ by {finding.gap:.3g}, "
        f"allowed: {finding.allowed:.3g}. It is kept in {aside}"
    )


def save_merged(run: Run, output: Path, observation: Observation | None) -> None:
    """Write the merged model beside its adapter, where it can be made and is the trained one."""
    method = run.method
    attempt = run.attempt
    unfinished = attempt.folder / "merged.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    with dispensable(attempt, MERGED):
        announce(attempt, run.world, "merging")
        try:
            write_merged(run, output, observation, unfinished)
            unfinished.rename(output / "merged")
        except MergeRefused as refusal:
            attempt.event("merge_refused", reason=str(refusal))
            raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # at once: where the disk is full, the note needs room
    report = dict(method.merge_report)
    if report:
        with dispensable(attempt, "merge_report.json"):
            text = json.dumps(report, indent=1)
            (output / "merge_report.json").write_text(text)


def write_merged(run: Run, output: Path, observation: Observation | None, folder: Path) -> None:
    """Write the merged model; raises OutputDiffers where it is another model than the trained."""
    method = run.method
    merged = merge(run, output)
    merged.save_pretrained(folder)
    del merged  # before the next copy is loaded
    write_ends(run, folder)
    run.tokenizer.save_pretrained(folder)
    # A merge that changes more than the update says how much, and has a bound of its own.
    if observation is None or any(method.merge_report.values()):
        return
    finding = compare_loaded(run, lambda placement: load_whole_model(run, folder, placement), observation)
    allowed = MERGED_ROUNDING * finding.allowed
    if not finding.gap <= allowed:  # so that a gap that is not a number raises
        raise OutputDiffers(f"its logits differ from the trained model's by {finding.gap:.3g}")


def merge(run: Run, adapter: Path) -> Any:
    """The base, loaded anew, with the exported adapter merged into it."""
    from peft import PeftModel

    base = load_base(run, adapter, {})
    model = PeftModel.from_pretrained(base, adapter)
    return run.method.merge(model)


def card(run: Run, output: Path) -> str:
    """The model card: base, data, method, result."""
    table = card_table(run)
    rows = []
    for name, value in table.items():
        rows.append(f"| {name} | {value} |")
    notes = []
    for line in omissions(run.attempt):
        notes.append(f"**Note:** {line}\n")
    lines = [
        "---",
        card_front(run),
        "---",
        f"# {run.job.name}",
        "",
        card_summary(run),
        "",
        "| | |",
        "|---|---|",
        *rows,
        "",
        *run.objective.notes,
        *ends_note(run, output),
        *notes,
    ]
    return "\n".join(lines)


def card_front(run: Run) -> str:
    """The model card's metadata, as YAML: what the output is loaded with, and on which base."""
    job = run.job
    library = "transformers" if job.method.makes_model else "peft"
    metadata = {"base_model": job.base.model, "library_name": library}
    text: str = yaml.safe_dump(metadata, sort_keys=True)
    return text.strip()


def card_summary(run: Run) -> str:
    """The model card's sentence: which base was tuned, by which method with which options."""
    base = run.job.base
    method = run.job.method
    options = []
    for key, value in method.in_use().items():
        options.append(f"{key} {value}")
    sentence = f"`{base.model}` tuned with **{method.kind}**"
    if options:
        joined = ", ".join(options)
        sentence += f" ({joined})"
    return sentence + "."


def card_table(run: Run) -> dict[str, str]:
    """The rows of the model card's table."""
    job = run.job
    settings = job.train
    run_dir = run.attempt.run_dir
    text = (run_dir / "job.yaml").read_text()
    record: dict[str, Any] = yaml.safe_load(text)
    table = {
        "run": f"`{run_dir.name}`",
        "data": f"`{job.data.train}`",
        "rows": summary_line(run.tokens.counts.summary()),
    }
    digests = record.get("digests", {})
    for name, digest in digests.items():
        if digest is not None:
            table[f"sha256 of {name}"] = f"`{digest}`"
    table["steps"] = f"{run.batches.steps} of {settings.batch_tokens} tokens"
    table["learning rate"] = f"{job.lr:g}, {settings.schedule}"
    for name, value in results(run_dir).items():
        table[name] = f"{value:.4f}"
    ends = map(str, run.ends)
    table["answers end at the tokens"] = ", ".join(ends)
    return table


def ends_note(run: Run, output: Path) -> list[str]:
    """How the users of an adapter make generation stop, where its base's generation config does not do."""
    config = output / "generation_config.json"
    if run.job.method.makes_model or not config.exists():
        return []
    return [
        "The base's generation config does not name all tokens that end an answer. The one beside this adapter does:",
        "`model.generate(..., generation_config=GenerationConfig.from_pretrained(<this folder>))`.",
        "",
    ]


def results(run_dir: Path) -> dict[str, float]:
    """The last value of each evaluation's metric, over all attempts."""
    last: dict[str, float] = {}
    for attempt in attempts(run_dir):
        for row in read_lines(attempt, "metrics.jsonl"):
            for name, value in row.items():
                if name.startswith("eval_"):
                    last[name] = value
    return last
