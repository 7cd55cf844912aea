"""Which parts of the fast path a model gets, and the check that it then computes what the plain path does.

A part is left out where the model is not made for it: a head that is adapted, has a bias or is followed by more than
itself; an attention that a method replaced, or in fp32. The parts together are tried on a probe of random tokens.
Where they fail, or differ from the plain path by more than rounding, layers are not compiled; where that does not
help either, the run is plain. At ZeRO 3 it is plain too: there a layer's weights are whole within its own forward
pass alone, between hooks that cannot be compiled.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from methods.parts import attention
from runfolder.job import Job
from trainer.data.one_row import starts_of_documents
from trainer.data.tokens import virtual_ids
from trainer.kernels import Kernels
from trainer.kernels.documents import DOCUMENT_ATTENTION, LARGEST_HEAD, tell_documents
from trainer.kernels.head import LinearHead
from trainer.kernels.layers import compile_layers, uncompile_layers
from trainer.objectives import labels

PROBE_LENGTHS = (40, 24)  # tokens of the probe's documents, beside virtual ones
PROBE_PARAMETERS = 8  # trained parameters whose gradient is compared
# Of a loss and of a gradient norm, relative to the plain path's; a mistake changes them by far more.
PROBE_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
ProbeBatch = dict[str, Tensor]


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


def make_fast(job: Job, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Kernels:
    """Put a model that has no engine yet on the fast path, as far as it can be; gives what it uses."""
    if not is_fast(job, device):
        return Kernels()
    batch = _probe(job, model, device)
    problems: list[str] = []
    with _without_dropout(model):
        expected = _probed(model, batch, Kernels())
        for compiled in (True, False):
            with ExitStack() as undo:
                kernels = _changed(job, model, dtype, device, compiled, undo)
                problem = _problem(model, batch, kernels, expected, PROBE_ROUNDING[dtype])
                if problem is None:
                    undo.pop_all()
                    return replace(kernels, problems=problems)
                problems.append(problem)
    return Kernels(problems=problems)


def _changed(
    job: Job, model: nn.Module, dtype: torch.dtype, device: torch.device, compiled: bool, undo: ExitStack
) -> Kernels:
    """Give a model all parts that it is made for, and `undo` what takes them back."""
    lower = dtype != torch.float32
    on_gpu = device.type == "cuda"
    in_one_row = False
    if lower:
        _leave_casts(model, undo)
    if lower and on_gpu:
        in_one_row = _attends_within_documents(job, model, undo)
    if compiled:
        compile_layers(model)
        undo.callback(uncompile_layers, model)
    head = linear_head(model, dtype)
    return Kernels(head, in_one_row, compiled, fused_step=on_gpu)


def _leave_casts(model: nn.Module, undo: ExitStack) -> None:
    """Let adapters of PEFT take inputs as they are: autocast gives products their dtype, so casts are in vain."""
    name = "cast_input_dtype_enabled"
    for module in model.modules():
        if getattr(module, name, False):
            setattr(module, name, False)
            undo.callback(setattr, module, name, True)


def _attends_within_documents(job: Job, model: nn.Module, undo: ExitStack) -> bool:
    """Change a base's dense attention to one within documents; False where it has another, or heads too large."""
    base = _base(model)
    config = base.config.get_text_config()
    size = getattr(config, "head_dim", None)
    if size is None:
        size = config.hidden_size // config.num_attention_heads
    fits = size <= LARGEST_HEAD and size % 8 == 0
    if base.config._attn_implementation != "sdpa" or not fits:
        return False
    kind = job.method.kind
    try:
        attention.replace(base, DOCUMENT_ATTENTION, kind, nearest=kind)
    except ValueError:  # it calls an attention of its own
        return False
    undo.callback(base.set_attn_implementation, "sdpa")
    decoder = base.get_decoder()
    hook = tell_documents(decoder, job.data.seq_len)
    undo.callback(hook.remove)
    return True


def _base(model: nn.Module) -> Any:
    """The base of transformers inside a model, which PEFT may have wrapped."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError("there is no base of transformers in the model")


def linear_head(model: nn.Module, dtype: torch.dtype) -> LinearHead | None:
    """The head, where logits are the products of hidden states with its weight and nothing else."""
    base = _base(model)
    module = base.get_output_embeddings()
    if type(module) is not nn.Linear or module.bias is not None:
        return None
    head = LinearHead(module, dtype)
    device = module.weight.device
    given: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    row = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad(), head.left_out():
        output = base(input_ids=row, position_ids=row, use_cache=False)
    hook.remove()
    for tensor in given:
        if tensor is output.logits:
            return head
    return None


def _probe(job: Job, model: nn.Module, device: torch.device) -> ProbeBatch:
    """A micro-batch of two documents of random tokens in one row, in which nearly every token is a label."""
    config = _base(model).config.get_text_config()
    virtual = virtual_ids(job.method.virtual_tokens)
    generator = torch.Generator()
    generator.manual_seed(0)
    ids: list[int] = []
    positions: list[int] = []
    for length in PROBE_LENGTHS:
        size = (length,)
        drawn = torch.randint(config.vocab_size, size, generator=generator)
        document = [*virtual, *drawn.tolist()]
        document = document[: job.data.seq_len]
        ids += document
        positions += range(len(document))
    input_ids = torch.tensor([ids], device=device)
    position_ids = torch.tensor([positions])
    starts = starts_of_documents(position_ids.numpy())
    first = len(virtual)
    last = len(ids) - 1
    kept = torch.arange(first, last, device=device)
    next_ids = input_ids[0, 1:]
    label = next_ids[kept]
    batch = {"input_ids": input_ids, "kept": kept}
    batch["position_ids"] = position_ids.to(device)
    batch["label"] = label.clamp_min(0)  # virtual tokens are none
    documents = torch.from_numpy(starts)
    batch["documents"] = documents.to(device)
    return batch


def _probed(model: nn.Module, batch: ProbeBatch, kernels: Kernels) -> Probed:
    """What a model makes of the probe, in training."""
    batch = dict(batch)
    if not kernels.in_one_row:
        del batch["documents"]
    if kernels.head:
        losses_N = labels.losses(model, batch, kernels.head)
    else:
        logits_NV = labels.logits(model, batch)
        fp32_NV = logits_NV.float()
        losses_N = cross_entropy(fp32_NV, batch["label"], reduction="none")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    compared = trained[:PROBE_PARAMETERS]
    total = losses_N.sum()
    gradients = torch.autograd.grad(total, compared, allow_unused=True)
    norms = []
    for gradient in gradients:
        if gradient is not None:
            norm = gradient.float().norm()
            norms.append(norm)
    losses = losses_N.detach()
    stacked = torch.stack(norms)
    return Probed(losses, stacked.norm())


def _problem(model: nn.Module, batch: ProbeBatch, kernels: Kernels, expected: Probed, rounding: float) -> str | None:
    """What is wrong with a model on the fast path; None where nothing is."""
    names = ", ".join(kernels.names)
    try:
        found = _probed(model, batch, kernels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, or a base of another kind, raises
        kind = type(error).__name__
        return f"{names}: {kind}: {error}"
    for name, value, truth in zip(Probed._fields, found, expected, strict=True):
        difference = value - truth
        gap = difference.abs().max()
        largest = truth.abs().max()
        relative = float(gap / largest)
        if not relative <= rounding:  # also where it is NaN
            return f"{names}: the probe's {name} differ by {relative:.1e}"
    return None


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Within it, nothing is dropped, so that two passes are alike."""
    shares: dict[nn.Dropout, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            shares[module] = module.p
            module.p = 0.0
    try:
        yield
    finally:
        for module, share in shares.items():
            module.p = share
