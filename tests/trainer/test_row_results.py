"""What an evaluation keeps of each row: of models whose loss or answer is known, on any workers, and by content."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import random_llama
from run_folders import claim, eval_row, make_run
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from runfolder.appended import read_lines
from runfolder.chain import Attempt
from runfolder.files import Damaged
from runfolder.row_results import RowResult, last_row_results, read_row_results, write_row_results
from trainer.data.row_digests import row_digests
from trainer.export import results


def results_per_row(run_dir: Path) -> list[RowResult]:
    path = last_row_results(run_dir)
    assert path
    return read_row_results(path)


def loss_alone(base: Path, prompt: str, completion: str) -> tuple[float, int]:
    """The summed loss of an answer, and its labels, as plain transformers gives them of one row by itself."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    if tokenizer.bos_token_id is not None and tokenizer(prompt)["input_ids"][0] == tokenizer.bos_token_id:
        before = [tokenizer.bos_token_id, *before]
    ids = torch.tensor([before + answer])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits[0]
    losses = nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return losses[-len(answer) :].sum().item(), len(answer)


def test_each_row_has_the_loss_that_it_has_alone_on_any_workers(
    new_run: Any, launch: Any, tiny_base: Path, held_out: Path
) -> None:
    settings = {
        "data": {"eval": str(held_out)},
        "train": {"steps": 1, "lr": 1e-12},
        "evaluation": {"max_new_tokens": 4, "rows": 30},
    }
    found = {}
    for world, zero in ((1, 0), (2, 3)):
        run = new_run(f"{world}-{zero}", sharding={"zero": zero}, **settings)
        launch(world, run)
        found[world] = results_per_row(run)
        losses = math.fsum(row.loss or 0 for row in found[world])
        weights = math.fsum(row.weight or 0 for row in found[world])
        assert losses / weights == pytest.approx(results(run)["eval_loss"], rel=1e-6)
        right = [row.correct for row in found[world]].count(True)
        assert right / 30 == results(run)["eval_exact_match"]
        assert len(list(run.glob("attempts/1/evaluations/step-*.jsonl"))) == 2
    assert [row.row for row in found[1]] == list(range(1, 31))
    assert len({row.digest for row in found[1]}) == 30
    for one, other in zip(found[1], found[2], strict=True):
        assert (one.digest, one.weight, one.answer, one.correct) == (
            other.digest,
            other.weight,
            other.answer,
            other.correct,
        )
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    lines = list(map(json.loads, held_out.read_text().splitlines()))
    for place in (0, 7, 29):
        loss, labels = loss_alone(tiny_base, lines[place]["prompt"], lines[place]["completion"])
        assert (found[1][place].loss, found[1][place].weight) == (pytest.approx(loss, rel=1e-4), labels)


def test_a_model_that_knows_nothing_loses_the_logarithm_of_its_vocabulary_on_each_label(
    new_run: Any, launch: Any, tiny_base: Path, held_out: Path, tmp_path: Path
) -> None:
    base = tmp_path / "uniform"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(base)
    model = random_llama(vocab_size=len(tokenizer), tie_word_embeddings=False, eos_token_id=1, pad_token_id=0)
    nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(base)
    run = new_run(
        "knows-nothing",
        base=str(base),
        data={"eval": str(held_out)},
        train={"steps": 1, "lr": 1e-12},
        evaluation={"max_new_tokens": 0},
    )
    launch(1, run)
    for row in results_per_row(run):
        assert row.loss == pytest.approx((row.weight or 0) * math.log(len(tokenizer)), rel=1e-6)
        assert (row.correct, row.answer) == (None, None)


def test_a_model_that_knows_one_row_is_right_on_it_alone(new_run: Any, launch: Any, tmp_path: Path) -> None:
    known, unknown = ("Sort: red cat dog", " cat dog red"), ("Sort: b a", " never")
    train, held_out = tmp_path / "train.jsonl", tmp_path / "both.jsonl"
    for path, rows in ((train, [known]), (held_out, [unknown, known])):
        path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    run = new_run(
        "known",
        method={"kind": "full"},
        data={"train": str(train), "eval": str(held_out)},
        train={"steps": 60, "batch_tokens": 64},
        evaluation={"max_new_tokens": 24},
    )
    launch(1, run)
    wrong, right = results_per_row(run)
    assert (wrong.correct, right.correct, right.answer) == (False, True, "cat dog red")
    assert right.loss is not None and wrong.loss is not None and right.loss < 0.5 < wrong.loss
    assert results(run)["eval_exact_match"] == 0.5


def test_a_row_has_one_digest_whatever_file_it_lies_in(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"prompt": "1+1", "completion": "2"}\n\n{"completion": "4", "prompt": "2+2"}\n')
    table = tmp_path / "rows.csv"
    table.write_text('prompt,completion\n"2+2","4"\n')
    of_lines = row_digests(str(lines), [1, 3])
    assert list(of_lines) == [1, 3] and of_lines[1] != of_lines[3]
    of_table = row_digests(str(table), range(10))
    assert set(of_table.values()) == {of_lines[3]}


def test_only_what_was_reported_counts_and_the_first_report_of_a_step(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "fake-0000000000", None)
    first = claim(run_dir)
    write_row_results(first, 10, [RowResult(1, "a", loss=1.0)])
    eval_row(first, 10, eval_loss=1.0)
    write_row_results(first, 20, [RowResult(1, "a", loss=2.0)])
    assert last_row_results(run_dir) == first.folder / "evaluations" / "step-10.jsonl"
    second = claim(run_dir, start=10)
    write_row_results(second, 10, [RowResult(1, "a", loss=9.0)])
    eval_row(second, 10, eval_loss=9.0)
    assert [row.loss for row in results_per_row(run_dir)] == [1.0]
    eval_row(first, 20, eval_loss=2.0)  # of an attempt that has a successor: behind the seal
    assert [row.loss for row in results_per_row(run_dir)] == [1.0]
    write_row_results(second, 20, [RowResult(1, "a", loss=math.nan, answer="ü\u2028\n")])
    eval_row(second, 20, eval_loss=3.0)
    assert results_per_row(run_dir) == [RowResult(1, "a", answer="ü\u2028\n")]
    (second.folder / "evaluations" / "step-20.jsonl").write_text('{"row": 1}\n')
    with pytest.raises(Damaged, match=r"step-20\.jsonl"):
        results_per_row(run_dir)


def test_test_rows_are_the_last_ones_and_judged_at_the_end_alone(
    new_run: Any, launch: Any, held_out: Path, tmp_path: Path
) -> None:
    """Each part comes to what it comes to in a run that has no other rows."""
    lines = held_out.read_text().splitlines(keepends=True)[:12]
    parts = {"all": lines, "first": lines[:9], "last": lines[9:]}
    runs = {}
    for name, rows in parts.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(rows))
        evaluation = {"max_new_tokens": 4, "every": 1, "test": 0.25 if name == "all" else 0.0}
        runs[name] = new_run(f"of-{name}", data={"eval": str(path)}, train={"steps": 2}, evaluation=evaluation)
    launch(1, *runs.values())
    found = results(runs["all"])
    for metric in ("loss", "exact_match"):
        assert found[f"eval_{metric}"] == pytest.approx(results(runs["first"])[f"eval_{metric}"], rel=1e-6)
        assert found[f"eval_test_{metric}"] == pytest.approx(results(runs["last"])[f"eval_{metric}"], rel=1e-6)
    rows = results_per_row(runs["all"])
    assert [row.row for row in rows if row.test] == [10, 11, 12] and len(rows) == 12
    told = read_lines(Attempt(runs["all"], 1), "metrics.jsonl")
    assert [row["step"] for row in told if "eval_test_loss" in row] == [2]
    assert [row["step"] for row in told if "eval_loss" in row] == [0, 1, 2]
