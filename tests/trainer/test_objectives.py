"""An objective from outside that uses all of the contract, in several layouts, against the same by hand."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from by_hand import adamw, base, clipped_step
from finished_runs import Curve, curve, difference, interrupted, rows
from pydantic import ValidationError
from sampling import sampled
from torch.nn.functional import cross_entropy, softplus

from methods.base import Setup
from methods.registry import create
from orchestrator.planning.spec_errors import explain
from runfolder.chain import Attempt
from runfolder.job import Job
from runfolder.record import load_job
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.examples import Examples
from trainer.data.tokenizer import load_tokenizer
from trainer.data.tokens import Document, tokenise
from trainer.meter import checked
from trainer.rollouts import recorded_rollout
from trainer.schedule import learning_rate

OUTSIDE = Path(__file__).parent.parent / "outside"
PISSA = {"kind": "lora", "rank": 4, "init": "pissa"}
STEPS, HALF = 8, 4
LAYOUTS = [(1, 0, 1, False), (1, 0, 3, True), (2, 2, 1, True), (2, 3, 1, False)]  # workers, ZeRO, micro-batch, packed
FIGURES = ("loss", "grad_norm", "margin", "likelier")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other package is there; workers always have it."""
    monkeypatch.syspath_prepend(OUTSIDE)


@pytest.fixture
def pairs_run(new_run: Any, held_out: Path) -> Any:
    """Make the folder of a run that learns pairs: three or four a step."""

    def make(name: str, objective: str, zero: int, micro: int, packed: bool) -> Path:
        run: Path = new_run(
            name,
            objective=objective,
            method=PISSA,
            data={"packing": packed, "eval": str(held_out)},
            train={"steps": STEPS, "batch_tokens": 150, "lr": 1e-3, "micro_batch": micro},
            sharding={"zero": zero},
            checkpoint={"every": HALF, "keep": 9},
            evaluation={"before": False},
        )
        return run

    return make


def log_likelihood(model: Any, document: Document) -> torch.Tensor:
    """Of the labels of a document, one document at a time."""
    ids = torch.tensor(document.ids, dtype=torch.long)
    losses = cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
    return -losses[torch.tensor(document.target)[1:]].sum()


def by_hand(run_dir: Path, cache: Path) -> tuple[Curve, list[float]]:
    """Losses and norms, and margins, of a plain loop that keeps a copy of the model as it was."""
    job = load_job(run_dir)
    model: Any = create(job.method, Setup(STEPS)).attach(base(run_dir))
    reference, optimizer = copy.deepcopy(model), adamw(model)
    tokens = tokenise(job.data.train, load_tokenizer(job.base), replace(Reading.of(job), virtual=0), cache)
    batches = Batches.of(job, Examples.of_each(tokens, 2))
    found, margins = [], []
    for k in range(STEPS):
        pairs = [[tokens.document(2 * int(i) + part) for part in (0, 1)] for i in batches.examples(k)]
        policy = [[log_likelihood(model, document) for document in pair] for pair in pairs]
        with torch.no_grad():
            start = [[log_likelihood(reference, document) for document in pair] for pair in pairs]
        h, h_0 = (torch.stack([first - second for first, second in each]) for each in (policy, start))
        labels = sum(int(document.target.sum()) for pair in pairs for document in pair)
        loss = softplus(-(h - h.mean().detach() / 2 - h_0.mean() / 2)).mean() - sum(map(sum, policy)) / labels
        loss.backward()
        norm = clipped_step(model, optimizer, job, learning_rate(job, k, STEPS))
        optimizer.zero_grad()
        found.append((loss.item(), norm))
        margins.append(h.mean().item())
    return found, margins


def figures(run: Path, attempt: int = 1) -> list[tuple[float, ...]]:
    return [tuple(row[name] for name in FIGURES) for row in rows(run, attempt).values()]


def judged(run: Path, attempt: int) -> dict[str, float]:
    """What was found of the held-out rows at the end."""
    lines = (run / "attempts" / str(attempt) / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "eval_loss" in row][-1]
    return {name: value for name, value in last.items() if name.startswith("eval_")}


@pytest.mark.parametrize("layouts", sampled(LAYOUTS[1:]))
def test_an_objective_of_pairs_is_the_same_in_every_layout_and_resumes(
    layouts: list[Any], pairs_run: Any, launch: Any, cache: Path
) -> None:
    runs = {key: pairs_run("pairs-{}-{}-{}-{}".format(*key), "pairs", *key[1:]) for key in (LAYOUTS[0], *layouts)}
    for world in (1, 2):
        launch(world, *(run for key, run in runs.items() if key[0] == world))
    truth, margins = by_hand(runs[LAYOUTS[0]], cache)
    for key, run in runs.items():
        assert difference(curve(run), truth) < 1e-6, key
        assert [row[2] for row in figures(run)] == pytest.approx(margins, rel=1e-5, abs=1e-5), key
        assert judged(run, 1) == pytest.approx(judged(runs[LAYOUTS[0]], 1), rel=1e-5), key
    assert judged(run, 1).keys() == {"eval_loss", "eval_margin", "eval_likelier"}
    again = {key: interrupted(runs[key], f"{runs[key].name}-again", HALF) for key in layouts}
    for world in (1, 2):
        launch(world, *(run for key, run in again.items() if key[0] == world))
    for key, run in again.items():
        assert figures(run, 2) == figures(runs[key])[HALF:], key
        assert judged(run, 2) == judged(runs[key], 1), key


def test_what_the_model_writes_is_recorded_before_the_update(pairs_run: Any, launch: Any) -> None:
    """Here it never writes the same twice: a resumed run is the same only by what was recorded."""
    run = pairs_run("written", "written_pairs", 2, 1, True)
    launch(2, run)
    assert all(recorded_rollout(Attempt(run, 1), step) for step in range(1, STEPS + 1))
    again, anew = (interrupted(run, name, HALF) for name in ("again", "anew"))
    lost = anew / "attempts" / "1" / "rollouts" / f"step-{STEPS}.safetensors"
    lost.unlink()
    launch(2, again, anew)
    assert figures(again, 2) == figures(run)[HALF:]
    assert figures(anew, 2)[:-1] == figures(run)[HALF:-1] and figures(anew, 2)[-1] != figures(run)[-1]


def test_a_metric_has_a_name_of_its_own() -> None:
    assert checked(["reward", "margin"]) == ["margin", "reward"]
    for name in ("loss", "mfu", "eval_margin"):
        with pytest.raises(ValueError, match=f"figure '{name}' of the objective; allowed: "):
            checked([name])


def test_an_unknown_objective_is_refused_with_what_is_allowed(new_run: Any) -> None:
    job = yaml.safe_load((new_run("any") / "job.yaml").read_text())["job"]
    assert Job.model_validate(job).objective.kind == "sft"
    for found, hint in (("stf", "did you mean 'sft'? "), ("imitation", "")):
        with pytest.raises(ValidationError) as refused:
            Job.model_validate(job | {"objective": found})
        ours = "'dpo', 'grpo', 'hungry', 'kto', 'orpo', 'pairs', 'reward', 'rloo', 'sft', 'simpo'"
        known = f"{ours}, 'slow', 'slowly_judged', 'steady', 'written_pairs'"
        allowed = f"{known}, or one of a package that is installed here"
        line = f"objective.kind: found '{found}'; {hint}allowed: {allowed}"
        assert explain(refused.value, job | {"objective": found}) == [line]
