"""Which parts of the fast path a model gets, and the check that it then computes what the plain path does.

A part is left out where the model is not made for it: a head that is adapted, has a bias or is followed by more than
itself; an attention that a method replaced, or in fp32. The parts together are tried on a probe of random tokens.
Where they fail, or differ from the plain path by more than rounding, documents get rows of their own; where that does
not help, layers are not compiled either; and in the end the run is plain. At ZeRO 3 it is plain too: there no worker
has the whole base when the probe is tried, before there is an engine.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from methods.base import Method
from methods.parts import attention
from methods.prefix import ATTENTION as PREFIX
from runfolder.job import Job
from runfolder.objectives import shares_prompts
from trainer.answers_apart import problem_of_branches
from trainer.data.tokens import virtual_ids
from trainer.kernels import Kernels
from trainer.kernels.documents import DOCUMENT_ATTENTION, LARGEST_HEAD, tell_documents
from trainer.kernels.head import LinearHead
from trainer.kernels.layers import compile_layers, uncompile_layers
from trainer.kernels.prefixed import PREFIX_ATTENTION
from trainer.objectives import labels
from trainer.objectives.score_head import revealed

ATTEMPTS = (
    Kernels(in_one_row=True, compiled=True),
    Kernels(in_one_row=False, compiled=True),
    Kernels(in_one_row=False, compiled=False),
)
# By a base's attention the one that does the same within documents.
IN_ONE_ROW = {"sdpa": DOCUMENT_ATTENTION, PREFIX: PREFIX_ATTENTION}
PROBE_LENGTH = 32  # tokens of each of the probe's documents, beside virtual ones
PROBE_PARAMETERS = 8  # trained parameters whose gradient is compared
# Norm of the difference over that of the plain path's values: bf16 takes 0.03 of the logits of 16 layers.
PROBE_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}
ProbeBatch = dict[str, Tensor]


class Probed(NamedTuple):
    """What a model makes of the probe: logits and loss of each label, and the norm of a few gradients."""

    logits: Tensor
    losses: Tensor
    norm: Tensor


def is_fast(job: Job, device: torch.device) -> bool:
    """Whether a job asks for the fast path: as it says, else on a GPU, below ZeRO 3."""
    wanted = job.train.kernels
    if wanted == "auto":
        return device.type == "cuda" and job.sharding.zero != 3
    return wanted == "fast"


def make_fast(job: Job, model: nn.Module, method: Method[Any], dtype: torch.dtype, device: torch.device) -> Kernels:
    """Put a model that has no engine yet on the fast path, as far as it can be; gives what it uses."""
    if not is_fast(job, device):
        return Kernels()
    documents = _probe(job, model, device)
    rounding = PROBE_ROUNDING[dtype]
    vocabulary = _base(model).config.get_text_config().vocab_size
    problems: list[str] = []
    with _without_dropout(model), revealed(model):
        expected = _probed(model, documents, Kernels())
        for wanted in ATTEMPTS:
            with ExitStack() as undo:
                kernels = _changed(job, model, dtype, wanted, undo)
                method.speed_up(model, undo)
                problem = _problem(model, documents, kernels, expected, rounding)
                if problem is None and shares_prompts(job.objective):
                    problem = problem_of_branches(model, vocabulary, device, kernels.in_one_row, rounding)
                if problem is None:
                    undo.pop_all()
                    return replace(kernels, problems=problems)
                if problem not in problems:
                    problems.append(problem)
    return Kernels(problems=problems)


def _changed(job: Job, model: nn.Module, dtype: torch.dtype, wanted: Kernels, undo: ExitStack) -> Kernels:
    """Give a model the parts that are wanted and that it is made for, and `undo` what takes them back."""
    head = linear_head(model, dtype)
    parameter = next(model.parameters())
    on_gpu = parameter.is_cuda
    lower = dtype != torch.float32
    in_one_row = False
    if lower:
        _leave_casts(model, undo)
    if wanted.in_one_row and lower and on_gpu:
        in_one_row = _attends_within_documents(job, model, undo)
    if wanted.compiled:
        compile_layers(model)
        undo.callback(uncompile_layers, model)
    return Kernels(head, in_one_row, wanted.compiled, fused_step=on_gpu)


def _leave_casts(model: nn.Module, undo: ExitStack) -> None:
    """Let adapters of PEFT take inputs as they are: autocast gives products their dtype, so casts are in vain."""
    name = "cast_input_dtype_enabled"
    for module in model.modules():
        if getattr(module, name, False):
            setattr(module, name, False)
            undo.callback(setattr, module, name, True)


def _attends_within_documents(job: Job, model: nn.Module, undo: ExitStack) -> bool:
    """Change a base's attention to the same within documents; False where none is known, or heads are too large."""
    base = _base(model)
    config = base.config.get_text_config()
    size = getattr(config, "head_dim", None)
    if size is None:
        size = config.hidden_size // config.num_attention_heads
    if size > LARGEST_HEAD or size % 8:
        return False
    before = base.config._attn_implementation
    if before not in IN_ONE_ROW:
        return False
    kind = job.method.kind
    try:
        attention.replace(base, IN_ONE_ROW[before], kind, nearest=kind)
    except ValueError:  # it calls an attention of its own
        return False
    undo.callback(base.set_attn_implementation, before)
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
    if type(module) is not nn.Linear:
        return None
    if module.bias is not None:
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


def _probe(job: Job, model: nn.Module, device: torch.device) -> list[Tensor]:
    """The ids of two documents of random tokens, of the same length."""
    config = _base(model).config.get_text_config()
    virtual = virtual_ids(job.method.virtual_tokens)
    virtual_V = torch.tensor(virtual, dtype=torch.long)
    generator = torch.Generator()
    generator.manual_seed(0)
    documents = []
    for _ in range(2):
        drawn = torch.randint(config.vocab_size, (PROBE_LENGTH,), generator=generator)
        ids_T = torch.cat([virtual_V, drawn])
        ids_T = ids_T[: job.data.seq_len]
        document = ids_T.to(device)
        documents.append(document)
    return documents


def _probe_row(documents: list[Tensor]) -> ProbeBatch:
    """A micro-batch of documents in one row, of which each token is a label that is not virtual."""
    length = len(documents[0])
    ids_T = torch.cat(documents)
    place_T = torch.arange(len(ids_T), device=ids_T.device)
    position_T = place_T % length
    is_real_T = ids_T >= 0
    has_one_before_T = position_T > 0
    is_label_T = is_real_T & has_one_before_T
    (label_place,) = is_label_T.nonzero(as_tuple=True)
    end = len(ids_T) + 1
    starts = torch.arange(0, end, length, dtype=torch.int32, device=ids_T.device)
    return {
        "input_ids": ids_T[None],
        "position_ids": position_T[None],
        "kept": label_place - 1,
        "label": ids_T[label_place],
        "documents": starts,
    }


def _probed(model: nn.Module, documents: list[Tensor], kernels: Kernels) -> Probed:
    """What a model makes of the probe's documents in training: in one row, where it knows them apart."""
    batches = [_probe_row(documents)]
    if not kernels.in_one_row:
        batches = []
        for document in documents:
            batch = _probe_row([document])
            del batch["documents"]
            batches.append(batch)
    logits = []
    losses = []
    for batch in batches:
        logits_NV, losses_N = _predicted(model, batch, kernels.head)
        logits.append(logits_NV)
        losses.append(losses_N)
    all_losses = torch.cat(losses)
    total = all_losses.sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    compared = trained[:PROBE_PARAMETERS]
    gradients = torch.autograd.grad(total, compared, allow_unused=True)
    norms = []
    for gradient in gradients:
        if gradient is not None:
            fp32 = gradient.float()
            norm = fp32.norm()
            norms.append(norm)
    stacked = torch.stack(norms)
    norm = stacked.norm()
    all_logits = torch.cat(logits)
    all_logits = all_logits.float()
    all_losses = all_losses.detach()
    return Probed(all_logits, all_losses, norm)


def _predicted(model: nn.Module, batch: ProbeBatch, head: LinearHead | None) -> tuple[Tensor, Tensor]:
    """The logits [N, V] of a batch's labels, without their gradient, and the losses [N]."""
    label_N = batch["label"]
    if head is None:
        logits_NV = labels.logits(model, batch)
        fp32_NV = logits_NV.float()
        width = logits_NV.shape[1]  # of hidden states, where they are revealed
        losses_N = cross_entropy(fp32_NV, label_N % width, reduction="none")
        return logits_NV.detach(), losses_N
    with head.left_out():
        hidden_ND = labels.logits(model, batch)
    losses_N = head.losses(hidden_ND, label_N)
    without_gradient = hidden_ND.detach()
    return head.logits(without_gradient), losses_N


def _problem(
    model: nn.Module, documents: list[Tensor], kernels: Kernels, expected: Probed, rounding: float
) -> str | None:
    """What is wrong with a model on the fast path; None where nothing is."""
    names = ", ".join(kernels.names)
    try:
        found = _probed(model, documents, kernels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, or a base of another kind, raises
        kind = type(error)
        return f"{names}: {kind.__name__}: {error}"
    for name, value, truth in zip(Probed._fields, found, expected, strict=True):
        difference = value - truth
        gap = difference.norm() / truth.norm()
        relative = float(gap)
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
