"""The training loop of one worker."""

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from methods.base import Setup
from methods.registry import create
from runfolder.chain import Attempt
from runfolder.digests import InputChanged, changes, frozen
from runfolder.folders import cache
from runfolder.job import Job
from runfolder.record import load_job
from trainer import apart, checkpoint, speed
from trainer.base import load_config, load_model, precision
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.survey import check_ids
from trainer.data.tokenizer import end_ids, load_tokenizer
from trainer.data.tokens import Tokens, tokenise
from trainer.embeddings import vocabulary
from trainer.evaluate import Evaluator
from trainer.export import export
from trainer.meter import Meter
from trainer.objectives import sft
from trainer.progress import shown
from trainer.run import Run
from trainer.schedule import learning_rate
from trainer.world import World, join
from trainer.zero import gather
from trainer.zero.shards import Shards

Batch = dict[str, torch.Tensor]


def train(run_dir: Path, attempt: int) -> None:
    """Do this worker's part of an attempt that is claimed: from its start checkpoint to attempts/N/output.

    Every worker of the group calls it. Any exception is the caller's to judge.
    """
    run, first = prepare(Attempt(run_dir, attempt))
    saves = checkpoint.Checkpoints(run.attempt, run.world, run.job.checkpoint.every, run.job.checkpoint.keep)
    evaluator = Evaluator.create(run, cache())
    fit(run, first, saves, evaluator)
    saves.wait()
    export(run)


def prepare(attempt: Attempt) -> tuple[Run, int]:
    """Load data and model, shard them, and take back the start checkpoint; gives the number of steps done."""
    job = load_job(attempt.run_dir)
    world = join()
    check_inputs(attempt, job, world)
    job = job.at_width(getattr(load_config(job.base), "hidden_size", None))
    with shown(attempt):
        tokenizer = load_tokenizer(job.base)
    reading = Reading.of(job, end_ids(tokenizer, job.base))
    tokens = tokenise(job.data.train, tokenizer, reading, cache(), lambda _: attempt.alive())
    planned = Batches.of(job, tokens)
    method = create(job.method, Setup(planned.steps, job.train.seed, job.data.seq_len, tokenizer, gather))
    dtype = precision(job, world.device)
    saved = checkpoint.open_checkpoint(attempt.run_dir, attempt.start) if attempt.start else None
    if saved:
        method.load_state(saved.method_state())
    with shown(attempt):
        model = load_model(job, method, dtype, world.device)
    check_ids(tokens, tokenizer, vocabulary(model.config), job.data.train)
    if saved:
        saved.load_weights(model, method)
    else:
        method.initialise(model, examples(planned, tokens, world.device))
    adam = {"betas": job.train.betas, "eps": job.train.eps, "weight_decay": job.train.weight_decay}
    shards = Shards(model, method, job.sharding.zero, job.lr, adam)
    if saved:
        saved.load_optimizer(shards)
    schedule = method.schedule(lambda step: learning_rate(job, step, planned.steps))
    run = Run(job, attempt, world, method, tokenizer, reading, tokens, planned, shards, dtype, schedule)
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


def examples(batches: Batches, tokens: Tokens, device: torch.device) -> Iterator[torch.Tensor]:
    """The token ids [1, T] of the training examples, in the order of their batches."""
    for k in range(batches.steps):
        for i in batches.examples(k):
            yield torch.as_tensor(tokens.example(int(i)).ids, dtype=torch.long, device=device)[None]


def announce(run: Run) -> None:
    """Tell readers what will happen: number of steps, sizes, and what of the data was cut."""
    if run.world.leads:
        run.attempt.event(
            "plan",
            steps=run.batches.steps,
            parameters=speed.count(run.model),
            trained=sum(speed.numel(p) for p in run.model.parameters() if p.requires_grad),
            examples=len(run.tokens.lengths),
            truncated=run.tokens.truncated,
            dropped=run.tokens.dropped,
            data=run.tokens.counts.summary(),
            device=str(run.world.device),
        )


def fit(run: Run, first: int, saves: checkpoint.Checkpoints, evaluator: Evaluator) -> None:
    """Take the steps after `first`, evaluate and save between them."""
    steps = run.batches.steps
    peak = speed.peak_flops(run.world.device, run.dtype)
    meter = Meter(run.attempt, run.world, steps, speed.flops_per_token(run.model), peak)
    if first == 0 and run.job.evaluation.before:
        evaluator.evaluate(run, 0)
    meter.pause()
    stream = prefetch(micro_batches(run, first))
    for step in range(first + 1, steps + 1):
        wish = take_step(run, step, stream, meter, saves.overdue())
        every = run.job.evaluation.every
        evaluation_due = step == steps or (every is not None and step % every == 0)
        save_due = step == steps or wish or saves.due(step)
        if evaluation_due or save_due:
            meter.flush()
            if evaluation_due:
                evaluator.evaluate(run, step)
            if save_due:
                saves.save(run.shards, run.method, step)
            meter.pause()


def take_step(run: Run, step: int, stream: Iterator[Batch | None], meter: Meter, overdue: bool) -> bool:
    """Accumulate the micro-batches of one global batch and apply them; gives whether rank 0 wants to save."""
    torch.manual_seed(hash((run.job.train.seed, step, run.world.rank)))
    total = run.batches.target_tokens(step - 1)
    loss = torch.zeros((), device=run.world.device, dtype=torch.float64)
    waited = -time.monotonic()
    while (batch := next(stream)) is not None:
        waited += time.monotonic()
        part, _ = sft.loss(run.shards.engine, batch)
        run.shards.backward(part / total)
        loss += part.detach() / total
        waited -= time.monotonic()
    waited += time.monotonic()
    lr = run.schedule(step - 1)
    norm = run.shards.step(lr, run.job.train.clip)
    return meter.record(step, loss, norm, lr, run.batches.tokens(step - 1), waited, overdue)


def micro_batches(run: Run, first: int) -> Iterator[Batch | None]:
    """This rank's micro-batches of all steps after `first`; None ends a step."""
    for k in range(first, run.batches.steps):
        for micro in run.batches.deal(k, run.world.rank, run.world.size):
            arrays = sft.arrays(micro, run.tokens, run.tokenizer.pad_token_id)
            yield {name: to_device(array, run.world.device) for name, array in arrays.items()}
        yield None


def to_device(array: Any, device: torch.device) -> torch.Tensor:
    """An array as a tensor on the device, copied without a wait where that is possible."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def prefetch(stream: Iterator[Batch | None], ahead: int = 4) -> Iterator[Batch | None]:
    """The same stream, made ahead in a thread; raises what the thread raised."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)

    def work() -> None:
        try:
            for item in stream:
                ready.put(item)
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        item = ready.get()
        if isinstance(item, BaseException):
            raise item
        yield item
