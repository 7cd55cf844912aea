"""The policy before the first step, from a model that has been trained: method by method."""

from typing import Any

import pytest
import torch
from alone import STEPS, attached, llama, logits, losses, optimizer_of
from torch import nn

from methods.base import ReferenceRefused, Setup
from methods.options import KINDS, Options
from methods.options.full import Full
from methods.options.low_rank import AdaLora, Dora, Lora, QLora, RsLora
from methods.options.low_rank_long import LongLora
from methods.options.low_rank_merged import ReLora
from methods.options.other_adapters import Bottleneck, FourierFt, Ia3, Vera
from methods.options.subspace import Galore
from methods.options.virtual import Prefix, Prompt, PTuning
from methods.registry import create

STARTS = ("default", "gaussian", "orthogonal", "pissa", "olora", "eva")
GIVEN: list[Options] = [
    *(Lora(rank=4, init=start) for start in STARTS),
    RsLora(rank=4),
    Dora(rank=4),
    AdaLora(rank=2, initial_rank=4),
    LongLora(rank=4, groups=1),
    Ia3(),
    Vera(rank=8),
    FourierFt(frequencies=50, scale=3000.0),
    Bottleneck(size=4),
]
TRAINS_BASE = "has no reference: it trains the base's own weights, and no second model is kept; nearest: lora"
VIRTUAL = "has no reference: it starts from virtual tokens that are trained and not kept; nearest: lora"
REFUSED: list[tuple[Options, str]] = [
    (Full(), f"method full {TRAINS_BASE}"),
    (Galore(rank=4), f"method galore {TRAINS_BASE}"),
    (ReLora(rank=4), "method relora has no reference: what it learns goes into the base; nearest: lora"),
    (Prefix(tokens=4, init_text=None), f"method prefix {VIRTUAL}"),
    (Prompt(tokens=4, init_text=None), f"method prompt {VIRTUAL}"),
    (PTuning(tokens=4), f"method ptuning {VIRTUAL}"),
    (QLora(init="loftq"), "method.init loftq has no reference: the A and B that it starts from are not kept"),
]


def name(options: Options) -> str:
    return f"{options.model_dump()['kind']}-{getattr(options, 'init', '')}"


@pytest.mark.parametrize("options", GIVEN, ids=name)
def test_within_it_the_logits_are_those_before_the_first_step(options: Options) -> None:
    agrees_with_the_start(*attached(options, llama()))


def test_new_embeddings_are_those_before_the_first_step() -> None:
    method = create(Lora(rank=4), Setup(STEPS))
    method.new_tokens = range(300, 320)
    agrees_with_the_start(method, method.attach(llama()))


def agrees_with_the_start(method: Any, model: nn.Module) -> None:
    """Train, and compare what the reference says with what the model said before."""
    method.initialise(model, [torch.arange(40)[None], torch.arange(60, 90)[None]])
    before = logits(model)
    losses(model, optimizer_of(method, model, 1e-2))
    after, named = logits(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with method.reference(model):
        found = logits(model)
    largest = before.abs().max()
    assert (found - before).abs().max() < 2e-6 * largest
    assert (after - before).abs().max() > 1e-2 * largest
    assert torch.equal(logits(model), after)  # and training goes on as if nothing had been
    assert all(torch.equal(p, named[n]) for n, p in model.named_parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_resumed_run_knows_the_start_that_moved_its_base(start: Any) -> None:
    options = Lora(rank=4, init=start)
    method, model = attached(options, llama())
    before = logits(model)
    again, resumed = attached(options, llama())
    again.load_state(method.state())
    resumed = again.attach(llama())
    losses(resumed, optimizer_of(again, resumed, 1e-2))
    with again.reference(resumed):
        found = logits(resumed)
    with resumed.disable_adapter():
        without = logits(resumed)
    assert (found - before).abs().max() < 2e-6 * before.abs().max()
    assert (without - before).abs().max() > 0.1 * before.abs().max()  # what "the adapter off" would have been


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=lambda case: "" if isinstance(case, str) else name(case))
def test_it_is_refused_where_it_is_gone(options: Options, reason: str) -> None:
    with pytest.raises(ReferenceRefused) as refused:
        create(options).reference(llama())
    assert str(refused.value) == reason


def test_every_method_is_one_or_the_other() -> None:
    assert {type(options) for options in GIVEN} | {type(options) for options, _ in REFUSED} == set(KINDS.values())
