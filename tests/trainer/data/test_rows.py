"""Reading rows: every file type and shape, and one clear line for everything that is wrong."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.data.files import RowError, digest
from trainer.data.rows import Row, columns_used, read_rows

DATA = Path(__file__).parents[2] / "data"
GOOD = {"question": "1 + 1?", "answer": "2"}
CHAT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def jsonl(folder: Path, *records: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def check(source: Any) -> int:
    """Read all rows and count them."""
    return sum(1 for _ in read_rows(source))


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"prompt": "{a}", "completion": " b"}, "{a}", " b"),
        ({"prompt": "", "completion": "b"}, "", "b"),
        (GOOD, "Question: 1 + 1?\nAnswer:", " 2"),
        ({"instruction": "Add", "input": "1, 1", "output": "2"}, "Instruction: Add\nInput: 1, 1\nResponse:", " 2"),
        ({"instruction": "Add", "input": "", "output": "2"}, "Instruction: Add\nResponse:", " 2"),
        ({"instruction": "Add", "output": "2"}, "Instruction: Add\nResponse:", " 2"),
        ({"text": "Once", "id": 7}, "", "Once"),
    ],
)
def test_shapes(tmp_path: Path, record: dict[str, Any], prompt: str, completion: str) -> None:
    assert list(read_rows(jsonl(tmp_path, record))) == [Row(1, prompt, completion)]


def test_messages(tmp_path: Path) -> None:
    spare = [{**turn, "name": None} for turn in CHAT]  # as a union of schemas leaves them
    assert list(read_rows(jsonl(tmp_path, {"messages": spare}))) == [Row(1, "", "", tuple(CHAT))]


def test_every_file_type_gives_the_same_rows(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = DATA / "questions.jsonl"
    records = [json.loads(line) for line in source.read_text().splitlines()]
    (tmp_path / "a.json").write_text(json.dumps(records))
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"])
        writer.writeheader()
        writer.writerows(records)
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    for name in ("a.json", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    expected = list(read_rows(source))
    assert [row.number for row in expected] == [1, 2, 3]
    for path in tmp_path.iterdir():
        assert list(read_rows(path)) == expected, path.name


def test_row_numbers_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n")
    assert [row.number for row in read_rows(path)] == [1, 3]
    assert check(path) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "?"}, "row 2, field answer: found nothing, allowed: text"),
        ({"question": 5, "answer": "2"}, "row 2, field question: found 5 (int), allowed: text"),
        ({"question": "?", "answer": None}, "row 2, field answer: found nothing, allowed: text"),
        (
            {"question": "?", "answer": " \n"},
            "row 2, field answer: found empty text, allowed: text that is not empty",
        ),
        (
            {"question": "?", "answer": "\ud800"},
            "row 2, field answer: found half of a surrogate pair, allowed: text that can be written as UTF-8",
        ),
        ([1, 2], "row 2: found [1, 2] (list), allowed: an object with named fields"),
    ],
)
def test_bad_second_row(tmp_path: Path, bad: Any, message: str) -> None:
    path = jsonl(tmp_path, GOOD, bad)
    with pytest.raises(RowError) as error:
        check(path)
    assert str(error.value) == f"{path}, {message}"


def test_bad_optional_field(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"instruction": "Add", "input": 0, "output": "2"})
    with pytest.raises(RowError, match=r"row 1, field input: found 0 \(int\), allowed: text"):
        check(path)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages: found nothing, allowed: a list of {role, content}"),
        ([], "messages: found [] (list), allowed: a list of {role, content}"),
        (["hi"], "messages[0]: found 'hi' (str), allowed: an object {role, content}"),
        ([CHAT[0], {"role": "bot", "content": "2"}], "[1].role: found 'bot' (str), allowed: system, user, assistant"),
        (
            [CHAT[0], {"role": ["a"], "content": "2"}],
            "[1].role: found ['a'] (list), allowed: system, user, assistant",
        ),
        ([{"role": "user"}, CHAT[1]], "messages[0].content: found nothing, allowed: text"),
        ([CHAT[0], {**CHAT[1], "content": ""}], "[1].content: found empty text, allowed: text that is not empty"),
        (
            [CHAT[0], {**CHAT[1], "tool_calls": []}],
            "messages[1]: found the fields tool_calls, allowed: role, content",
        ),
        ([CHAT[0]], "messages: found no assistant turn, allowed: at least one, as it is what is learned"),
        ([CHAT[1]], "messages[0].role: found 'assistant' (str), allowed: system, user: somebody asks first"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: Any, message: str) -> None:
    path = jsonl(tmp_path, {"messages": messages})
    with pytest.raises(RowError) as error:
        check(path)
    assert str(error.value).startswith(f"{path}, row 1, field messages")
    assert str(error.value).endswith(message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", ": found no rows, allowed: at least one"),
        ("a.csv", b"text\n", ": found no rows, allowed: at least one"),
        ("a.json", b"[]", ": found no rows, allowed: at least one"),
        ("a.json", b"{}", ": found {} (dict), allowed: a list of objects"),
        (
            "a.json",
            b"[",
            ": found invalid JSON (Expecting value at column 2), allowed: a list of objects",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": \n',
            ", row 2: found invalid JSON (Expecting value at column 9), allowed: one JSON object per line",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ", line 2: found the byte 0xe9, allowed: text in UTF-8"),
        (
            "a.csv",
            b"text\na\nb,c\n",
            ", row 2: found more cells than the header has, allowed: one cell for each column",
        ),
        ("a.csv", b"question,answer\na\n", ", row 1, field answer: found nothing, allowed: text"),
        (
            "a.csv",
            b'text\n"a" b\n',
            ", row 1: found broken CSV (',' expected after '\"'), allowed: comma-separated cells under a header",
        ),
        (
            "a.jsonl",
            b'{"chosen": "a", "rejected": "b"}',
            ", row 1: found the fields chosen, rejected, allowed: messages (and system) | "
            "conversations (and system) | prompt/completion (and system, context) | "
            "question/answer (and context, system, history) | "
            "instruction/output (and input, context, system, history) | "
            "instruction/response (and input, context, system, history) | text; or say data.columns",
        ),
        (
            "a.txt",
            b"hello",
            ": found the file type .txt, allowed: .jsonl, .json, .csv, .parquet, .jsonl.gz, .json.gz, .csv.gz",
        ),
        ("a.jsonl.gz", b"hello", ": cannot be read: Not a gzipped file (b'he')"),
        ("a.jsonl.gz", gzip.compress(b"much text" * 99, mtime=0)[:-9], ": cannot be read: Compressed file ended"),
        ("a.parquet", b"hello, I am no parquet", ": cannot be read: Parquet magic bytes not found"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RowError) as error:
        check(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [check, digest])
def test_no_such_file(tmp_path: Path, read: Any) -> None:
    for path in (tmp_path / "none.jsonl", f"{DATA.parent.name}/none.jsonl", "none"):
        with pytest.raises(RowError, match=r"(?i)no such file"):
            read(path)


def test_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(RowError, match="Is a directory"):
        check(tmp_path / "a.jsonl")


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        if name == "owner/none":
            raise FileNotFoundError("Dataset 'owner/none' doesn't exist on the Hub")
        return datasets.Dataset.from_list([GOOD, GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [check(name) for name in ("owner/a", "owner/a:main", "owner/a:main:test[:5]", "owner/a::test")] == [2] * 4
    assert asked == [
        ("owner/a", None, "train"),
        ("owner/a", "main", "train"),
        ("owner/a", "main", "test[:5]"),
        ("owner/a", None, "test"),
    ]
    assert digest("owner/a") == digest("owner/a") != digest(DATA / "questions.jsonl")
    with pytest.raises(RowError, match=r"owner/none: no such file, and as a hub dataset: .*doesn't exist on the Hub"):
        check("owner/none")


def test_digest_follows_the_content(tmp_path: Path) -> None:
    before = digest(jsonl(tmp_path, GOOD))
    assert digest(jsonl(tmp_path, GOOD)) == before
    assert digest(jsonl(tmp_path, GOOD, GOOD)) != before


def test_needs_the_standard_library_only() -> None:
    heavy = "{'torch', 'numpy', 'pyarrow', 'datasets', 'transformers', 'pydantic'}"
    read = f"len(list(r.read_rows({str(DATA / 'chat.jsonl')!r})))"
    code = f"import sys, trainer.data.rows as r; print({read}, {heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "2 set()\n"


def test_gsm8k_is_checked(gsm8k: Path) -> None:
    assert check(gsm8k) == 7473


ASKED = {"question": "How many?", "answer": "2"}
TOLD = {"instruction": "Add", "input": "1, 1", "output": "2"}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({**ASKED, "context": "CREATE TABLE a"}, "Context: CREATE TABLE a\nQuestion: How many?\nAnswer:"),
        ({**ASKED, "system": "Be brief."}, "Be brief.\n\nQuestion: How many?\nAnswer:"),
        (
            {**TOLD, "system": "Be brief.", "history": [["Add 0, 1", "1"], ["Why?", "So."]]},
            "Be brief.\n\nInstruction: Add 0, 1\nResponse: 1\n\nInstruction: Why?\nResponse: So.\n\n"
            "Instruction: Add\nInput: 1, 1\nResponse:",
        ),
        ({**TOLD, "system": None, "history": []}, "Instruction: Add\nInput: 1, 1\nResponse:"),
        ({"prompt": "1 + 1 =", "completion": " 2", "context": "Sums.", "system": ""}, "Sums.\n\n1 + 1 ="),
        (
            {"instruction": "Add", "context": "1, 1", "response": "2", "category": "sums"},
            "Instruction: Add\nContext: 1, 1\nResponse:",
        ),
    ],
)
def test_companions_enter_the_prompt(tmp_path: Path, record: dict[str, Any], prompt: str) -> None:
    (row,) = read_rows(jsonl(tmp_path, record))
    assert (row.prompt, row.completion.strip()) == (prompt, "2")
    assert row.unused == tuple(name for name in record if name == "category")


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("before", "field history: found 'before' (str), allowed: a list of pairs [question, answer]"),
        ([["a"]], "field history[0]: found ['a'] (list), allowed: a list of pairs [question, answer]"),
        ([["a", "b"], ["a", 1]], "field history[1]: found 1 (int), allowed: text"),
    ],
)
def test_bad_history(tmp_path: Path, history: Any, message: str) -> None:
    path = jsonl(tmp_path, {**TOLD, "history": history})
    with pytest.raises(RowError) as error:
        check(path)
    assert str(error.value) == f"{path}, row 1, {message}"


def test_columns_that_nobody_reads_are_named(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"id": None, "note": "", "tags": [], "score": float("nan")}
    path = jsonl(tmp_path, {**GOOD, **empty}, {**GOOD, "id": 0, "note": "x", "tags": ["y"], "score": 0.5})
    assert [row.unused for row in read_rows(path)] == [(), ("id", "note", "tags", "score")]


@pytest.mark.parametrize(
    ("column", "value"),
    [("tools", [{"name": "f"}]), ("label", False), ("images", ["a.png"]), ("rejected", "no"), ("functions", "f()")],
)
def test_columns_that_would_change_the_meaning_are_refused(tmp_path: Path, column: str, value: Any) -> None:
    path = jsonl(tmp_path, GOOD, {**GOOD, column: value})
    with pytest.raises(RowError) as error:
        check(path)
    assert str(error.value).startswith(f"{path}, row 2, field {column}: found ")
    assert "data.columns" in str(error.value)
    mapped = list(read_rows(path, {"question": "question", "answer": "answer"}))  # who maps has decided
    assert mapped[1].unused == (column,)
    assert check(jsonl(tmp_path, {**GOOD, column: None})) == 1


TABLE = {"query": "How many?", "sql": "SELECT 1", "schema": {"a": 1}, "n": 3, "empty": None}


@pytest.mark.parametrize(
    ("columns", "prompt", "completion"),
    [
        ({"prompt": "query", "completion": "sql"}, "How many?", "SELECT 1"),
        ({"prompt": "{n}: {query}{empty}\n{{x}}", "completion": " {sql}"}, "3: How many?\n{x}", " SELECT 1"),
        ({"question": "query", "answer": "sql"}, "Question: How many?\nAnswer:", " SELECT 1"),
        (
            {"question": "query", "answer": "sql", "context": "n={n}"},
            "Context: n=3\nQuestion: How many?\nAnswer:",
            " SELECT 1",
        ),
        ({"text": "{query} {sql}"}, "", "How many? SELECT 1"),
    ],
)
def test_any_table_can_be_mapped(tmp_path: Path, columns: dict[str, str], prompt: str, completion: str) -> None:
    (row,) = read_rows(jsonl(tmp_path, TABLE), columns)
    assert (row.prompt, row.completion) == (prompt, completion)
    read = set(columns_used(columns))
    assert row.unused == tuple(name for name, value in TABLE.items() if value is not None and name not in read)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "quarry", "completion": "sql"},
            "data.columns: found no column 'quarry', allowed: 'query', 'sql'",
        ),
        ({"prompt": "{query} {schema}", "completion": "sql"}, "field schema: found {'a': 1} (dict), allowed: text"),
        ({"prompt": "query", "completion": "n"}, "field completion: found 3 (int), allowed: text"),
        ({"prompt": "query", "completion": "sql", "extra": "n"}, "found the fields prompt, completion, extra"),
        ({"prompt": "query"}, "found the fields prompt, allowed: messages"),
    ],
)
def test_a_mapping_that_does_not_fit(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(RowError) as error:
        list(read_rows(jsonl(tmp_path, TABLE), columns))
    assert message in str(error.value)


def test_sharegpt(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    (row,) = read_rows(jsonl(tmp_path, {"id": "a", "system": "Be brief.", "conversations": turns}))
    assert row.messages == ({"role": "system", "content": "Be brief."}, *CHAT)
    assert row.unused == ("id",)
    path = jsonl(tmp_path, {"conversations": [turns[0], {"from": "observation", "value": "2"}]})
    with pytest.raises(
        RowError, match=r"conversations\[1\]\.from: found 'observation' \(str\), allowed: system, human"
    ):
        check(path)
    path = jsonl(tmp_path, {"system": "a", "messages": [{"role": "system", "content": "b"}, *CHAT]})
    with pytest.raises(RowError, match="field system: found 'a' .* allowed: nothing beside a system turn"):
        check(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 100_000, "found JSON that is nested too deeply"),
        ("1" * 5000, "found a number of more than 4300 digits"),
    ],
)
def test_json_that_python_cannot_take(tmp_path: Path, name: str, value: str, message: str) -> None:
    path = tmp_path / name
    line = f'{{"text": "a", "x": {value}'
    path.write_text(f'{{"text": "a"}}\n{line}}}\n' if name == "a.jsonl" else f"[{line}}}]")
    with pytest.raises(RowError) as error:
        check(path)
    where = f"{path}, row 2" if name == "a.jsonl" else str(path)
    assert str(error.value).startswith(f"{where}: {message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a", "text": "b"}', ", row 1: found the field 'text' twice, allowed: each field once"),
        ("a.csv", b"text,text\na,b\n", ": found the column 'text' twice, allowed: each column once"),
    ],
)
def test_a_name_twice(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RowError) as error:
        check(path)
    assert str(error.value) == f"{path}{message}"


def test_a_parquet_value_that_python_cannot_take(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a"], "when": pa.array([2**62], pa.timestamp("us"))}), path)
    with pytest.raises(RowError, match=r"a\.parquet: cannot be read: "):
        check(path)


def test_an_answer_must_be_there_also_in_a_mapping(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"q": "x", "a": "y"}, {"q": None, "a": "y"}, {"q": "x", "a": None})
    with pytest.raises(RowError, match="row 3, field a: found nothing, allowed: text, as it makes the answer"):
        list(read_rows(path, {"prompt": "Q {q}", "completion": " A: {a}"}))
