"""First steps on preferences are known in every layout: losses as numbers, gradients as sums of supervised ones."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import base
from finished_runs import curve, difference, rows, saved
from first_steps import FIRST, METHODS
from sampling import SEED
from torch.nn.functional import cross_entropy

from methods.base import Setup
from methods.registry import create
from runfolder.record import load_job
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.examples import Examples
from trainer.data.tokenizer import load_tokenizer
from trainer.data.tokens import Tokens, tokenise

Layout = tuple[int, int, int, bool]  # workers, ZeRO stage, sequences a pass, packed
Gradients = dict[str, torch.Tensor]
ALONE: Layout = (1, 0, 2, False)
LAYOUTS: list[Layout] = [
    (world, zero, 2, packed) for world, zero, packed in product((1, 2, 3), range(4), (True, False))
]
CELLS = list(product(METHODS, LAYOUTS))
FEW = random.Random(SEED).sample(list(product(FIRST, CELLS)), 3)
EACH = [pytest.param([(name, cell) for cell in CELLS], id=name, marks=pytest.mark.matrix) for name in FIRST]
# What a unit more of one side's log-likelihood is worth at the start, of a pair: the answer's labels are given.
SLOPES: dict[str, Callable[[int], float]] = {
    "sigmoid": lambda labels: 0.1 / 2,  # noqa: ARG005
    "smoothed": lambda labels: 0.1 / 2 * (1 - 2 * 0.2),  # noqa: ARG005
    "per-token": lambda labels: 0.1 / 2 / labels,
    "ipo": lambda labels: 1 / 0.1 / labels,
    "ipo-summed": lambda labels: 1 / 0.5,  # noqa: ARG005
    "hinge": lambda labels: 0.1,  # noqa: ARG005
    "reward": lambda labels: 1 / 2,  # noqa: ARG005
}


@pytest.mark.parametrize("cells", [pytest.param(FEW, id="sample"), *EACH])
@pytest.mark.timeout(3600)
def test_first_losses_and_gradients_are_known(
    cells: list[tuple[str, tuple[str, Layout]]], preference_run: Any, launch: Any, cache: Path
) -> None:
    runs = {}
    alone = [(name, (method, ALONE)) for name, (method, _) in cells]
    for name, (method, layout) in dict.fromkeys([*alone, *cells]):
        world, zero, micro, packed = layout
        run = preference_run(
            f"{name}-{method}-{world}-{zero}-{packed}",
            FIRST[name][0],
            method=METHODS[method],
            data={"packing": packed},
            train={"steps": 2, "micro_batch": micro, "clip": None},
            sharding={"zero": zero},
            checkpoint={"every": 1, "keep": 9},
        )
        launch(world, run)
        runs[name, method, layout] = run
    expected = {(name, method): gradients(name, runs[name, method, ALONE], cache) for name, (method, _) in alone}
    for (name, method, layout), run in runs.items():
        where = (name, method, layout)
        first, second = rows(run, 1).values()
        assert first["loss"] == pytest.approx(FIRST[name][1], abs=1e-6), where
        assert first["loss"] != second["loss"], where
        if "accuracy" in first:
            assert first["accuracy"] == pytest.approx(0.5, abs=1e-6), where
        of_all = expected[name, method]
        norm, gap = compared(run, of_all)
        assert first["grad_norm"] == pytest.approx(norm, rel=1e-5), where
        assert gap < 1e-5 * norm, where
        found, truth = curve(run), curve(runs[name, method, ALONE])
        assert difference(found[:1], truth[:1]) < 1e-6 and difference(found, truth) < 1e-5, where


def compared(run: Path, expected: Gradients) -> tuple[float, float]:
    """The norm of gradients, and how far those of a run's first step are from them, by AdamW's first moments.

    GaLore keeps of a matrix's gradient what its first singular vectors see; signs are free, so norms are compared.
    """
    checkpoint, job = saved(run, 1), load_job(run)
    square, of_gaps = 0.0, 0.0
    for name, gradient in expected.items():
        projected, rank = f"{name}.subspace", METHODS["galore"]["rank"]
        if "exp_avg" in checkpoint.kinds(projected):
            moments = checkpoint.read("exp_avg", projected, 0, rank * max(gradient.shape)).double()
            gradient, moments = torch.linalg.svdvals(gradient)[:rank].norm(), moments.norm()
        else:
            moments = checkpoint.read("exp_avg", name, 0, gradient.numel()).double()
        square += float(gradient.square().sum())
        of_gaps += float((moments / (1 - job.train.betas[0]) - gradient.flatten()).square().sum())
    return math.sqrt(square), math.sqrt(of_gaps)


def gradients(name: str, run_dir: Path, cache: Path) -> Gradients:
    """Of the first step, by name, fp64: a sum over its documents, one at a time, of supervised gradients.

    A reward model, whose head is zero, has a gradient in that alone: a sum of hidden states.
    """
    job = load_job(run_dir)
    plain = base(run_dir)
    scores = name == "reward"
    if scores:
        plain.lm_head = torch.nn.Linear(plain.config.hidden_size, 1, bias=False)
        torch.nn.init.zeros_(plain.lm_head.weight)
        torch.manual_seed(job.train.seed)
    model: Any = create(job.method, Setup(2, job.train.seed, 64, load_tokenizer(job.base))).attach(plain)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad or (scores and "lm_head" in key)}
    sums = {key: torch.zeros_like(p, dtype=torch.float64) for key, p in trained.items()}
    tokens = tokenise(job.data.train, load_tokenizer(job.base), replace(Reading.of(job), virtual=0), cache)
    firsts = [2 * int(example) for example in Batches.of(job, Examples.of_each(tokens, 2)).examples(0)]
    for number, weight in weights(name, tokens, firsts):
        ids = torch.tensor(tokens.document(number).ids, dtype=torch.long)
        if scores:
            (head,) = [key for key in trained if "lm_head" in key]
            with torch.no_grad():
                hidden = model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1]
            sums[head] -= weight * hidden[0, -1].double()
            continue
        labels = ids.masked_fill(~torch.tensor(tokens.document(number).target), -100)[1:]
        loss = cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels, reduction="sum")
        for key, gradient in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
            sums[key] += weight * gradient.double()
    return sums


def weights(name: str, tokens: Tokens, firsts: list[int]) -> Iterator[tuple[int, float]]:
    """The documents of a step, and with which weight the supervised gradient of each is in that of the step."""
    for first in firsts:
        if name == "kto":
            yield first, 0.1 * 1.5 / 4 / len(firsts) * (1 if tokens.desirable[first] else -1)
            continue
        for number, sign in ((first, 1), (first + 1, -1)):
            yield number, sign * SLOPES[name](int(tokens.targets[number])) / len(firsts)
