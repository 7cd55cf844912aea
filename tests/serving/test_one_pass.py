"""Evaluation in one pass: answers that are the engine's own, kept one by one, and never asked for twice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import Exported, loaded, make_base
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from methods.base import Setup
from methods.options import KINDS
from methods.registry import create
from serving import asking
from serving.base import FrozenBase
from serving.changes import changes_of
from serving.engine import Engine
from serving.evaluate import AnswerSheet, Candidate, answer_all, missing_of, sheets_of
from serving.folder import adapter_digest
from serving.kept import AnswersFile, KeptAnswer
from serving.pool import packed_adapter
from serving.question import AskedTask, Question, ScoredText
from serving.sequence import Request
from serving.sizes import sizes_for
from serving.starting import ReadyEngine, engine_with, ready_engine

TINY = Path(__file__).parents[2] / "examples" / "tiny"
STOP = 7
NAMES = ("lora", "prefix", "ia3")


def prompt(number: int, length: int = 9) -> tuple[int, ...]:
    return tuple((5 * number + 11 * i + 3) % 320 for i in range(length))


WRITTEN = [Question(prompt(n, 4 + n), new_tokens=5, stop=(STOP,)) for n in range(7)]
TEXTS = tuple(ScoredText(prompt(n, 12), ((3, 5), (9, 12))) for n in range(3))
CHOSEN = [Question(prompt(n), texts=TEXTS[n:]) for n in range(3)]
TASKS = [AskedTask("written", "a" * 64, tuple(WRITTEN)), AskedTask("chosen", "b" * 64, tuple(CHOSEN))]


@pytest.fixture
def engine(base: Path, exported: dict[str, Exported]) -> Engine:
    engine = Engine(loaded(base), tokens=1024, positions=64, rows=4, adapter_bytes=2**20)
    for name in NAMES:
        engine.load(name, exported[name].folder)
    return engine


def candidates(exported: dict[str, Exported], *names: str) -> list[Candidate]:
    made = [Candidate()]
    for name in names:
        folder = exported[name].folder
        made.append(Candidate(name, folder, adapter_digest(folder)))
    return made


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def ask(engine: Engine, sheets: list[AnswerSheet], told: list[int] | None = None) -> int:
    """Ask what is missing; gives how many questions that were."""
    count = len(missing_of(sheets))
    answer_all(engine, sheets, decode, {"base": "x"}, (told or []).append)
    return count


def test_answers_are_those_of_the_engine(engine: Engine, exported: dict[str, Exported], tmp_path: Path) -> None:
    (whole,) = engine.generate([Request(WRITTEN[0].prompt, new_tokens=5)])
    stop = whole[2]  # of one question at least, the answer ends with it
    written = AskedTask("written", "a" * 64, tuple(replace(question, stop=(stop,)) for question in WRITTEN))
    sheets = sheets_of(tmp_path, [written, TASKS[1]], candidates(exported, *NAMES))
    assert ask(engine, sheets) == 4 * 10
    for sheet in sheets:
        kept, name = AnswersFile(sheet.file.path).answers, sheet.candidate.name
        assert len(kept) == len(sheet.task.questions)
        for question in sheet.task.questions:
            answer = kept[question.key]
            if question.new_tokens:
                (ids,) = engine.generate([Request(question.prompt, name, 5, (stop,))])
                assert answer.tokens == len(ids)
                assert answer.text == decode(ids[:-1] if ids[-1] == stop else ids)
            for text, total in zip(question.texts, answer.log_likelihoods, strict=True):
                (scores,) = engine.log_likelihoods([Request(text.ids, name, 1)], [3])
                assert total == pytest.approx(sum(scores[:2]) + sum(scores[6:9]), abs=1e-4)
    assert sheets[0].file.answers[written.questions[0].key].text == decode(whole[: whole.index(stop)])
    heads = [sheet.file.head for sheet in sheets]
    assert heads[0]["change"] is None and all(head["change"] > 0 for head in heads[2:])


def test_one_more_adapter_is_all_that_is_asked(engine: Engine, exported: dict[str, Exported], tmp_path: Path) -> None:
    ask(engine, sheets_of(tmp_path, TASKS, candidates(exported, "lora")))
    assert ask(engine, sheets_of(tmp_path, TASKS, candidates(exported, "lora", "ia3"))) == 10
    assert ask(engine, sheets_of(tmp_path, TASKS, candidates(exported, "ia3", "lora"))) == 0
    more = AskedTask("written", "a" * 64, (*WRITTEN, Question(prompt(50), 5, (STOP,))))
    assert ask(engine, sheets_of(tmp_path, [more], candidates(exported, "ia3", "lora"))) == 3


def test_two_names_of_one_adapter_are_asked_once(
    engine: Engine, exported: dict[str, Exported], tmp_path: Path
) -> None:
    twice = candidates(exported, "lora", "lora")
    assert ask(engine, sheets_of(tmp_path, TASKS, twice)) == 20


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    engine: Engine, exported: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sheets_of(tmp_path / "whole", TASKS, candidates(exported, "lora"))
    ask(engine, whole)
    monkeypatch.setattr(asking, "WRITE_EVERY_S", -1.0)
    monkeypatch.setattr(asking, "LOOK_EVERY", 1)

    def stop_after_three(done: int) -> None:
        if done >= 3:
            raise KeyboardInterrupt

    parts = sheets_of(tmp_path / "parts", TASKS, candidates(exported, "lora"))
    with pytest.raises(KeyboardInterrupt):
        answer_all(engine, parts, decode, {"base": "x"}, stop_after_three)
    with parts[0].file.path.open("a") as stream:
        stream.write('{"key": "cut o')  # as a killed process leaves it
    again = sheets_of(tmp_path / "parts", TASKS, candidates(exported, "lora"))
    fresh = Engine(engine.base.model, tokens=1024, positions=64, adapter_bytes=2**20)
    fresh.load("lora", exported["lora"].folder)
    assert 0 < ask(fresh, again) <= 17
    for one, other in zip(whole, sheets_of(tmp_path / "parts", TASKS, candidates(exported, "lora")), strict=True):
        assert one.file.answers.keys() == other.file.answers.keys()
        for key, answer in one.file.answers.items():
            assert answer.text == other.file.answers[key].text
            assert answer.log_likelihoods == pytest.approx(other.file.answers[key].log_likelihoods, abs=1e-4)


def test_answers_that_cannot_be_written_end_the_evaluation(
    engine: Engine, exported: dict[str, Exported], tmp_path: Path
) -> None:
    sheets = sheets_of(tmp_path, TASKS, candidates(exported, "lora"))
    sheets[-1].file.begin({"base": "x"})
    sheets[-1].file.path.unlink()
    sheets[-1].file.path.mkdir()
    with pytest.raises(IsADirectoryError):
        ask(engine, sheets)
    assert all(len(AnswersFile(sheet.file.path).answers) == len(sheet.task.questions) for sheet in sheets[:-1])


def test_what_has_no_room_is_answered_with_nothing(
    engine: Engine, exported: dict[str, Exported], tmp_path: Path
) -> None:
    long = AskedTask(
        "long",
        "c" * 64,
        (
            Question(prompt(1, 62), new_tokens=9, stop=(STOP,)),  # two tokens are left, and none behind a prefix of 5
            Question(prompt(2, 64), new_tokens=9, stop=(STOP,)),
            Question(prompt(3), texts=(ScoredText(prompt(3, 64), ((1, 2),)),)),
        ),
    )
    sheets = sheets_of(tmp_path, [long], candidates(exported, "prefix"))
    ask(engine, sheets)
    base, prefix = (list(AnswersFile(sheet.file.path).answers.values()) for sheet in sheets)
    assert [answer.without_room for answer in base] == [True, True, False]
    assert base[2].tokens == 2
    assert [answer.without_room for answer in prefix] == [True, True, True]


def test_an_adapter_without_effect_is_seen(engine: Engine, exported: dict[str, Exported], tmp_path: Path) -> None:
    folder = tmp_path / "inert"
    folder.mkdir()
    source = exported["lora"].folder
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    weights = load_file(source / "adapter_model.safetensors")
    inert = {name: torch.zeros_like(w) if "lora_B" in name else w for name, w in weights.items()}
    save_file(inert, folder / "adapter_model.safetensors")
    engine.load("inert", folder)
    changes = changes_of(engine, ["lora", "inert"], [prompt(1), prompt(2)])
    assert changes["inert"] == 0 and changes["lora"] > 0.01


def test_adapters_in_company_change_as_much_as_alone(
    engine: Engine, base: Path, exported: dict[str, Exported]
) -> None:
    prompts = [prompt(1, 63), prompt(2)]  # behind the prefix, the first one has no room for its last tokens
    small = Engine(loaded(base), tokens=512, positions=64, residents=2, chunk=70, adapter_bytes=2**20)
    for name in NAMES:
        small.load(name, exported[name].folder)
    alone = {name: changes_of(engine, [name], prompts)[name] for name in NAMES}
    for some_engine in (engine, small):
        assert changes_of(some_engine, [None, *NAMES], prompts) == pytest.approx(alone, rel=1e-4)
        assert some_engine.scheduler.idle
    assert changes_of(engine, [None], prompts) == {}


def test_the_first_of_two_answers_counts_and_broken_lines_do_not(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    file = AnswersFile(path)
    file.begin({"base": "x"})
    file.add([KeptAnswer("a", "one", 3), KeptAnswer("a", "two", 4)])
    assert file.answers["a"].text == "one"
    path.write_text(path.read_text() + '{"key": "b", "text": "no more"}\n7\n{"ke')
    AnswersFile(path).add([KeptAnswer("c", "ü", 1)])
    read = AnswersFile(path)
    assert {key: answer.text for key, answer in read.answers.items()} == {"a": "one", "c": "ü"}
    assert read.head == {"base": "x"}


def test_an_engine_is_as_large_as_its_questions_need(base: Path, exported: dict[str, Exported]) -> None:
    frozen = FrozenBase(loaded(base))
    sizes = sizes_for(frozen.config, WRITTEN, len(NAMES))
    assert sizes["rows"] == 7 and sizes["residents"] == 3
    adapters = {name: packed_adapter(exported[name].folder, frozen) for name in NAMES}
    engine = engine_with(frozen, adapters, sizes)
    assert len(engine.generate([Request(q.prompt, name, 5) for q in WRITTEN for name in NAMES])) == 21


def test_an_engine_has_room_for_adapters_that_are_larger_than_their_files(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden_size=128)
    method = create(KINDS["fourierft"](kind="fourierft", frequencies=8000, target=["q_proj", "up_proj"]), Setup(0))
    model = method.attach(loaded(base))
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    method.export(model, weights, tmp_path / "adapter")
    frozen = FrozenBase(loaded(base))
    adapters = {"waves": packed_adapter(tmp_path / "adapter", frozen)}
    engine = engine_with(frozen, adapters, sizes_for(frozen.config, WRITTEN, 1))
    files = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert engine.pool.arena.size > 4 * files
    assert len(engine.generate([Request(WRITTEN[0].prompt, "waves", 5)])[0]) == 5


def test_a_question_is_its_own_key() -> None:
    plain = json.loads(json.dumps(CHOSEN[0].dump()))
    assert Question.load(plain) == CHOSEN[0] and Question.load(plain).key == CHOSEN[0].key
    others = (Question(WRITTEN[0].prompt, 6, (STOP,)), Question(WRITTEN[0].prompt, 5))
    keys = {question.key for question in (*WRITTEN, *CHOSEN, *others)}
    assert len(keys) == 12


def test_an_answer_ends_soon_after_a_stop_text(engine: Engine, exported: dict[str, Exported], tmp_path: Path) -> None:
    (whole,) = engine.generate([Request(prompt(4), new_tokens=50)])
    stop_text = f" {whole[3]} "
    question = Question(prompt(4), new_tokens=50, stop_texts=(stop_text,))
    sheets = sheets_of(tmp_path, [AskedTask("cut", "d" * 64, (question,))], candidates(exported))
    ask(engine, sheets)
    (answer,) = sheets[0].file.answers.values()
    text = answer.text or ""
    assert stop_text in text and decode(whole).startswith(text)
    assert answer.tokens < 50
    assert engine.cache.free_pages == engine.cache.pages - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about processors alone")
def test_a_small_base_takes_one_thread_and_what_is_wrong_is_said(
    base: Path, exported: dict[str, Exported], tmp_path: Path
) -> None:
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "base")
    for path in base.iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    adapters = [{"name": name, "folder": str(exported[name].folder)} for name in NAMES]
    request = {"base": str(tmp_path / "base"), "revision": None, "adapters": adapters}
    torch.set_num_threads(2)
    ready = ready_engine(request, lambda config, adapters: sizes_for(config, WRITTEN, adapters))
    assert isinstance(ready, ReadyEngine)
    assert ready.engine.pool.names == sorted(NAMES)
    assert torch.get_num_threads() == 1
    adapters[0]["folder"] = str(tmp_path)
    assert ready_engine(request, lambda config, adapters: sizes_for(config, WRITTEN, adapters)) == [
        f"{tmp_path}: found no adapter_config.json or bottleneck_config.json"
    ]
