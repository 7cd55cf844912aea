"""Prompts that both answers of a pair share: rows, log-likelihoods, scores, gradients and curves are as if apart."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import curve, difference, events
from flash_on_cpu import flash_on_cpu
from llamas import random_llama
from pydantic import ValidationError
from sampling import each_sampled
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from runfolder.job import Job
from trainer.answers_apart import branch_gap
from trainer.data import one_row
from trainer.data.collate import BRANCH as FIRST_BRANCH
from trainer.data.collate import collate, shared_by_pairs
from trainer.data.counts import Counts
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import Layout
from trainer.data.shards import join_examples
from trainer.data.tokens import Tokens
from trainer.kernels import Kernels
from trainer.kernels.documents import DOCUMENT_ATTENTION, tell_documents
from trainer.kernels.head import LinearHead
from trainer.objectives.likelihood import likelihood_arrays, log_likelihoods
from trainer.step import with_starts

TWO_LAYERS: dict[str, Any] = {"vocab_size": 60, "initializer_range": 0.3}
BASES: dict[str, Any] = {
    "llama": lambda: random_llama(vocab_size=60),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **TWO_LAYERS)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **TWO_LAYERS,
        )
    ),
}


def pairs(*lengths: tuple[int, int, int]) -> Tokens:
    """Random pairs of so many tokens of a prompt, a chosen and a rejected answer."""
    rng = np.random.default_rng(0)
    documents = []
    for prompt, *answers in lengths:
        asked = rng.integers(3, 60, prompt)
        for answer in answers:
            ids = np.concatenate([asked, rng.integers(3, 60, answer)]).astype(np.int32)
            documents.append((ids, np.arange(len(ids)) >= prompt))
    return Tokens([join_examples(documents, range(len(documents)), Counts())])


def test_a_row_has_the_prompt_once() -> None:
    tokens = pairs((3, 2, 2), (2, 1, 1))
    first, second = (tokens.document(number).ids.tolist() for number in (0, 1))
    arrays = collate([[0, 1, 2], [3]], tokens, 0, shared_by_pairs(tokens))
    assert arrays["input_ids"][0].tolist()[:7] == first + second[3:]
    assert arrays["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 3, 4, 0, 1, 2, *range(6)]
    assert arrays["before"][0].tolist() == [-1, 0, 1, 2, 3, 2, 5, *range(6, 15)]
    assert arrays["group"][0].tolist() == [1] * 7 + [2] * 3 + [3] * 6
    assert arrays["part"][0].tolist() == [0, 0, 0, 1, 1, 2, 2] + [0] * 9
    assert arrays["part"][1].tolist() == [0] * 16 and arrays["position_ids"][1].tolist()[:3] == [0, 1, 2]


def test_what_is_shared_ends_before_the_first_label() -> None:
    same = (np.array([5, 6, 7, 8], np.int32), np.array([False, False, True, True]))
    other = (np.array([5, 6, 7, 9], np.int32), np.array([False, False, True, True]))
    apart = (np.array([4, 6, 7, 9], np.int32), np.array([False, False, True, True]))
    tokens = Tokens([join_examples([same, other, same, apart, same], [1] * 5, Counts())])
    assert shared_by_pairs(tokens).tolist() == [0, 2, 0, 0, 0]


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_as_many_pairs_as_fit_with_their_prompts_once(packing: bool) -> None:
    tokens = pairs(*[(12, 2, 2)] * 8)
    examples = Examples.of_each(tokens, 2)
    sharing = Examples(tokens, examples.starts, shared_by_pairs(tokens))
    layout = Layout(seq_len=32, packing=packing, micro_batch=1)
    apart, together = (layout.deal(GlobalBatch(each, np.arange(8)), 0, 1) for each in (examples, sharing))
    assert len(together) == (4 if packing else 8) and len(apart) == 8
    assert sorted(number for micro in together for row in micro.rows for number in row) == list(range(16))
    assert all(len(row) == (4 if packing else 2) for micro in together for row in micro.rows)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_log_likelihoods_and_gradients_are_as_if_apart(base: str, head: bool) -> None:
    tokens = pairs((5, 4, 7), (9, 3, 2), (1, 2, 2))
    torch.manual_seed(0)
    model: Any = BASES[base]().eval()
    kernels = Kernels(LinearHead(model, torch.float32)) if head else Kernels()

    def found(rows: list[list[int]], shared: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        arrays = likelihood_arrays(rows, tokens, 0, shared)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        policy = log_likelihoods(model, batch, kernels)
        weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.3])
        return policy.detach(), list(torch.autograd.grad((policy * weights).sum(), list(model.parameters())))

    shared = shared_by_pairs(tokens)
    expected, slopes = found([[number] for number in range(6)], None)
    for rows in ([[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]]):
        policy, gradients = found(rows, shared)
        torch.testing.assert_close(policy, expected, rtol=1e-6, atol=1e-5)
        for gradient, slope in zip(gradients, slopes, strict=True):
            torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-4)


def test_a_base_that_reads_no_mask_is_found_out() -> None:
    torch.manual_seed(0)
    model: Any = BASES["llama"]()
    assert branch_gap(model, 60, torch.device("cpu"), in_one_row=False) < 1e-5
    forward = model.forward
    model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)  # noqa: ARG005
    assert branch_gap(model, 60, torch.device("cpu"), in_one_row=False) > 1e-3


@pytest.mark.parametrize("wrong", [False, True])
def test_in_one_row_second_answers_see_prompts_of_first_ones(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention is stood in for by the same sums on a CPU; what is gathered for it, and given back, is real."""
    if wrong:
        monkeypatch.setattr(one_row, "TRUNK", FIRST_BRANCH)
    torch.manual_seed(0)
    model: Any = BASES["llama"]()
    model.set_attn_implementation(DOCUMENT_ATTENTION)
    tell_documents(model.get_decoder(), 64)
    with flash_on_cpu():
        gap = branch_gap(model, 60, torch.device("cpu"), in_one_row=True)
    assert gap > 1e-3 if wrong else gap < 1e-5


def test_keys_are_gathered_for_second_answers() -> None:
    tokens = pairs((3, 2, 1), (2, 1, 2))
    arrays = with_starts(collate([[0, 1, 2, 3]], tokens, 0, shared_by_pairs(tokens)))
    assert arrays["documents"].tolist() == [0, 5, 6, 9, 11, 16]
    assert arrays["key_starts"].tolist() == [0, 5, 9, 12, 16, 21]
    expected = [*range(5), 0, 1, 2, 5, 6, 7, 8, 6, 7, 9, 10, *range(11, 16)]
    assert arrays["key_places"].tolist() == expected


@pytest.fixture(scope="session")
def long_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 40 pairs whose prompts are longer than their answers."""
    rng = random.Random(2)
    path = tmp_path_factory.mktemp("long") / "pairs.jsonl"
    lines = []
    for _ in range(40):
        numbers = [rng.randrange(100) for _ in range(rng.randrange(4, 12))]
        row = {"prompt": " + ".join(map(str, numbers)) + " =", "chosen": f" {sum(numbers)}"}
        lines.append(json.dumps(row | {"rejected": f" {sum(numbers)}{rng.randrange(1000)}"}) + "\n")
    path.write_text("".join(lines))
    return path


CASES = [
    (objective, method)
    for objective in ("dpo", "simpo", "orpo", "reward")
    for method in ({"kind": "lora", "rank": 4}, {"kind": "prefix", "tokens": 3}, {"kind": "full"})
]


@pytest.mark.parametrize(("objective", "method"), each_sampled(CASES))
def test_curves_are_as_if_apart(
    objective: str, method: dict[str, Any], new_run: Any, launch: Any, long_prompts: Path
) -> None:
    runs = []
    for name, shares, world, zero, packed in (
        ("apart", False, 1, 0, True),
        ("shared", True, 1, 0, True),
        ("elsewhere", True, 2, 3, False),
    ):
        run = new_run(
            name,
            objective={"kind": objective, "share_prompts": shares},
            method=method,
            data={"train": str(long_prompts), "packing": packed, "eval": str(long_prompts)},
            train={"steps": 4, "batch_tokens": 400, "lr": 1e-3, "micro_batch": 2},
            sharding={"zero": zero},
        )
        launch(world, run)
        runs.append(run)
    apart, shared, elsewhere = map(curve, runs)
    assert difference(shared, apart) < 1e-5 and difference(elsewhere, apart) < 1e-5
    (found,) = [event for event in events(runs[1]) if event["event"] == "plan"]
    assert found["examples"] == 40


def test_attention_by_places_cannot_share() -> None:
    job = {"base": "b", "objective": {"kind": "dpo", "share_prompts": True}, "method": "longlora"}
    with pytest.raises(ValidationError, match="objective.share_prompts with method longlora, whose attention"):
        Job.model_validate(job | {"data": "d", "train": {"steps": 1}})
