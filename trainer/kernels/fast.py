"""Which parts of the fast path a model gets: those with which it computes what it does on the plain path.

A part is left out where the model is not made for it: a head that is adapted, has a bias or is followed by more than
itself; an attention that a method replaced, or in fp32. The parts together are tried on a probe (probe.py).
Where they fail, or differ from the plain path by more than rounding, documents get rows of their own; where that does
not help, layers are not compiled either; and in the end the run is plain. At ZeRO 3 no worker has the whole base when
the probe is tried, before there is an engine: so it is tried on the first layers.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.base import Method
from methods.parts import attention
from methods.parts.peft_adapter import trained_in_place_of
from methods.parts.quantised import four_bit_layers
from methods.prefix import ATTENTION as PREFIX
from runfolder.job import Job
from runfolder.objectives import shares_prompts
from trainer.answers_apart import problem_of_branches
from trainer.kernels import Kernels
from trainer.kernels.documents import DOCUMENT_ATTENTION, LARGEST_HEAD, tell_documents
from trainer.kernels.head import LinearHead
from trainer.kernels.layers import compile_layers, uncompile_layers
from trainer.kernels.prefixed import PREFIX_ATTENTION
from trainer.kernels.probe import PROBE_ROUNDING, probe_documents, probed, problem_of_probe, without_dropout
from trainer.objectives.score_head import revealed
from trainer.zero.by_layer import whole_in_part

ATTEMPTS = (
    Kernels(in_one_row=True, compiled=True),
    Kernels(in_one_row=False, compiled=True),
    Kernels(in_one_row=False, compiled=False),
)
# By a base's attention the one that does the same within documents.
IN_ONE_ROW = {"sdpa": DOCUMENT_ATTENTION, PREFIX: PREFIX_ATTENTION}


def is_fast(job: Job, device: torch.device) -> bool:
    """Whether a job is to be on the fast path: as it says, else on a GPU where it is fast by itself."""
    wanted = job.train.kernels
    if wanted == "auto":
        return device.type == "cuda" and job.is_fast_on_gpus
    return wanted == "fast"


def make_fast(job: Job, model: nn.Module, method: Method[Any], dtype: torch.dtype, device: torch.device) -> Kernels:
    """Put a model that has no engine yet on the fast path, as far as it can be; gives what it uses."""
    if not is_fast(job, device):
        return Kernels()
    vocabulary = _base(model).config.get_text_config().vocab_size
    documents = probe_documents(job, vocabulary, device)
    rounding = PROBE_ROUNDING[dtype]
    problems: list[str] = []
    sharded = job.sharding.zero == 3
    with without_dropout(model), revealed(model):
        expected = probed(model, documents, Kernels())
        for wanted in ATTEMPTS:
            with ExitStack() as undo:
                kernels = _changed(job, model, dtype, wanted, undo)
                method.speed_up(model, undo, sharded)
                problem = problem_of_probe(model, documents, kernels, expected, rounding)
                if problem is None and shares_prompts(job.objective):
                    with whole_in_part(model):
                        problem = problem_of_branches(model, vocabulary, device, kernels.in_one_row, rounding)
                problem = _of_any_rank(problem)
                if problem is None:
                    undo.pop_all()
                    return replace(kernels, problems=problems)
                if problem not in problems:
                    problems.append(problem)
    return Kernels(problems=problems)


def _of_any_rank(problem: str | None) -> str | None:
    """The first problem that a rank has, so that all go on alike."""
    if not dist.is_initialized():
        return problem
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)


def _changed(job: Job, model: nn.Module, dtype: torch.dtype, wanted: Kernels, undo: ExitStack) -> Kernels:
    """Give a model the parts that are wanted and that it is made for, and `undo` what takes them back."""
    sharded = job.sharding.zero == 3
    head = linear_head(model, dtype, sharded)
    parameter = next(model.parameters())
    on_gpu = parameter.is_cuda
    lower = dtype != torch.float32
    in_one_row = False
    if lower:
        _leave_casts(model, undo)
    if on_gpu and any(four_bit_layers(model)):
        from trainer.kernels.four_bits import make_whole_at_once  # it imports bitsandbytes

        make_whole_at_once(model, undo)
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


def linear_head(model: nn.Module, dtype: torch.dtype, sharded: bool) -> LinearHead | None:
    """The head, where logits are the products of hidden states with its weight and nothing else.

    Where weights are sharded it must be frozen: the gradient of one comes when it is not whole any more.
    """
    base = _base(model)
    module = trained_in_place_of(base.get_output_embeddings())
    if type(module) is not nn.Linear:
        return None
    if module.bias is not None:
        return None
    if sharded and module.weight.requires_grad:
        return None
    head = LinearHead(base, dtype)
    device = module.weight.device
    given: list[Tensor] = []
    row = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad(), whole_in_part(model), head.left_out() as gap:
        gap.register_forward_hook(lambda _module, _inputs, output: given.append(output))
        output = base(input_ids=row, position_ids=row, use_cache=False)
    for tensor in given:
        if tensor is output.logits:
            return head
    return None
