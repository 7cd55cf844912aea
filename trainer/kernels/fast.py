"""Which parts of the fast path a model gets, and the check that it then computes what the plain path does.

A part is left out where the model is not made for it: a head that is adapted, has a bias or is followed by more than
itself; an attention that a method replaced, or in fp32. The parts together are tried on a probe of random tokens.
Where they fail, or differ from the plain path by more than rounding, layers are not compiled; where that does not
help either, the run is plain. At ZeRO 3 it is plain too: there a layer's weights are whole within its own forward
pass alone, between hooks that cannot be compiled.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from methods.parts import attention
from runfolder.job import Job
from trainer.data.layout import starts_of_documents
from trainer.data.tokens import virtual_ids
from trainer.kernels import Kernels
from trainer.kernels.documents import DOCUMENT_ATTENTION, LARGEST_HEAD, tell_documents
from trainer.kernels.head import Head
from trainer.kernels.layers import compile_layers, uncompile_layers
from trainer.objectives import labels

PROBE_LENGTHS = (40, 24)  # tokens of the probe's documents, beside virtual ones
PROBE_PARAMETERS = 8  # trained parameters whose gradient is compared
# Of a loss and of a gradient norm, relative to the plain path's; a mistake changes them by far more.
PROBE_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Probed(NamedTuple):
    """What a model makes of the probe: the loss of each label, and the norm of a few gradients."""

    losses: Tensor
    norm: Tensor


def is_fast(job: Job, device: torch.device) -> bool:
    """Whether a job asks for the fast path: as it says, else on a GPU, below ZeRO 3."""
    wanted = job.train.kernels
    if wanted == "auto":
        return device.type == "cuda" and job.sharding.zero != 3
    return wanted == "fast"


def make_fast(job: Job, model: nn.Module, dtype: torch.dtype, device: torch.device) -> tuple[Kernels, list[str]]:
    """Put a model that has no engine yet on the fast path; gives what it uses, and what was found against more."""
    if not is_fast(job, device):
        return Kernels(), []
    batch = _probe(job, model, device)
    problems = []
    with _without_dropout(model):
        expected = _probed(model, batch, Kernels())
        for compiled in (True, False):
            with ExitStack() as undo:
                kernels = _changed(job, model, dtype, device, compiled, undo)
                problem = _compared(model, batch, kernels, expected, dtype)
                if problem is None:
                    undo.pop_all()
                    return kernels, problems
                problems.append(problem)
    return Kernels(), problems


def _changed(
    job: Job, model: nn.Module, dtype: torch.dtype, device: torch.device, compiled: bool, undo: ExitStack
) -> Kernels:
    """Give a model all parts that it is made for, and `undo` what takes them back."""
    lower = dtype != torch.float32
    if lower:
        _leave_casts(model, undo)
    in_one_row = lower and device.type == "cuda" and _attends_within_documents(job, model, undo)
    if compiled:
        compile_layers(model)
        undo.callback(uncompile_layers, model)
    return Kernels(_head(model, dtype), in_one_row, compiled, device.type == "cuda")


def _leave_casts(model: nn.Module, undo: ExitStack) -> None:
    """Let adapters of PEFT take inputs as they are: autocast gives products their dtype, so casts are in vain."""
    for module in model.modules():
        if getattr(module, "cast_input_dtype_enabled", False):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
            undo.callback(setattr, module, "cast_input_dtype_enabled", True)


def _attends_within_documents(job: Job, model: nn.Module, undo: ExitStack) -> bool:
    """Change a base's dense attention to one within documents; False where it has another, or heads too large."""
    base = _base(model)
    config = base.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if base.config._attn_implementation != "sdpa" or size > LARGEST_HEAD or size % 8:
        return False
    try:
        attention.replace(base, DOCUMENT_ATTENTION, job.method.kind, job.method.kind)
    except ValueError:  # it calls an attention of its own
        return False
    hook = tell_documents(base.get_decoder(), job.data.seq_len)
    undo.callback(base.set_attn_implementation, "sdpa")
    undo.callback(hook.remove)
    return True


def _base(model: nn.Module) -> Any:
    """The base of transformers inside a model, which PEFT may have wrapped."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError("there is no base of transformers in the model")


def _head(model: nn.Module, dtype: torch.dtype) -> Head | None:
    """The head, where logits are the products of hidden states with its weight and nothing else."""
    base = _base(model)
    module = base.get_output_embeddings()
    if type(module) is not nn.Linear or module.bias is not None:
        return None
    head = Head(module, dtype)
    given: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    row = torch.zeros(1, 1, dtype=torch.long, device=module.weight.device)
    with torch.no_grad(), head.left_out():
        logits = base(input_ids=row, position_ids=row, use_cache=False).logits
    hook.remove()
    is_last = any(output is logits for output in given)
    return head if is_last else None


def _probe(job: Job, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """A micro-batch of two documents of random tokens in one row, in which nearly every token is a label."""
    vocabulary = _base(model).config.get_text_config().vocab_size
    virtual = virtual_ids(job.method.virtual_tokens)
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = []
    positions: list[int] = []
    for length in PROBE_LENGTHS:
        drawn = torch.randint(vocabulary, (length,), generator=generator)
        document = [*virtual, *drawn.tolist()]
        document = document[: job.data.seq_len]
        ids += document
        positions += range(len(document))
    input_ids = torch.tensor([ids])
    position_ids = torch.tensor([positions])
    kept = torch.arange(len(virtual), len(ids) - 1)
    label = input_ids[0, 1:][kept].clamp_min(0)
    starts = torch.from_numpy(starts_of_documents(position_ids.numpy()))
    batch = {"input_ids": input_ids, "position_ids": position_ids, "documents": starts, "kept": kept, "label": label}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _probed(model: nn.Module, batch: dict[str, Tensor], kernels: Kernels) -> Probed:
    """What a model makes of the probe, in training."""
    batch = dict(batch)
    if not kernels.in_one_row:
        del batch["documents"]
    if kernels.head:
        losses_N = labels.losses(model, batch, kernels.head)
    else:
        logits_NV = labels.logits(model, batch)
        losses_N = cross_entropy(logits_NV.float(), batch["label"], reduction="none")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(losses_N.sum(), trained[:PROBE_PARAMETERS], allow_unused=True)
    norms = [grad.float().norm() for grad in found if grad is not None]
    return Probed(losses_N.detach(), torch.stack(norms).norm())


def _compared(
    model: nn.Module, batch: dict[str, Tensor], kernels: Kernels, expected: Probed, dtype: torch.dtype
) -> str | None:
    """What is wrong with a model on the fast path; None where nothing is."""
    try:
        found = _probed(model, batch, kernels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a base of another kind raises
        return f"{', '.join(kernels.names)}: {type(error).__name__}: {error}"
    allowed = PROBE_ROUNDING[dtype]
    for name, value, truth in zip(Probed._fields, found, expected, strict=True):
        gap = (value - truth).abs().max() / truth.abs().max()
        if not float(gap) <= allowed:
            return f"{', '.join(kernels.names)}: the probe's {name} differ by {float(gap):.1e}"
    return None


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Within it, nothing is dropped, so that two passes are alike."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    shares = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer.p = share
