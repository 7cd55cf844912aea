"""Reward models: the same curve in every layout, and outputs that plain libraries load.

The last tests are of what is said of held-out pairs.
"""

import json
import random
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from by_hand import adamw, base, clipped_step
from campaign import METHODS
from finished_runs import Curve, curve, difference, events, interrupted, rows
from llamas import random_llama
from peft import PeftModel
from pydantic import ValidationError
from sampling import each_sampled, sampled
from torch.nn.functional import logsigmoid
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from methods.base import Setup
from methods.options import KINDS
from methods.parts import quantised
from methods.registry import create
from runfolder.job import Job
from runfolder.loading import loading_lines
from runfolder.objectives import RewardOptions
from runfolder.record import load_job, read_record
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.examples import Examples
from trainer.data.tokenizer import load_tokenizer
from trainer.data.tokens import Tokens, tokenise
from trainer.objectives.reward_buckets import accuracies, of_buckets, of_lengths
from trainer.objectives.reward_output import padding_token
from trainer.schedule import learning_rate

STEPS, HALF = 20, 10
LN_2 = 0.6931471805599453
REWARD = {"kind": "reward"}
CENTRED = {"kind": "reward", "centring": 0.05}
PISSA = {"kind": "lora", "rank": 4, "init": "pissa"}
LAYOUTS = [(1, 0, 3, True), (2, 2, 1, True), (2, 3, 1, False), (3, 1, 2, True)]  # workers, ZeRO, micro-batch, packed
SCORING = [kind for kind in METHODS if kind not in RewardOptions.refused_methods]


@pytest.fixture(scope="session")
def with_margins(pairs: Path) -> Path:
    """The same pairs, of which two in three have a margin."""
    path = pairs.with_name("margins.jsonl")
    lines = []
    for number, line in enumerate(pairs.read_text().splitlines()):
        margin = {"margin": number / 30} if number % 3 else {}
        lines.append(json.dumps(json.loads(line) | margin) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def reward_run(new_run: Any, pairs: Path) -> Any:
    """Make the folder of a run that trains a reward model; parts are as in `new_run`."""

    def make(name: str, **parts: Any) -> Path:
        data = {"train": str(pairs), **parts.pop("data", {})}
        train = {"steps": STEPS, "batch_tokens": 400, "lr": 1e-3, "micro_batch": 1, **parts.pop("train", {})}
        run: Path = new_run(name, **{"objective": REWARD} | parts, data=data, train=train)
        return run

    return make


def by_hand(run_dir: Path, cache: Path) -> Curve:
    """Losses and norms of a plain loop: one document at a time, and a head that starts at zero."""
    job = load_job(run_dir)
    plain: Any = base(run_dir)
    plain.lm_head = torch.nn.Linear(plain.config.hidden_size, 1, bias=False)
    torch.nn.init.zeros_(plain.lm_head.weight)
    torch.manual_seed(job.train.seed)
    model: Any = create(job.method, Setup(STEPS)).attach(plain)
    for name, parameter in model.named_parameters():
        if "lm_head" in name:
            parameter.requires_grad_(True)
    optimizer = adamw(model)
    tokens = tokenise(job.data.train, load_tokenizer(job.base), replace(Reading.of(job), virtual=0), cache)
    batches = Batches.of(job, Examples.of_each(tokens, 2))
    found = []
    for k in range(STEPS):
        firsts = [2 * int(example) for example in batches.examples(k)]
        chosen, rejected = (torch.stack([score(model, tokens, first + i) for first in firsts]) for i in (0, 1))
        lead = chosen - rejected - torch.tensor(tokens.margins[firsts])
        loss = (CENTRED["centring"] * (chosen + rejected) ** 2 - logsigmoid(lead)).mean()
        loss.backward()
        norm = clipped_step(model, optimizer, job, learning_rate(job, k, STEPS))
        optimizer.zero_grad()
        found.append((loss.item(), norm))
    return found


def score(model: Any, tokens: Tokens, number: int) -> torch.Tensor:
    """What a model with a head for scores gives the last token of a document."""
    ids = torch.tensor(tokens.document(number).ids, dtype=torch.long)
    scored: torch.Tensor = model(input_ids=ids[None]).logits[0, -1, 0].double()
    return scored


@pytest.mark.parametrize("layouts", sampled(LAYOUTS))
@pytest.mark.timeout(3600)
def test_curves_are_those_by_hand_in_every_layout_and_after_a_resume(
    layouts: list[Any], reward_run: Any, launch: Any, cache: Path, with_margins: Path
) -> None:
    runs = {}
    for layout in layouts:
        world, zero, micro, packed = layout
        runs[layout] = reward_run(
            "{}-{}-{}-{}".format(*layout),
            objective=CENTRED,
            method=PISSA,
            data={"packing": packed, "train": str(with_margins)},
            train={"micro_batch": micro},
            sharding={"zero": zero},
            checkpoint={"every": HALF, "keep": 9},
        )
        launch(world, runs[layout])
    expected = by_hand(next(iter(runs.values())), cache)
    for layout, run in runs.items():
        assert difference(curve(run), expected) < 1e-6, layout
        again = interrupted(run, f"{run.name}-again", HALF)
        launch(layout[0], again)
        assert curve(again, 2) == curve(run)[HALF:], layout
        elsewhere = interrupted(run, f"{run.name}-elsewhere", HALF, sharding={"zero": 1})
        launch(1 if layout[0] > 1 else 2, elsewhere)
        assert difference(curve(elsewhere, 2), curve(run)[HALF:]) < 1e-5, layout


def loaded(run: Path) -> Any:
    """A reward model as its users load it, by transformers and PEFT alone."""
    output = run / "output"
    job = load_job(run)
    if not job.method.quantises:
        submitted = {**read_record(run), "job": job.dump()}  # as `submit` has it, with all defaults
        (run / "job.yaml").write_text(yaml.safe_dump(submitted))
        names: dict[str, Any] = {each.__name__: each for each in (AutoConfig, AutoTokenizer, PeftModel)}
        names["AutoModelForSequenceClassification"] = AutoModelForSequenceClassification
        exec("\n".join(loading_lines(run)), names)  # what `status` says
        return names["model"].float().eval()
    options: dict[str, Any] = {"config": AutoConfig.from_pretrained(output), "dtype": torch.float32}
    options |= quantised.load_options("nf4", True, torch.float32)
    model = AutoModelForSequenceClassification.from_pretrained(job.base.model, **options)
    quantised.disable_cpu_repacking(model)
    return PeftModel.from_pretrained(model, output).eval()


def scores(model: Any, tokenizer: Any, tokens: Tokens) -> torch.Tensor:
    """The scores of all documents in one padded batch."""
    ids = [tokens.document(number).ids.tolist() for number in range(len(tokens))]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits[:, 0].double()
    return found


@pytest.fixture(scope="session")
def padded_by_end(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a tokenizer whose padding is the token that ends answers, and which has another one."""
    folder = tmp_path_factory.mktemp("ended") / "base"
    shutil.copytree(tiny_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", each_sampled(SCORING, 2))
def test_plain_libraries_score_padded_batches_as_the_trainer_does(
    kind: str, reward_run: Any, launch: Any, cache: Path, pairs: Path, padded_by_end: Path
) -> None:
    run = reward_run(
        kind,
        base=str(padded_by_end),
        method=METHODS[kind],
        data={"eval": str(pairs)},
        train={"steps": 6, "lr": 2e-2, "micro_batch": 4},
        output={"merge": "merge" not in KINDS[kind].refusals},
    )
    launch(1, run)
    agrees_with_plain_libraries(run, pairs, cache)


def agrees_with_plain_libraries(run: Path, pairs: Path, cache: Path) -> None:
    """What is loaded from a run's output gives a padded batch of its held-out pairs the scores of its last step."""
    assert [event for event in events(run) if event["event"] == "missing"] == []
    job = load_job(run)
    tokens = tokenise(str(pairs), load_tokenizer(job.base), replace(Reading.of(job), virtual=0), cache)
    tokenizer = AutoTokenizer.from_pretrained(run / "output")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == tokens.document(0).ids[-1]
    judged = [json.loads(line) for line in (run / "attempts/1/metrics.jsonl").read_text().splitlines()][-1]
    models = [loaded(run)]
    merged = run / "output" / "merged"
    if merged.exists():
        models.append(AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32).eval())
    for model in models:
        padded = scores(model, tokenizer, tokens)
        chosen, rejected = padded[0::2], padded[1::2]
        assert chosen.std() > 1e-3
        assert chosen.mean().item() == pytest.approx(judged["eval_reward_chosen"], abs=1e-5)
        assert rejected.mean().item() == pytest.approx(judged["eval_reward_rejected"], abs=1e-5)
        assert -logsigmoid(chosen - rejected).mean().item() == pytest.approx(judged["eval_loss"], abs=1e-5)
        assert (chosen > rejected).double().mean().item() == pytest.approx(judged["eval_accuracy"], abs=1e-9)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_in_bf16_scores_are_as_exact_as_logits(kind: str, reward_run: Any, launch: Any) -> None:
    run = reward_run(
        kind, method=METHODS[kind], train={"steps": 3, "lr": 1e-2, "precision": "bf16", "micro_batch": 4}
    )
    launch(1, run)
    assert rows(run, 1)[1]["loss"] == pytest.approx(LN_2, abs=1e-6)
    (found,) = [event for event in events(run) if event["event"] == "compared"]
    assert 0 < found["gap"] <= found["allowed"]


def test_a_planted_rule_is_learned(reward_run: Any, launch: Any, tmp_path: Path) -> None:
    """The better sum ends on an even digit, whatever its length."""
    rng = random.Random(3)
    lines = []
    for _ in range(200):
        even, odd = rng.randrange(10 ** rng.randrange(1, 4)), rng.randrange(10 ** rng.randrange(1, 4))
        pair = {"chosen": f" {even}{rng.choice('02468')}", "rejected": f" {odd}{rng.choice('13579')}"}
        lines.append(json.dumps({"prompt": "a sum:", **pair}) + "\n")
    for name, part in (("train", lines[:150]), ("eval", lines[150:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    run = reward_run(
        "rule",
        method={"kind": "full"},
        data={name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")},
        train={"steps": 60, "lr": 1e-2, "micro_batch": 32},
    )
    launch(1, run)
    first, last = [json.loads(line) for line in (run / "attempts/1/metrics.jsonl").read_text().splitlines()][::61]
    assert (first["eval_accuracy"], last["eval_accuracy"] > 0.95) == (0.5, True)
    assert abs(last["eval_score_length_correlation"]) < 0.5


OTHER_BASES: dict[str, Any] = {
    "tied": lambda size: random_llama(vocab_size=size, tie_word_embeddings=True),
    "gpt2": lambda size: GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    ),
}


@pytest.mark.parametrize(
    ("kind", "method", "zero"), each_sampled(list(product(OTHER_BASES, ("full", "lora"), (0, 3))))
)
def test_bases_whose_head_is_their_embedding(
    kind: str, method: str, zero: int, reward_run: Any, launch: Any, cache: Path, pairs: Path, tiny_base: Path
) -> None:
    folder = pairs.with_name(f"{kind}-{method}-{zero}")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = OTHER_BASES[kind](len(tokenizer))
    model.config.pad_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    run = reward_run(
        kind,
        base=str(folder),
        method=METHODS[method],
        data={"eval": str(pairs)},
        train={"steps": 6, "lr": 2e-2, "micro_batch": 4},
        sharding={"zero": zero},
    )
    launch(2 if zero else 1, run)
    assert rows(run, 1)[1]["loss"] == pytest.approx(LN_2, abs=1e-6)
    agrees_with_plain_libraries(run, pairs, cache)


def test_the_token_that_pads_ends_no_answer(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    config = AutoConfig.from_pretrained(tiny_base)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert padding_token(tokenizer, (end,), config) == pad
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    other = config.vocab_size
    config.vocab_size += 1
    tokenizer.pad_token = tokenizer.eos_token
    assert padding_token(tokenizer, (end,), config) == pad
    assert padding_token(tokenizer, (end, pad), config) == other
    with pytest.raises(ValueError, match="has no special token but those that end an answer"):
        padding_token(tokenizer, (end, pad, other), config)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"method": "prompt"}, "objective reward with method prompt: behind vectors in front"),
        ({"method": "ptuning"}, "objective reward with method ptuning: behind vectors in front"),
        ({"method": "bottleneck"}, "objective reward with method bottleneck: neither transformers nor PEFT"),
        (
            {"method": "lora", "base": {"model": "b", "resize_embeddings": True}},
            "base.resize_embeddings with objective reward and method lora, which would train rows of a head",
        ),
    ],
)
def test_what_does_not_fit_a_reward_model_is_refused(parts: dict[str, Any], message: str) -> None:
    job = {"base": {"model": "b"}, "objective": REWARD, "data": {"train": "d"}, "train": {"steps": 1}} | parts
    job["method"] = {"kind": parts["method"]}
    with pytest.raises(ValidationError, match=message):
        Job.model_validate(job)


def test_a_head_that_is_adapted_is_refused(reward_run: Any, launch: Any) -> None:
    run = reward_run("head", method={"kind": "lora", "rank": 4, "target": ["q_proj", "lm_head"]})
    with pytest.raises(
        AssertionError, match="ValueError: method.target: found the head, which is trained as a whole"
    ):
        launch(1, run)


def test_accuracies_by_margin_and_length() -> None:
    margins = [0.3, -0.3, 0.7, 1.5, -1.5, 0.0, 3.0]
    rewards = torch.tensor([0.2, 0.1, 1.0, 2.0, 0.5, 0.0, 4.0], dtype=torch.float64)
    figures = {
        "accuracy": torch.tensor([1.0, 0, 1, 1, 0, 0.5, 1], dtype=torch.float64),
        "reward_margin": torch.tensor(margins, dtype=torch.float64),
        "reward_chosen": rewards,
        "reward_rejected": rewards - torch.tensor(margins, dtype=torch.float64),
        "labels_chosen": torch.tensor([3.0, 5, 2, 7, 4, 4, 9], dtype=torch.float64),
        "labels_rejected": torch.tensor([4.0, 4, 4, 4, 4, 4, 4], dtype=torch.float64),
    }
    sums = {**of_buckets(figures), **of_lengths(figures)}
    found = accuracies({name: value.mean().item() for name, value in sums.items()})
    assert {name: value for name, value in found.items() if name.startswith("accuracy")} == pytest.approx(
        {
            "accuracy_margin_0_to_0.5": 0.5,
            "accuracy_margin_0.5_to_1": 1.0,
            "accuracy_margin_1_to_2": 0.5,
            "accuracy_margin_from_2": 1.0,
            "accuracy_chosen_shorter": 1.0,
            "accuracy_chosen_as_long": 0.25,
            "accuracy_chosen_longer": 2 / 3,
            "accuracy_by_length_alone": (3 + 2 / 2) / 7,
        }
    )
    together = [torch.cat([figures[f"{kind}_chosen"], figures[f"{kind}_rejected"]]) for kind in ("reward", "labels")]
    expected = torch.corrcoef(torch.stack(together))[0, 1].item()
    assert found["score_length_correlation"] == pytest.approx(expected)
    assert found["share_chosen_shorter"] == pytest.approx(2 / 7)
