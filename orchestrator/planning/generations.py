"""What a job writes itself in a step, where it learns from answers of its own: tokens, caches, and the time for both.

The time is the least that the device's bandwidth and arithmetic allow: to write a token, all weights and the caches
of all answers are read once.
"""

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from methods.options.base import BaseConfig
from orchestrator.planning.answer_room import room_behind
from orchestrator.planning.hours import planned_flops, stated_share
from orchestrator.planning.model import Model
from orchestrator.planning.sizes import Sizes, planned_kernels, planned_precision
from orchestrator.planning.survey import SourceRows
from runfolder.group_objectives import GroupOptions
from runfolder.job import Job
from trainer.devices import bandwidth_of_name, peak_of_name
from trainer.writing_size import ANSWERS_AT_ONCE, cached_tokens


@dataclass(frozen=True)
class Generations:
    """What is written in a step that writes, at most: answers are as long as they may be.

    `cache_bytes` are those of keys and values on each worker, held from the first rollout to the end. `share` is the
    part of the time that writing takes at least; None where the device is not known. `judge_bytes` are those of a
    reward model's folder.
    """

    prompts: int
    answers: int
    tokens: int
    learned: int  # tokens of prompts and answers that pass forward and backward
    updates: int
    cache_bytes: int
    share: float | None
    judge_bytes: int


def generations(
    job: Job, model: Model, sizes: Sizes | None, train: SourceRows | None, kind: str, gpu: str | None
) -> Generations | None:
    """What a job writes in a step, on workers with GPUs of a name; None where it writes none, or rows are hidden."""
    options = job.objective
    survey = train.survey if train else None
    if not isinstance(options, GroupOptions) or survey is None or not survey.examples:
        return None
    of_row = survey.tokens / survey.examples
    in_prompts = survey.tokens - survey.learned
    of_prompt = in_prompts / survey.examples
    rows = int(job.train.batch_tokens / of_row)
    prompts = max(1, rows)
    answers = prompts * options.samples
    longest = min(options.new_tokens, room_behind(of_prompt, job))
    tokens = round(answers * longest)
    learned = tokens + round(answers * of_prompt)
    precision = planned_precision(job, kind)
    element = 2 if precision == "bf16" else 4
    of_token = cached_bytes(model.config, element)
    cached = cached_tokens(job.data.seq_len, of_token)
    cache_bytes = cached * of_token
    share = None
    if sizes is not None and gpu is not None:
        length = of_prompt + longest
        share = _writing_share(job, model, sizes, gpu, answers, length, of_token, learned)
    judge = _folder_bytes(options.reward_model)
    return Generations(prompts, answers, tokens, learned, options.updates, cache_bytes, share, judge)


def cached_bytes(config: BaseConfig, element: int) -> int:
    """The bytes of a token's keys and values in all layers of a base, of elements so large; 0 where it says none."""
    layers = config.get("num_hidden_layers", 0)
    heads = config.get("num_attention_heads", 0)
    if not layers or not heads:
        return 0
    cached_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or config.get("hidden_size", 0) // heads
    total: int = 2 * layers * cached_heads * size * element
    return total


def _writing_share(
    job: Job, model: Model, sizes: Sizes, gpu: str, answers: int, length: float, of_token: int, learned: int
) -> float | None:
    """The part of the time that writing answers takes at least."""
    bandwidth = bandwidth_of_name(gpu)
    peak = peak_of_name(gpu)
    options = job.objective
    if bandwidth is None or peak is None or not isinstance(options, GroupOptions):
        return None
    workers = job.resources.world_size
    of_worker = ceil(answers / workers)
    cached = cached_tokens(job.data.seq_len, of_token)
    with_room = int(cached / length)
    together = max(1, min(of_worker, ANSWERS_AT_ONCE, with_room))
    rounds = ceil(of_worker / together)
    halfway = length - options.new_tokens / 2
    caches = together * halfway * of_token
    read = sizes.memory.weights + caches
    writing = rounds * options.new_tokens * read / bandwidth
    per_token = planned_flops(job, model, sizes)
    kernels = planned_kernels(job, "gpu")
    per_second = peak * stated_share(job, kernels) * workers
    learning = per_token * learned / per_second
    total = writing + options.updates * learning
    return writing / total


def _folder_bytes(folder: str | None) -> int:
    """The bytes of the weights in a folder; 0 where it is not here."""
    if folder is None:
        return 0
    weights = Path(folder).glob("*.safetensors")
    return sum(path.stat().st_size for path in weights)
