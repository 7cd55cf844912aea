"""Preference rows: every form that data has, what is cut and left out, and one clear line for what is wrong."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from sampling import sampled

from orchestrator import cli
from trainer.data.encode import Reading
from trainer.data.files import RowError
from trainer.data.preferences import read_judged, read_margins, read_pairs
from trainer.data.rows import Row
from trainer.data.tokens import Tokens, tokenise

ROOT = Path(__file__).parents[3]
ASKED = {"role": "user", "content": "1 + 1?"}
RIGHT, WRONG = ({"role": "assistant", "content": content} for content in ("2", "3"))
TEXTS = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
CHATS = {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}
JUDGED = {"prompt": "1 + 1 =", "completion": " 2", "label": True}
HEAD = "\n\nHuman: 1 + 1?\n\nAssistant:"
HH = {"chosen": f"{HEAD} The sum is 2.", "rejected": f"{HEAD} The sun is 3."}


def jsonl(folder: Path, *records: Any) -> Path:
    path = folder / "preferences.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(path: Path) -> list[tuple[str, str, str]]:
    """The prompt and both answers of each pair."""
    both = [pair.answers for pair in pairs(path)]
    assert all(chosen.prompt == rejected.prompt for chosen, rejected in both)
    return [(chosen.prompt, chosen.completion, rejected.completion) for chosen, rejected in both]


def pairs(path: Path) -> list[Any]:
    return list(read_pairs(path))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (TEXTS, ("1 + 1 =", " 2", " 3")),
        (TEXTS | {"system": "Add."}, ("Add.\n\n1 + 1 =", " 2", " 3")),
        (HH, (HEAD, " The sum is 2.", " The sun is 3.")),
        ({"chosen": f"{HEAD} 2{HEAD} 2", "rejected": f"{HEAD} 2{HEAD} 3"}, (f"{HEAD} 2{HEAD}", " 2", " 3")),
    ],
)
def test_pairs_of_texts(tmp_path: Path, record: Any, expected: tuple[str, str, str]) -> None:
    assert texts(jsonl(tmp_path, record)) == [expected]


@pytest.mark.parametrize(
    "record",
    [
        CHATS,
        CHATS | {"prompt": "1 + 1?"},
        {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": [ASKED], "chosen": "2", "rejected": "3"},
    ],
)
def test_pairs_of_chats(tmp_path: Path, record: Any) -> None:
    (pair,) = pairs(jsonl(tmp_path, record))
    turns = [(ASKED, RIGHT), (ASKED, WRONG)]
    assert pair.answers == tuple(Row(1, "", "", each, only_last=True) for each in turns)
    assert pair.left_out is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (TEXTS | {"rejected": " 2"}, "identical"),
        ({"chosen": CHATS["chosen"], "rejected": CHATS["chosen"]}, "identical"),
        ({"chosen": HH["chosen"], "rejected": HH["chosen"]}, "identical"),
        ({"chosen": f"{HEAD} 2{HEAD} 2", "rejected": f"{HEAD} 3{HEAD} 2"}, "branched"),
        ({"chosen": f"{HEAD} 2{HEAD} 2", "rejected": f"{HEAD} 2"}, "branched"),
        ({"chosen": [ASKED, RIGHT, ASKED, RIGHT], "rejected": [ASKED, WRONG]}, "branched"),
        ({"chosen": [ASKED, RIGHT, ASKED, RIGHT], "rejected": [ASKED, WRONG, ASKED, RIGHT]}, "branched"),
        ({"chosen": HEAD, "rejected": f"{HEAD} 2"}, "no_reply"),
    ],
)
def test_pairs_that_teach_nothing_are_left_out(tmp_path: Path, record: Any, reason: str) -> None:
    assert [pair.left_out for pair in pairs(jsonl(tmp_path, record))] == [reason]


def test_columns_of_another_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"q": "1 + 1", "good": "2", "bad": "3"})
    columns = {"prompt": "Q: {q}\nA:", "chosen": " {good}", "rejected": " {bad}"}
    (pair,) = read_pairs(path, columns)
    assert pair.answers == (Row(1, "Q: 1 + 1\nA:", " 2"), Row(1, "Q: 1 + 1\nA:", " 3"))


def test_judged_answers_have_a_neighbour(tmp_path: Path) -> None:
    prompts = ("a", "b", "c")
    path = jsonl(tmp_path, *({"prompt": p, "completion": f" {p}", "label": i % 2} for i, p in enumerate(prompts)))
    found = list(read_judged(path))
    answers = [[answer.prompt + answer.completion for answer in row.answers] for row in found]
    assert answers == [["a a", "a b"], ["b b", "b a"], ["c c", "c b"]]
    assert [row.desirable for row in found] == [False, True, False]
    chats = jsonl(tmp_path, {"messages": [ASKED, RIGHT], "label": True}, {"messages": [ASKED, WRONG], "label": False})
    assert [row.answers[1].messages for row in read_judged(chats)] == [(ASKED, WRONG), (ASKED, RIGHT)]


def test_the_neighbour_of_a_judged_answer_has_another_prompt(tmp_path: Path) -> None:
    # Pairs taken apart: the row before is the other answer to the same prompt, whose growth is no baseline.
    asked = ("a", "a", "b", "b", "b", "c")
    rows = [{"prompt": p, "completion": f" {i}", "label": i % 2} for i, p in enumerate(asked)]
    found = read_judged(jsonl(tmp_path, *rows))
    assert [row.answers[1].completion for row in found] == [" 2", " 2", " 1", " 1", " 1", " 4"]
    one_prompt = read_judged(jsonl(tmp_path, *rows[2:5]))
    assert [row.answers[1].completion for row in one_prompt] == [" 3", " 2", " 3"]


SYSTEM = {"role": "system", "content": "Add."}


@pytest.mark.parametrize(
    ("read", "record"),
    [
        (read_pairs, {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]}),
        (read_pairs, CHATS | {"prompt": "1 + 1?"}),
        (read_margins, CHATS),
        (read_pairs, {"prompt": [ASKED], "completions": ["2", "3"], "ranks": [1, 2]}),
        (read_judged, {"prompt": [ASKED], "completion": "2", "label": True}),
        (read_judged, {"messages": [ASKED, RIGHT], "label": True}),
    ],
)
def test_a_system_prompt_beside_turns_is_the_first_of_them(tmp_path: Path, read: Any, record: Any) -> None:
    first, *_ = read(jsonl(tmp_path, record | {"system": "Add."}, record))
    assert [answer.messages[:2] for answer in first.answers] == [(SYSTEM, ASKED)] * 2
    assert first.answers[0].messages[2:] == (RIGHT,)


ANSWERS = [" 2", " 3", " 4"]
LIST = {"prompt": "1 + 1 =", "completions": ANSWERS}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (LIST | {"ranks": [1, 2, 3]}, [(" 2", " 3"), (" 2", " 4"), (" 3", " 4")]),
        (LIST | {"ranks": [3, 1, 1]}, [(" 3", " 2"), (" 4", " 2")]),
        (LIST | {"scores": [0.5, -1, 0.25]}, [(" 2", " 3"), (" 2", " 4"), (" 4", " 3")]),
        (
            {"prompt": "1 + 1 =", "completions": [{"completion": " 3", "rank": 1}, {"completion": " 2", "rank": 0}]},
            [(" 2", " 3")],
        ),
    ],
)
def test_lists_make_a_pair_of_each_two_of_unequal_rank(tmp_path: Path, record: Any, expected: Any) -> None:
    assert texts(jsonl(tmp_path, record)) == [("1 + 1 =", *both) for both in expected]


def test_lists_of_chats_and_lists_that_teach_nothing(tmp_path: Path) -> None:
    chats = {"prompt": [ASKED], "completions": [[WRONG], [RIGHT]], "scores": [1, 2]}
    found = pairs(jsonl(tmp_path, chats, chats | {"scores": [2, 2]}))
    assert [pair.left_out for pair in found] == [None, "tied"]
    assert [answer.messages for answer in found[0].answers] == [(ASKED, RIGHT), (ASKED, WRONG)]
    tokens = tokenise(
        jsonl(tmp_path, LIST | {"ranks": [1, 2, 3]}, LIST | {"ranks": [1, 1, 1]}),
        small.tokenizer(),
        Reading(64, rows="pairs"),
        tmp_path / "cache",
    )
    assert (len(tokens), tokens.counts.rows, tokens.counts.examples, tokens.counts.number("tied")) == (6, 2, 3, 1)
    assert tokens.rows.tolist() == [1] * 6


def test_margins_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path, TEXTS | {"margin": 0.5}, TEXTS, LIST | {"chosen": " 2", "rejected": " 3", "margin": 2})
    assert [(pair.margin, pair.unused) for pair in read_margins(path)] == [
        (0.5, ()),
        (0.0, ()),
        (2.0, ("completions",)),
    ]
    first, *_ = read_pairs(path)
    assert (first.margin, first.unused) == (0.0, ("margin",))
    tokens = tokenise(path, small.tokenizer(), Reading(64, rows="margins"), tmp_path / "cache")
    assert tokens.margins.tolist() == [0.5, 0.5, 0.0, 0.0, 2.0, 2.0]
    for wrong in (True, "much", float("inf")):
        bad = jsonl(tmp_path, TEXTS | {"margin": wrong})
        with pytest.raises(RowError, match="row 1, field margin: found .*, allowed: a finite number"):
            list(read_margins(bad))


MALFORMED_PAIRS: list[tuple[Any, str]] = [
    ({"prompt": "a", "chosen": "b"}, "field rejected: found nothing, allowed: text"),
    ({"prompt": "a", "rejected": "b"}, "field chosen: found nothing, allowed: text"),
    ({"chosen": "b", "rejected": "c"}, "field prompt: found nothing, allowed: text"),
    (TEXTS | {"prompt": 5}, "field prompt: found 5 (int), allowed: text"),
    (TEXTS | {"chosen": ""}, "field chosen: found empty text, allowed: text that is not empty"),
    (TEXTS | {"rejected": " \n"}, "field rejected: found empty text, allowed: text that is not empty"),
    (TEXTS | {"rejected": None}, "field rejected: found nothing, allowed: text"),
    (TEXTS | {"chosen": 2.5}, "field chosen: found 2.5 (float), allowed: text"),
    (TEXTS | {"chosen": {"a": 1}}, "field chosen: found {'a': 1} (dict), allowed: text"),
    (TEXTS | {"chosen": "\ud800"}, "field chosen: found half of a surrogate pair, allowed: text that can be written"),
    (TEXTS | {"label": True}, "field label: found True (bool), allowed: nothing there"),
    (TEXTS | {"tools": [1]}, "field tools: found [1] (list), allowed: nothing there"),
    ([1, 2], "found [1, 2] (list), allowed: an object with named fields"),
    ("text", "found 'text' (str), allowed: an object with named fields"),
    (TEXTS | {"chosen": []}, "field chosen: found [] (list), allowed: a list of {role, content}"),
    (TEXTS | {"chosen": ["hi"]}, "field chosen[0]: found 'hi' (str), allowed: an object {role, content}"),
    (CHATS | {"prompt": "2 + 2?"}, "field prompt: found '2 + 2?' (str), allowed: what the user asks first"),
    (
        {"prompt": [ASKED], "chosen": [ASKED], "rejected": [WRONG]},
        "field chosen: found a last turn of the role user, allowed: a last turn of the assistant",
    ),
    (
        {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [{"role": "bot", "content": "2"}]},
        "field rejected[0].role: found 'bot' (str), allowed: system, user, assistant",
    ),
    (
        {"prompt": [ASKED], "chosen": [{"role": "assistant", "content": ""}], "rejected": [WRONG]},
        "field chosen[0].content: found empty text, allowed: text that is not empty",
    ),
    ({"prompt": [], "chosen": [RIGHT], "rejected": [WRONG]}, "field prompt: found [] (list), allowed: a list of"),
    (
        {"prompt": [RIGHT], "chosen": [RIGHT], "rejected": [WRONG]},
        "field chosen[0].role: found 'assistant' (str), allowed: system, user: somebody asks first",
    ),
]
MALFORMED_BESIDE_TURNS: list[tuple[Any, str]] = [
    (
        {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG], "context": "Sums."},
        "field context: found 'Sums.' (str), allowed: nothing beside a prompt of turns",
    ),
    (
        {"prompt": [SYSTEM, ASKED], "chosen": [RIGHT], "rejected": [WRONG], "system": "Add."},
        "field system: found 'Add.' (str), allowed: nothing beside a system turn",
    ),
]
MALFORMED_TRANSCRIPTS: list[tuple[Any, str]] = [
    (
        {"chosen": "The sum is 2.", "rejected": "The sun is 3."},
        "field chosen: found 'The sum is 2.' (str), allowed: a transcript that begins with '\\n\\nHuman:'",
    ),
    (HH | {"rejected": f"Rules.{HEAD} 3"}, "field rejected: found 'Rules."),
    (
        HH | {"chosen": f"{HEAD} 2\n\nHuman: why?"},
        "field chosen: found a last turn of the human, allowed: a transcript",
    ),
    (HH | {"system": "Add."}, "field system: found 'Add.' (str), allowed: nothing beside a transcript"),
    (HH | {"chosen": 5}, "field chosen: found 5 (int), allowed: text"),
]
MALFORMED_JUDGED: list[tuple[Any, str]] = [
    (JUDGED | {"label": None}, "field label: found nothing, allowed: true, false"),
    (JUDGED | {"label": "yes"}, "field label: found 'yes' (str), allowed: true, false"),
    (JUDGED | {"label": 2}, "field label: found 2 (int), allowed: true, false"),
    (JUDGED | {"label": 0.5}, "field label: found 0.5 (float), allowed: true, false"),
    (JUDGED | {"completion": ""}, "field completion: found empty text, allowed: text that is not empty"),
    (JUDGED | {"chosen": "2"}, "field chosen: found '2' (str), allowed: nothing there"),
]


MALFORMED_LISTS: list[tuple[Any, str]] = [
    (LIST | {"ranks": [1, 2]}, "field ranks: found 2 of them, allowed: 3, one for each of the completions"),
    (LIST | {"ranks": [1, 2, "3"]}, "field ranks[2]: found '3' (str), allowed: a finite number"),
    (LIST | {"ranks": 5}, "field ranks: found 5 (int), allowed: a list of two or more"),
    (LIST | {"ranks": [1, 2, 2], "completions": "2"}, "field completions: found '2' (str), allowed: a list of two"),
    (
        LIST | {"ranks": [1, 2, 2], "completions": [" 2", 3, " 4"]},
        "field completions[1]: found 3 (int), allowed: text",
    ),
    (
        LIST | {"ranks": [1, 2, 2], "completions": [" 2", "", " 4"]},
        "field completions[1]: found empty text, allowed:",
    ),
]
ENTRIES = {"prompt": "1 + 1 =", "completions": [{"completion": " 2", "rank": 1}, {"completion": " 3", "rank": 2}]}
MALFORMED_ENTRIES: list[tuple[Any, str]] = [
    (
        ENTRIES | {"completions": [" 2", " 3"]},
        "field completions[0]: found ' 2' (str), allowed: an object {completion",
    ),
    (
        ENTRIES | {"completions": [{"completion": " 2", "rank": 1}, {"completion": " 3"}]},
        "field completions[1]: found {'completion': ' 3'} (dict), allowed: an object {completion",
    ),
    (
        ENTRIES | {"completions": [{"completion": " 2", "score": None}, {"completion": " 3", "score": 1}]},
        "field completions[0].score: found nothing, allowed: a finite number",
    ),
    (
        ENTRIES | {"completions": [{"completion": " 2", "rank": 1}, {"completion": " 3", "score": 2}]},
        "field completions[1]: found {'completion': ' 3', 'score': 2} (dict), allowed: a rank, as the first of",
    ),
]


MALFORMED: list[tuple[str, Any, Any, str]] = [
    *(("dpo", TEXTS, *case) for case in MALFORMED_PAIRS),
    *(("dpo", TEXTS, *case) for case in MALFORMED_BESIDE_TURNS),
    *(("dpo", HH, *case) for case in MALFORMED_TRANSCRIPTS),
    *(("kto", JUDGED, *case) for case in MALFORMED_JUDGED),
    *(("reward", LIST | {"ranks": [1, 2, 3]}, *case) for case in MALFORMED_LISTS),
    *(("dpo", ENTRIES, *case) for case in MALFORMED_ENTRIES),
]


@pytest.mark.parametrize(("objective", "good", "bad", "message"), MALFORMED)
def test_a_malformed_row_is_named_in_one_line(
    tmp_path: Path, objective: str, good: Any, bad: Any, message: str
) -> None:
    path = jsonl(tmp_path, good, bad)
    with pytest.raises(RowError) as error:
        list((read_judged if objective == "kto" else read_pairs)(path))
    assert str(error.value).startswith((f"{path}, row 2, {message}", f"{path}, row 2: {message}"))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([TEXTS], "row 1: found the fields prompt, chosen, rejected, allowed: prompt/completion/label (and system"),
        ([JUDGED], "found one row, allowed: two or more"),
        ([JUDGED, JUDGED], "found label true in every row, allowed: both true and false"),
    ],
)
def test_answers_that_cannot_be_judged(tmp_path: Path, records: list[Any], message: str) -> None:
    path = jsonl(tmp_path, *records)
    with pytest.raises(RowError, match=message.replace("(", r"\(")):
        tokenise(path, small.tokenizer(), Reading(64, rows="judged"), tmp_path / "cache")


def made(folder: Path, *records: Any, seq_len: int = 64, rows: Any = "pairs", **options: Any) -> Tokens:
    reading = Reading(seq_len, rows=rows, **options)
    return tokenise(jsonl(folder, *records), small.tokenizer(), reading, folder / "cache")


def test_a_long_prompt_loses_its_beginning_in_both_answers_and_no_answer_is_cut(tmp_path: Path) -> None:
    digits = {"prompt": "1234567890" * 3 + "=", "chosen": " 42", "rejected": " 4321"}
    whole = made(tmp_path, digits)
    (chosen, rejected) = (whole.document(i) for i in (0, 1))
    cut = made(tmp_path, digits, seq_len=20, too_long="cut")
    lost = len(rejected.ids) - 20
    assert cut.truncated == 1 and lost > 0
    for index, document in enumerate((chosen, rejected)):
        kept = cut.document(index)
        assert kept.ids[0] == document.ids[0]  # BOS
        assert np.array_equal(kept.ids[1:], document.ids[1 + lost :])
        assert kept.target.sum() == document.target.sum()
    assert made(tmp_path, digits, TEXTS, seq_len=20, too_long="drop").dropped == 1
    long = {"prompt": "=", "chosen": " 2", "rejected": " 12345678901234567890"}
    short = made(tmp_path, long, TEXTS, seq_len=16, too_long="cut")
    assert (len(short), short.dropped) == (2, 1)


def test_duplicates_are_pairs(tmp_path: Path) -> None:
    tokens = made(tmp_path, TEXTS, TEXTS, TEXTS | {"rejected": " 4"}, TEXTS | {"rejected": " 2"})
    assert len(tokens) == 6 and tokens.duplicates(2, 2) == 1
    assert tokens.counts.number("identical") == 1 and tokens.counts.noticed["identical"] == (1, 4)


def test_where_no_pair_teaches_anything_the_reasons_are_said(tmp_path: Path) -> None:
    identical = TEXTS | {"rejected": " 2"}
    with pytest.raises(RowError, match="no pair has anything to learn: 2 have two answers that are the same"):
        made(tmp_path, identical, identical)


def test_only_the_last_turn_of_a_chat_is_learned(tmp_path: Path) -> None:
    tokenizer = small.tokenizer(chat=small.CHAT)
    before = [ASKED, RIGHT, ASKED]
    path = jsonl(tmp_path, {"chosen": [*before, RIGHT], "rejected": [*before, WRONG]})
    tokens = tokenise(path, tokenizer, Reading(256, rows="pairs"), tmp_path / "cache")
    learned = [tokenizer.decode(tokens.document(i).ids[tokens.document(i).target]) for i in (0, 1)]
    assert learned == ["2</s>", "3</s>"]


def test_the_pairs_of_hh_rlhf_are_cut_at_their_last_reply() -> None:
    path = ROOT.parent / "shared" / "data" / "hh_harmless_test.jsonl.gz"
    if not path.exists():
        pytest.skip("the test file of HH-RLHF is not beside this checkout")
    with gzip.open(path, "rt") as stream:
        records = [json.loads(line) for line in stream]
    found = pairs(path)
    assert Counter(pair.left_out for pair in found) == {None: 2303, "branched": 5, "no_reply": 4}
    for record, pair in zip(records, found, strict=True):
        for side, answer in zip(("chosen", "rejected"), pair.answers, strict=True):
            assert answer.prompt + answer.completion == record[side]
            assert answer.prompt.endswith("\n\nAssistant:") and "\n\nAssistant:" not in answer.completion


@pytest.mark.parametrize("cases", sampled(MALFORMED))
def test_the_command_line_says_it_in_one_line_and_exits_with_2(
    cases: list[Any],
    tmp_path: Path,
    tiny_base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capsys.readouterr()
    for objective, good, bad, message in cases:
        path = jsonl(tmp_path, good, bad)
        job = {
            "base": str(tiny_base),
            "objective": objective,
            "data": {"train": str(path), "seq_len": 64},
            "train": {"steps": 1, "batch_tokens": 64},
        }
        (tmp_path / "job.yaml").write_text(json.dumps(job))
        monkeypatch.setattr(sys, "argv", ["fleetune", "plan", str(tmp_path / "job.yaml")])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr().err.strip()
        assert left.value.code == 2
        assert f"{path}, row 2" in said and message in said
        assert len(said.splitlines()) == 1
