"""`fleetune rows`, and what `plan` and `submit` say of rows: what the trainer would see, before a run."""

import datetime
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizer_kinds import CHATML, make

from orchestrator.errors import InputError
from orchestrator.planning import survey as looking
from orchestrator.planning.plan import plan
from orchestrator.rows import rows
from orchestrator.submit import submit
from orchestrator.terminal.row_text import show_rows
from runfolder.record import read_record

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of zeros with a byte-level tokenizer and a chat template that writes the date."""
    from jobs import make_base

    folder = make_base(tmp_path / "base", vocab_size=512)
    tok = make("byte level", bos=False, end="<|im_end|>", chat="{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    tok.save_pretrained(folder)
    return folder


def job(tmp_path: Path, *records: Any, **data: Any) -> Path:
    """A job.yaml over these rows."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    written = {
        "name": "look",
        "base": "base",
        "method": {"kind": "lora", "rank": 2},
        "data": {"train": "train.jsonl", "seq_len": 48, **data},
        "train": {"steps": 5, "batch_tokens": 64},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(written))
    return path


def text(example: Any, learned: bool) -> str:
    return "".join(token.text for token in example.tokens if token.learned == learned)


@pytest.mark.usefixtures("base", "home")
def test_rows_shows_what_is_learned_and_what_is_cut(tmp_path: Path) -> None:
    short = {"prompt": "Answer:", "completion": " yes", "id": 7}
    long = {"prompt": "Answer:", "completion": " a b" * 40}
    lost = {"prompt": "a b " * 40, "completion": "yes"}
    found = rows(job(tmp_path, *[short] * 30, long, lost))
    assert [example.row for example in found.examples] == [1, 2, 3]
    example = found.examples[0]
    assert (text(example, False), text(example, True)) == ("Answer:", " yes<|im_end|>")
    assert list(example.parts) == [("Answer:", False, True), (" yes<|im_end|>", True, True)]
    survey = found.survey
    assert (survey.rows, survey.examples, survey.number("truncated"), survey.number("dropped")) == (32, 32, 1, 1)
    assert (survey.duplicates, survey.unused) == (29, {"id": (30, 1)})
    assert survey.tokens == 30 * len(example.tokens) + 48
    assert [warning.split()[0] for warning in found.warnings] == ["not", "of", "in"]

    (cut,) = rows(tmp_path / "job.yaml", row=31).examples
    assert (cut.fate, cut.kept) == ("truncated", 48)
    (left_out,) = rows(tmp_path / "job.yaml", row=32).examples
    assert (left_out.fate, left_out.kept) == ("dropped", 0)
    with pytest.raises(InputError, match=r"--row: found 33; allowed: the number of a row"):
        rows(tmp_path / "job.yaml", row=33)
    with pytest.raises(InputError, match=r"data\.eval: missing"):
        rows(tmp_path / "job.yaml", evaluation=True)


@pytest.mark.usefixtures("base", "home")
def test_rows_shows_both_answers_of_a_pair_and_what_its_prompt_loses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"prompt": "Answer:", "chosen": " yes", "rejected": " no no"}
    long = {"prompt": "first " + "a b " * 40, "chosen": "yes", "rejected": "no"}
    path = job(tmp_path, short, long, short | {"rejected": " yes"}, too_long="cut")
    found = rows(path, overrides=["objective=dpo"])
    assert [example.row for example in found.examples] == [1, 1, 2, 2, 3, 3]
    assert [text(example, True) for example in found.examples[:2]] == [" yes<|im_end|>", " no no<|im_end|>"]
    for example in found.examples[2:4]:
        kept = [index for index in range(len(example.tokens)) if example.keeps(index)]
        assert example.fate == "truncated" and kept[-1] == len(example.tokens) - 1
        assert kept[0] == 0 and len(kept) <= 48 and kept[1] > 10
    assert max(example.cut_to for example in found.examples[2:4]) > 0
    assert [(example.fate, example.kept) for example in found.examples[4:]] == [("identical", 0)] * 2
    show_rows(found)
    said = capsys.readouterr().out
    assert said.count("the beginning of its prompt is cut") == 2 and said.count("both answers are the same") == 2


@pytest.mark.usefixtures("base", "home")
def test_rows_says_which_answer_is_which_and_shows_lists_that_teach_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = {"prompt": "Answer:", "completions": [" yes", " no"], "ranks": [1, 1]}
    show_rows(rows(job(tmp_path, tied, tied | {"ranks": [2, 1]}), overrides=["objective=dpo"]))
    said = capsys.readouterr().out
    assert "row 1  0 tokens, 0 learned, left out: all of its answers rank alike" in said
    assert 0 < said.index("row 2, chosen") < said.index(" no") < said.index("row 2, rejected")
    judged = [{"prompt": p, "completion": " yes", "label": p == "Q:"} for p in ("Q:", "Answer:")]
    show_rows(rows(job(tmp_path, *judged), overrides=["objective=kto"]))
    said = capsys.readouterr().out
    assert "row 1, desirable" in said and "row 2, undesirable" in said
    assert said.count(", a neighbour's answer, for the baseline") == 2


@pytest.mark.usefixtures("base", "home")
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_plan_counts_preferences_that_are_there_twice(tmp_path: Path, objective: str) -> None:
    pair = {"prompt": "Answer:", "chosen": " yes", "rejected": " no"}
    records: list[Any] = [pair, pair, pair | {"prompt": "Q:"}]
    if objective == "kto":
        asked = [("Answer:", True), ("Q:", False), ("Answer:", True)]
        records = [{"prompt": p, "completion": " yes", "label": label} for p, label in asked]
    found = plan(job(tmp_path, *records), overrides=[f"objective={objective}"])
    assert "data.train: 1 of 3 preferences are equal to an earlier one" in found.warnings


@pytest.mark.usefixtures("base", "home")
def test_rows_shows_what_is_asked_where_answers_are_the_model_s_own(tmp_path: Path) -> None:
    path = job(tmp_path, *[{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)])
    view = rows(path, overrides=["objective=grpo"])
    assert not any(token.learned for example in view.examples for token in example.tokens)
    assert view.examples[0].answer and "which rewards see" in view.examples[0].answer
    assert view.sequences == []
    named = job(tmp_path, *[{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "name": "x"} for n in range(20)])
    judge = tmp_path / "rewards.py"
    judge.write_text("def named(prompt, completion, row):\n    return 1.0\n")
    learned = f"objective={{kind: grpo, reward: '{judge}:named'}}"
    warned = [
        any("'name'" in text for text in rows(named, overrides=[by]).warnings) for by in ("objective=grpo", learned)
    ]
    assert warned == [True, False]


@pytest.mark.usefixtures("base", "home")
def test_rows_shows_how_examples_are_packed(tmp_path: Path) -> None:
    records = [{"prompt": "", "completion": "a" * length} for length in (30, 20, 10)]
    found = rows(job(tmp_path, *records))
    (first, second) = found.sequences
    assert [(row, stop - start) for row, start, stop in first.examples] == [(1, 31), (3, 11)]
    assert (first.padding, second.padding) == (48 - 31 - 11, 48 - 21)
    assert [place[1:] for place in first.examples] == [(0, 31), (31, 42)]


@pytest.mark.usefixtures("base", "home")
def test_plan_says_what_becomes_of_the_rows(tmp_path: Path) -> None:
    record = {"prompt": "Answer:", "completion": " yes", "context": None, "note": "x"}
    found = plan(job(tmp_path, *[record] * 40))
    assert [warning.split(": ")[0] for warning in found.warnings] == ["data.train"]
    assert "'note' (in 40 of 40 rows)" in found.warnings[0]
    assert plan(job(tmp_path, *[record] * 40)) == found  # as it is remembered


@pytest.mark.usefixtures("base", "home")
def test_rows_that_are_too_long_are_refused_unless_the_job_says_otherwise(tmp_path: Path) -> None:
    long = {"prompt": "Answer:", "completion": " a b" * 40}
    short = {"prompt": "Answer:", "completion": " yes"}
    with pytest.raises(
        InputError, match=r"data\.train: .*: 2 of 12 examples are longer than data\.seq_len 48: 2 would"
    ):
        plan(job(tmp_path, *[long] * 2, *[short] * 10))
    for choice, cut, dropped in (("cut", 2, 0), ("drop", 0, 2)):
        found = plan(job(tmp_path, *[long] * 2, *[short] * 10, too_long=choice))
        assert f"of 12 examples, {cut} are cut and {dropped} left out" in found.warnings[0]
    with pytest.raises(InputError, match=r"row 11: longer than data\.seq_len 48, as are 1 of 11 examples"):
        plan(job(tmp_path, *[short] * 10, long, too_long="refuse"))


@pytest.mark.usefixtures("base", "home")
@pytest.mark.parametrize("tokens", [True, False])
def test_too_few_steps_are_told_with_a_batch_that_gives_enough(
    tmp_path: Path, tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty short rows, three epochs and the default batch: one step with each row several times in it."""
    if not tokens:
        monkeypatch.setattr(looking, "missing_packages", lambda: ["transformers"])
    path = job(tmp_path, *[{"prompt": "Sort: red cat dog", "completion": " cat dog red"}] * 40)
    found = plan(path, ["train={epochs: 3}"])
    assert found.steps == 1
    (warning,) = [warning for warning in found.warnings if warning.startswith("train.batch_tokens: found 16384")]
    batch = int(warning.rpartition("train.batch_tokens: ")[2].split()[0])
    again = plan(path, [f"train={{epochs: 3, batch_tokens: {batch}}}"])
    assert again.steps is not None and 20 <= again.steps <= 110
    assert not any("batch_tokens" in warning or "epochs" in warning for warning in again.warnings)
    few = plan(path, ["train={epochs: 3, batch_tokens: 100}"])
    assert any(warning.startswith("train.epochs: 3 epochs are") for warning in few.warnings)


@pytest.mark.usefixtures("base", "home")
def test_without_a_tokenizer_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = job(tmp_path, *[{"prompt": "a" * 40, "completion": " b"}] * 8)
    monkeypatch.setattr(looking, "missing_packages", lambda: ["transformers", "pyarrow"])
    monkeypatch.setattr("orchestrator.planning.preflight.missing_packages", lambda: ["transformers", "pyarrow"])
    (warning,) = plan(path).warnings
    assert warning.startswith("data: rows were not looked at as tokens (transformers, pyarrow not installed: pip")
    monkeypatch.setattr("orchestrator.rows.missing_packages", lambda: ["transformers"])
    with pytest.raises(InputError, match=r"rows: needs transformers; allowed: pip install 'fleetune\[data\]'"):
        rows(path)


@pytest.mark.usefixtures("base", "home")
def test_modules_of_a_user_do_not_stand_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = tmp_path / "mine"
    hostile.mkdir()
    (hostile / "trainer.py").write_text("raise SystemExit('the trainer of a user')\n")
    monkeypatch.setenv("PYTHONPATH", str(hostile))
    monkeypatch.setattr(looking, "READER", [sys.executable, "-P", "-m", "trainer.data"])
    path = job(tmp_path, *[{"prompt": "Answer:", "completion": " yes"}] * 40)
    assert plan(path).warnings == ()
    (hostile / "pyarrow.py").write_text("raise ImportError('no arrows')\n")
    (hostile / "trainer.py").unlink()
    (warning,) = plan(path, ["data.seq_len=47"]).warnings
    assert "not looked at as tokens (looking at them failed: ImportError: no arrows)" in warning


@pytest.mark.usefixtures("home")
def test_a_token_without_an_embedding(tmp_path: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "model.safetensors").unlink()
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    path = job(tmp_path, {"prompt": "!", "completion": "!"}, {"prompt": "!", "completion": "yes"})
    with pytest.raises(InputError) as error:
        plan(path, ["base={model: base, init: scratch}"])
    (line,) = str(error.value).splitlines()
    assert line.startswith("data.train, row 2: the token ") and "the base has 40 embeddings" in line


@pytest.mark.usefixtures("base", "home")
def test_the_date_of_submission_is_frozen(tmp_path: Path) -> None:
    path = job(tmp_path, *[{"messages": CHAT}] * 8)
    found = plan(path)
    assert any(warning.startswith("data.date: the chat template writes") for warning in found.warnings)
    before = datetime.date.today()
    done = submit(path)
    assert read_record(done.run_dir)["job"]["data"]["date"] in {str(before), str(datetime.date.today())}
    pinned = submit(path, overrides=["data.date=2024-07-26"])
    assert read_record(pinned.run_dir)["job"]["data"]["date"] == "2024-07-26"
    (example, *_) = rows(path, overrides=["data.date=2024-07-26"]).examples
    assert text(example, False).startswith("26 Jul 2024\n")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the base's tokenizer has no chat template"),
        ("{{ raise_exception('no system turns') }}", "the chat template refuses it: no system turns"),
    ],
)
def test_a_chat_that_the_base_cannot_take(tmp_path: Path, base: Path, template: str | None, message: str) -> None:
    (base / "chat_template.jinja").unlink()
    tok = make("byte level", chat=template)
    tok.save_pretrained(base)
    with pytest.raises(InputError, match=rf"data\.train: .*{message}"):
        plan(job(tmp_path, {"messages": CHAT}))


@pytest.mark.usefixtures("home")
def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path, base: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    path = job(tmp_path, {"prompt": "a", "completion": "b"})
    for verb in (plan, rows):
        with pytest.raises(InputError, match=r"base\.model: .*base: its tokenizer cannot be loaded: "):
            verb(path)


@pytest.mark.usefixtures("home")
def test_a_config_that_transformers_refuses_is_refused_with_the_cause(tmp_path: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_attention_heads": 7}))
    (base / "model.safetensors").unlink()
    path = job(tmp_path, {"prompt": "a", "completion": "b"})
    with pytest.raises(InputError, match=r"its tokenizer cannot be loaded: .*: ValueError: .*attention heads \(7\)"):
        plan(path, ["base={model: base, init: scratch}"])


@pytest.mark.usefixtures("base")
def test_rows_needs_no_torch_and_speaks_json(tmp_path: Path, home: Path) -> None:
    path = job(tmp_path, {"prompt": "Answer:\u001b[2J", "completion": " yes"})
    command = "import sys; sys.modules['torch'] = None; from orchestrator.cli import main; main()"

    def call(*arguments: str) -> str:
        shown = subprocess.run(
            [sys.executable, "-c", command, "rows", str(path), *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        return shown.stdout

    found = json.loads(call("--json"))
    assert found["survey"]["rows"] == 1
    assert [token["learned"] for token in found["examples"][0]["tokens"]][-1] is True
    shown = call("--row", "1")
    assert "\u001b" not in shown and "\\x1b[2J" in shown
    assert home.exists()


DATA = ROOT.parent / "shared" / "data"


@pytest.mark.usefixtures("base", "home")
@pytest.mark.skipif(not DATA.exists(), reason="the data sets are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "columns", "count"),
    [("gsm8k_test.jsonl", None, 1319), ("hh_harmless_test.jsonl.gz", {"text": "chosen"}, 2312)],
)
def test_counts_of_real_data_add_up(tmp_path: Path, name: str, columns: dict[str, str] | None, count: int) -> None:
    source = DATA / name
    content = gzip.decompress(source.read_bytes()) if name.endswith(".gz") else source.read_bytes()
    lines = content.splitlines()
    path = job(tmp_path, {"text": "a"}, train=str(source), seq_len=512, too_long="cut", columns=columns)
    found = rows(path).survey
    assert found.rows == found.examples == len(lines) == count
    unused = set(json.loads(lines[0])) - {"question", "answer", "chosen"}
    assert set(found.unused) == unused
