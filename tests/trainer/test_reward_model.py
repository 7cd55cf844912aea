"""A trained reward model as the reward: the numbers that transformers and PEFT give, without a second base."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from finished_runs import rows
from llamas import random_llama
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from orchestrator.errors import InputError
from orchestrator.planning.freeze import read_job
from runfolder.chain import Attempt
from runfolder.digests import changes, digests
from serving.engine import Engine
from trainer.reward_model import AdapterJudge, WholeModelJudge, judge_of, shares_base
from trainer.rewards import RewardSample
from trainer.rollouts import recorded_rollout

SAMPLES = 3


@pytest.fixture
def reward_model(new_run: Any, launch: Any, pairs: Path) -> Any:
    """Train a reward model; gives the folder of its output."""

    def train(method: dict[str, Any]) -> Path:
        run: Path = new_run(
            f"judge-{method['kind']}",
            objective="reward",
            method=method,
            data={"train": str(pairs)},
            train={"steps": 6, "lr": 1e-2},
        )
        launch(1, run)
        return run / "output"

    return train


def scores(folder: Path, base: Path, documents: list[list[int]]) -> list[float]:
    """What plain transformers and PEFT give documents."""
    config = AutoConfig.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in documents]


@pytest.mark.parametrize("method", [{"kind": "lora", "rank": 4}])
def test_an_adapter_of_the_same_base_judges_on_it(
    method: dict[str, Any], reward_model: Any, new_run: Any, launch: Any, tiny_base: Path
) -> None:
    folder = reward_model(method)
    run = new_run(
        "judged",
        objective={
            "kind": "grpo",
            "reward": {"model": 2.0, "format": 1.0},
            "reward_model": str(folder),
            "samples": SAMPLES,
            "new_tokens": 7,
            "temperature": 1.5,
        },
        train={"steps": 2, "batch_tokens": 60, "lr": 1e-2},
    )
    launch(1, run)
    rollout = recorded_rollout(Attempt(run, 1), 2)
    assert rollout is not None
    documents = [ids.tolist() for ids in np.split(rollout["ids"], rollout["ends"][:-1])]
    theirs = scores(folder, tiny_base, documents)
    assert np.ptp(theirs) > 1e-3  # else any scores would do
    assert rollout["reward_model"] == pytest.approx(theirs, abs=1e-5)
    assert rollout["rewards"] == pytest.approx(2 * np.array(theirs), abs=2e-5)  # nothing has the form of an answer
    reported = rows(run, 1)[2]
    assert reported["reward_model"] == pytest.approx(np.mean(theirs), abs=1e-5)
    assert reported["reward"] == pytest.approx(2 * reported["reward_model"], abs=1e-5)
    assert reported["reward_format"] == 0


def test_one_of_another_base_or_a_whole_one_lies_beside(reward_model: Any, tiny_base: Path, tmp_path: Path) -> None:
    adapter, whole = reward_model({"kind": "lora", "rank": 4}), reward_model({"kind": "full"})
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(tiny_base, copy)
    shutil.copytree(tiny_base, other)
    config = AutoConfig.from_pretrained(tiny_base)
    random_llama(vocab_size=config.vocab_size, initializer_range=0.1).save_pretrained(other)
    assert shares_base(adapter, str(tiny_base)) and shares_base(adapter, str(copy))
    assert not shares_base(adapter, str(other)) and not shares_base(whole, str(tiny_base))
    on_base, beside = (Engine(str(place), residents=2, tokens=2048, positions=64) for place in (copy, other))
    own = judge_of(adapter, shares_base(adapter, str(copy)), on_base)
    judge = judge_of(adapter, shares_base(adapter, str(other)), beside)
    assert isinstance(own, AdapterJudge) and isinstance(judge, WholeModelJudge)
    assert isinstance(judge_of(whole, shares_base(whole, str(copy)), on_base), WholeModelJudge)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    samples = []
    for prompt, written in (("1 + 2 =", " 3"), ("30 + 4 + 7 =", " 41"), ("9 =", " 12345678")):
        ids = tokenizer(prompt + written + tokenizer.eos_token)["input_ids"]
        samples.append(RewardSample(prompt, written, "", {}, ids=ids))
    journal: Any = None  # a model is asked again for nothing
    assert judge.judge(samples, journal) == pytest.approx(own.judge(samples, journal), abs=1e-5)


def test_the_folder_of_a_reward_model_is_part_of_the_job(tmp_path: Path) -> None:
    folder, data, job_file = tmp_path / "judge", tmp_path / "rows.jsonl", tmp_path / "job.yaml"
    data.write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    objective = {"kind": "grpo", "reward": "model", "reward_model": "judge"}
    written = {"base": "b", "method": "lora", "data": str(data), "train": {"steps": 1}, "objective": objective}
    job_file.write_text(yaml.safe_dump(written))
    with pytest.raises(
        InputError, match=r"objective.reward_model: found no reward model in judge; allowed: the output"
    ):
        read_job(job_file)
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(InputError, match=r"found LlamaForCausalLM, which does not score; allowed: the output"):
        read_job(job_file)
    (folder / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    job, _ = read_job(job_file)
    assert job.sources["objective.reward_model"] == str(folder)
    known = digests(job, None)
    assert changes(job, known) == []
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    (change,) = changes(job, known)
    assert change.startswith(f"objective.reward_model: {folder} has changed since the submission")
