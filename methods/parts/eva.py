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

Fits = dict[str, IncrementalPCA]  # by a target's name
Recorded = dict[str, list[Tensor]]  # by a target's name, its inputs [T, in]

TOKENS = 8192  # after which directions of a few dozen have settled
TOKENS_PER_UPDATE = 512  # tokens whose inputs are held for a step of the SVD
PEFTS_SEED = 42  # of the sketch in it: where no direction stands out, it decides


def start_from_inputs(model: Module, examples: Iterable[Tensor], rank: int, gather: Gather) -> None:
    """Set A of every target from what it is fed for these examples, token ids [1, T]; on every rank at once."""
    starts = input_directions(model, examples, rank, gather)
    with torch.no_grad():
        for name, layer in adapted(model):
            a_RI = layer.lora_A[ADAPTER].weight
            b_OR = layer.lora_B[ADAPTER].weight
            a_RI.copy_(starts[name])
            b_OR.zero_()


def input_directions(model: Module, examples: Iterable[Tensor], rank: int, gather: Gather) -> Tensors:
    """The first principal directions [rank, in] of every target's inputs, by its name."""
    fits: Fits = {}
    for name, _ in adapted(model):
        fits[name] = IncrementalPCA(rank, lowrank=True, lowrank_seed=PEFTS_SEED)
    least = 2 * rank
    enough = max(TOKENS_PER_UPDATE, least)
    seen = 0  # tokens whose inputs the SVD has taken in
    waiting = 0  # tokens whose inputs wait for it
    model.eval()
    with torch.no_grad(), recorded_inputs(model) as recorded, gather.gathered_in_turn(model):
        for ids in examples:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            waiting += ids.numel()
            if waiting >= enough:
                update_fits(fits, recorded)
                seen += waiting
                waiting = 0
            if seen >= TOKENS:
                break
        if waiting > rank or not seen:
            update_fits(fits, recorded)
    model.train()
    components: Tensors = {}
    for name, fit in fits.items():
        components[name] = fit.components_
    return components


def update_fits(fits: Fits, recorded: Recorded) -> None:
    """Update each target's SVD with the inputs that were recorded, and forget them."""
    for name, inputs in recorded.items():
        together = torch.cat(inputs)
        fit = fits[name]
        fit.partial_fit(together)
        inputs.clear()


@contextmanager
def recorded_inputs(model: Module) -> Iterator[Recorded]:
    """Within it, every target's inputs are kept, fp32 [T, in]."""
    recorded: Recorded = {}
    handles = []
    for name, layer in adapted(model):
        inputs: list[Tensor] = []
        recorded[name] = inputs
        hook = _appending_to(inputs)
        handle = layer.register_forward_pre_hook(hook)
        handles.append(handle)
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _appending_to(recorded: list[Tensor]) -> Callable[..., None]:
    """A hook that appends a module's input to a list, fp32 [T, in]."""

    def append(_: Module, inputs: tuple[Tensor]) -> None:
        """Append the first of the inputs, flattened to [T, in]."""
        input_TI = inputs[0]
        input_TI = input_TI.flatten(0, -2)
        input_TI = input_TI.float()
        recorded.append(input_TI)

    return append
