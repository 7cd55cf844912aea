"""DeepSpeed's engine, and which rank owns which part of which trained parameter.

The only file that touches DeepSpeed's private names; it refuses another version than the one it was written for.

Every stage runs in DeepSpeed's fp32 mode: trained weights are fp32 and are their own masters, frozen weights keep
their dtype, and bf16 enters through autocast inside the forward pass. So gradients are accumulated and reduced in
fp32 at every stage, and three layouts remain: whole parameters (stage 0), one flat slice of all (1 and 2), and a
slice of each (3). Accumulation is ours to bound (`managed_gradient_accumulation: false`): gradients add up until
`engine.step()`. DeepSpeed averages over ranks, so a loss must be multiplied by the world size to give the sum.

What DeepSpeed takes for the optimizer is a door: its step is called once per step with every gradient in place, and
hands over to an optimizer that knows fragments of named parameters instead of flat slices.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from methods.base import Fragment as AnyFragment
from methods.base import Method, Piece

VERSION = "0.19.8"
ONE_GROUP = 10**15  # elements; more than any model has, so that stage 3 keeps all trained weights in one flat slice


@dataclass(frozen=True, eq=False)
class Fragment:
    """The part [start, stop) of one flattened trained parameter that this rank holds."""

    name: str
    start: int
    stop: int
    owner: torch.Tensor
    offset: int
    parameter: nn.Parameter

    @classmethod
    def of(cls, name: str, start: int, stop: int, owner: torch.Tensor, offset: int) -> "Fragment":
        """The elements of `owner` from `offset` on, as a parameter of their own that shares their memory."""
        view = owner.data.view(-1)[offset : offset + stop - start]
        return cls(name, start, stop, owner, offset, nn.Parameter(view))

    def take_gradient(self) -> None:
        """Let the parameter's gradient be the owner's."""
        grad = self.owner.grad
        part = slice(self.offset, self.offset + self.stop - self.start)
        self.parameter.grad = grad.view(-1)[part] if grad is not None else None


class _Door(torch.optim.Optimizer):  # type: ignore[misc]
    """DeepSpeed's optimizer: a step that does what it was told to."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__([{"params": parameters}], {"lr": 0.0})
        self.enter: Callable[[], None] = lambda: None

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        """Hand over."""
        with torch.no_grad():
            self.enter()


class Shards:
    """A model under DeepSpeed: backward, step, and the trained state by name (a `methods.base.View`)."""

    def __init__(
        self, model: nn.Module, method: Method[Any], stage: int, lr: float = 0.0, adam: dict[str, Any] | None = None
    ) -> None:
        self.model = model
        self.stage = stage
        self.replicated = stage == 0
        self.method = method
        self._clip: float | None = None
        self._grad_norm: torch.Tensor | None = None
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = {id(p): name for name, p in named}
        self._shapes = {name: shape(p) for name, p in named}
        door = _Door([p for _, p in named])
        self.engine = _engine(model, door, stage)
        # A method that sums gradients itself gets each rank's own share, where DeepSpeed would sum whole ones.
        self._averaged = stage != 0 or not method.reduces
        self.engine.enable_backward_allreduce = self._averaged
        self._fragments = list(self._layout())
        self._by_name = {fragment.name: fragment for fragment in self._fragments}
        self.optimizer = method.optimizer(self._fragments, lr, **(adam or {}))
        door.enter = self._enter

    def fragments(self) -> Sequence[Fragment]:
        """What this rank holds."""
        return self._fragments

    def shape(self, name: str) -> torch.Size:
        """The whole shape of a trained parameter."""
        return self._shapes[name]

    def whole(self, name: str, part: Callable[[AnyFragment], torch.Tensor]) -> torch.Tensor:
        """What all ranks' parts of a trained parameter make, in its shape, on every rank; a collective."""
        fragment = self._by_name.get(name)
        if self.replicated and fragment is not None:
            return part(fragment).view(self.shape(name))
        device = self._fragments[0].parameter.device if self._fragments else next(self.model.parameters()).device
        out = torch.zeros(self.shape(name), device=device)
        if fragment is not None:
            out.view(-1)[fragment.start : fragment.stop] = part(fragment)
        dist.all_reduce(out)
        return out

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it, these weights of the model are whole on every rank; rank 0's changes to them stay."""
        import deepspeed

        gather: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=0, enabled=self.stage == 3
        )
        return gather

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss that is summed over ranks."""
        self.engine.backward(loss * dist.get_world_size() if self._averaged else loss, scale_wrt_gas=False)

    def step(self, lr: float, clip: float | None) -> torch.Tensor:
        """Apply the gradients and give their global norm before clipping, a 0-d fp64 tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        self._clip, self._grad_norm = clip, None
        self.engine.step()
        # Stage 3 skips the step by itself when the norm is not finite.
        return self._grad_norm if self._grad_norm is not None else torch.tensor(math.nan)

    def pieces(self) -> list[Piece]:
        """All of the trained state that this rank holds: weights, the optimizer's tensors, the method's own."""
        trained = [
            Piece(f.name, f.start, {"weight": f.parameter.data, **self._state(f)}, self.replicated)
            for f in self._fragments
        ]
        return [*trained, *self._changed(), *self.method.pieces()]

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the output holds, whole, on the host of rank 0 (empty elsewhere); a collective.

        Every parameter where the output is a model, else those that are trained or changed.
        """
        import deepspeed

        changed, all_ = set(self.method.changed(self.model)), self.method.options.makes_model
        for name, parameter in self.model.named_parameters():
            if all_ or parameter.requires_grad or name in changed:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    yield name, parameter.detach().to("cpu", copy=True) if dist.get_rank() == 0 else torch.empty(0)

    def _enter(self) -> None:
        for fragment in self._fragments:
            fragment.take_gradient()
        self.method.penalty(self)
        grads = self.method.gradients(self)
        self._grad_norm = self._norm(grads)
        if self._clip is not None:
            scale = torch.clamp(self._clip / (self._grad_norm + 1e-6), max=1.0)
            for grad in grads:
                grad.mul_(scale.to(grad.dtype))
        self.method.before_step(self)
        self.optimizer.step()
        self.method.after_step(self)

    def _norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        device = next(self.model.parameters()).device
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64) ** 2 for g in grads]
        square = torch.stack([torch.zeros((), dtype=torch.float64, device=device), *squares]).sum()
        if not self.replicated:
            dist.all_reduce(square)
        return square.sqrt()

    def _state(self, fragment: Fragment) -> dict[str, torch.Tensor]:
        state = self.optimizer.state.get(fragment.parameter, {})
        return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}

    def _changed(self) -> Iterator[Piece]:
        for name in self.method.changed(self.model):
            parameter = self.model.get_parameter(name)
            if self.stage != 3:
                yield Piece(name, 0, {"weight": parameter.data.view(-1)}, True)
                continue
            size = parameter.partition_numel()
            start = dist.get_rank() * size
            held = min(size, parameter.ds_numel - start)
            if held > 0:
                yield Piece(name, start, {"weight": parameter.ds_tensor.data[:held]}, False)

    def _layout(self) -> Iterator[Fragment]:
        if self.stage == 0:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    yield Fragment.of(name, 0, parameter.numel(), parameter, 0)
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
                yield Fragment.of(self._names[id(parameter)], start - offset, stop - offset, owner, start - left)

    def _slices_of_each(self) -> Iterator[Fragment]:
        zero = self.engine.optimizer
        (owner,) = zero.fp32_partitioned_groups_flat
        offset = 0
        for parameter in zero.fp16_groups[0]:
            size = parameter.partition_numel()
            start = dist.get_rank() * size
            stop = min(start + size, parameter.ds_numel)
            if start < stop:
                yield Fragment.of(self._names[id(parameter)], start, stop, owner, offset)
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
