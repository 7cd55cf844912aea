"""GRPO and RLOO: what a step learns from answers of its own, in several layouts, against the same by hand."""

import json
import math
import threading
import time
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from by_hand import adamw, base, clipped_step
from finished_runs import Curve, curve, interrupted, rows
from pydantic import ValidationError

from methods.base import Setup
from methods.registry import create
from orchestrator.errors import InputError
from orchestrator.planning.freeze import read_job
from orchestrator.samples import sample_lines
from runfolder.appended import read_from
from runfolder.chain import Attempt, claim_next
from runfolder.digests import changes, digests
from runfolder.group_objectives import GrpoOptions, RlooOptions
from runfolder.job import Job
from runfolder.record import load_job
from runfolder.samples import SAMPLES_FILE, of_step, samples_of
from trainer.data.tokenizer import load_tokenizer
from trainer.objectives.advantages import advantages_over_others, group_advantages
from trainer.objectives.base import Arrays
from trainer.objectives.group_loss import token_costs
from trainer.objectives.groups import GroupPolicy, StepRefused
from trainer.reward_function import RewardFailed, RewardProcess
from trainer.reward_journal import RewardJournal, answer_key, forget_rewards
from trainer.rewards import RewardSample, rewards_of
from trainer.rollouts import RolloutLost, recorded_rollout, rolled_out
from trainer.schedule import learning_rate

STEPS, HALF, SAMPLES = 6, 3, 3
REWARD = '''
from pathlib import Path

def spread(prompt, completion, row):
    """What few answers of a random model have alike; and a little for the row's answer."""
    with Path(__file__).with_name("calls.txt").open("a") as stream:
        print(repr((prompt, completion)), file=stream)
    return sum(map(ord, completion)) % 11 / 11 + len(row["completion"]) / 100
'''
OBJECTIVES = {
    "grpo": {"kind": "grpo"},
    "dapo": {"kind": "grpo", "average": "tokens"},
    "dr_grpo": {"kind": "grpo", "average": "length", "scale": False},
    "rloo": {"kind": "rloo"},
}
LAYOUTS = [(1, 0, 1, False), (2, 2, 2, True)]  # workers, ZeRO, micro-batch, packed


@pytest.fixture
def group_run(new_run: Any, ending_base: Path, held_out: Path, tmp_path: Path) -> Any:
    """Make the folder of a run that learns from groups: two or three prompts a step."""
    reward = tmp_path / "rewards.py"
    reward.write_text(REWARD)

    def make(name: str, options: dict[str, Any], zero: int = 0, micro: int = 1, packed: bool = False) -> Path:
        shared = {"reward": f"{reward}:spread", "samples": SAMPLES, "new_tokens": 7, "temperature": 1.5}
        run: Path = new_run(
            name,
            base=str(ending_base),
            objective=shared | options,
            data={"packing": packed, "eval": str(held_out)},
            train={"steps": STEPS, "batch_tokens": 60, "lr": 1e-2, "micro_batch": micro},
            sharding={"zero": zero},
            checkpoint={"every": HALF, "keep": 9},
            evaluation={"before": False, "rows": 6, "max_new_tokens": 4},
        )
        return run

    return make


def rollout_of(run: Path, step: int) -> Arrays:
    found = recorded_rollout(Attempt(run, 1), step)
    assert found is not None
    return found


def documents(rollout: Arrays) -> list[tuple[torch.Tensor, int]]:
    """The ids of each answer with its prompt, and the length of the prompt."""
    ids = np.split(rollout["ids"], rollout["ends"][:-1])
    return [(torch.tensor(i, dtype=torch.long), int(p)) for i, p in zip(ids, rollout["prompts"], strict=True)]


def by_hand(run: Path) -> Curve:
    """Losses and norms of a plain loop over the recorded answers, one at a time, with advantages by their formula."""
    job = load_job(run)
    options: Any = job.objective
    model: Any = create(job.method, Setup(STEPS)).attach(base(run))
    optimizer = adamw(model)
    found: Curve = []
    for k in range(STEPS):
        rollout = rollout_of(run, k + 1)
        written = documents(rollout)
        R = torch.tensor(rollout["rewards"]).view(-1, SAMPLES)
        if options.kind == "rloo":
            A = R - (R.sum(1, keepdim=True) - R) / (SAMPLES - 1)
        else:
            A = (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4 if options.scale else 1)
        labels = sum(len(ids) - prompt for ids, prompt in written)
        total = 0.0
        for (ids, prompt), advantage in zip(written, A.flatten(), strict=True):
            log = (model(input_ids=ids[None]).logits[0, :-1] / options.temperature).log_softmax(-1)
            policy = log.gather(1, ids[1:, None])[prompt - 1 :, 0]
            if options.kind == "rloo":
                term = (policy.sum() - policy.sum().detach()).exp() / len(written)
            else:
                average = {
                    "answers": 1 / len(written) / len(policy),
                    "tokens": 1 / labels,
                    "length": 1 / len(written) / options.new_tokens,
                }[options.average]
                term = (policy - policy.detach()).exp().sum() * average
            loss = -advantage * term
            loss.backward()
            total += loss.item()
        norm = clipped_step(model, optimizer, job, learning_rate(job, k, STEPS))
        optimizer.zero_grad()
        found.append((total, norm))
    return found


def judged(run: Path, attempt: int) -> dict[str, float]:
    """What was found of the held-out rows at the end."""
    lines = (run / "attempts" / str(attempt) / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "eval_loss" in row][-1]
    return {name: value for name, value in last.items() if name.startswith("eval_")}


def calls(run: Path) -> list[str]:
    """What the reward of the window's run was asked."""
    return (run.parent / "calls.txt").read_text().splitlines()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_that_of_its_formula(
    name: str, group_run: Any, launch: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = group_run(name, OBJECTIVES[name])
    launch(1, run)
    first = rows(run, 1)[1]
    log = (tmp_path_factory.getbasetemp() / "workers.log").read_text()
    assert f"step 1/{STEPS}  reward {first['reward']:.4f}  loss {first['loss']:.4f}  norm" in log
    for step in range(1, STEPS + 1):
        rollout = rollout_of(run, step)
        texts = [tuple(ids[prompt:].tolist()) for ids, prompt in documents(rollout)]
        assert len(set(texts)) > len(texts) / 2  # the answers to a prompt differ
        assert len(set(map(len, texts))) > 2  # else the means over answers, over tokens and over lengths are one
    reported = rows(run, 1).values()
    assert all(row["groups_without_signal"] < 0.5 and row["engine_distance"] < 1e-5 for row in reported)
    assert min(norm for _, norm in curve(run)) > 1e-3
    truth = by_hand(run)
    for ours, theirs in zip(curve(run), truth, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=2e-6)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5)


def test_what_is_written_and_learned_depends_on_no_layout_and_resumes_bitwise(group_run: Any, launch: Any) -> None:
    """Four steps learn from the same answers, so that one dies among them: what was recorded is not asked again."""
    options = {"kind": "grpo", "updates": 4, "clip_low": 0.01, "clip_high": 0.02, "average": "tokens"}
    one, two = (group_run(f"on-{layout[0]}", options, *layout[1:]) for layout in LAYOUTS)
    launch(1, one)
    launch(2, two)
    assert rollout_of(one, 1)["ids"].tolist() == rollout_of(two, 1)["ids"].tolist()  # no rank in any draw
    assert recorded_rollout(Attempt(one, 1), 2) is None and recorded_rollout(Attempt(one, 1), 5) is not None
    clipped = [row["tokens_clipped"] for row in rows(one, 1).values()]
    assert clipped[0] == 0 and max(clipped) > 0.05  # else the window's later steps say nothing
    for ours, theirs in zip(curve(two)[:4], curve(one)[:4], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    before = calls(one)
    again = interrupted(one, "again", HALF)
    launch(1, again)
    assert curve(again, 2) == curve(one)[HALF:]
    assert judged(again, 2) == judged(one, 1)
    assert {"eval_reward", "eval_exact_match"} <= judged(one, 1).keys()
    asked = calls(one)[len(before) :]
    assert (
        len(asked) == 2
    )  # a check: held-out answers are the same as before, so they were judged, as all others were
    anew = interrupted(one, "anew", HALF)
    (anew / "attempts" / "1" / "rollouts" / "step-5.safetensors").unlink()
    launch(1, anew)
    assert curve(anew, 2) == curve(one)[HALF:]  # draws are functions of step, prompt and sample


RARE = '''
def spread(prompt, completion, row):
    """The same for all answers to most prompts."""
    return sum(map(ord, completion)) % 11 / 11 if len(prompt) % 4 == 0 else 0.5
'''


def test_other_prompts_come_in_the_place_of_those_without_signal(group_run: Any, launch: Any, tmp_path: Path) -> None:
    """In any layout the same ones, and no more often than the job says."""
    redrawn = {"kind": "grpo", "redraws": 3}
    one, two = (group_run(f"on-{layout[0]}", redrawn, *layout[1:]) for layout in LAYOUTS)
    without = group_run("without", {"kind": "grpo"})
    (tmp_path / "rewards.py").write_text(RARE)
    launch(1, one, without)
    launch(2, two)
    assert rollout_of(one, 1)["ids"].tolist() == rollout_of(two, 1)["ids"].tolist()
    kept = rollout_of(without, 1)
    drawn = rollout_of(one, 1)
    of_first = drawn["redraws"] == 0
    assert 0 < of_first.sum() < len(of_first) or drawn["redraws"].max() == 3
    for before, after, draws in zip(documents(kept), documents(drawn), drawn["redraws"], strict=True):
        assert (before[0].tolist() == after[0].tolist()) == (draws == 0)
    dead = {run: [row["groups_without_signal"] for row in rows(run, 1).values()] for run in (one, without)}
    assert sum(dead[one]) < sum(dead[without]) - 1
    assert max(row["redraws"] for row in rows(one, 1).values()) <= 3
    assert "redraws" not in rows(without, 1)[1]


def test_what_it_wrote_is_there_for_people_to_read(group_run: Any, launch: Any) -> None:
    options = {"kind": "grpo", "updates": 2, "reward": {"exact_match": 1.0, "format": 0.5}}
    run = group_run("read", options)
    launch(1, run)
    found = samples_of(partial(read_from, run, SAMPLES_FILE))
    assert [(sample["step"], sample["number"]) for sample in found] == list(product((1, 3, 5), range(SAMPLES)))
    tokenizer = load_tokenizer(load_job(run).base)
    for sample, (ids, prompt) in zip(of_step(found, 3), documents(rollout_of(run, 3)), strict=False):
        assert sample["prompt"] == tokenizer.decode(ids[:prompt], skip_special_tokens=True)
        assert sample["written"] == tokenizer.decode(ids[prompt:], skip_special_tokens=True)
        assert (sample["reward"], sample["rewards"]) == (0.0, {"exact_match": 0.0, "format": 0.0})
    text = sample_lines(of_step(found, 3))
    assert text[:2] == ["step 3", f"prompt: {found[SAMPLES]['prompt']}"]
    assert text[3].startswith("--- 1: reward 0 (exact_match 0, format 0)")


BAD = {
    "raises": ("return 1 / 0", "raised ZeroDivisionError in line 3: division by zero"),
    "hangs": ("import time; time.sleep(99)", "took longer than 0.5 s"),
    "not_finite": ("return float('nan')", "gave nan, allowed: a finite number"),
    "random": ("import random; return random.random()", "could not be repeated"),
    "nothing": ("return None", "gave None, allowed: a finite number"),
    "ends": ("import os; os._exit(3)", "ended its process (status 3)"),
    "leaves": ("raise SystemExit(4)", "ended its process (status 4)"),
    "lines": ("raise ValueError('a\\n\\x1b[1mb\\ud800')", "raised ValueError in line 3: a ?[1mb?; sample"),
    "reads": (
        "import subprocess; return 1 / len(subprocess.check_output(['cat']))",
        "raised ZeroDivisionError in line 3",
    ),
    "deeper": ("json = __import__('json'); return json.loads('{')", "raised JSONDecodeError in line 3: Expecting"),
}


@pytest.fixture
def journal(tmp_path: Path) -> RewardJournal:
    """A step's journal, in an attempt of a run."""
    return RewardJournal(claimed(tmp_path / "run"), 1, 0)


def claimed(run_dir: Path) -> Attempt:
    """The next attempt of a run that has nothing but attempts."""
    run_dir.mkdir(exist_ok=True)
    attempt = claim_next(run_dir, None)
    assert attempt is not None
    return attempt


@pytest.mark.parametrize("name", BAD)
def test_a_reward_that_fails_shows_the_sample(name: str, journal: RewardJournal, tmp_path: Path) -> None:
    body, problem = BAD[name]
    file = tmp_path / "rewards.py"
    file.write_text(f"def {name}(prompt, completion, row):\n    print('heard by nobody')\n    {body}\n")
    rewards = rewards_of(GrpoOptions(reward=f"{file}:{name}", reward_seconds=0.5))
    with pytest.raises(RewardFailed) as failed:
        rewards.judge([RewardSample("1 + 1 =", "3", "2", {"n": 7})], journal)
    assert problem in str(failed.value)
    assert "sample: prompt '1 + 1 =', completion '2', row {'n': 7}" in str(failed.value)


def test_a_call_is_kept_though_the_children_of_its_worker_are_killed(journal: RewardJournal, tmp_path: Path) -> None:
    """As Ray does where it ends a worker, because another one of the run has died."""
    file = tmp_path / "rewards.py"
    file.write_text("import time\ndef slow(prompt, completion, row):\n    time.sleep(0.5)\n    return 3.0\n")
    process = RewardProcess(str(file), "slow", 5.0)
    living = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]  # of earlier tests
    (child,) = [one for one in living if str(file) in one.cmdline()]
    killed = threading.Timer(0.2, child.kill)
    killed.start()
    with suppress(RewardFailed):
        process.value({"prompt": "p", "completion": "c", "row": {}}, journal.path, "key")
    killed.join()
    assert RewardJournal(claimed(tmp_path / "run"), 1, 0).value("key") == 3.0
    process.end()


def test_a_reward_may_fail_for_what_the_model_wrote_alone(journal: RewardJournal, tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def picky(prompt, completion, row):\n    assert completion == 'right'\n    return 1.0\n")
    rewards = rewards_of(GrpoOptions(reward=f"{file}:picky"))
    samples = [RewardSample("p", "right", "right", {}, "a"), RewardSample("p", "wrong", "right", {}, "b")]
    with pytest.raises(
        RewardFailed, match="raised AssertionError in line 2: ; sample: prompt 'p', completion 'wrong'"
    ):
        rewards.judge(samples, journal)


def test_what_a_function_gave_is_known_to_the_next_attempt_until_it_is_recorded(tmp_path: Path) -> None:
    file, run_dir = tmp_path / "rewards.py", tmp_path / "run"
    file.write_text(REWARD)
    row = {"completion": "4"}
    samples = [RewardSample("1 + 1 =", text, "4", row, answer_key(0, i, [1], [i])) for i, text in enumerate("ab")]
    rewards = rewards_of(GrpoOptions(reward=f"{file}:spread"))
    first = claimed(run_dir)
    given, _ = rewards.judge(samples, RewardJournal(first, 3, 1))
    with RewardJournal(first, 3, 1).path.open("a") as stream:
        stream.write('{"key": "torn')  # by a kill
    second = claimed(run_dir)
    later = RewardJournal(second, 3, 0)
    assert [later.value(sample.key) for sample in samples] == given
    anew = rewards_of(GrpoOptions(reward=f"{file}:spread"))
    assert anew.judge(samples, later)[0] == given
    assert len((tmp_path / "calls.txt").read_text().splitlines()) == 2 + 2 + 2  # two checks, and each answer once
    assert RewardJournal(second, 4, 0).value(samples[0].key) is None  # of another step
    forget_rewards(second, 3)
    assert RewardJournal(second, 3, 0).value(samples[0].key) is None


def test_a_call_that_is_under_way_is_waited_for_and_not_made_again(tmp_path: Path) -> None:
    file, run_dir, calls = tmp_path / "rewards.py", tmp_path / "run", tmp_path / "calls.txt"
    file.write_text(
        "import time\ndef slow(prompt, completion, row):\n"
        f"    with open({str(calls)!r}, 'a') as stream:\n        print(completion, file=stream)\n"
        "    time.sleep(len(completion) // 4)\n    return 5.0\n"
    )
    first, row = claimed(run_dir), {"completion": "4"}
    sample = RewardSample("1 + 1 =", "slow", "4", row, "key")
    process = RewardProcess(str(file), "slow", 5.0)
    asked = {"prompt": sample.prompt, "completion": sample.written, "row": row}
    before = threading.Thread(target=process.value, args=(asked, RewardJournal(first, 1, 0).path, sample.key))
    before.start()
    while not calls.exists():
        time.sleep(0.01)
    later = rewards_of(GrpoOptions(reward=f"{file}:slow"))
    assert later.judge([sample], RewardJournal(claimed(run_dir), 1, 0))[0] == [5.0]
    before.join()
    process.end()
    assert calls.read_text().split() == ["slow", "4", "4"]


def test_rewards_add_up_by_their_weights(journal: RewardJournal, tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def length(prompt, completion, row):\n    return len(completion)\n")
    options = GrpoOptions(reward={"exact_match": 2.0, "format": 0.5, f"{file}:length": -0.01})
    written = ["so #### 1,234.50", "so #### 1234.", "#### 7 #### 1234", "#### 1234\n"]
    samples = [RewardSample("p", text, "#### 1234", {}, text) for text in written]
    totals, by_name = rewards_of(options).judge(samples, journal)
    assert by_name["format"] == [1, 0, 0, 1]
    assert by_name["exact_match"] == [0, 0, 1, 1]
    assert by_name["function"] == [len(text) for text in written]
    assert totals == pytest.approx([0.5 - 0.16, -0.13, 2 - 0.16, 2.5 - 0.1])


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"method": {"kind": "full"}}, "objective grpo with method full: it changes the base's own weights"),
        ({"sharding": {"zero": 3}}, "sharding.zero 3 with objective grpo"),
        ({"method": {"kind": "lora", "init": "pissa"}}, "method.init pissa, which moves the base's weights"),
        ({"method": {"kind": "lora", "dropout": 0.1}}, "method.dropout 0.1: what writes the answers drops nothing"),
        ({"objective": {"kind": "grpo", "reward": "rewards.py"}}, "allowed: exact_match, format, model, or file.py"),
        ({"objective": {"kind": "grpo", "reward": {}}}, "allowed: exact_match, format, model"),
        ({"objective": {"kind": "grpo", "reward": {"a.py:f": 1, "b.py:g": 1}}}, "allowed: one function, which"),
        ({"objective": {"kind": "grpo", "reward": "model"}}, "reward_model: found none with reward model"),
        ({"objective": {"kind": "grpo", "reward_model": "m"}}, "reward_model: found m, which no reward asks"),
        ({"objective": {"kind": "grpo", "reward_seconds": 1e10}}, "less than or equal to 1000000"),
    ],
)
def test_what_does_not_work_is_refused_with_the_reason(parts: dict[str, Any], problem: str) -> None:
    job = {"base": "b", "objective": "grpo", "method": "lora", "data": "rows.jsonl", "train": {"steps": 1}}
    Job.model_validate(job)
    with pytest.raises(ValidationError, match=problem):
        Job.model_validate(job | parts)


NOT_THERE = {
    "def spred(prompt, completion, row):\n    return spread\n": "rewards.py: found no spread; allowed: a function",
    "def spread(:": r"rewards.py: found invalid syntax .*line 1.*; allowed: Python",
    "\x00": "found source code .*null bytes.*; allowed: Python",
}


def test_the_file_of_a_reward_is_part_of_the_job(tmp_path: Path) -> None:
    rewards, data = tmp_path / "rewards.py", tmp_path / "rows.jsonl"
    rewards.write_text(REWARD)
    data.write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    written = {"base": "b", "method": "lora", "data": str(data), "train": {"steps": 1}}
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(written | {"objective": {"kind": "grpo", "reward": "rewards.py:spread"}}))
    job, _ = read_job(job_file)
    assert job.sources["objective.reward"] == str(rewards)
    known = digests(job, None)
    assert changes(job, known) == []
    rewards.write_text(REWARD + "\n")
    (change,) = changes(job, known)
    assert change.startswith(f"objective.reward: {rewards} has changed since the submission")
    rewards.unlink()
    with pytest.raises(InputError, match=r"objective.reward: found no file rewards.py; allowed: the path of one"):
        read_job(job_file)
    for code, problem in NOT_THERE.items():
        rewards.write_text(code)
        with pytest.raises(InputError, match=problem):
            read_job(job_file)
    rewards.write_text("from statistics import mean as spread\nraise SystemExit('it was run')\n")
    assert read_job(job_file)[0] == job


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("{", "config.json: found no JSON"),
        ("[]", "judge: found none, which does not score"),
        ('{"architectures": [3]}', "judge: found 3, which does not score"),
    ],
)
def test_what_is_no_reward_model_is_told_in_a_line(config: str, problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    judged = {"kind": "grpo", "reward": "model", "reward_model": str(folder)}
    written = {"base": "b", "method": "lora", "data": "rows.jsonl", "train": {"steps": 1}, "objective": judged}
    with pytest.raises(InputError, match=problem):
        read_job(written)


def costs(options: Any, growth: list[float], excess: float) -> list[float]:
    """What the tokens of two answers cost, of two tokens and of one, whose advantages are 1 and -1."""
    old_N = torch.tensor([-1.0, -2.0, -3.0])
    batch = {
        "labels": torch.tensor([2, 1]),
        "advantage": torch.tensor([1.0, -1.0]),
        "engine": old_N - excess,
    }
    found = token_costs(options, old_N + torch.tensor(growth), old_N, batch)
    return found.costs.tolist()


def test_ratios_are_clipped_where_they_gain_and_weighed_by_what_the_engine_thought() -> None:
    up, down = math.log(1.5), math.log(0.5)
    grpo = GrpoOptions(clip_low=0.2, clip_high=0.3, importance_cap=2.0)
    assert costs(grpo, [up, down, up], 0.0) == pytest.approx([-1.3, -0.5, 1.5])
    assert costs(grpo, [0.0, 0.0, down], 0.0) == pytest.approx([-1.0, -1.0, 0.8])
    assert costs(grpo, [0.0, 0.0, 0.0], math.log(1.7)) == pytest.approx([-1.7, -1.7, 1.7])
    assert costs(grpo, [0.0, 0.0, 0.0], math.log(9)) == pytest.approx([-2.0, -2.0, 2.0])
    assert costs(grpo.model_copy(update={"importance_cap": None}), [0.0] * 3, math.log(9)) == [-1.0, -1.0, 1.0]
    of_answers = grpo.model_copy(update={"ratio": "answer"})
    assert costs(of_answers, [2 * up, 0.0, down], 0.0) == pytest.approx([-1.3, -1.3, 0.8])  # the mean: up
    rloo = RlooOptions(clip_low=0.2, clip_high=0.3, importance_cap=4.0)
    assert costs(rloo, [math.log(1.1)] * 2 + [0.0], 0.0) == pytest.approx([-1.21, -1.21, 1.0])
    assert costs(rloo, [0.0] * 3, math.log(1.7)) == pytest.approx([-2.89, -2.89, 1.7])


@pytest.mark.parametrize("distance", [0.2, math.nan])
def test_a_step_is_refused_where_engine_and_trainer_are_too_far_apart(distance: float) -> None:
    policy = GroupPolicy.__new__(GroupPolicy)
    policy._options = GrpoOptions()
    policy.check_step(7, {"engine_distance": policy._options.most_apart or 0.0})
    with pytest.raises(StepRefused, match=r"step 7: .* nats a token apart .*objective.most_apart allows 0.05"):
        policy.check_step(7, {"engine_distance": distance})
    policy._options = GrpoOptions(most_apart=None)
    policy.check_step(7, {"engine_distance": distance})


def test_a_window_whose_answers_are_lost_is_not_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy has moved within the window: what it wrote now would be of another one than the steps before had."""
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda *_, **__: None)
    world = SimpleNamespace(leads=False, device=None)
    run: Any = SimpleNamespace(
        world=world, objective=SimpleNamespace(rollout_step=lambda _: 1), batches=SimpleNamespace(batch=lambda k: k)
    )
    with pytest.raises(RolloutLost, match="step 4 learns from what was written for step 1, which is not recorded"):
        rolled_out(run, 4, list)


def test_equal_rewards_are_worth_nothing_whatever_rounding_leaves_of_them() -> None:
    """Three times 0.1 has a mean that is not 0.1; scaled up, what is left would be an advantage."""
    rewards = np.array([[0.1, 0.1, 0.1], [1.0, 0.0, 0.0]])
    assert (rewards - rewards.mean(axis=1, keepdims=True))[0].any()
    assert group_advantages(rewards, True)[0].tolist() == [0.0, 0.0, 0.0]
    assert advantages_over_others(rewards)[1].tolist() == [1.0, -0.5, -0.5]
    assert group_advantages(np.array([[1.0, 0.0, 0.0, 0.0]]), True)[0] == pytest.approx(
        [1.4997, -0.4999, -0.4999, -0.4999], abs=1e-4
    )
