"""DeepSpeed's engine, and which rank owns which part of which trained parameter.

The only file that touches DeepSpeed's private names; it refuses another version than the one it was written for.

Every stage runs in DeepSpeed's fp32 mode: trained weights are fp32 and are their own masters, frozen weights keep
their dtype, and bf16 enters through autocast inside the forward pass. So gradients are accumulated and reduced in
fp32 at every stage, and three layouts remain: whole parameters (stage 0), one flat slice of all (1 and 2), and a
slice of each (3). Accumulation is ours to bound (`managed_gradient_accumulation: false`): gradients add up until
`engine.step()`. DeepSpeed averages over ranks, so a loss must be multiplied by the world size to give the sum.

The client optimizer's step is called once per step with every gradient in place. Its public hooks are where the norm
is taken, clipping happens, and a method sees the gradients.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from methods.base import Method

VERSION = "0.19.8"
ONE_GROUP = 10**15  # elements; more than any model has, so that stage 3 keeps all trained weights in one flat slice


@dataclass(frozen=True)
class Fragment:
    """The part [start, stop) of one flattened trained parameter that this rank holds."""

    name: str
    start: int
    stop: int
    owner: torch.Tensor
    offset: int
    optimizer: torch.optim.Optimizer

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.view(-1)[self.offset : self.offset + self.stop - self.start]

    @property
    def master(self) -> torch.Tensor:
        """The fp32 weights, 1-D."""
        return self._part(self.owner.data)

    @property
    def grad(self) -> torch.Tensor | None:
        """The gradient summed over ranks and micro-batches, 1-D; only between the backward pass and the step."""
        return self._part(self.owner.grad) if self.owner.grad is not None else None

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors for these elements, 1-D, by name."""
        states = self.optimizer.state[self.owner].items()
        return {key: self._part(value) for key, value in states if _is_elementwise(value, self.owner)}

    def owned(self, rank: int, world: int) -> slice:
        """Which of these elements this rank answers for when every rank holds them all."""
        size = math.ceil((self.stop - self.start) / world)
        return slice(min(rank * size, self.stop - self.start), min((rank + 1) * size, self.stop - self.start))


class Shards:
    """A model under DeepSpeed: backward, step, and the trained state by name (a `methods.base.View`)."""

    def __init__(self, model: nn.Module, method: Method[Any], optimizer: torch.optim.Optimizer, stage: int) -> None:
        self.stage = stage
        self.replicated = stage == 0
        self.method = method
        self.optimizer = optimizer
        self.grad_norm: torch.Tensor | None = None
        self.clip: float | None = None
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._shapes = {name: shape(p) for name, p in model.named_parameters() if p.requires_grad}
        self.engine = _engine(model, optimizer, stage)
        self._fragments = list(self._layout())
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def fragments(self) -> list[Fragment]:
        """What this rank holds."""
        return self._fragments

    def shape(self, name: str) -> torch.Size:
        """The whole shape of a trained parameter."""
        return self._shapes[name]

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss that is summed over ranks."""
        self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def step(self, lr: float, clip: float | None) -> torch.Tensor:
        """Apply the gradients and give their global norm before clipping, a 0-d fp64 tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.clip, self.grad_norm = clip, None
        self.engine.step()
        # Stage 3 skips the step by itself when the norm is not finite.
        return self.grad_norm if self.grad_norm is not None else torch.tensor(math.nan)

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every trained parameter, whole, on the host of rank 0 (empty elsewhere); a collective."""
        import deepspeed

        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    yield name, parameter.detach().to("cpu", copy=True) if dist.get_rank() == 0 else torch.empty(0)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = self._norm(grads)
        if self.clip is not None:
            scale = torch.clamp(self.clip / (self.grad_norm + 1e-6), max=1.0)
            for grad in grads:
                grad.mul_(scale.to(grad.dtype))
        self.method.before_step(self)

    def _after_step(self, *_: object) -> None:
        self.method.after_step(self)

    def _norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        square = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) ** 2 for g in grads]).sum()
        if not self.replicated:
            dist.all_reduce(square)
        return square.sqrt()

    def _layout(self) -> Iterator[Fragment]:
        if self.stage == 0:
            for name, parameter in self.engine.module.named_parameters():
                if parameter.requires_grad:
                    yield Fragment(name, 0, parameter.numel(), parameter, 0, self.optimizer)
        elif self.stage == 3:
            yield from self._slices_of_each()
        else:
            yield from self._slice_of_all()

    def _slice_of_all(self) -> Iterator[Fragment]:
        zero = self.engine.optimizer
        (owner,) = zero.single_partition_of_fp32_groups
        size = int(zero.partition_size[0])
        left = dist.get_rank() * size
        for parameter, offset in zip(
            zero.round_robin_bit16_groups[0], zero.round_robin_bit16_offsets[0], strict=True
        ):
            start, stop = max(left, offset), min(left + size, offset + parameter.numel())
            if start < stop:
                yield Fragment(
                    self._names[id(parameter)], start - offset, stop - offset, owner, start - left, self.optimizer
                )

    def _slices_of_each(self) -> Iterator[Fragment]:
        zero = self.engine.optimizer
        (owner,) = zero.fp32_partitioned_groups_flat
        offset = 0
        for parameter in zero.fp16_groups[0]:
            size = parameter.partition_numel()
            start = dist.get_rank() * size
            stop = min(start + size, parameter.ds_numel)
            if start < stop:
                yield Fragment(self._names[id(parameter)], start, stop, owner, offset, self.optimizer)
            offset += size


def config(stage: int, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage, for so many trained elements."""
    bucket = max(2**20, min(50_000_000, trained))
    sharding: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage in (1, 2):
        sharding["compute_grad_norm"] = False
    if stage == 3:
        sharding |= {"sub_group_size": ONE_GROUP, "stage3_prefetch_bucket_size": bucket}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_optimization": sharding,
    }


def prepare() -> None:
    """Check DeepSpeed's version and keep it from compiling its shared-memory op, before distributed starts.

    The op is built at the first `init_distributed`, and a lock that a killed process left makes the next one hang
    without a word. Gloo does not need it.
    """
    if version("deepspeed") != VERSION:
        raise RuntimeError(f"deepspeed {version('deepspeed')} is installed; trainer/zero.py is written for {VERSION}")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def partitioned_loading(stage: int, dtype: torch.dtype) -> Iterator[None]:
    """Within it, `from_pretrained` at stage 3 keeps only this rank's slices, in `dtype`, and PEFT gathers them."""
    if stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # transformers holds it weakly: it must live as long as the block.
    alive = HfDeepSpeedConfig(config(stage, 0) | {"bf16": {"enabled": dtype == torch.bfloat16}})
    yield
    del alive


def assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a trained parameter, sharded or not, before the engine exists; at stage 3 every rank calls it."""
    import deepspeed

    parameter = model.get_parameter(name)
    sharded = hasattr(parameter, "ds_id")
    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
        if not sharded or dist.get_rank() == 0:
            parameter.copy_(value.view(parameter.shape).to(parameter.device))


def shape(parameter: nn.Parameter) -> torch.Size:
    """The whole shape of a parameter, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _engine(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    import deepspeed

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, trained))
    return engine


def _is_elementwise(value: object, owner: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == owner.numel() and value.dim() > 0
