"""Task files: one clear line per error, and rows that are the trainer's own."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import InputError
from orchestrator.evaluation.questions import Preparation, PreparedTask
from orchestrator.evaluation.scores import is_right, score_task
from orchestrator.evaluation.task import read_task, read_tasks
from runfolder.job import Base
from serving.kept import KeptAnswer
from trainer.data.encode import Reading
from trainer.data.tokenizer import load_tokenizer
from trainer.data.tokens import read_prompts, tokenise

ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "tiny"
ENDS = (1,)
ROWS = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(5)]
CHOICES = [
    {"q": "opposite of hot", "options": ["cold", "big", "red"], "gold": 0},
    {"q": "opposite of big", "options": ["red", "small"], "gold": "B"},
    {"q": "opposite of wet", "options": ["dry", "red"], "gold": "dry"},
    {"q": "opposite of old", "options": ["3", "new"], "gold": "1"},
]
CHOICE = {"kind": "choice", "prompt": "{q} ->", "choices": "options", "answer": "gold"}


def task_file(folder: Path, data: list[dict[str, Any]], /, **task: Any) -> Path:
    """A task, with its data beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump({"kind": "exact_match", "data": "rows.jsonl", **task}))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Base(model=str(TINY)))


def prepared(tokenizer: Any, path: Path, limit: int | None = None) -> PreparedTask:
    return Preparation(tokenizer, ENDS).prepare(read_task(path), limit)


def test_a_task_is_named_by_its_file_and_finds_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = task_file(tmp_path / "tasks", ROWS)
    monkeypatch.chdir(tmp_path)
    task = read_task(Path("tasks/sums.yaml"))
    assert (task.name, task.data) == ("sums", str(path.with_name("rows.jsonl")))
    assert task.measures == ("exact_match",)
    (tmp_path / "tasks" / "hub.yaml").write_text("kind: exact_match\ndata: openai/gsm8k:main:test\n")
    assert read_task(Path("tasks/hub.yaml")).data == "openai/gsm8k:main:test"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "exact"}, "kind: found 'exact'; did you mean 'exact_match'? allowed: 'exact_match', 'choice'"),
        ({"max_tokens": 3}, "max_tokens: unknown key; did you mean 'max_new_tokens'?"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0; allowed: greater than or equal to 1"),
        ({"extract": "("}, "extract: found '('; is no regular expression"),
        ({"name": "a/b"}, "name: found 'a/b'; must be at most 64 letters"),
        ({"choices": "options"}, "kind exact_match with choices, which is for kind choice"),
        ({"kind": "choice", "prompt": "{q}"}, "kind choice without choices; allowed: prompt, choices and answer"),
        ({**CHOICE, "choices": ["one"]}, "choices: found fewer than two"),
        ({**CHOICE, "columns": {"prompt": "q"}}, "kind choice with columns"),
    ],
)
def test_what_is_wrong_is_one_line(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = task_file(tmp_path, ROWS, **changes)
    with pytest.raises(InputError) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)
    assert "job: " not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_tasks_are_looked_at_before_one_is_refused(tmp_path: Path) -> None:
    paths = [task_file(tmp_path / str(n), ROWS, kind=kind) for n, kind in enumerate(("a", "exact_match", "b"))]
    with pytest.raises(InputError) as caught:
        read_tasks([*paths, tmp_path / "none.yaml", paths[1]])
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and "none.yaml: No such file" in lines[2] and "two of the name sums" in lines[3]


def test_prompts_are_those_of_the_trainer(tokenizer: Any, tmp_path: Path) -> None:
    path = task_file(tmp_path, ROWS, kind="generation", max_new_tokens=7)
    rows = prepared(tokenizer, path).rows
    source = str(path.with_name("rows.jsonl"))
    trained = read_prompts(source, tokenizer, Reading(256, ends=ENDS))
    assert [(list(row.question.prompt), row.expected) for row in rows] == [(p.ids, p.answer) for p in trained]
    tokens = tokenise(source, tokenizer, Reading(256, ends=ENDS), tmp_path / "cache")
    for number, row in enumerate(rows):
        (text,) = row.question.texts
        document = tokens.document(number)
        assert list(text.ids) == document.ids.tolist()
        scored = [place for first, stop in text.ranges for place in range(first, stop)]
        assert scored == document.target.nonzero()[0].tolist()
        assert (row.question.new_tokens, row.question.stop) == (7, ENDS)


def test_a_chat_is_asked_through_the_template(tokenizer: Any, tmp_path: Path) -> None:
    chatty = deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    (plain, *_) = prepared(chatty, task_file(tmp_path / "a", ROWS)).rows
    (chat, *_) = prepared(chatty, task_file(tmp_path / "b", ROWS, chat=True)).rows
    turns = [{"role": "user", "content": ROWS[0]["prompt"]}]
    expected = chatty.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(chat.question.prompt) == expected != list(plain.question.prompt)
    assert chat.expected == plain.expected == "0"


def test_rows_are_limited_by_the_task_and_by_the_command(tokenizer: Any, tmp_path: Path) -> None:
    assert len(prepared(tokenizer, task_file(tmp_path, ROWS, rows=4)).rows) == 4
    assert len(prepared(tokenizer, task_file(tmp_path, ROWS, rows=4), limit=2).rows) == 2
    assert len(prepared(tokenizer, task_file(tmp_path, ROWS, rows=2), limit=4).rows) == 2
    assert len(prepared(tokenizer, task_file(tmp_path, ROWS), limit=3).rows) == 3
    assert len(prepared(tokenizer, task_file(tmp_path, CHOICES, **CHOICE), limit=3).rows) == 3


def test_choices_are_texts_behind_the_prompt(tokenizer: Any, tmp_path: Path) -> None:
    rows = prepared(tokenizer, task_file(tmp_path, CHOICES, **CHOICE)).rows
    assert [(row.expected, row.right) for row in rows] == [("cold", 0), ("small", 1), ("dry", 0), ("new", 1)]
    first = rows[0].question
    assert first.new_tokens == 0 and len(first.texts) == 3
    for text, choice in zip(first.texts, CHOICES[0]["options"], strict=True):
        ((start, stop),) = text.ranges
        assert tokenizer.decode(text.ids[:start]) == "opposite of hot ->"
        assert tokenizer.decode(text.ids) == f"opposite of hot -> {choice}" and stop == len(text.ids)


@pytest.mark.parametrize(
    ("rows", "task", "said"),
    [
        ([{"prompt": "a"}], {}, "row 1: found the fields prompt"),
        ([{"q": "a"}], CHOICE, "row 1: found no column 'options', allowed: 'q'"),
        ([{"q": "a", "options": ["x"], "gold": 0}], CHOICE, "field options: found ['x'] (list), allowed: a list of"),
        ([{"q": "a", "options": ["x", "y"], "gold": 2}], CHOICE, "field gold: found 2 (int), allowed: the text, the"),
        ([{"q": "a", "options": ["x", "y"], "gold": "z"}], CHOICE, "field gold: found 'z' (str), allowed: the text"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(
    rows: list[dict[str, Any]], task: dict[str, Any], said: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="rows.jsonl, row 1") as caught:
        prepared(tokenizer, task_file(tmp_path, rows, **task))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("written", "expected", "extract", "right"),
    [
        ("so it is\n#### 1,200", "long\n#### 1200", None, True),
        ("1200", "long\n#### 1200", None, False),
        (" yes ", "yes", None, True),
        ("it is 3, then 1,200.", "#### 1200", "number", True),
        ("it is 1200.5", "1200", "number", False),
        ("nothing", "1200", "number", False),
        ("<b>x</b> <b>y</b>", "y", "<b>(.*?)</b>", True),
        ("<b>y</b> <b>x</b>", "y", "<b>(.*?)</b>", False),
    ],
)
def test_what_is_right(written: str, expected: str, extract: str | None, right: bool) -> None:
    assert is_right(written, expected, extract) is right


def test_another_rule_of_what_is_right_asks_nothing_anew(tokenizer: Any, tmp_path: Path) -> None:
    row = [{"prompt": "count:", "completion": " 3"}]
    plain = prepared(tokenizer, task_file(tmp_path / "a", row))
    cut = prepared(tokenizer, task_file(tmp_path / "b", row, extract="[0-9]"))
    longer = prepared(tokenizer, task_file(tmp_path / "c", row, max_new_tokens=9))
    assert plain.key == cut.key != longer.key
    key = plain.rows[0].question.key
    assert key == cut.rows[0].question.key
    answers = {key: KeptAnswer(key, " it is 3.", 6)}
    assert [score.right for task in (plain, cut) for score in score_task(task, answers)] == [False, True]


def test_the_likeliest_text_is_chosen_by_the_rule_of_the_task(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"q": "x", "options": ["a", "much longer"], "gold": 1}]
    for normalise, right in (("none", False), ("characters", True), ("tokens", True)):
        task = prepared(tokenizer, task_file(tmp_path, rows, **CHOICE, normalise=normalise))
        question = task.rows[0].question
        assert question.texts[1].count > 3 * question.texts[0].count
        answers = {question.key: KeptAnswer(question.key, log_likelihoods=(-2.0, -3.0))}
        (score,) = score_task(task, answers)
        assert score.right is right
