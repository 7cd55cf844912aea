"""The loop: chunks, stops, draws, names that are loaded anew, and more adapters than the device has room for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import Exported, export, loaded

from serving.cache import PAGE, pages_for
from serving.engine import Engine
from serving.error import RequestRefused, UnknownAdapter
from serving.integers import integers
from serving.prefixes import page_keys
from serving.sampler import noise
from serving.sequence import Request, Sequence

PROMPT = tuple((5 * i + 7) % 320 for i in range(30))


def engine_of(base: Path, **sizes: int) -> Engine:
    return Engine(loaded(base), **{"tokens": 1024, "positions": 128, "adapter_bytes": 2**20} | sizes)


def test_chunks_of_prompts_change_nothing(base: Path, exported: dict[str, Exported]) -> None:
    asked = [Request(PROMPT[: 9 + 7 * n], name, new_tokens=4) for n, name in enumerate((None, "lora", "prefix"))]
    answers = []
    for chunk in (5, 8192):
        engine = engine_of(base, chunk=chunk)
        for name in ("lora", "prefix"):
            engine.load(name, exported[name].folder)
        answers.append(engine.generate(asked))
    assert answers[0] == answers[1]


def test_an_answer_ends_with_a_stop_token_or_at_its_length(base: Path) -> None:
    engine = engine_of(base)
    (whole,) = engine.generate([Request(PROMPT, new_tokens=10)])
    (stopped,) = engine.generate([Request(PROMPT, new_tokens=10, stop=(whole[4],))])
    assert len(whole) == 10 and stopped == whole[: whole.index(whole[4]) + 1]
    assert engine.cache.free_pages == engine.cache.pages - 1


def test_a_draw_depends_on_its_seed_and_its_limits(base: Path) -> None:
    engine = engine_of(base)
    drawn = engine.generate([Request(PROMPT, new_tokens=6, temperature=1.0, seed=seed) for seed in (1, 2, 1)])
    assert drawn[0] == drawn[2] != drawn[1]
    (greedy,) = engine.generate([Request(PROMPT, new_tokens=6)])
    for limit in ({"top_k": 1}, {"top_p": 1e-6}):
        assert engine.generate([Request(PROMPT, new_tokens=6, temperature=1.0, seed=3, **limit)]) == [greedy]


def test_draws_have_the_models_distribution() -> None:
    noise_TV = noise(torch.arange(20000), torch.zeros(20000, dtype=torch.int64), 4)
    probability_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    share_V = torch.bincount((probability_V.log() + noise_TV).argmax(-1), minlength=4) / 20000
    assert (share_V - probability_V).abs().max() < 0.015


def test_a_name_that_is_loaded_anew_never_serves_what_was_there_before(
    base: Path, exported: dict[str, Exported], tmp_path: Path
) -> None:
    again = export(base, "lora", tmp_path / "again", seed=9)
    engine, asked = engine_of(base), [Request(PROMPT, "mine", new_tokens=5)]
    first = engine.load("mine", exported["lora"].folder)
    old = engine.generate(asked)
    under_way = engine.add(asked[0])
    engine.step()
    assert engine.load("mine", again.folder) != first
    new = engine.generate(asked)
    assert under_way.answer == old[0] != new[0]
    fresh = engine_of(base)
    fresh.load("other", again.folder)
    assert fresh.generate([Request(PROMPT, "other", new_tokens=5)]) == new
    engine.unload("mine")
    with pytest.raises(UnknownAdapter):
        engine.generate(asked)


def test_more_adapters_than_fit_take_turns(base: Path, exported: dict[str, Exported]) -> None:
    names = ("lora", "dora", "prefix", "ia3", "prompt", "vera")
    large, small = engine_of(base), engine_of(base, residents=2, rows=4)
    for name in names:
        large.load(name, exported[name].folder)
        small.load(name, exported[name].folder, pinned=name == "dora")
    asked = [Request(PROMPT[:7], name, new_tokens=3) for name in (*names, *names)]
    assert small.generate(asked) == large.generate(asked)
    assert small.pool.packed_of("dora").digest in small.pool.resident


def test_idle_adapters_give_their_pages_to_who_needs_them(base: Path, exported: dict[str, Exported]) -> None:
    engine, large = engine_of(base, tokens=64), engine_of(base)
    for name in ("prefix", "prompt", "ptuning"):
        engine.load(name, exported[name].folder)
        large.load(name, exported[name].folder)
    for name in ("prefix", "prompt", "ptuning", "prefix"):
        asked = [Request(PROMPT[:20], name, new_tokens=4), Request(PROMPT[:20], new_tokens=4)]
        assert engine.generate(asked) == large.generate(asked)
    assert engine.cache.free_pages == engine.cache.pages - 2 == 3


def test_patterns_of_ranks_and_scales_are_those_of_peft(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    patterns = {"rank_pattern": {"q_proj": 6, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"o_proj": 40, "up": 3}}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj", "up_proj"], init_lora_weights=False,
        **patterns,
    )  # fmt: skip
    tuned = peft.get_peft_model(loaded(base), config).eval()
    tuned.save_pretrained(tmp_path / "patterns")
    engine = engine_of(base)
    engine.load("patterns", tmp_path / "patterns")
    with torch.no_grad():
        expected = tuned(input_ids=torch.tensor([PROMPT])).logits[0]
    (found,) = engine.logits([Request(PROMPT, "patterns")])
    assert (found - expected).abs().max() < 1e-5 * expected.std()


def test_an_adapters_identity_is_its_weights_and_its_config(
    base: Path, exported: dict[str, Exported], tmp_path: Path
) -> None:
    engine = engine_of(base)
    shutil.copytree(exported["lora"].folder, tmp_path / "copy")
    digest = engine.load("a", exported["lora"].folder)
    assert engine.load("b", tmp_path / "copy") == digest
    path = tmp_path / "copy" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 9}))
    assert engine.load("b", tmp_path / "copy") != digest


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(()), "found no prompt"),
        (Request(PROMPT, new_tokens=0), "no new tokens"),
        (Request(PROMPT, new_tokens=200), "found 230 positions; allowed: at most 128"),
        (Request((1, 320)), "found an id of no token; allowed: 0 to 319"),
    ],
)
def test_what_can_never_be_answered_is_refused(request_: Request, said: str, base: Path) -> None:
    with pytest.raises(RequestRefused, match=said):
        engine_of(base).add(request_)


def test_what_finds_no_room_beside_pinned_adapters_is_refused_and_the_rest_goes_on(
    base: Path, exported: dict[str, Exported]
) -> None:
    engine = engine_of(base, residents=1)
    engine.load("first", exported["lora"].folder, pinned=True)
    engine.load("second", exported["dora"].folder)
    engine.generate([Request(PROMPT, "first", new_tokens=2)])
    with pytest.raises(RequestRefused, match="found no room on the device for its adapter, or no pages"):
        engine.generate([Request(PROMPT, "second", new_tokens=2)])
    assert len(engine.generate([Request(PROMPT, "first", new_tokens=2)])[0]) == 2


def test_log_likelihoods_are_those_of_the_logits(base: Path, exported: dict[str, Exported]) -> None:
    engine = engine_of(base, chunk=8)
    engine.load("lora", exported["lora"].folder)
    for name in (None, "lora"):
        (logits_TV,) = engine.logits([Request(PROMPT, name)])
        log_TV = logits_TV.log_softmax(-1)
        expected = [float(log_TV[at - 1, PROMPT[at]]) for at in range(20, 30)]
        (found,) = engine.log_likelihoods([Request(PROMPT, name)], [20])
        assert found == pytest.approx(expected, abs=1e-4)


def test_more_texts_than_rows_are_scored_in_turn(base: Path) -> None:
    texts = [Request(PROMPT[first:]) for first in range(5)]
    expected = [engine_of(base).log_likelihoods([text], [20])[0] for text in texts]
    found = engine_of(base, rows=2).log_likelihoods(texts, [20] * 5)  # each is done in the pass that reads it
    for scores, alone in zip(found, expected, strict=True):
        assert scores == pytest.approx(alone, abs=1e-4)


def rows_computed(engine: Engine, asked: list[Request]) -> int:
    """The rows that an engine computes for requests, prompts and answers together."""
    counts = []
    plain = engine.forward.run

    def counted(chosen: object, id_T: torch.Tensor) -> object:
        counts.append(len(id_T))
        return plain(chosen, id_T)  # type: ignore[arg-type]

    engine.forward.run = counted  # type: ignore[assignment, method-assign]
    engine.generate(asked)
    engine.forward.run = plain  # type: ignore[method-assign]
    return sum(counts)


def test_equal_beginnings_are_computed_once_for_each_adapter_and_tenant(
    base: Path, exported: dict[str, Exported]
) -> None:
    prompt = tuple((7 * i + 3) % 320 for i in range(2 * PAGE + 5))
    begun = [Request((*prompt, last), "lora", new_tokens=1) for last in (9, 10, 11)]
    engine = engine_of(base)
    for name in ("lora", "dora"):
        engine.load(name, exported[name].folder)
    assert rows_computed(engine, begun) == len(prompt) + 1 + 2 * (5 + 1)  # together, and the first of them whole
    assert rows_computed(engine, begun[:1]) == 5 + 1  # long after it has ended
    others = [replace(begun[0], adapter="dora"), replace(begun[0], adapter=None), replace(begun[0], tenant="else")]
    for other in others:
        assert rows_computed(engine, [other]) == len(prompt) + 1
    engine.load("lora", export(base, "lora", exported["lora"].folder.parent / "anew", seed=5).folder)
    assert rows_computed(engine, begun[:1]) == len(prompt) + 1
    assert engine.cache.free_pages == engine.cache.pages - 1


def test_no_name_of_a_tenant_passes_for_tokens() -> None:
    first, rest = tuple(range(PAGE)), PROMPT[:PAGE]
    keys = []
    for tenant, prompt in (("", first + rest), (integers(first).tobytes().decode(), rest)):
        sequence = Sequence(Request(prompt, tenant=tenant), None)
        keys.append(set(page_keys(sequence).values()))
    assert [len(of_prompt) for of_prompt in keys] == [2, 1] and keys[0].isdisjoint(keys[1])


def test_shared_beginnings_change_no_answer_and_give_way_where_pages_are_few(base: Path) -> None:
    prompts = [tuple((k * i + 3) % 320 for i in range(40)) for k in (3, 3, 5, 3, 7, 5)]
    asked = [
        Request((*prompt, 4 * number), new_tokens=5, temperature=1.0, seed=number, scores_answer=True)
        for number, prompt in enumerate(prompts)
    ]
    alone = [engine_of(base).answered([request])[0] for request in asked]
    for tokens in (1024, 64):  # room for all, and for one sequence
        engine = engine_of(base, tokens=tokens, positions=64)
        for _ in range(2):
            for found, expected in zip(engine.answered(asked), alone, strict=True):
                assert found.answer == expected.answer
                assert found.scores == pytest.approx(expected.scores, abs=1e-4)
        assert engine.cache.free_pages == engine.cache.pages - 1


def test_scores_of_an_answer_are_those_of_its_tokens_in_the_prompt(base: Path) -> None:
    engine = engine_of(base)
    for limits in ({"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 5}):
        (written,) = engine.answered([Request(PROMPT, new_tokens=6, seed=3, scores_answer=True, **limits)])
        whole = Request((*PROMPT, *written.answer), temperature=limits["temperature"])
        (expected,) = engine.log_likelihoods([whole], [len(PROMPT)])
        assert written.scores == pytest.approx(expected, abs=1e-4)
    assert engine.answered([Request(PROMPT, new_tokens=2)])[0].scores == []


@pytest.mark.parametrize("length", [5, 16, 21, 48], ids=["less than a page", "a page", "a page and more", "chunks"])
def test_several_answers_to_a_prompt_compute_it_once(length: int, base: Path, exported: dict[str, Exported]) -> None:
    prompt = tuple((7 * i + 3) % 320 for i in range(length))
    limits: dict[str, Any] = {"new_tokens": 6, "temperature": 1.0, "scores_answer": True}
    asked = [
        Request(prompt, adapter, seed=seed, **limits) for adapter in (None, "lora", "prefix") for seed in range(4)
    ]

    def engine_with_adapters() -> Engine:
        engine = engine_of(base, chunk=32)
        for name in ("lora", "prefix"):
            engine.load(name, exported[name].folder)
        return engine

    alone = [engine_with_adapters().answered([request])[0] for request in asked]
    engine = engine_with_adapters()
    for found, expected in zip(engine.answered(asked), alone, strict=True):
        assert found.answer == expected.answer
        assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    of_prefix = pages_for(engine.pool.packed_of("prefix").adapter.virtual)
    assert engine.cache.free_pages == engine.cache.pages - 1 - of_prefix
    assert len({tuple(sequence.answer) for sequence in alone[:4]}) > 1
    first_tokens = [replace(request, new_tokens=1) for request in asked[:4]]
    assert rows_computed(engine_of(base, chunk=32), first_tokens) == length
    of_tenants = [replace(first_tokens[0], tenant=tenant) for tenant in ("a", "b")]
    assert rows_computed(engine_of(base, chunk=32), of_tenants) == 2 * length
    scored = engine_of(base)
    (first, *_), (likelihood,) = scored.answered(asked[:4]), scored.log_likelihoods([Request(prompt)], [1])
    assert first.answer == alone[0].answer and len(likelihood) == length - 1


def test_waves_change_no_answer_and_take_fewer_passes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Request(PROMPT[n % 9 : 12], new_tokens=3 + 5 * n % 11) for n in range(40)]
    passes: list[int] = []
    engine = engine_of(base, rows=16)
    plain = engine.forward.run
    monkeypatch.setattr(engine.forward, "run", lambda *given: passes.append(1) or plain(*given))
    in_waves = engine.generate(asked)
    of_waves = len(passes)
    sequences = [engine.add(request) for request in asked]
    while not engine.scheduler.idle:
        engine.step()
    assert [sequence.answer for sequence in sequences] == in_waves
    assert of_waves < len(passes) - of_waves
