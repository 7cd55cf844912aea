"""The training loop of one worker."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from methods.base import Method, Setup
from methods.registry import create
from runfolder.appended import read_lines
from runfolder.chain import Attempt, attempts
from runfolder.digests import InputChanged, changes, frozen_digests
from runfolder.folders import cache
from runfolder.job import Job
from runfolder.record import load_job
from trainer import speed
from trainer.base import forward_dtype, load_config, load_model
from trainer.best import best_so_far, end_by_loss, is_over
from trainer.checkpoint.reading import CheckpointReader, open_start
from trainer.checkpoint.saving import CheckpointWriter
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.survey import check_ids
from trainer.data.tokenizer import end_ids, load_tokenizer
from trainer.document_leak import check_documents_apart
from trainer.embeddings import vocabulary
from trainer.evaluate import Evaluator
from trainer.export import export
from trainer.kernels.fast import make_fast
from trainer.meter import Meter, SaveRequest
from trainer.objectives.base import Objective, ObjectiveSetup
from trainer.objectives.registry import create_objective
from trainer.progress import announce, noting_progress
from trainer.reference import know_reference
from trainer.run import Run
from trainer.schedule import learning_rate
from trainer.step import feed, take_step
from trainer.stop import Stopped, StopRequests
from trainer.world import World, join_process_group
from trainer.zero import gather
from trainer.zero.sharded import ShardedModel


def train(run_dir: Path, attempt: int) -> bool:
    """Do this worker's part of an attempt that is claimed: from its start checkpoint to attempts/N/output.

    False where it was asked to stop before, and has saved. Every worker of the group calls it. Any exception is the
    caller's to judge.
    """
    claimed = Attempt(run_dir, attempt)
    try:
        run, first = prepare_run(claimed)
        know_reference(run, run.examples, run.batches.all_examples())
        settings = run.job.checkpoint
        saves = CheckpointWriter(run.attempt, run.world, settings.every, settings.keep)
        evaluator = Evaluator.create(run)
        last = take_steps(run, first, saves, evaluator)
        end_by_loss(run, last)
        export(run)
    except Stopped as stopped:
        if dist.get_rank() == 0:
            claimed.event("stopped", step=stopped.step)
        return False
    return True


def prepare_run(attempt: Attempt) -> tuple[Run, int]:
    """Load data and model, shard them, and take back the start checkpoint; gives the number of steps done.

    Raises Stopped where no step is to be taken.
    """
    job = load_job(attempt.run_dir)
    world = join_process_group()
    announce(attempt, world, "workers_up")
    stops = StopRequests(attempt, world)
    check_inputs(attempt, job, world)
    width = getattr(load_config(job.base), "hidden_size", None)
    job = job.at_width(width)
    device = world.device
    with noting_progress(attempt):
        tokenizer = load_tokenizer(job.base)
    ends = end_ids(tokenizer, job.base)
    reading = Reading.of(job, ends)
    objective_setup = ObjectiveSetup(job, tokenizer, reading, cache(), lambda _: attempt.note_progress())
    objective = create_objective(objective_setup)
    examples = objective.read(job.data.train)
    stops.leave_if_warned(stops.first)
    batches = Batches.of(job, examples)
    saved = open_start(attempt, world)
    stops.leave_if_warned(stops.first)
    method = create_method(job, batches, tokenizer, saved)
    objective.method = method
    dtype = forward_dtype(job, device)
    model = base_model(attempt, job, objective, dtype, world)
    embeddings = vocabulary(model.config)
    check_ids(examples.tokens, tokenizer, embeddings, job.data.train)
    if saved:
        saved.load_weights(model, method)
    else:
        method.initialise(model, documents(batches, device))
    with noting_progress(attempt):
        objective.kernels = make_fast(job, model, method, dtype, device)
    sharded = shard(job, model, method, saved, objective.kernels.fused_step)
    schedule = method.schedule(lambda step: learning_rate(job, step, batches.steps))
    run = Run(
        job, attempt, world, stops, method, tokenizer, reading, objective, examples, batches, sharded, dtype, schedule
    )
    check_documents_apart(run)
    announce_plan(run)
    return run, saved.step if saved else 0


def base_model(attempt: Attempt, job: Job, objective: Objective, dtype: torch.dtype, world: World) -> nn.Module:
    """The model of a job with the weights of its base, and the objective's method attached; that may take long."""
    announce(attempt, world, "loading_base")
    with noting_progress(attempt):
        model = load_model(job, objective.method, dtype, world.device, objective)
    announce(attempt, world, "base_loaded")
    return model


def create_method(job: Job, batches: Batches, tokenizer: Any, saved: CheckpointReader | None) -> Method[Any]:
    """The method of a job, with its state of a checkpoint where there is one."""
    setup = Setup(batches.steps, job.train.seed, job.data.seq_len, tokenizer, gather)
    method = create(job.method, setup)
    if saved:
        state = saved.method_state()
        method.load_state(state)
    return method


def shard(
    job: Job, model: nn.Module, method: Method[Any], saved: CheckpointReader | None, fused: bool
) -> ShardedModel:
    """The model under DeepSpeed's engine, with the optimizer's state of a checkpoint where there is one."""
    settings = job.train
    adam: dict[str, Any] = {
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if fused:
        adam["fused"] = True
    sharded = ShardedModel(model, method, job.sharding.zero, job.lr, adam)
    if saved:
        saved.load_optimizer(sharded)
    return sharded


def check_inputs(attempt: Attempt, job: Job, world: World) -> None:
    """Raise InputChanged on every worker unless data and base are still those that were submitted."""
    messages = [""]
    if world.leads:  # large files are read once, not by each worker
        digests = frozen_digests(attempt.run_dir)
        changed = changes(job, digests)
        messages = ["; ".join(changed)]
    dist.broadcast_object_list(messages, device=world.device)
    if messages[0]:
        raise InputChanged(messages[0])


def documents(batches: Batches, device: torch.device) -> Iterator[torch.Tensor]:
    """The token ids [1, T] of the training documents, in the order of their batches."""
    for k in range(batches.steps):
        batch = batches.batch(k)
        tokens = batch.examples.tokens
        for number in batch.documents():
            document = tokens.document(number)
            row = torch.as_tensor(document.ids, dtype=torch.long, device=device)
            yield row[None]


def announce_plan(run: Run) -> None:
    """Tell readers what will happen: number of steps, sizes, kernels, and what of the data was cut."""
    model = run.model
    tokens = run.tokens
    world = run.world
    kernels = run.objective.kernels
    if world.leads:
        run.attempt.event(
            "plan",
            steps=run.batches.steps,
            parameters=speed.count_weights(model),
            trained=speed.count_trained(model),
            examples=len(run.examples),
            truncated=tokens.truncated,
            dropped=tokens.dropped,
            data=tokens.counts.summary(),
            device=str(world.device),
            kernels=kernels.names,
            kernel_problems=kernels.problems,
        )


def take_steps(run: Run, first: int, saves: CheckpointWriter, evaluator: Evaluator) -> int:
    """Take the steps after `first`, evaluate and save between them, until all is on disk; gives the last of them.

    That is an earlier one than the job's where the held-out loss says so. Raises Stopped, with as much on disk, where
    the run is to stop before its end.
    """
    last_step = run.batches.steps
    every = run.job.evaluation.every
    meter = create_meter(run)
    evaluate_first(run, first, evaluator)
    best = best_so_far(run, first)
    saves.best = best.step
    if is_over(run, best):
        return first
    meter.pause()
    micro_batches_of = feed(run, first)
    step = first
    for step in range(first + 1, last_step + 1):
        save_here = saves.overdue()
        stop_here = run.stops.wanted(step)
        request_here = SaveRequest(save_here, stop_here)
        requested = take_step(run, step, micro_batches_of, meter, request_here)
        is_last = step == last_step
        must_stop = requested.stop and not is_last
        must_save = is_last or requested.save or requested.stop or saves.due(step)
        if is_last or is_multiple(step, every):
            with meter.pausing():
                was_finished = evaluate_in_time(run, step, evaluator)
            must_stop = must_stop or not was_finished
            best = best_so_far(run, step)
            saves.best = best.step
            is_last = is_last or is_over(run, best)
            must_save = must_save or is_last or best.step == step
        if must_save or must_stop:
            with meter.pausing():
                saves.save(run.sharded, run.method, step)
        if must_stop:
            saves.wait()
            raise Stopped(step)
        if is_last:
            break
    saves.wait()
    return step


def create_meter(run: Run) -> Meter:
    """What measures the steps of a run on its devices."""
    world = run.world
    peak = speed.peak_flops(world.device, run.dtype)
    flops_per_token = speed.flops_per_token(run.model)
    steps = run.batches.steps
    return Meter(run.attempt, world, steps, flops_per_token, peak)


def evaluate_first(run: Run, first: int, evaluator: Evaluator) -> None:
    """Evaluate before the first step where the job says so, or where an earlier attempt had to leave it.

    Raises Stopped where no step is to be taken.
    """
    evaluation = run.job.evaluation
    unfinished = first < run.batches.steps
    if unfinished:
        run.stops.leave_before_first()
    due = evaluation.before
    if first:
        due = not unfinished or is_multiple(first, evaluation.every)
        due = due and not is_reported(run, first)
    if due:
        evaluator.evaluate(run, first)


def is_reported(run: Run, step: int) -> bool:
    """Whether an attempt has reported an evaluation after a step, or there is none; every rank calls it."""
    if run.job.data.eval is None:
        return True
    found = False
    if run.world.leads:
        for attempt in attempts(run.attempt.run_dir):
            for row in read_lines(attempt, "metrics.jsonl"):
                of_step = row["step"] == step
                found |= of_step and "eval_loss" in row
    return run.world.told(found)


def evaluate_in_time(run: Run, step: int, evaluator: Evaluator) -> bool:
    """Evaluate after a step; False where there was no time left to finish that."""
    try:
        evaluator.evaluate(run, step)
    except Stopped:
        return False
    return True


def is_multiple(step: int, every: int | None) -> bool:
    """Whether what is done every so many steps, if at all, is done after this one."""
    return every is not None and step % every == 0
