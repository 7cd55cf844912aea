"""What a model wrote in a step, with what each answer was worth: of runs that learn from answers of their own."""

from orchestrator.errors import InputError
from orchestrator.runs import Handle, find
from runfolder.appended import Chunk, Position
from runfolder.files import Record
from runfolder.samples import SAMPLES_FILE, of_step, samples_of


def samples(run: str, step: int | None = None, cluster: str | None = None) -> list[Record]:
    """What a run wrote to the first prompt of a step, without one of the last that has any; raises InputError."""
    handle = find(run, cluster)
    found = samples_of(lambda since: read_samples(handle, since))
    if not found:
        raise InputError(
            f"run {handle.run_id}: it has written no samples yet; allowed: a run of objective grpo or rloo that has "
            "taken a step"
        )
    steps = sorted({sample["step"] for sample in found})
    last = steps[-1]
    if step is None:
        return of_step(found, last)
    if step not in steps:
        first = steps[0]
        raise InputError(
            f"--step: found {step}, in which run {handle.run_id} wrote nothing; allowed: {first} to {last}, those in "
            "which it wrote"
        )
    return of_step(found, step)


def read_samples(handle: Handle, since: Position) -> list[Chunk]:
    """What was appended to a run's samples since a position."""
    appended = handle.site.read(handle.run_id, {SAMPLES_FILE: since})
    return appended[SAMPLES_FILE]


def sample_lines(shown: list[Record]) -> list[str]:
    """Samples of a step as text: the prompt, then each answer below what it was worth."""
    first = shown[0]
    lines = [f"step {first['step']}", f"prompt: {first['prompt']}"]
    for sample in shown:
        worth = f"reward {sample['reward']:.4g}"
        by_name = sample.get("rewards", {})
        if by_name:
            parts = [f"{name} {value:.4g}" for name, value in by_name.items()]
            worth += " (" + ", ".join(parts) + ")"
        if sample["cut"]:
            worth += ", without an end"
        lines += ["", f"--- {sample['number'] + 1}: {worth}", sample["written"]]
    return lines
