"""The room that prompts leave for answers, where a job learns from what the model writes."""

from collections.abc import Iterator

from runfolder.group_objectives import GroupOptions
from runfolder.job import Job
from trainer.data.survey import Survey


def room_behind(prompt: float, job: Job) -> float:
    """How many tokens an answer to a prompt of so many may have in data.seq_len; one place is the engine's."""
    left = job.data.seq_len - prompt - 1
    return max(1.0, left)


def answer_warnings(job: Job, survey: Survey) -> Iterator[str]:
    """What a user should know of the room that prompts leave for answers, by a sample of them."""
    options = job.objective
    if not isinstance(options, GroupOptions):
        return
    prompts = [tokens - labels for tokens, labels in survey.sample]
    longest = max(prompts)
    room = room_behind(longest, job)
    if room < options.new_tokens:
        yield (
            f"objective.new_tokens: found {options.new_tokens}; a prompt of {longest} tokens leaves room for "
            f"{room:.0f} in data.seq_len {job.data.seq_len}, and its answers end there"
        )
