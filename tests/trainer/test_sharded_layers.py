"""ZeRO 3 by decoder layers: gathers and hooks are counted, losses are those of ZeRO 2, linears keep what they must.

Adapters have their frozen base gathered by `trainer/zero/frozen.py` (test_frozen_layers.py), the others by DeepSpeed.

Weights of the tiny base are so small that they would all be resident; here none is, or only factors of adapters are.
"""

import json
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from campaign import METHODS, TRAIN
from finished_runs import difference
from ports import free_port
from sampling import SEED, sampled
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from methods.base import Setup
from methods.registry import create
from runfolder.job import Job
from trainer.base import load_model
from trainer.data.tokens import virtual_ids
from trainer.kernels.fast import make_fast
from trainer.world import join_process_group
from trainer.zero import by_layer, engine, gather
from trainer.zero.by_layer import gather_by_layer
from trainer.zero.linear import ShardedLinear, shard_linears
from trainer.zero.sharded import ShardedModel

STEPS, PASSES, ROWS, LENGTH = 8, 2, 4, 16
VARIANTS = {**METHODS, "lisa": {"kind": "full", "lisa_layers": 1, "lisa_every": 2}}
VARIANTS["relora-alone"] = {"kind": "relora", "rank": 4, "others": False}
NAMES = sorted(set(VARIANTS) - {"qlora"})  # a base in 4 bits is whole on every rank
FEW_FAST = random.Random(SEED).sample(NAMES, 2)


def train(rank: int, folder: str, port: int, base: str, cases: list[dict[str, Any]]) -> None:
    """One of two workers: the curve of each case, the gathers of its last step, and the hooks of its engine."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join_process_group()
    torch.set_num_threads(1)
    at_once: Callable[[nn.Module], int] = engine.gather_by_layer
    found = []
    for case in cases:
        engine.RESIDENT = case["resident"]
        engine.gather_by_layer = at_once if case.get("at_once", True) else lambda _: 0
        with torch.compiler.set_stance("default" if case.get("compiled") else "force_eager"):
            found.append(curve_of(rank, base, case))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def job_of(base: str, case: dict[str, Any]) -> Job:
    """The job of a case."""
    method = VARIANTS[case["name"]]
    settings = {
        "steps": STEPS,
        "batch_tokens": 64,
        "lr": TRAIN[method["kind"]]["lr"],
        "gradient_checkpointing": case.get("checkpointed", False),
        "kernels": "fast" if case.get("fast") else "plain",
    }
    data = {"train": "/x.jsonl", "seq_len": LENGTH}
    parts = {"base": base, "method": method, "train": settings, "data": data, "sharding": {"zero": case["zero"]}}
    return Job.model_validate(parts)


def curve_of(rank: int, base: str, case: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradient norms of a case, and what its last step gathered."""
    from deepspeed.comm import comm
    from transformers import AutoTokenizer

    job = job_of(base, case)
    lr = job.lr
    method = create(job.method, Setup(STEPS, 0, LENGTH, AutoTokenizer.from_pretrained(base), gather))
    model = load_model(job, method, torch.float32, torch.device("cpu"))
    method.initialise(model, iter(()))
    kernels = make_fast(job, model, method, torch.float32, torch.device("cpu"))
    assert kernels.compiled == case.get("fast", False) and not kernels.problems
    head = kernels.head
    sharded = ShardedModel(model, method, job.sharding.zero, lr, {})
    sent: list[int] = []
    backend, generator = comm.cdb, torch.Generator().manual_seed(0)
    plain = type(backend).all_gather_into_tensor

    def counted(**named: Any) -> Any:
        sent.append(named["output_tensor"].numel())
        return plain(backend, **named)

    backend.all_gather_into_tensor = counted
    of_torch = torch.distributed.all_gather_into_tensor

    def counted_by_torch(output: Tensor, *rest: Any, **named: Any) -> Any:
        sent.append(output.numel())
        return of_torch(output, *rest, **named)

    torch.distributed.all_gather_into_tensor = counted_by_torch
    front = torch.tensor(virtual_ids(job.method.virtual_tokens), dtype=torch.long).expand(ROWS, -1)
    curve = []
    for step in range(STEPS):
        sent.clear()
        losses = torch.zeros(())
        for _ in range(PASSES):
            drawn_BT = torch.randint(0, 300, (2 * ROWS, LENGTH), generator=generator)[rank * ROWS :][:ROWS]
            ids_BT = torch.cat([front, drawn_BT], 1)
            places_BT = torch.arange(ids_BT.shape[1]).expand(ROWS, -1)
            with head.left_out() if head else nullcontext():
                logits_BTV = sharded.engine(input_ids=ids_BT, position_ids=places_BT).logits[:, -LENGTH:-1]
            label_N = drawn_BT[:, 1:].flatten()
            if head:
                loss = head.total(logits_BTV.flatten(0, 1), label_N) / len(label_N)
            else:
                loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), label_N)
            sharded.backward(loss / (2 * PASSES))
            losses += loss.detach() / (2 * PASSES)
        torch.distributed.all_reduce(losses)
        norm = sharded.step(lr, 1.0, step)
        curve.append((float(losses), float(norm)))
    del backend.all_gather_into_tensor
    torch.distributed.all_gather_into_tensor = of_torch
    hooks = 0
    offload = getattr(sharded.engine.optimizer, "parameter_offload", None)
    if offload:
        hooks = len(offload.forward_hooks) + len(offload.backward_hooks)
    sizes = [gather.shape(parameter).numel() for parameter in model.parameters()]
    return {"curve": curve, "gathers": len(sent), "elements": sum(sent), "hooks": hooks, "sizes": sizes}


def run(folder: Path, base: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the first of two workers found in each case."""
    arguments = (str(folder), free_port(), str(base), cases)
    torch.multiprocessing.start_processes(train, arguments, 2, start_method="forkserver")
    found: list[dict[str, Any]] = json.loads((folder / "0.json").read_text())
    return found


@pytest.mark.usefixtures("workers")  # it makes forks cheap
@pytest.mark.parametrize("names", sampled(NAMES, 2))
@pytest.mark.timeout(1800)
def test_sharded_layers_train_as_at_zero_2(names: list[str], tiny_base: Path, tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {"zero": 2, "resident": 0},
        {"zero": 3, "resident": 0},
        {"zero": 3, "resident": 500, "checkpointed": True},
    ]
    cases = [{"name": name, **variant} for name in names for variant in variants]
    found = run(tmp_path, tiny_base, cases)
    for number, name in enumerate(names):
        expected, *others = found[len(variants) * number :][: len(variants)]
        for other in others:
            assert difference(other["curve"], expected["curve"]) < 1e-6, (name, other)
            assert other["gathers"] > 0


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize(
    ("names", "compiled"), [(FEW_FAST, False), pytest.param(NAMES, True, marks=pytest.mark.matrix)]
)
@pytest.mark.timeout(3600)
def test_sharded_layers_train_fast_as_at_zero_2(
    names: list[str], compiled: bool, tiny_base: Path, tmp_path: Path
) -> None:
    fast = {"resident": 0, "fast": True, "compiled": compiled}
    found = run(tmp_path, tiny_base, [{"name": name, "zero": zero, **fast} for name in names for zero in (2, 3)])
    for name, expected, sharded in zip(names, found[::2], found[1::2], strict=True):
        bound = 2e-5 if VARIANTS[name]["kind"] == "dora" else 1e-6  # whose norms are found in another way
        assert difference(sharded["curve"], expected["curve"]) < bound, name
        assert sharded["gathers"] > 0


@pytest.mark.usefixtures("workers")  # it makes forks cheap
def test_a_layer_is_gathered_at_once(tiny_base: Path, tmp_path: Path) -> None:
    full = {"name": "full", "zero": 3, "resident": 500}
    found, by_module = run(tmp_path, tiny_base, [full, {**full, "at_once": False}])
    assert found["hooks"] * 3 < by_module["hooks"]
    sharded = sum(size for size in found["sizes"] if size > 500)
    resident = sum(size for size in found["sizes"] if size <= 500)
    # What is sharded comes once a pass, and what is resident once a step, with its layer.
    assert found["elements"] == PASSES * sharded + resident
    assert found["gathers"] <= PASSES * 4  # two layers, and what is outside of them


def test_a_linear_layer_keeps_its_input_only_where_it_is_trained() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 6)
    for trained in (False, True):
        plain.requires_grad_(trained)
        for dtype in (torch.float32, torch.bfloat16):
            ours = nn.Linear(8, 6)
            ours.load_state_dict(plain.state_dict())
            ours.requires_grad_(trained)
            shard_linears(ours, lambda weight: weight.numel() > 40)
            assert type(ours) is ShardedLinear
            x, kept, wanted = torch.randn(2, 3, 8), what_is_kept(ours, dtype), what_is_kept(plain, dtype)
            (found, tensors), (expected, _) = kept(x), wanted(x)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
            assert [tensor.dtype for tensor in tensors if tensor.shape == x.shape] == [torch.float32] * trained
            assert [tensor is ours.weight for tensor in tensors if tensor.shape == (6, 8)] == [True]


def what_is_kept(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]:
    """A pass of a layer under autocast to a dtype: output and gradients, and what was kept for the backward pass."""

    def passed(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        x = x.clone().requires_grad_()
        layer.zero_grad()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                y = layer(x)
            kept_by_layer = list(kept)
            y.float().square().sum().backward()
        gradients = [each.grad for each in (x, *layer.parameters()) if each.grad is not None]
        return [y.detach(), *gradients], kept_by_layer

    return passed


def test_small_linear_layers_stay_as_they_are() -> None:
    layer = nn.Linear(8, 6)
    shard_linears(layer, lambda weight: weight.numel() > 48)
    assert type(layer) is nn.Linear


class Layer(GradientCheckpointingLayer):
    """A layer as bases have them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        product: Tensor = self.linear(hidden_states)
        return product


def leaves(model: nn.Module) -> int:
    """How many modules of a model DeepSpeed was told not to look into."""
    from deepspeed.utils import get_z3_leaf_modules

    return len(get_z3_leaf_modules(model))


def test_the_elements_of_the_largest_layer_are_found() -> None:
    model = nn.Sequential(Layer(), nn.Linear(9, 9), Layer())
    assert gather_by_layer(model) == 20
    assert leaves(model) == 2


def test_layers_that_share_weights_are_gathered_module_by_module() -> None:
    model = nn.Sequential(Layer(), Layer())
    model[1].linear = model[0].linear
    assert gather_by_layer(model) == 0
    assert leaves(model) == 0


def test_layers_larger_than_may_be_gathered_are_not_gathered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_layer, "LIVE", 19)
    assert gather_by_layer(Layer()) == 0


def test_hidden_states_that_have_a_name_come_first_and_with_a_gradient() -> None:
    layer = Layer()
    gather_by_layer(layer)
    given = []
    layer.register_forward_hook(lambda _module, values, _output: given.extend(values))
    layer(hidden_states=torch.zeros(2, 4))
    with torch.no_grad():
        layer(torch.zeros(2, 4))
    assert [hidden.requires_grad for hidden in given] == [True, False]
