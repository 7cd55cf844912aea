"""The longest passes of a run, tried before its first step: too little memory shows in seconds, not after hours.

Nothing that is trained moves, and random numbers go on where they were: the first step is what it would have been. An
attempt that goes on from a checkpoint tries the passes that are left again: it may be on other devices, and that
costs about a step. What the passes took at most is kept in the attempt's events, beside what a dry run foretold.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from trainer.data.longest import LongestPass, longest_pass
from trainer.data.tokens import Tokens
from trainer.evaluate import Evaluator
from trainer.foretelling import Foretelling, fitting_changes, foretell
from trainer.generation_memory import CacheToCome
from trainer.progress import announce
from trainer.run import Run
from trainer.step import dealt_to_rank, micro_batch_tensors, prepared
from trainer.world import World
from trainer.writing import write_greedily

PASSES = 2  # from the second on, gradients stand beside activations
SHORTER_ANSWERS = "a lower evaluation.max_new_tokens takes less; 0 judges by the loss alone"
FEWER_ROWS = "train.micro_batch: 1 takes less"


class DoesNotFit(torch.OutOfMemoryError):
    """The longest passes of a run need more memory than its device has."""


def calibrate_training(run: Run, first: int) -> Foretelling | None:
    """Try the longest micro-batch of the steps after `first`, with gradients and moments beside it; a collective.

    Gives what has it foretold beside the run, if anything does. Raises DoesNotFit. What a model has yet to write
    has no length: such objectives are not tried.
    """
    if not is_calibrated(run, first) or run.objective.generates:
        return None
    deal = partial(dealt_to_rank, run)
    longest = longest_pass(run.batches, first, deal)
    foretelling = foretell(run, longest)
    size = f"a micro-batch of {longest}"
    with _trying(run, "training", size, foretelling=foretelling), _any_reference(run, run.tokens):
        _try_training(run, longest)
    if foretelling:
        foretelling.end()
    return foretelling


def calibrate_evaluation(run: Run, first: int, evaluator: Evaluator) -> None:
    """Try the longest held-out micro-batch and the prompts whose answers take the most memory; a collective.

    Raises DoesNotFit.
    """
    batches = evaluator.batches
    if batches is None or not is_calibrated(run, first):
        return
    model = run.model
    model.eval()
    try:
        with torch.no_grad():
            if not run.objective.generates:
                deal = partial(dealt_to_rank, run)
                longest = longest_pass(batches, 0, deal)
                size = f"a held-out micro-batch of {longest}"
                with _trying(run, "evaluation", size, FEWER_ROWS):
                    _try_judging(run, longest)
            _try_answers(run, evaluator)
    finally:
        model.train()


def is_calibrated(run: Run, first: int) -> bool:
    """Whether passes are tried: where steps are left, as the job says, else on a GPU."""
    if first >= run.batches.steps:
        return False
    wanted = run.job.train.calibrate
    if wanted is None:
        return run.world.device.type == "cuda"
    return wanted


def _try_training(run: Run, longest: LongestPass) -> None:
    """Run a micro-batch forward and backward, and let go of the gradients."""
    objective = run.objective
    sharded = run.sharded
    batch = longest.batch
    totals = objective.totals(batch)
    tensors = micro_batch_tensors(run, batch.examples, longest.micro)
    passes, known = prepared(run, [tensors], totals)
    moments = moments_to_come(run)
    for _ in range(PASSES):
        for micro_batch in passes:
            shares = objective.loss(sharded.engine, micro_batch, totals, known)
            sharded.backward(shares.loss)
    del moments
    sharded.discard()


def _try_judging(run: Run, longest: LongestPass) -> None:
    """Run a held-out micro-batch forward."""
    objective = run.objective
    batch = longest.batch
    totals = objective.totals(batch)
    tensors = micro_batch_tensors(run, batch.examples, longest.micro)
    passes, known = prepared(run, [tensors], totals)
    for micro_batch in passes:
        objective.loss(run.model, micro_batch, totals, known)


def _try_answers(run: Run, evaluator: Evaluator) -> None:
    """Begin the answers that take the most memory, beside as much as their caches will take at the end."""
    rows = evaluator.prompt_rows(run)
    largest = None
    most = 0
    for group in evaluator.prompt_groups(run, rows):
        cached = group.cached(rows)
        if cached > most:
            largest = group
            most = cached
    if largest is None:
        return
    prompts = [rows[number] for number in largest.prompts]
    count = len(prompts)
    stop = CacheToCome(run, largest)
    size = f"{count} answers of {largest.new_tokens} tokens"
    with _trying(run, "answers", size, SHORTER_ANSWERS):
        write_greedily(run, prompts, largest.new_tokens, stop)


def moments_to_come(run: Run) -> list[torch.Tensor]:
    """Memory as AdamW's moments will take it from the first step on; none where it holds them already, or never."""
    optimizer = run.sharded.optimizer
    if run.sharded.chunked or optimizer.state or type(optimizer) is not torch.optim.AdamW:
        return []
    moments = []
    for group in optimizer.param_groups:  # a method may hold moments of its own in the place of some
        for parameter in group["params"]:
            for _ in range(2):
                moment = torch.empty_like(parameter)
                moments.append(moment)
    return moments


@contextmanager
def _trying(
    run: Run, what: str, size: str, advice: str | None = None, foretelling: Foretelling | None = None
) -> Iterator[None]:
    """Within it, passes of a size in words are tried; keeps what they took. Raises DoesNotFit, with advice."""
    world = run.world
    device = world.device
    on_gpu = device.type == "cuda"
    announce(run.attempt, world, "calibrating", what=what, size=size)
    run.attempt.note_progress()
    began = time.monotonic()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        devices = [device] if on_gpu else []
        with torch.random.fork_rng(devices):
            yield
    except torch.OutOfMemoryError as error:
        memory = device_bytes(world)
        instead = advice or fitting_changes(run, memory, foretelling)
        there = str(device)
        if memory:
            gib = memory / 2**30
            there = f"the {gib:.1f} GiB of {device}"
        problem = f"out of memory before the first step: {size} does not fit into {there}"
        raise DoesNotFit(f"{problem}; {instead}") from error
    peak = None
    if on_gpu:
        peak = _highest_peak(world)
    seconds = time.monotonic() - began
    if world.leads:
        run.attempt.event("calibrated", what=what, size=size, bytes=peak, seconds=seconds)


def device_bytes(world: World) -> int | None:
    """The bytes of this rank's GPU that nobody else has; None where it has none."""
    if world.device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(world.device)
    reserved = torch.cuda.memory_reserved(world.device)
    return free + reserved


def _highest_peak(world: World) -> int:
    """The most bytes that tensors took on any rank's GPU; a collective."""
    torch.cuda.synchronize(world.device)
    device = world.device
    of_rank = torch.cuda.max_memory_allocated(device)
    peak = torch.tensor(of_rank, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


@contextmanager
def _any_reference(run: Run, tokens: Tokens) -> Iterator[None]:
    """Within it, documents have a reference where the objective reads one, though it is not known yet."""
    known = tokens.reference
    if run.objective.needs_reference and known is None:
        documents = len(tokens)
        tokens.reference = np.zeros(documents)
    try:
        yield
    finally:
        tokens.reference = known
