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
from torch import nn

from methods.base import Gather
from methods.parts.initial import adapted
from methods.parts.peft_adapter import ADAPTER

TOKENS = 8192  # after which directions of a few dozen have settled
AT_ONCE = 512  # tokens whose inputs are held for a step of the SVD
PEFTS_SEED = 42  # of the sketch in it: where no direction stands out, it decides


def start_from_inputs(model: nn.Module, examples: Iterable[torch.Tensor], rank: int, gather: Gather) -> None:
    """Set A of every target from what it is fed for these examples, token ids [1, T]; on every rank at once."""
    found = directions(model, examples, rank, gather)
    with torch.no_grad():
        for name, layer in adapted(model):
            layer.lora_A[ADAPTER].weight.copy_(found[name])
            layer.lora_B[ADAPTER].weight.zero_()


def directions(
    model: nn.Module, examples: Iterable[torch.Tensor], rank: int, gather: Gather
) -> dict[str, torch.Tensor]:
    """The first principal directions [rank, in] of every target's inputs, by its name."""
    fits = {name: IncrementalPCA(rank, lowrank=True, lowrank_seed=PEFTS_SEED) for name, _ in adapted(model)}
    enough, seen, waiting = max(AT_ONCE, 2 * rank), 0, 0
    model.eval()
    with torch.no_grad(), listening(model) as heard, gather.gathered_in_turn(model):
        for ids in examples:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            waiting += ids.numel()
            if waiting >= enough:
                fit(fits, heard)
                seen, waiting = seen + waiting, 0
            if seen >= TOKENS:
                break
        if waiting > rank or not seen:
            fit(fits, heard)
    model.train()
    return {name: fitted.components_ for name, fitted in fits.items()}


def fit(fits: dict[str, IncrementalPCA], heard: dict[str, list[torch.Tensor]]) -> None:
    """Go on with the inputs that were heard, and forget them."""
    for name, inputs in heard.items():
        fits[name].partial_fit(torch.cat(inputs))
        inputs.clear()


@contextmanager
def listening(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Within it, every target's inputs are kept, fp32 [T, in]."""
    heard: dict[str, list[torch.Tensor]] = {name: [] for name, _ in adapted(model)}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs: heard[name].append(inputs[0].flatten(0, -2).float())

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in adapted(model)]
    yield heard
    for handle in handles:
        handle.remove()
