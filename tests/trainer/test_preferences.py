"""Objectives on preferences: first losses that are known, the same curve in every layout, and one reference."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import adamw, base
from finished_runs import Curve, curve, difference, events, interrupted, rows
from sampling import sampled
from torch.nn.functional import cross_entropy, logsigmoid

from methods.base import Setup
from methods.registry import create
from runfolder.record import load_job
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.examples import Examples
from trainer.data.tokenizer import load_tokenizer
from trainer.data.tokens import Document, tokenise
from trainer.schedule import learning_rate

STEPS, HALF = 20, 10
LN_2 = 0.6931471805599453
DPO = {"kind": "dpo", "beta": 0.1}
FIRST: dict[str, tuple[dict[str, Any], float]] = {
    "sigmoid": (DPO, LN_2),
    "smoothed": (DPO | {"label_smoothing": 0.2}, LN_2),
    "per-token": (DPO | {"per_token": True}, LN_2),
    "ipo": (DPO | {"loss": "ipo"}, 25.0),
    "ipo-summed": (DPO | {"loss": "ipo", "beta": 0.5, "per_token": False}, 1.0),
    "hinge": (DPO | {"loss": "hinge"}, 1.0),
    "kto": ({"kind": "kto", "desirable": 1.5, "undesirable": 1.5}, 0.75),
}
PISSA = {"kind": "lora", "rank": 4, "init": "pissa"}
METHODS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4},
    "dora": {"kind": "dora", "rank": 4},
    "pissa": PISSA,
    "prefix": {"kind": "prefix", "tokens": 3},
    "galore": {"kind": "galore", "rank": 4},
}
LAYOUTS = [(1, 0, 3, True), (2, 2, 1, True), (2, 3, 1, False), (3, 1, 2, True)]  # workers, ZeRO, micro-batch, packed


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 60 sums with a right and a wrong answer, of different lengths."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for _ in range(60):
        numbers = [rng.randrange(100) for _ in range(rng.randrange(2, 9))]
        right = str(sum(numbers))
        wrong = right[::-1] + str(rng.randrange(10 ** rng.randrange(1, 6)))
        row = {"prompt": " + ".join(map(str, numbers)) + " =", "chosen": f" {right}", "rejected": f" {wrong}"}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def judged(pairs: Path) -> Path:
    """A .jsonl of the same sums, each with one answer that was judged."""
    path = pairs.with_name("judged.jsonl")
    lines = []
    for number, line in enumerate(pairs.read_text().splitlines()):
        row = json.loads(line)
        liked = number % 3 > 0
        row = {"prompt": row["prompt"], "completion": row["chosen" if liked else "rejected"], "label": liked}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def preference_run(new_run: Any, pairs: Path, judged: Path) -> Any:
    """Make the folder of a run on pairs, or on judged answers for KTO; parts are as in `new_run`."""

    def make(name: str, objective: dict[str, Any], **parts: Any) -> Path:
        data = {"train": str(judged if objective["kind"] == "kto" else pairs), **parts.pop("data", {})}
        train = {"steps": STEPS, "batch_tokens": 400, "lr": 1e-3, "micro_batch": 1, **parts.pop("train", {})}
        run: Path = new_run(name, objective=objective, data=data, train=train, **parts)
        return run

    return make


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
        graded = [p for p in model.parameters() if p.grad is not None]
        norm = torch.cat([p.grad.flatten() for p in graded]).double().norm()
        torch.nn.utils.clip_grads_with_norm_(graded, job.train.clip, norm)
        optimizer.param_groups[0]["lr"] = learning_rate(job, k, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


@pytest.mark.parametrize("cases", sampled([(name, method) for name in FIRST for method in METHODS], 3))
def test_first_losses_are_known(cases: list[Any], preference_run: Any, launch: Any) -> None:
    runs = {case: preference_run("-".join(case), FIRST[case[0]][0], method=METHODS[case[1]]) for case in cases}
    launch(2, *runs.values())
    for (name, method), run in runs.items():
        assert rows(run, 1)[1]["loss"] == pytest.approx(FIRST[name][1], abs=1e-6), (name, method)
        assert rows(run, 1)[2]["loss"] != rows(run, 1)[1]["loss"]
        if "accuracy" in rows(run, 1)[1]:
            assert rows(run, 1)[1]["accuracy"] == pytest.approx(0.5, abs=1e-6)


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


def computed(run: Path, attempt: int = 1) -> int:
    """Of how many examples the reference was computed in an attempt."""
    found = [event["computed_examples"] for event in events(run, attempt) if event["event"] == "reference"]
    return sum(found)


def test_the_reference_is_computed_once(preference_run: Any, launch: Any, pairs: Path) -> None:
    def run(name: str, beta: float = 0.1, **parts: Any) -> Path:
        train = {"steps": 3, "seed": 77, **parts.pop("train", {})}
        made: Path = preference_run(name, DPO | {"beta": beta}, method=PISSA, train=train, **parts)
        return made

    first, other_beta, longer = run("first"), run("other-beta", 0.3), run("longer", train={"steps": 5})
    launch(1, first, other_beta, longer)
    assert computed(first) > 0 and computed(other_beta) == 0
    assert 0 < computed(longer) < computed(first)
    answers = pairs.with_name("other-pairs.jsonl")
    answers.write_text(pairs.read_text().replace('"chosen": " 1', '"chosen": " 2'))
    changed = [
        run("other-start", train={"seed": 78}),
        run("other-data", data={"train": str(answers)}),
        run("other-base", base={"model": str(load_job(first).base.model), "init": "scratch"}),
    ]
    launch(1, *changed)
    assert [computed(each) > 0 for each in changed] == [True] * 3


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
