"""Tasks of lm-evaluation-harness, with several adapters at once: the scores are those of its own model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import export
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'fleetune[harness]'")

from serving.engine import Engine
from serving.error import RequestRefused
from serving.harness import evaluate_by_harness
from serving.sequence import Request
from serving.shared import Asked, SharedEngine

TINY = Path(__file__).parents[2] / "examples" / "tiny"
PAIRS = "hot-cold big-small fast-slow old-new long-short hard-soft light-dark wet-dry".split()  # noqa: SIM905
KINDS = ("lora", "dora")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A choice, an answer that is written, and texts that are scored whole."""
    path = tmp_path_factory.mktemp("tasks") / "opposites.jsonl"
    rows = []
    for number, pair in enumerate(PAIRS):
        first, second = pair.split("-")
        other = PAIRS[number - 1].split("-")[1]
        rows.append({"word": first, "right": second, "choices": [other, second], "gold": 1})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    strip = [{"function": "remove_whitespace"}, {"function": "take_first"}]
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "doc_to_text": "opposite of {{word}} ->",
    }
    return [
        {
            **common,
            "task": "chosen",
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        },
        {
            **common,
            "task": "written",
            "output_type": "generate_until",
            "doc_to_target": "right",
            "generation_kwargs": {"until": [" long", "\n"], "max_gen_toks": 40, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "filter_list": [{"name": "strip", "filter": strip}],
        },
        {
            **common,
            "task": "whole",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "opposite of {{word}} -> {{right}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ]


def figures(results: Any) -> dict[str, dict[str, float]]:
    """The measures of each task, without their errors."""
    return {
        task: {name: value for name, value in measures.items() if isinstance(value, float) and "stderr" not in name}
        for task, measures in results["results"].items()
    }


def test_scores_are_those_of_the_harness_own_model(
    tasks: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    exported = {kind: export(TINY, kind, tmp_path / kind, seed=number) for number, kind in enumerate(KINDS)}
    engine = Engine(AutoModelForCausalLM.from_pretrained(TINY), tokens=2048, positions=128, adapter_bytes=2**22)
    for kind, adapter in exported.items():
        engine.load(kind, adapter.folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    found = evaluate_by_harness(engine, tokenizer, [None, *KINDS], tasks, bootstrap_iters=0)
    seen = set()
    for name in (None, *KINDS):
        model = AutoModelForCausalLM.from_pretrained(TINY) if name is None else exported[name].alone(TINY)
        alone = HFLM(pretrained=model.eval(), tokenizer=tokenizer, max_length=128, batch_size=4, device="cpu")
        with torch.no_grad():
            expected = evaluate(lm=alone, task_dict=TaskManager().load(tasks), bootstrap_iters=0)
        ours, theirs = figures(found[name]), figures(expected)
        assert ours.keys() == theirs.keys() == {"chosen", "written", "whole"}
        for task, measures in theirs.items():
            assert ours[task] == pytest.approx(measures, rel=1e-4), task
        seen.add(json.dumps(theirs))
    assert len(seen) == 3, "nothing to tell apart"


def test_a_request_that_is_refused_is_the_error_of_who_asked() -> None:
    engine = Engine(AutoModelForCausalLM.from_pretrained(TINY), tokens=256, positions=32, adapter_bytes=2**20)
    shared = SharedEngine(engine, AutoTokenizer.from_pretrained(TINY))
    with shared.working():
        with pytest.raises(RequestRefused, match="allowed: at most 32"):
            shared.complete(Asked([Request((5,) * 40)], [None], [()]))
        (sequence,) = shared.complete(Asked([Request((5, 6), new_tokens=3)], [None], [()]))
    assert len(sequence.answer) == 3
