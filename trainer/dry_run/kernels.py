"""What the fast path would be on a GPU, for a dry run on a CPU.

It is put on as `trainer/kernels/fast.py` does it, but for the probe, whose values there are none of. Compiled layers
are traced and partitioned as they are for a GPU: so what they keep for the backward pass is what is kept there.
Nothing is compiled; the graphs are run, without counting what a fused kernel would keep in registers.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.fx import GraphModule, Interpreter, Node

from methods.base import Method
from methods.options.base import BaseConfig, window
from runfolder.job import Job
from trainer.dry_run.ledger import Ledger
from trainer.kernels import Kernels

# Beside those of single elements, operations that a compiler makes part of what reads them.
COPIED = (
    *("convert_element_type", "_to_copy", "clone", "cat", "full", "iota", "where", "slice_scatter"),
    "constant_pad",
)
# Operations that a compiler calls as they are: what they read and give is in memory.
CALLED = ("mm", "addmm", "bmm", "baddbmm", "attention", "fleetune", "convolution", "index_put", "embedding", "sort")


def fast_kernels(
    job: Job,
    model: nn.Module,
    method: Method[Any],
    dtype: torch.dtype,
    tracer: "LayerTracer",
) -> Kernels:
    """Put a model on the fast path, and say what it uses; nothing is taken back."""
    from trainer.kernels import fast, layers

    undo = ExitStack()
    model.eval()  # attention that is sparse in training would look at positions
    sharded = job.sharding.zero == 3
    head = fast.linear_head(model, dtype, sharded)
    model.train()
    in_one_row = False
    if dtype != torch.float32:
        fast._leave_casts(model, undo)
        of_base = fast._base(model).config.to_dict()
        in_one_row = sees_documents(job, of_base) and fast._attends_within_documents(job, model, undo)
    with patch.object(layers, "compile_region", tracer):
        layers.compile_layers(model)
    method.speed_up(model, undo, sharded)
    undo.pop_all()
    return Kernels(head, in_one_row, compiled=True, fused_step=True)


def sees_documents(job: Job, config: BaseConfig) -> bool:
    """Whether a base's attention sees all of a row: else the probe refuses attention within documents."""
    of_text = config.get("text_config", config)
    seen_back = window(of_text)
    return seen_back is None or job.data.seq_len <= seen_back


def unread_losses(logits_CV: Tensor, label_C: Tensor, scale_C: Tensor | None) -> Tensor:  # noqa: ARG001
    """What the kernel of losses gives, which leaves gradients in the place of logits."""
    labels = len(label_C)
    return torch.empty(labels, dtype=torch.float32)


class LayerTracer:
    """A backend of `torch.compile` that traces as the fast path's does, and runs what it traced."""

    ledger: Ledger  # of the model that runs now

    def __call__(self, region: GraphModule, inputs: list[Any]) -> Any:
        """A region as a function, forward and backward."""
        from torch._inductor.compile_fx import compile_fx

        from trainer.kernels.fused_gates import fuse_gates
        from trainer.kernels.shared_products import share_products

        share_products(region.graph)
        fuse_gates(region.graph)
        region.recompile()
        with functorch.patch(ban_recompute_materialized_backward=False):
            return compile_fx(region, inputs, inner_compile=self._traced)

    def _traced(self, graph: GraphModule, _inputs: Any, **_options: Any) -> Callable[..., Any]:
        """One direction of a region, as a function of its list of inputs."""
        region = Region(graph, self)

        def run(inputs: list[Any]) -> Any:
            values = list(inputs)
            inputs.clear()
            return region.once(values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


class Region(Interpreter):  # type: ignore[misc]
    """A traced graph that runs node by node, and whose fused nodes take no memory."""

    def __init__(self, graph: GraphModule, tracer: LayerTracer) -> None:
        super().__init__(graph)
        self._tracer = tracer
        self._fused = {node for node in graph.graph.nodes if _is_fused(node)}

    def once(self, values: list[Any]) -> Any:
        """What the graph makes of values, of which nothing else is kept."""
        made = self.run(*values)
        self.env.clear()
        self.args_iter = iter(())
        return made

    def run_node(self, node: Node) -> Any:
        """The value of a node."""
        if node not in self._fused:
            return super().run_node(node)
        with self._tracer.ledger.uncounted():
            return super().run_node(node)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What a function gives; the state of random numbers, which checkpoints keep, is as good as any."""
        name = str(target)
        if name == "run_and_save_rng_state":
            function, *inputs = args
            state = torch.empty(16, dtype=torch.uint8)
            return state, function(*inputs, **kwargs)
        if name == "run_with_rng_state":
            _, function, *inputs = args
            return function(*inputs, **kwargs)
        return super().call_function(target, args, kwargs)


def _is_fused(node: Node) -> bool:
    """Whether a compiler would make what a node gives only where it is read."""
    if node.op != "call_function" or not _is_of_elements(node):
        return False
    return not any(map(_reads_memory, node.users))


def _reads_memory(node: Node) -> bool:
    """Whether a node wants its inputs in memory: what is called, what is given back, and views for either."""
    if node.op == "output" or _is_called(node):
        return True
    return _is_view(node) and any(map(_reads_memory, node.users))


def _is_called(node: Node) -> bool:
    name = str(node.target)
    return any(part in name for part in CALLED)


def _is_view(node: Node) -> bool:
    if getattr(node.target, "is_view", False):
        return True
    name = str(node.target)
    return "reshape" in name or "getitem" in name


def _is_of_elements(node: Node) -> bool:
    """Whether each element that a node gives is made of a few elements that it reads."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags or _is_view(node):
        return True
    name = str(node.target)
    return any(part in name for part in COPIED)
