"""Prefix tuning, prompt tuning and p-tuning: equal to PEFT, at their start, packed, padded and over layouts."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from finished_runs import curve, difference, interrupted, loss_gap
from sampling import method_sampled
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from methods.base import UNSHARDED, Setup
from methods.options.virtual import Prefix, Prompt, PTuning
from methods.parts.weights import shapes
from methods.registry import create
from runfolder.record import load_job
from trainer.data.tokens import virtual_ids

TOKENS = 7
KINDS = {"prefix": Prefix, "prompt": Prompt, "ptuning": PTuning}
PREFIX = {"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS}
PEFT = {
    "prefix": peft.PrefixTuningConfig(**PREFIX),
    "prompt": peft.PromptTuningConfig(**PREFIX, prompt_tuning_init="SAMPLE_VOCAB"),
    "ptuning": peft.PromptEncoderConfig(**PREFIX, encoder_hidden_size=16),
}
IDS = torch.randint(5, 300, (40,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tuned(kind: str, tiny_base: Path) -> tuple[Any, Any]:
    """A method at its default start and its model; the base's weights are large enough that attention matters."""
    return attached(kind, tiny_base)


def base(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def attached(kind: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    width = {"hidden": 16} if kind == "ptuning" else {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    method = create(KINDS[kind](tokens=TOKENS, **width, **options), Setup(tokenizer=tokenizer, seq_len=64))
    torch.manual_seed(0)
    return method, method.attach(base(folder))


def row(method: Any, *documents: torch.Tensor) -> dict[str, torch.Tensor]:
    """Documents packed in one row, as the trainer does."""
    front = torch.tensor(virtual_ids(method.options.virtual_tokens), dtype=torch.long)
    parts = [torch.cat([front, document]) for document in documents]
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    return {"input_ids": torch.cat(parts)[None], "position_ids": positions[None]}


def logits(method: Any, model: Any, *documents: torch.Tensor) -> list[torch.Tensor]:
    """The logits of each document's own tokens."""
    out = model(**row(method, *documents), use_cache=False).logits[0]
    v = method.options.virtual_tokens
    ends = torch.tensor([len(d) + v for d in documents]).cumsum(0).tolist()
    return [out[end - len(d) : end] for end, d in zip(ends, documents, strict=True)]


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def peft_twin(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(base(folder), copy.deepcopy(PEFT[kind]))


def put_start(kind: str, model: Any, twin: Any) -> None:
    """Give PEFT's model what ours starts from."""
    encoder = twin.prompt_encoder["default"]
    if kind != "prefix":
        encoder.load_state_dict(model.get_input_embeddings().encoder.state_dict())
        return
    start_L2HVD = torch.stack([layer.self_attn.prefix for layer in model.model.layers]).detach()
    encoder.load_prompt_embeddings(start_L2HVD.permute(3, 0, 1, 2, 4).reshape(TOKENS, -1))


def test_twenty_steps_equal_peft(kind: str, tiny_base: Path) -> None:
    method, model = attached(kind, tiny_base)
    twin = peft_twin(kind, tiny_base)
    put_start(kind, model, twin)
    ours, theirs = (torch.optim.AdamW(trained(m), lr=1e-2) for m in (model, twin))
    count = sum(p.numel() for p in trained(model))
    assert count == sum(p.numel() for p in trained(twin))
    assert count == method.options.added_parameters(*shapes(base(tiny_base), UNSHARDED))
    for step in range(20):
        document = IDS[step : step + 15]
        mine = cross_entropy(logits(method, model, document)[0][:-1], document[1:])
        own = twin(input_ids=document[None]).logits[0, -len(document) : -1]
        other = cross_entropy(own, document[1:])
        assert abs(mine.item() - other.item()) / other.item() < 1e-5
        for loss, optimizer in ((mine, ours), (other, theirs)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_random_start_is_peft_s(tiny_base: Path) -> None:
    """For p-tuning, where it is a network's; prompts start from any tokens, prefixes from the same noise."""
    _, model = attached("ptuning", tiny_base, init_text=None)
    ours, theirs = trained(model), trained(peft_twin("ptuning", tiny_base))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    _, model = attached("prompt", tiny_base, init_text=None)
    vectors = model.get_input_embeddings()
    drawn = vectors(torch.tensor([virtual_ids(TOKENS)]))[0]
    assert all((vectors.weight == vector).all(1).any() for vector in drawn)
    _, model = attached("prefix", tiny_base, init_text=None)
    assert 0.8 < torch.cat([p.flatten() for p in trained(model)]).std() < 1.2


def test_starts_as_if_the_text_stood_in_front(tuned: Any, tiny_base: Path) -> None:
    method, model = tuned
    text = method.setup.tokenizer(method.options.init_text)["input_ids"]
    ids = torch.tensor((text * TOKENS)[:TOKENS])
    expected = base(tiny_base)(torch.cat([ids, IDS])[None]).logits[0, TOKENS:]
    torch.testing.assert_close(logits(method, model, IDS)[0], expected, rtol=1e-5, atol=1e-5)


def test_packed_documents_equal_solo_ones(tuned: Any) -> None:
    method, model = tuned
    documents = [IDS[:9], IDS[9:12], IDS[12:]]
    for packed, document in zip(logits(method, model, *documents), documents, strict=True):
        torch.testing.assert_close(packed, logits(method, model, document)[0], rtol=1e-5, atol=1e-5)


def test_generation_with_padding_equals_a_full_pass(tuned: Any) -> None:
    method, model = tuned
    model.eval()
    documents = [IDS[:9], IDS[9:12]]
    rows = [row(method, document)["input_ids"][0] for document in documents]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0)) for r in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(r), (longest - len(r), 0)) for r in rows])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=True
    )
    for document, written in zip(documents, out[:, longest:], strict=True):
        said = logits(method, model, torch.cat([document, written]))[0][len(document) - 1 : -1]
        assert torch.equal(said.argmax(-1), written)


def test_gradient_checkpointing_changes_nothing(kind: str, tiny_base: Path) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        method, model = attached(kind, tiny_base)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.cat(logits(method, model, IDS[:20], IDS[20:])).logsumexp(-1).sum().backward()
        return [p.grad for p in trained(model)]

    pairs = list(zip(gradients(True), gradients(False), strict=True))
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in pairs)


def test_bf16_inside_autocast_trains_fp32_weights(kind: str, tiny_base: Path) -> None:
    method, model = attached(kind, tiny_base)
    exact = logits(method, model, IDS)[0]
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(method, model, IDS)[0]
    assert (rough - exact).abs().mean() / exact.abs().mean() < 0.05
    rough.float().logsumexp(-1).sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained(model))


def test_a_window_that_hides_the_prefix_is_refused(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.config.sliding_window = 70
    with pytest.raises(ValueError, match="at most 63"):
        create(Prefix(tokens=TOKENS), Setup(seq_len=64)).attach(model)
    with pytest.raises(ValueError, match="method.tokens: found 70; allowed: fewer than the 70"):
        Prefix(tokens=70).check({"sliding_window": 70}, 64)


@pytest.mark.parametrize("kinds", method_sampled("virtual", list(KINDS)))
def test_layouts_resume_and_export(kinds: list[str], new_run: Any, launch: Any, cache: Path, held_out: Path) -> None:
    layouts = {"a": (0, 1, True), "b": (2, 3, False), "d": (3, 2, False)}
    runs = {
        (kind, name): new_run(
            f"{kind}-{name}",
            method={"kind": kind, "tokens": TOKENS} | ({"hidden": 16} if kind == "ptuning" else {}),
            sharding={"zero": zero},
            train={"micro_batch": micro, "lr": 1e-2},
            data={"packing": packing} | ({"eval": str(held_out)} if name == "d" else {}),
            evaluation={"max_new_tokens": 3, "before": False},
            checkpoint={"every": 5, "keep": 9},
        )
        for kind in kinds
        for name, (zero, micro, packing) in layouts.items()
        if name != "b" or kind == "prefix"
    }
    launch(2, *runs.values())
    again = {kind: interrupted(runs[kind, "d"], f"{kind}-again", 5) for kind in kinds}
    launch(2, *again.values())
    worst = {run.name: difference(curve(run), curve(runs[kind, "a"])) for (kind, _), run in runs.items()}
    print(worst)
    for kind in kinds:
        run = runs[kind, "d"]
        whole = curve(run)
        assert curve(again[kind], 2) == whole[5:]
        plain = AutoModelForCausalLM.from_pretrained(load_job(run).base.model)
        assert loss_gap(peft.PeftModel.from_pretrained(plain, run / "output"), run, cache) < 1e-5
        assert whole[-1][0] < whole[0][0]
    assert max(worst.values()) < 1e-6, worst
