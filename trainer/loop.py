"""The training loop of one worker."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from methods.base import Setup
from methods.registry import create
from runfolder.chain import Attempt
from runfolder.digests import InputChanged, changes, frozen
from runfolder.folders import cache
from runfolder.job import Job
from runfolder.record import load_job
from trainer import apart, speed
from trainer.base import load_config, load_model, precision
from trainer.checkpoint.reading import open_start
from trainer.checkpoint.saving import Checkpoints
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.survey import check_ids
from trainer.data.tokenizer import end_ids, load_tokenizer
from trainer.embeddings import vocabulary
from trainer.evaluate import Evaluator
from trainer.export import export
from trainer.meter import Meter, Wish
from trainer.objectives.base import Setup as ObjectiveSetup
from trainer.objectives.registry import create as create_objective
from trainer.progress import shown
from trainer.run import Run
from trainer.schedule import learning_rate
from trainer.step import feed, take_step
from trainer.stop import StopRequests
from trainer.world import World, join
from trainer.zero import gather
from trainer.zero.shards import Shards


def train(run_dir: Path, attempt: int) -> bool:
    """Do this worker's part of an attempt that is claimed: from its start checkpoint to attempts/N/output.

    False where it was asked to stop before, and has saved. Every worker of the group calls it. Any exception is the
    caller's to judge.
    """
    run, first = prepare(Attempt(run_dir, attempt))
    saves = Checkpoints(run.attempt, run.world, run.job.checkpoint.every, run.job.checkpoint.keep)
    evaluator = Evaluator.create(run)
    finished = fit(run, first, saves, evaluator)
    if finished:
        export(run)
    return finished


def prepare(attempt: Attempt) -> tuple[Run, int]:
    """Load data and model, shard them, and take back the start checkpoint; gives the number of steps done."""
    job = load_job(attempt.run_dir)
    world = join()
    check_inputs(attempt, job, world)
    job = job.at_width(getattr(load_config(job.base), "hidden_size", None))
    with shown(attempt):
        tokenizer = load_tokenizer(job.base)
    reading = Reading.of(job, end_ids(tokenizer, job.base))
    setup = ObjectiveSetup(job, tokenizer, reading, cache(), lambda _: attempt.alive())
    objective = create_objective(job.objective, setup)
    examples = objective.read(job.data.train)
    planned = Batches.of(job, examples)
    method = create(job.method, Setup(planned.steps, job.train.seed, job.data.seq_len, tokenizer, gather))
    objective.method = method
    dtype = precision(job, world.device)
    saved = open_start(attempt, world)
    if saved:
        method.load_state(saved.method_state())
    with shown(attempt):
        model = load_model(job, method, dtype, world.device)
    check_ids(examples.tokens, tokenizer, vocabulary(model.config), job.data.train)
    if saved:
        saved.load_weights(model, method)
    else:
        method.initialise(model, documents(planned, world.device))
    adam = {"betas": job.train.betas, "eps": job.train.eps, "weight_decay": job.train.weight_decay}
    shards = Shards(model, method, job.sharding.zero, job.lr, adam)
    if saved:
        saved.load_optimizer(shards)
    schedule = method.schedule(lambda step: learning_rate(job, step, planned.steps))
    run = Run(job, attempt, world, method, tokenizer, reading, objective, examples, planned, shards, dtype, schedule)
    apart.check(run)
    announce(run)
    return run, saved.step if saved else 0


def check_inputs(attempt: Attempt, job: Job, world: World) -> None:
    """Raise InputChanged on every worker unless data and base are still those that were submitted."""
    found = [""]
    if world.leads:  # large files are read once, not by each worker
        found = ["; ".join(changes(job, frozen(attempt.run_dir)))]
    dist.broadcast_object_list(found, device=world.device)
    if found[0]:
        raise InputChanged(found[0])


def documents(batches: Batches, device: torch.device) -> Iterator[torch.Tensor]:
    """The token ids [1, T] of the training documents, in the order of their batches."""
    for k in range(batches.steps):
        batch = batches.batch(k)
        for document in batch.documents():
            ids = batch.examples.tokens.document(document).ids
            yield torch.as_tensor(ids, dtype=torch.long, device=device)[None]


def announce(run: Run) -> None:
    """Tell readers what will happen: number of steps, sizes, and what of the data was cut."""
    if run.world.leads:
        run.attempt.event(
            "plan",
            steps=run.batches.steps,
            parameters=speed.count(run.model),
            trained=sum(speed.numel(p) for p in run.model.parameters() if p.requires_grad),
            examples=len(run.examples),
            truncated=run.tokens.truncated,
            dropped=run.tokens.dropped,
            data=run.tokens.counts.summary(),
            device=str(run.world.device),
        )


def fit(run: Run, first: int, saves: Checkpoints, evaluator: Evaluator) -> bool:
    """Take the steps after `first`, evaluate and save between them; False when the run is to stop before its end.

    All that was saved is on disk then.
    """
    steps = run.batches.steps
    peak = speed.peak_flops(run.world.device, run.dtype)
    meter = Meter(run.attempt, run.world, steps, speed.flops_per_token(run.model), peak)
    if first == 0 and run.job.evaluation.before:
        evaluator.evaluate(run, 0)
    meter.pause()
    fed = feed(run, first)
    stops = StopRequests(run.attempt, run.world)
    for step in range(first + 1, steps + 1):
        wish = take_step(run, step, fed, meter, Wish(saves.overdue(), stops.wanted(step)))
        every = run.job.evaluation.every
        evaluation_due = step == steps or (every is not None and step % every == 0)
        save_due = step == steps or wish.save or wish.stop or saves.due(step)
        if evaluation_due or save_due:
            meter.flush()
            if evaluation_due:
                evaluator.evaluate(run, step)
            if save_due:
                saves.save(run.shards, run.method, step)
            meter.pause()
        if wish.stop and step < steps:
            saves.wait()
            if run.world.leads:
                run.attempt.event("stopped", step=step)
            return False
    saves.wait()
    return True
