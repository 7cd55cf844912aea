"""EVA: A starts as the first r principal directions of each target's inputs, B as zero.

Paischer et al. 2024, arXiv 2410.07170, section 3: an incremental SVD of the activations over the first examples of
the training data, as PEFT has it, over all tokens of a fixed number (PEFT stops layer by layer). Every module keeps
its rank (the paper's rho = 1). All ranks see the same examples one by one, without padding, so the directions depend
on neither layout nor packing.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor
from torch.nn import Module

from methods.base import Gather, Tensors
from methods.parts.initial import adapted
from methods.parts.peft_adapter import ADAPTER

TOKENS = 8192  # after which directions of a few dozen have settled
TOKENS_PER_UPDATE = 512  # tokens whose inputs are held for a step of the SVD
PEFTS_SEED = 42  # of the sketch in it: where no direction stands out, it decides


def start_from_inputs(model: Module, examples: Iterable[Tensor], rank: int, gather: Gather) -> None:
    """Set A of every target from what it is fed for these examples, token ids [1, T]; on every rank at once."""
    starts = directions(model, examples, rank, gather)
    with torch.no_grad():
        for name, layer in adapted(model):
            a_RI = layer.lora_A[ADAPTER].weight
            b_OR = layer.lora_B[ADAPTER].weight
            a_RI.copy_(starts[name])
            b_OR.zero_()


def directions(model: Module, examples: Iterable[Tensor], rank: int, gather: Gather) -> Tensors:
    """The first principal directions [rank, in] of every target's inputs, by its name."""
    fits: dict[str, IncrementalPCA] = {}
    for name, _ in adapted(model):
        fits[name] = IncrementalPCA(rank, lowrank=True, lowrank_seed=PEFTS_SEED)
    enough = max(TOKENS_PER_UPDATE, 2 * rank)
    seen = 0  # tokens whose inputs the SVD has taken in
    waiting = 0  # tokens whose inputs wait for it
    model.eval()
    with torch.no_grad(), recorded_inputs(model) as heard, gather.gathered_in_turn(model):
        for ids in examples:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            waiting += ids.numel()
            if waiting >= enough:
                fit(fits, heard)
                seen += waiting
                waiting = 0
            if seen >= TOKENS:
                break
        if waiting > rank or not seen:
            fit(fits, heard)
    model.train()
    return {name: fitted.components_ for name, fitted in fits.items()}


def fit(fits: dict[str, IncrementalPCA], heard: dict[str, list[Tensor]]) -> None:
    """Update each target's SVD with the inputs that were heard, and forget them."""
    for name, inputs in heard.items():
        together = torch.cat(inputs)
        fitted = fits[name]
        fitted.partial_fit(together)
        inputs.clear()


@contextmanager
def recorded_inputs(model: Module) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, every target's inputs are kept, fp32 [T, in]."""
    heard: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in adapted(model):
        heard[name] = []
        handle = layer.register_forward_pre_hook(_keeping(heard[name]))
        handles.append(handle)
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _keeping(inputs_heard: list[Tensor]) -> Callable[..., None]:
    """A hook that appends a module's input to a list, fp32 [T, in]."""

    def keep(_: Module, inputs: tuple[Tensor]) -> None:
        input_TI = inputs[0]
        input_TI = input_TI.flatten(0, -2).float()
        inputs_heard.append(input_TI)

    return keep
