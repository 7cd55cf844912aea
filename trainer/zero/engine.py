"""DeepSpeed's engine: the version that is known, the configuration of each ZeRO stage, and the optimizer it gets.

Every stage runs in DeepSpeed's fp32 mode: trained weights are fp32 and are their own masters, frozen weights keep
their dtype, and bf16 enters through autocast inside the forward pass. So gradients are accumulated and reduced in
fp32 at every stage. Accumulation is ours to bound (`managed_gradient_accumulation: false`): gradients add up until
`engine.step()`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from trainer.zero.by_layer import gather_by_layer
from trainer.zero.gather import shape
from trainer.zero.linear import shard_linears

VERSION = "0.19.8"
ONE_GROUP = 10**15  # elements; more than any model has, so that stage 3 keeps all trained weights in one flat slice
RESIDENT = 10**6  # elements up to which stage 3 keeps a parameter whole: norms, and the factors of most adapters


class Placeholder(torch.optim.Optimizer):
    """The placeholder optimizer that DeepSpeed gets: its step calls `on_step`, with all gradients reduced."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        group = {"params": parameters}
        super().__init__([group], {"lr": 0.0})
        self.on_step: Callable[[], None] = lambda: None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Call `on_step`, without recording gradients."""
        with torch.no_grad():
            self.on_step()


def prepare_deepspeed() -> None:
    """Check DeepSpeed's version and keep it from compiling its shared-memory op, before distributed starts.

    The op is built at the first `init_distributed`, and a lock that a killed process left makes the next one hang
    without a word. Gloo does not need it.
    """
    installed = version("deepspeed")
    if installed != VERSION:
        raise RuntimeError(f"deepspeed {installed} is installed; trainer/zero is written for {VERSION}")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def config(stage: int, trained: int, of_layer: int = 0) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage, for so many trained elements, and so many elements of the largest layer.

    At stage 3 the next layer is gathered while one computes.
    """
    bucket = min(50_000_000, trained)
    bucket = max(2**20, bucket)
    sharding: dict[str, Any] = {"stage": stage}
    sharding["reduce_bucket_size"] = bucket
    sharding["allgather_bucket_size"] = bucket
    if stage in (1, 2):
        sharding["compute_grad_norm"] = False
    if stage == 3:
        sharding["sub_group_size"] = ONE_GROUP
        sharding["stage3_prefetch_bucket_size"] = max(bucket, of_layer)
        sharding["stage3_param_persistence_threshold"] = RESIDENT
        sharding["memory_efficient_linear"] = False  # ours keeps less
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a step
        "zero_optimization": sharding,
    }


def start_engine(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """DeepSpeed's engine around a model whose trained parameters the optimizer has."""
    import deepspeed

    trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += shape(parameter).numel()
    of_layer = 0
    if stage == 3:
        of_layer = gather_by_layer(model)
        shard_linears(model, is_not_resident)
    configuration = config(stage, trained, of_layer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration)
    if stage == 3:
        # DeepSpeed would gather each resident parameter by itself after a step; so they come with their layers.
        engine.optimizer.persistent_parameters.clear()
    return engine


def is_not_resident(weight: nn.Parameter) -> bool:
    """Whether DeepSpeed's stage 3 shards a weight, as it is too large to stay whole."""
    return shape(weight).numel() > RESIDENT


class Alone:
    """What an engine is at stage 0 for a worker without others: gradients add up where they are. No DeepSpeed."""

    enable_backward_allreduce = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> None:
        if stage != 0:
            raise ValueError(f"found stage {stage}; allowed: 0")
        self.module = model
        self._optimizer = optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass."""
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = False) -> None:  # noqa: ARG002
        """Add the gradients of a loss."""
        loss.backward()

    def step(self) -> None:
        """Have the optimizer step, and free the gradients."""
        self._optimizer.step()
        self._optimizer.zero_grad()


@contextmanager
def partitioned_loading(stage: int, dtype: torch.dtype) -> Iterator[None]:
    """Within it, `from_pretrained` at stage 3 keeps only this rank's slices, in `dtype`, and PEFT gathers them."""
    if stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    bf16 = {"enabled": dtype == torch.bfloat16}
    configuration = config(stage, 0) | {"bf16": bf16}
    # transformers holds it weakly: it must live as long as the block.
    alive = HfDeepSpeedConfig(configuration)
    yield
    del alive
