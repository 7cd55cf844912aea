"""Before the first step: a worker's data, model and engine, as the start checkpoint has them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from methods.base import Method, Setup
from methods.parts.peft_adapter import base_under
from methods.registry import create
from runfolder.chain import Attempt
from runfolder.digests import InputChanged, changes, frozen_digests
from runfolder.files import Record
from runfolder.folders import cache
from runfolder.job import Job
from runfolder.record import load_job
from trainer import speed
from trainer.base import forward_dtype, load_config, load_model
from trainer.checkpoint.reading import CheckpointReader, open_start
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.survey import check_ids
from trainer.data.tokenizer import end_ids, load_tokenizer
from trainer.document_leak import check_documents_apart
from trainer.embeddings import vocabulary
from trainer.kernels import Kernels
from trainer.kernels.fast import make_fast
from trainer.objectives.base import Objective, ObjectiveSetup
from trainer.objectives.registry import create_objective
from trainer.progress import announce, noting_progress
from trainer.run import Run
from trainer.schedule import learning_rate
from trainer.shared_rows.attention import share_rows
from trainer.shared_rows.check import check_shared_rows
from trainer.stop import StopRequests
from trainer.world import World, join_process_group
from trainer.zero import gather
from trainer.zero.sharded import ShardedModel


def prepare_run(attempt: Attempt) -> tuple[Run, int]:
    """Load data and model, shard them, and take back the start checkpoint; gives the number of steps done.

    Raises Stopped where no step is to be taken.
    """
    job = load_job(attempt.run_dir)
    world = join_process_group(job.sharding.sequence)
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
    objective_setup = ObjectiveSetup(job, tokenizer, reading, cache(), lambda _: attempt.note_progress(), attempt)
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
        objective.kernels = computed_by(job, model, method, dtype, world)
    sharded = shard(job, model, method, saved, objective.kernels.fused_step)
    schedule = method.schedule(lambda step: learning_rate(job, step, batches.steps))
    run = Run(
        job, attempt, world, stops, method, tokenizer, reading, objective, examples, batches, sharded, dtype, schedule
    )
    check_rows(run)
    announce_plan(run)
    return run, saved.step if saved else 0


def base_model(attempt: Attempt, job: Job, objective: Objective, dtype: torch.dtype, world: World) -> nn.Module:
    """The model of a job with the weights of its base, and the objective's method attached; that may take long."""
    announce(attempt, world, "loading_base")
    with noting_progress(attempt):
        model = load_model(job, objective.method, dtype, world.device, objective)
    announce(attempt, world, "base_loaded")
    return model


def computed_by(job: Job, model: nn.Module, method: Method[Any], dtype: torch.dtype, world: World) -> Kernels:
    """Put a model on the fast path, as far as it can be, and have it share rows; gives how it then computes."""
    kernels = make_fast(job, model, method, dtype, world.device)
    sequence = world.sequence
    base = base_under(model)
    share_rows(base, sequence)
    return replace(kernels, sequence=sequence)


def check_rows(run: Run) -> None:
    """Raise ValueError where the base does not do with rows what the job asks for; every rank calls it."""
    check_documents_apart(run)
    check_shared_rows(run)


def create_method(job: Job, batches: Batches, tokenizer: Any, saved: CheckpointReader | None) -> Method[Any]:
    """The method of a job, with its state of a checkpoint where there is one."""
    train = job.train
    setup = Setup(batches.steps, train.seed, job.data.seq_len, tokenizer, gather, train.master_weights)
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
    sharded = ShardedModel(model, method, job.sharding.zero, job.lr, adam, offload=job.sharding.offloads)
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
            evaluate_every=run.job.evaluation.every,
            work=work_of(run),
        )


def work_of(run: Run) -> Record:
    """What a run does and on what, for what later plans learn of its costs."""
    job = run.job
    device = run.world.device
    name = device.type
    if name == "cuda":
        name = torch.cuda.get_device_name(device)
    precision = "fp32"
    if run.dtype == torch.bfloat16:
        precision = "bf16"
    kernels = "plain"
    if run.objective.kernels.names:
        kernels = "fast"
    peak = speed.peak_flops(device, run.dtype)
    per_token = speed.flops_per_token(run.model)
    return {
        "method": job.method.kind,
        "objective": job.objective.kind,
        "zero": job.sharding.zero,
        "offload": job.sharding.offload,
        "kernels": kernels,
        "checkpointing": job.train.gradient_checkpointing,
        "master_weights": job.train.master_weights,
        "precision": precision,
        "workers": run.world.size,
        "device": name,
        "peak": peak,
        "flops_per_token": per_token,
        "batch_tokens": job.train.batch_tokens,
    }
