"""ZeRO 3 of a frozen base: a layer is gathered once a pass, ahead of its turn, and given back; changes are seen."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from ports import free_port

from methods.base import Setup
from methods.registry import create
from runfolder.job import Job
from trainer.base import load_model
from trainer.world import join_process_group
from trainer.zero import gather
from trainer.zero.by_layer import decoder_layers
from trainer.zero.frozen import is_frozen_apart
from trainer.zero.sharded import ShardedModel

ROWS, LENGTH = 2, 8
Events = list[str]


def model_of(base: str, method: dict[str, Any], zero: int, checkpointed: bool = False) -> tuple[Any, Any]:
    """A method, and the model that it is attached to."""
    train = {"steps": 2, "batch_tokens": 64, "gradient_checkpointing": checkpointed}
    data = {"train": "/x.jsonl", "seq_len": LENGTH}
    parts = {"base": base, "method": method, "train": train, "data": data, "sharding": {"zero": zero}}
    job = Job.model_validate(parts)
    attached = create(job.method, Setup(2, 0, LENGTH, None, gather))
    model = load_model(job, attached, torch.float32, torch.device("cpu"))
    attached.initialise(model, iter(()))
    return attached, model


def worker(rank: int, workers: int, folder: str, port: int, base: str) -> None:
    """One of some workers, which writes what it found."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join_process_group()
    torch.set_num_threads(1)
    lora = {"kind": "lora", "rank": 2, "target": ["q_proj"]}
    found: dict[str, Any] = {}
    for checkpointed in (False, True):
        method, model = model_of(base, lora, 3, checkpointed)
        sharded = ShardedModel(model, method, 3, 1e-3, {})
        found[f"events-{checkpointed}"] = events_of_pass(sharded)
        found[f"whole-{checkpointed}"] = whole_weights(model)
        with torch.no_grad():
            logits_of(sharded.engine)
        found[f"whole-{checkpointed}"] += whole_weights(model)
    found["gap"] = [gap_after_change(base, lora, name) for name in ("down_proj", "embed_tokens", "norm")]
    found["apart"] = {
        kind: is_frozen_apart(model_of(base, {"kind": kind}, 3)[1]) for kind in ("full", "ia3", "longlora")
    }
    found["apart"]["rank 64"] = is_frozen_apart(model_of(base, {"kind": "lora", "rank": 64}, 3)[1])
    found["apart"]["zero 2"] = is_frozen_apart(model_of(base, lora, 2)[1])
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def logits_of(engine: Any) -> torch.Tensor:
    """The logits of some tokens."""
    ids_BT = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    places_BT = torch.arange(LENGTH).expand(ROWS, -1)
    logits: torch.Tensor = engine(input_ids=ids_BT, position_ids=places_BT).logits
    return logits


def events_of_pass(sharded: ShardedModel) -> Events:
    """What happens in a forward and a backward pass: gathers begin, and layers compute."""
    events: Events = []
    plain = dist.all_gather_into_tensor

    def noted(*tensors: torch.Tensor, **named: Any) -> Any:
        events.append("gather")
        return plain(*tensors, **named)

    dist.all_gather_into_tensor = noted
    handles = []
    for number, layer in enumerate(decoder_layers(sharded.model)):
        norm = layer.post_attention_layernorm
        say = lambda *_, number=number: events.append(f"layer {number}")  # noqa: E731
        handles += [norm.register_forward_hook(say), norm.register_full_backward_hook(say)]
    try:
        loss = logits_of(sharded.engine).square().sum()
        events.append("loss")
        sharded.backward(loss)
    finally:
        dist.all_gather_into_tensor = plain
        for handle in handles:
            handle.remove()
    return events


def whole_weights(model: torch.nn.Module) -> list[str]:
    """The sharded weights that are whole."""
    named = model.named_parameters()
    return [name for name, weight in named if gather.is_sharded(weight) and gather.is_gathered(weight)]


def gap_after_change(base: str, method: dict[str, Any], part: str) -> float:
    """How far logits are from those of a model that was never sharded, when frozen weights of both have changed."""
    logits = []
    for zero in (0, 3):
        attached, model = model_of(base, method, zero)
        sharded = ShardedModel(model, attached, zero, 1e-3, {})
        before = logits_of(sharded.engine).detach()
        changed = [weight for name, weight in model.named_parameters() if part in name and not weight.requires_grad]
        with gather.gathered(changed, modified=True), torch.no_grad():
            for weight in changed:
                weight.mul_(1.5)
        logits.append(logits_of(sharded.engine).detach())
        assert (logits[-1] - before).abs().max() > 1e-3
    return float((logits[0] - logits[1]).abs().max())


@pytest.fixture(params=[1, 2], ids=["alone", "two"], scope="module")
def found(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What the first of some workers found."""
    folder = tmp_path_factory.mktemp("frozen")
    workers = request.param
    arguments = (workers, str(folder), free_port(), str(tiny_base))
    torch.multiprocessing.start_processes(worker, arguments, workers, start_method="forkserver")
    yield workers, json.loads((folder / "0.json").read_text())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_layer_comes_while_the_one_before_it_computes(found: Any, checkpointed: bool) -> None:
    workers, of_worker = found
    events = of_worker[f"events-{checkpointed}"]
    if workers == 1:
        assert "gather" not in events
        return
    forward = events[: events.index("loss")]
    # embedding, first layer, and the second one before the first computes; final norm, head
    assert forward == [*["gather"] * 3, "layer 0", "layer 1", "gather", "gather"]
    backward = events[events.index("loss") + 1 :]
    again = [event for event in backward if event != "gather"]
    assert backward.count("gather") == 4  # head, norm, second layer, first layer
    assert backward[:4] == ["gather"] * 4 and again[0] == "layer 1" and again[-1] == "layer 0"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_weight_stays_whole_behind_a_pass(found: Any, checkpointed: bool) -> None:
    assert found[1][f"whole-{checkpointed}"] == []


def test_frozen_weights_that_change_are_gathered_as_they_are_now(found: Any) -> None:
    assert all(gap < 1e-5 for gap in found[1]["gap"])


def test_weights_are_gathered_here_where_the_base_is_frozen_and_few_are_trained(found: Any) -> None:
    assert found[1]["apart"] == {"full": False, "ia3": True, "longlora": False, "rank 64": False, "zero 2": False}
