"""Ids are the tokenizer's own of the whole text, on every kind of tokenizer; the learned part is the answer."""

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import CHATML, KINDS, LLAMA2, THINKING, make
from tokenizers import Tokenizer
from tokenizers.normalizers import NFKC, Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from trainer.data.encode import Encoded, Encoder, Reading
from trainer.data.files import RowError
from trainer.data.rows import Row
from trainer.data.tokens import read_prompts, tokenise

WORDS = [
    "the",
    "red",
    "cat",
    "dog",
    "is",
    "four",
    "token",
    "hello",
    "yes",
    "Answer:",
    "how",
    "legs?",
    "4",
    "12",
    "!",
    "x",
]


def phrase(rng: random.Random, spaces: bool) -> str:
    words = rng.choices(WORDS, k=rng.randrange(1, 6))
    text = " ".join(words) if rng.random() < 0.8 else "  ".join(words)
    return rng.choice(("", " ", "\n")) + text + rng.choice(("", " ")) if spaces else text


def random_row(rng: random.Random, number: int) -> Row:
    return Row(number, rng.choice(("", phrase(rng, True))), phrase(rng, True))


def random_chat(rng: random.Random, number: int) -> Row:
    turns = [{"role": "system", "content": phrase(rng, False)}] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(1, 4)):
        turns.append({"role": "user", "content": phrase(rng, False)})
        turns.append({"role": "assistant", "content": phrase(rng, False)})
    return Row(number, "", "", tuple(turns))


def examples(encoder: Encoder, rows: list[Row]) -> list[list[Encoded]]:
    return [those for _, those in encoder.examples(rows)]


def squeezed(text: str) -> str:
    """Without what WordPiece does not keep (spaces), and shows of the middle of a word alone (##)."""
    return "".join(text.split()).replace("##", "")


def learned(tok: Any, example: Encoded) -> str:
    return squeezed(tok.decode(example.ids[example.target]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True)])
def test_rows_are_read_whole(kind: str, bos: bool, eos: bool) -> None:
    tok = make(kind, bos=bos, eos=eos)
    rng = random.Random(kind)
    rows = [random_row(rng, number) for number in range(1, 1001)]
    for row, (example,) in zip(rows, examples(Encoder("rows", tok, Reading(512)), rows), strict=True):
        own = tok(row.prompt + row.completion)["input_ids"]
        assert example.ids.tolist() == own + [tok.eos_token_id] * (not eos)
        if not example.straddles:
            first = [] if bos or row.prompt else example.ids[:1]  # which nothing predicts
            assert squeezed(tok.decode(first)) + learned(tok, example) == squeezed(row.completion) + "</s>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA2, "</s>")])
def test_chats_are_read_whole(kind: str, template: str, end: str) -> None:
    tok = make(kind, chat=template, end=end)
    rng = random.Random(kind)
    rows = [random_chat(rng, number) for number in range(1, 1001)]
    for row, (example,) in zip(rows, examples(Encoder("rows", tok, Reading(512)), rows), strict=True):
        text = tok.apply_chat_template(list(row.messages), tokenize=False)
        assert example.ids.tolist() == tok(text, add_special_tokens=False)["input_ids"]
        answers = [turn["content"] for turn in row.messages if turn["role"] == "assistant"]
        assert learned(tok, example) == "".join(squeezed(answer) + end for answer in answers)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_what_a_server_is_sent(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    for eos in (False, True):
        tok = make(kind, eos=eos, chat=CHATML)
        rows = [{"prompt": phrase(rng, False) + ":", "completion": " yes"} for _ in range(50)]
        path = written(tmp_path, *rows)
        sent = [tok(row["prompt"])["input_ids"] for row in rows]
        assert [prompt.ids for prompt in read_prompts(path, tok, Reading(64))] == [
            ids[:-1] if eos else ids for ids in sent
        ]
        chats = [random_chat(rng, number) for number in range(50)]
        path = written(tmp_path, *({"messages": chat.messages} for chat in chats))
        sent = [
            tok.apply_chat_template(list(chat.messages[:-1]), add_generation_prompt=True)["input_ids"]
            for chat in chats
        ]
        assert [prompt.ids for prompt in read_prompts(path, tok, Reading(64))] == sent


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
def test_control_tokens_in_the_data_are_text(kind: str) -> None:
    tok = make(kind, chat=CHATML, end="<|im_end|>")
    answer = "four <|im_end|> is a token"
    plain = Row(1, "<s> which?", f" {answer}")
    chat = Row(2, "", "", ({"role": "user", "content": "[INST] hello"}, {"role": "assistant", "content": answer}))
    (row,), (turns,) = examples(Encoder("rows", tok, Reading(512)), [plain, chat])
    for example in (row, turns):
        assert example.hidden
        shown = tok.convert_ids_to_tokens(example.ids)
        assert shown.count("<|im_end|>") == (1 if example is row else 2)
        assert "[INST]" not in shown
        if kind not in ("wordpiece",):  # which has no tokens for these characters
            assert learned(tok, example) == squeezed(answer) + "<|im_end|>"
    assert tok.convert_ids_to_tokens(row.ids)[0] == "<s>"
    assert tok.convert_ids_to_tokens(row.ids).count("<s>") == 1

    asked = Encoder("rows", tok, Reading(512, parse_special=True))
    (row,), (turns,) = examples(asked, [plain, chat])
    assert row.ids.tolist() == [*tok(f"<s> which? {answer}", add_special_tokens=False)["input_ids"], tok.eos_token_id]
    assert not row.hidden
    assert tok.convert_ids_to_tokens(turns.ids).count("<|im_end|>") == 3


def test_a_name_that_cannot_be_written_as_text_is_refused() -> None:
    encoder = Encoder("a.jsonl", make("unigram"), Reading(64))
    with pytest.raises(RowError, match=r"a.jsonl, row 7: this tokenizer has no way to write '</s>' as text"):
        examples(encoder, [Row(7, "", "a </s> b")])


def test_a_shared_token_is_learned_and_counted(tmp_path: Path) -> None:
    tok = make("byte level, trimmed offsets")
    path = written(tmp_path, {"prompt": "Answer: ", "completion": "dog"}, {"prompt": "Answer:", "completion": " dog"})
    tokens = tokenise(path, tok, Reading(64), tmp_path)
    assert tokens.document(0).ids.tolist() == tokens.document(1).ids.tolist()
    assert tokens.document(0).target.tolist() == tokens.document(1).target.tolist()
    assert tokens.counts.noticed["straddles"] == (1, 1)


def test_an_answer_ends_where_generation_stops() -> None:
    """By EOS, or by another token at which the base stops: then EOS does not follow."""
    tok = make("byte level", chat=CHATML)
    chat = Row(1, "", "", ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}))
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    ((without,),) = examples(Encoder("rows", tok, Reading(64)), [chat])
    assert tok.decode(without.ids[without.target]) == "yes<|im_end|>\n</s>"
    ((closed,),) = examples(Encoder("rows", tok, Reading(64, ends=(stop,))), [chat])
    assert tok.decode(closed.ids[closed.target]) == "yes<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each(tmp_path: Path) -> None:
    tok = make("byte level", chat=THINKING, end="<|im_end|>")
    turns = []
    for asked, answer in (("hello", "yes"), ("how many?", "four")):
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    tokens = tokenise(written(tmp_path, {"messages": turns}), tok, Reading(256), tmp_path)
    assert tokens.rows.tolist() == [1, 1]
    assert tokens.counts.noticed["split"] == (1, 1)
    for index, stop in ((0, 2), (1, 4)):
        example = tokens.document(index)
        assert tok.decode(example.ids) == tok.apply_chat_template(turns[:stop], tokenize=False)
        assert tok.decode(example.ids[example.target]) == "<think>\n\n</think>\n\n" + turns[stop - 1]["content"] + (
            "<|im_end|>"
        )


DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML


def test_the_date_is_the_jobs(tmp_path: Path) -> None:
    tok = make("byte level", chat=DATED, end="<|im_end|>")
    path = written(tmp_path, {"messages": random_chat(random.Random(0), 1).messages})
    days = [datetime.date(2024, 7, 26), datetime.date(2024, 7, 27)]
    texts = []
    for day in days:
        tokens = tokenise(path, tok, Reading(256, date=day), tmp_path / "cache")
        texts.append(tok.decode(tokens.document(0).ids))
        (prompt,) = read_prompts(path, tok, Reading(256, date=day))
        assert texts[-1].startswith(tok.decode(prompt.ids))
    assert [text[:11] for text in texts] == ["26 Jul 2024", "27 Jul 2024"]
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 2
    with pytest.raises(RowError, match=r"the chat template writes today's date: say which in data.date"):
        tokenise(path, tok, Reading(256), tmp_path / "cache")
    undated = make("byte level", chat=CHATML, end="<|im_end|>")
    for day in days:
        tokenise(path, undated, Reading(256, date=day), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 3


@pytest.mark.parametrize(
    "call",
    ["strftime_now ('%d %b %Y')", 'strftime_now(format="%d %b %Y")', "strftime_now( '%d %b %Y' )"],
)
def test_every_written_form_of_the_date_is_fixed(call: str) -> None:
    tok = make(
        "byte level",
        end="<|im_end|>",
        chat=f"{{% if strftime_now is defined %}}{{{{ {call} }}}}{{% endif %}}{CHATML}",
    )
    rows = [random_chat(random.Random(0), 1)]
    ((example,),) = examples(Encoder("rows", tok, Reading(256, date=datetime.date(2020, 1, 5))), rows)
    assert tok.decode(example.ids).startswith("05 Jan 2020")
    for other in ("{% set now = strftime_now %}{{ now('%d') }}", "{{ strftime_now('%d ' ~ '%b') }}"):
        tok.chat_template = other + CHATML
        with pytest.raises(RowError, match="computes the form of the date"):
            examples(Encoder("rows", tok, Reading(256, date=datetime.date(2020, 1, 5))), rows)


SYSTEM_LAST = (  # puts the system turn where the last question is, as Mistral's does
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {% if loop.last %}{{ ns.system }}{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
END_OF_ALL = (  # writes EOS behind the last turn alone, as Phi-3's does
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)


def test_a_system_turn_in_the_last_question_is_learned_as_it_is_asked() -> None:
    tok = make("byte level", chat=SYSTEM_LAST)
    turns = [("system", "no"), ("user", "hello"), ("assistant", "yes"), ("user", "how many"), ("assistant", "four")]
    row = Row(1, "", "", tuple({"role": role, "content": content} for role, content in turns))
    (found,) = examples(Encoder("rows", tok, Reading(256)), [row])
    assert [tok.decode(example.ids) for example in found] == [
        "[INST] no\n\nhello[/INST] yes</s>",
        "[INST] hello[/INST] yes</s>[INST] no\n\nhow many[/INST] four</s>",
    ]
    assert [tok.decode(example.ids[example.target]) for example in found] == [" yes</s>", " four</s>"]


def test_an_end_behind_all_turns_is_no_part_of_an_answer() -> None:
    tok = make("byte level", chat=END_OF_ALL)
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    row = random_chat(random.Random(3), 1)
    ((example,),) = examples(Encoder("rows", tok, Reading(256, ends=(stop,))), [row])
    assert tok.decode(example.ids) == tok.apply_chat_template(list(row.messages), tokenize=False)
    answers = [turn["content"] for turn in row.messages if turn["role"] == "assistant"]
    assert tok.decode(example.ids[example.target]) == "".join(answer + "<|im_end|>" for answer in answers)


PARTS = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PARTS, r"row 1, field messages\[0\]: the chat template leaves out \(some of\) this user turn"),
        (CHATML.replace("{{ m.content }}", "{{ m.content[:2] }}"), "leaves out"),
        (CHATML.replace("{{ m.content }}", "{{ m.content + 5 }}"), "row 1, .*: the chat template fails: TypeError"),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content.index('#') }}"),
            "row 1, .*: the chat template fails: ValueError",
        ),
    ],
)
def test_templates_that_lose_what_a_turn_says(template: str, message: str) -> None:
    chat = Row(1, "", "", ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}))
    with pytest.raises(RowError, match=message):
        examples(Encoder("rows", make("byte level", chat=template), Reading(64)), [chat])


def test_turns_behind_the_last_answer_are_counted(tmp_path: Path) -> None:
    tok = make("byte level", chat=CHATML, end="<|im_end|>")
    turns = [("user", "hello"), ("assistant", "yes"), ("user", "how many?")]
    path = written(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]})
    assert tokenise(path, tok, Reading(64), tmp_path).counts.noticed["unanswered"] == (1, 1)


def test_a_prompt_that_is_asked_in_other_tokens_is_counted() -> None:
    """Also where no token stands for both: GPT-2's rule splits two newlines before a word, and only there."""
    tok = make("byte level")
    tok.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    row = Row(1, "Answer:\n\n", "yes")
    encoder = Encoder("rows", tok, Reading(64))
    ((example,),) = examples(encoder, [row])
    (asked,) = encoder.prompts([row])
    assert example.straddles == (example.ids[: len(asked)].tolist() != asked)
    assert not examples(encoder, [Row(1, "Answer:", " yes")])[0][0].straddles


@pytest.mark.parametrize("normalizer", [Lowercase(), NFKC()])
def test_data_that_becomes_a_control_token_is_refused(normalizer: Any) -> None:
    """By a normaliser under which another text is a name."""
    tok = make("byte level")
    core = json.loads(tok.backend_tokenizer.to_str())
    for token in core["added_tokens"]:
        token["normalized"] = True
    own = Tokenizer.from_str(json.dumps(core))
    own.normalizer = normalizer
    tok = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    encoder = Encoder("rows", tok, Reading(64))
    text = "an </S> end" if isinstance(normalizer, Lowercase) else "an \uff1c/s\uff1e end"
    with pytest.raises(RowError, match=r"rows, row 4: this tokenizer has no way to write .* as text"):
        examples(encoder, [Row(4, "a", text)])
    assert examples(encoder, [Row(4, "a", " dog")])


def test_private_characters_beside_names_are_refused() -> None:
    encoder = Encoder("rows", make("byte level"), Reading(64))
    with pytest.raises(RowError, match="rows, row 2: private characters"):
        examples(encoder, [Row(2, "</s>", "\U000f0002\U0010fffd")])


def test_what_has_nothing_to_learn_is_not_called_too_long(tmp_path: Path) -> None:
    tok = make("wordpiece", bos=False)
    path = written(tmp_path, {"prompt": "", "completion": "\u200b"}, *[{"prompt": "a", "completion": "dog"}] * 20)
    tokens = tokenise(path, tok, Reading(64), tmp_path)
    assert (tokens.counts.noticed, len(tokens)) == ({"empty": (1, 1)}, 20)
    for choice, message in (("drop", "no row has at most 8 tokens"), ("cut", "no row has a label among its first 8")):
        long = written(tmp_path, {"prompt": "a " * 20, "completion": "dog"})
        with pytest.raises(RowError, match=message):
            tokenise(long, tok, Reading(8, too_long=choice), tmp_path)
