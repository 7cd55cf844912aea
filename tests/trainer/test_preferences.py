"""Objectives on preferences: the same curve in every layout and after a resume, and one reference."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import adamw, base, clipped_step
from finished_runs import Curve, curve, difference, events, interrupted
from first_steps import DPO, FIRST, LN_2, PISSA
from llamas import random_llama
from sampling import sampled
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoTokenizer

from methods.base import Setup
from methods.registry import create
from runfolder.objectives import DpoOptions
from runfolder.record import load_job
from trainer.data.batches import Batches
from trainer.data.counts import Counts
from trainer.data.encode import Reading
from trainer.data.examples import Examples
from trainer.data.shards import join_examples
from trainer.data.tokenizer import load_tokenizer
from trainer.data.tokens import Document, Tokens, tokenise
from trainer.kernels import Kernels
from trainer.kernels.head import LinearHead
from trainer.objectives import likelihood
from trainer.objectives.dpo import DirectPreference, pair_losses
from trainer.objectives.likelihood import likelihood_arrays
from trainer.objectives.orpo import log_odds
from trainer.schedule import learning_rate
from trainer.step import with_starts

STEPS, HALF = 20, 10
LAYOUTS = [(1, 0, 3, True), (2, 2, 1, True), (2, 3, 1, False), (3, 1, 2, True)]  # workers, ZeRO, micro-batch, packed


def log_likelihood(model: Any, document: Document) -> torch.Tensor:
    """Of the labels of a document, one document at a time."""
    ids = torch.tensor(document.ids, dtype=torch.long)
    losses = cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
    return -losses[torch.tensor(document.target)[1:]].double().sum()


@dataclass
class Step:
    """Of the examples of a step [E]: log-likelihoods of both documents, before the first step too; labels; likes."""

    first: torch.Tensor
    second: torch.Tensor
    first_before: torch.Tensor
    second_before: torch.Tensor
    first_labels: torch.Tensor
    second_labels: torch.Tensor
    desirable: torch.Tensor

    @property
    def margin(self) -> torch.Tensor:
        return (self.first - self.first_before) - (self.second - self.second_before)

    @property
    def margin_per_token(self) -> torch.Tensor:
        first = (self.first - self.first_before) / self.first_labels
        return first - (self.second - self.second_before) / self.second_labels


def odds(step: Step) -> torch.Tensor:
    """The log-odds ratio of ORPO, as the paper writes it."""
    p, q = torch.exp(step.first / step.first_labels), torch.exp(step.second / step.second_labels)
    return torch.log(p / (1 - p)) - torch.log(q / (1 - q))


def kto(step: Step) -> torch.Tensor:
    z = (step.second - step.second_before).mean().clamp(min=0).detach()
    growth = 0.1 * (step.first - step.first_before - z)
    return (1.5 * (1 - torch.sigmoid(torch.where(step.desirable, growth, -growth)))).mean()


BY_HAND: dict[str, tuple[dict[str, Any], Callable[[Step], torch.Tensor]]] = {
    "sigmoid": (DPO, lambda s: -logsigmoid(0.1 * s.margin).mean()),
    "smoothed": (
        DPO | {"label_smoothing": 0.2},
        lambda s: (-0.8 * logsigmoid(0.1 * s.margin) - 0.2 * logsigmoid(-0.1 * s.margin)).mean(),
    ),
    "per-token": (DPO | {"per_token": True}, lambda s: -logsigmoid(0.1 * s.margin_per_token).mean()),
    "ipo": (DPO | {"loss": "ipo"}, lambda s: ((s.margin_per_token - 5) ** 2).mean()),
    "hinge": (DPO | {"loss": "hinge"}, lambda s: (1 - 0.1 * s.margin).clamp(min=0).mean()),
    "simpo": (
        {"kind": "simpo", "beta": 2.0, "gamma": 1.375},
        lambda s: -logsigmoid(2 * (s.first / s.first_labels - s.second / s.second_labels) - 1.375).mean(),
    ),
    "orpo": (
        {"kind": "orpo", "weight": 0.3},
        lambda s: -s.first.sum() / s.first_labels.sum() - 0.3 * logsigmoid(odds(s)).mean(),
    ),
    "kto": (FIRST["kto"][0], kto),
}


def by_hand(run_dir: Path, cache: Path, loss_of: Callable[[Step], torch.Tensor]) -> Curve:
    """Losses and norms of a plain loop that keeps a copy of the model as it was."""
    job = load_job(run_dir)
    model: Any = create(job.method, Setup(STEPS)).attach(base(run_dir))
    before, optimizer = copy.deepcopy(model), adamw(model)
    tokens = tokenise(job.data.train, load_tokenizer(job.base), replace(Reading.of(job), virtual=0), cache)
    batches = Batches.of(job, Examples.of_each(tokens, 2))
    found = []
    for k in range(STEPS):
        firsts = [2 * int(example) for example in batches.examples(k)]
        of_both = [[tokens.document(first + part) for first in firsts] for part in (0, 1)]
        policy = [torch.stack([log_likelihood(model, each) for each in documents]) for documents in of_both]
        with torch.no_grad():
            start = [torch.stack([log_likelihood(before, each) for each in documents]) for documents in of_both]
        labels = [torch.tensor([int(each.target.sum()) for each in documents]) for documents in of_both]
        loss = loss_of(Step(*policy, *start, *labels, torch.tensor(tokens.desirable[firsts])))
        loss.backward()
        norm = clipped_step(model, optimizer, job, learning_rate(job, k, STEPS))
        optimizer.zero_grad()
        found.append((loss.item(), norm))
    return found


@pytest.mark.parametrize("cases", sampled(list(product(BY_HAND, LAYOUTS))))
@pytest.mark.timeout(3600)
def test_curves_are_those_by_hand_in_every_layout_and_after_a_resume(
    cases: list[Any], preference_run: Any, launch: Any, cache: Path
) -> None:
    runs = {}
    for name, layout in cases:
        _, zero, micro, packed = layout
        runs[name, layout] = preference_run(
            "{}-{}-{}-{}-{}".format(name, *layout),
            BY_HAND[name][0],
            method=PISSA,
            data={"packing": packed},
            train={"micro_batch": micro},
            sharding={"zero": zero},
            checkpoint={"every": HALF, "keep": 9},
        )
        launch(layout[0], runs[name, layout])
    for (name, layout), run in runs.items():
        expected = by_hand(run, cache, BY_HAND[name][1])
        assert difference(curve(run), expected) < 1e-6, (name, layout)
        again = interrupted(run, f"{run.name}-again", HALF)
        launch(layout[0], again)
        assert curve(again, 2) == curve(run)[HALF:], (name, layout)
        elsewhere = interrupted(run, f"{run.name}-elsewhere", HALF, sharding={"zero": 1})
        launch(1 if layout[0] > 1 else 2, elsewhere)
        assert difference(curve(elsewhere, 2), curve(run)[HALF:]) < 1e-5, (name, layout)


def computed(run: Path, attempt: int = 1) -> int:
    """Of how many examples the reference was computed in an attempt."""
    found = [event["computed_examples"] for event in events(run, attempt) if event["event"] == "reference"]
    return sum(found)


def test_the_reference_is_computed_once(preference_run: Any, launch: Any, pairs: Path) -> None:
    def run(name: str, beta: float = 0.1, **parts: Any) -> Path:
        train = {"steps": 3, "seed": 77, **parts.pop("train", {})}
        made: Path = preference_run(name, DPO | {"beta": beta}, method=PISSA, train=train, **parts)
        return made

    first, other_beta = run("first"), run("other-beta", 0.3)
    whole = run("whole", train={"steps": None, "epochs": 1})
    launch(1, first, other_beta, whole)
    assert computed(first) > 0 and computed(other_beta) == 0
    assert computed(first) + computed(whole) == 60
    answers = pairs.with_name("other-pairs.jsonl")
    answers.write_text(pairs.read_text().replace('"chosen": " 1', '"chosen": " 2'))
    changed = [
        run("other-start", train={"seed": 78}),
        run("other-data", data={"train": str(answers)}),
        run("other-base", base={"model": str(load_job(first).base.model), "init": "scratch"}),
    ]
    launch(1, *changed)
    assert [computed(each) > 0 for each in changed] == [True] * 3


def test_the_reference_of_another_chat_template_start_or_method_is_another(
    preference_run: Any, launch: Any, pairs: Path, tiny_base: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()[:20]]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row | {"prompt": [asked(row["prompt"])]}) + "\n" for row in rows))
    bases = {}
    for name, mark in (("one", "user: "), ("other", "asked: ")):
        bases[name] = tmp_path / f"base-{name}"
        shutil.copytree(tiny_base, bases[name])
        tokenizer = AutoTokenizer.from_pretrained(bases[name])
        tokenizer.chat_template = f"{{% for m in messages %}}{mark}{{{{ m.content }}}}\n{{% endfor %}}"
        tokenizer.save_pretrained(bases[name])

    def run(name: str, template: str, method: dict[str, Any], beta: float = 0.1) -> Path:
        made: Path = preference_run(
            name,
            DPO | {"beta": beta},
            base=str(bases[template]),
            method=method,
            data={"train": str(chats)},
            train={"steps": 2},
        )
        return made

    first = run("first", "one", PISSA)
    others = {
        "same": run("same", "one", PISSA, 0.3),
        "template": run("template", "other", PISSA),
        "start": run("start", "one", PISSA | {"init": "gaussian"}),
        "method": run("method", "one", {"kind": "dora", "rank": 4}),
    }
    launch(1, first, *others.values())
    assert computed(first) > 0
    assert {name: computed(each) > 0 for name, each in others.items()} == {
        "same": False,
        "template": True,
        "start": True,
        "method": True,
    }


def asked(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_a_damaged_reference_is_computed_again_unless_the_policy_has_moved(
    preference_run: Any, launch: Any, cache: Path
) -> None:
    parts = {"method": PISSA, "checkpoint": {"every": 2, "keep": 9}}
    first = preference_run("first", DPO, train={"steps": 3, "seed": 79}, **parts)
    launch(1, first)
    (kept,) = (first / "reference").iterdir()
    cached = cache / "references" / kept.name
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.write_bytes(content)
    again = preference_run("again", DPO, train={"steps": 3, "seed": 79}, **parts)
    resumed, lost = interrupted(first, "resumed", 2), interrupted(first, "lost", 2)
    launch(1, again, resumed)
    assert computed(again) == computed(first) and computed(resumed, 2) == 0
    assert curve(resumed, 2) == curve(first)[2:]
    (lost / "reference" / kept.name).unlink()
    cached.unlink()
    with pytest.raises(AssertionError, match="ReferenceLost: what the policy before the first step gave is neither"):
        launch(1, lost)


def judgements(run: Path) -> dict[int, dict[str, float]]:
    """What was found of the held-out rows, by step."""
    lines = (run / "attempts" / "1" / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if "eval_loss" in row]
    return {row["step"]: {name: row[name] for name in row if name.startswith("eval_")} for row in found}


@pytest.mark.parametrize(("objective", "first"), [(DPO, LN_2), (FIRST["kto"][0], 0.75)])
def test_held_out_preferences_are_judged_alike_in_every_layout(
    objective: dict[str, Any], first: float, preference_run: Any, launch: Any, pairs: Path, judged: Path
) -> None:
    held_out = str(judged if objective["kind"] == "kto" else pairs)
    layouts = {"alone": (1, 0, 4, True), "shared": (2, 2, 1, False)}
    runs = {}
    for name, (world, zero, micro, packed) in layouts.items():
        runs[name] = preference_run(
            name,
            objective,
            data={"eval": held_out, "packing": packed},
            train={"steps": 4, "micro_batch": micro, "lr": 1e-2},
            sharding={"zero": zero},
        )
        launch(world, runs[name])
    alone, shared = map(judgements, runs.values())
    assert alone[0]["eval_loss"] == pytest.approx(first, abs=1e-6)
    assert alone[4]["eval_loss"] < alone[0]["eval_loss"] - 1e-3
    for step in (0, 4):
        assert shared[step] == pytest.approx(alone[step], rel=1e-5, abs=1e-6)
    if objective["kind"] == "dpo":
        assert (alone[0]["eval_accuracy"], alone[4]["eval_accuracy"] > 0.5) == (0.5, True)


@pytest.mark.parametrize("way", ["chunks", "head"])
def test_log_likelihoods_are_the_same_in_chunks_and_by_the_head(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 60, length).astype(np.int32) for length in (9, 5, 14)]
    targets = [np.arange(len(row)) > 2 for row in ids]
    tokens = Tokens([join_examples(list(zip(ids, targets, strict=True)), range(3), Counts())])
    arrays = likelihood_arrays([[2, 0], [1]], tokens, pad_id=0)
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.manual_seed(0)
    model: Any = random_llama(vocab_size=60)

    def found(kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
        policy = likelihood.log_likelihoods(model, batch, kernels)
        (gradient,) = torch.autograd.grad((policy * torch.tensor([1.0, -2.0, 0.5])).sum(), [model.lm_head.weight])
        return policy, gradient

    expected, of_weight = found(Kernels())
    for place, number in enumerate((2, 0, 1)):
        assert expected[place].item() == pytest.approx(
            log_likelihood(model, tokens.document(number)).item(), rel=1e-6
        )
    kernels = Kernels(LinearHead(model, torch.float32)) if way == "head" else Kernels()
    monkeypatch.setattr(likelihood, "CHUNK", 4)
    policy, gradient = found(kernels)
    torch.testing.assert_close(policy, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, of_weight, rtol=1e-5, atol=1e-6)


def test_documents_in_one_row_are_told_apart_in_both_parts_of_a_batch() -> None:
    positions = np.array([[0, 1, 2, 0, 1, 0, 1, 2]])
    found = with_starts({"position_ids": positions, "neighbours_position_ids": positions[:, :5], "label": positions})
    assert found["documents"].tolist() == [0, 3, 5, 8]
    assert found["neighbours_documents"].tolist() == [0, 3, 5]


@pytest.mark.parametrize("log_p", [-1e-9, -0.1, -0.6931, -0.6932, -3.0, -50.0, -800.0])
def test_log_odds_are_exact_and_have_a_gradient_everywhere(log_p: float) -> None:
    value = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    found = log_odds(value)
    rest = -math.expm1(log_p)
    assert found.item() == pytest.approx(log_p - math.log(rest), rel=1e-9)
    found.backward()
    assert value.grad is not None and value.grad.item() == pytest.approx(1 / rest, rel=1e-6)


@pytest.mark.parametrize("margin", [-50.0, -1.0, 0.0, 1.0, 50.0])
@pytest.mark.parametrize("name", ["sigmoid", "smoothed", "ipo-summed", "hinge"])
def test_what_a_margin_costs(name: str, margin: float) -> None:
    options = DpoOptions.model_validate(FIRST[name][0])
    beta, wrong = options.beta, options.label_smoothing
    right = math.log1p(math.exp(-beta * margin))
    expected = {
        "sigmoid": (1 - wrong) * right + wrong * (right + beta * margin),
        "ipo": (margin - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - beta * margin),
    }
    assert pair_losses(options, torch.tensor(margin)).item() == pytest.approx(expected[options.loss], rel=1e-6)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("lead", "accuracy"), [(0.05, 1.0), (-0.05, 0.0), (1e-5, 0.5)])
def test_what_counts_as_a_tie_is_no_matter_of_beta(
    beta: float, lead: float, accuracy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = SimpleNamespace(objective=DpoOptions(beta=beta))
    setup: Any = SimpleNamespace(job=job)
    objective = DirectPreference(setup)
    monkeypatch.setattr(objective, "policy", lambda _model, _batch: torch.tensor([lead - 3, -3.0]).double())
    batch = {"chosen": torch.tensor([0]), "rejected": torch.tensor([1]), "labels": torch.tensor([2, 2])}
    shares = objective.loss(torch.nn.Module(), batch | {"reference": torch.tensor([-3.0, -3.0])}, {"pairs": 1}, {})
    assert shares.metrics["accuracy"].item() == accuracy
