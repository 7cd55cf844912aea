"""GaLore over ranks, ZeRO stages and restarts; what it reduces, and the bytes of its state."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from finished_runs import curve, difference, interrupted
from ports import free_port
from safetensors.torch import load_file
from torch import nn

from methods.base import Setup
from methods.galore import GaloreTuning
from methods.options import Galore

TUNED = {"kind": "galore", "rank": 4, "refresh_every": 7}
VARIANTS: dict[str, dict[str, Any]] = {
    "galore": TUNED,
    "fast": {**TUNED, "refresh": "fast", "optimizer": "adamw8bit"},
    "q-galore": {**TUNED, "variant": "q-galore", "refresh_every": 3},
    "apollo": {**TUNED, "variant": "apollo"},
}
STATES = {
    "fp32": Galore(rank=16),
    "8-bit moments": Galore(rank=16, optimizer="adamw8bit"),
    "4-bit bases": Galore(rank=16, variant="q-galore"),
    "apollo": Galore(rank=16, variant="apollo"),
}


def test_states_of_a_7b_are_a_third() -> None:
    hidden, wide, vocabulary, giga = 4096, 11008, 32000, 2**30
    linears: dict[str, tuple[int, int]] = {}
    others: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    others["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(32):
        linears |= {f"{layer}.{name}_proj": (hidden, hidden) for name in "qkvo"}
        linears |= {f"{layer}.{name}": (wide, hidden) for name in ("gate_proj", "up_proj")}
        linears[f"{layer}.down_proj"] = (hidden, wide)
        others |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    options = Galore(rank=1024)
    galore, adamw = sum(options.optimizer_bytes(linears, others)), 8 * options.trained(linears, others)
    assert round(galore / 2 / giga, 2) == 8.76  # the paper's moments are bf16
    assert round(adamw / 2 / giga, 2) == 25.10
    assert round(100 * (1 - galore / adamw), 1) == 65.1


def test_random_bases_have_no_sketch() -> None:
    with pytest.raises(ValueError, match="found refresh fast with variant apollo"):
        Galore(variant="apollo", refresh="fast")


class Small(nn.Module):
    """Matrices whose low-rank gradients fill whole blocks, and a vector beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)
        self.norm = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = self.down(self.up(x * self.norm).relu())
        return (moved - x).square().mean()


def held(method: GaloreTuning) -> int:
    """Bytes of state that this rank has of the matrices."""
    tensors = [tensor for piece in method.pieces() for tensor in piece.tensors.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(rank: int, folder: str, port: int) -> None:
    """One of two workers: elements that go through collectives, and bytes of state, per stage."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch.distributed as dist

    from trainer.world import join
    from trainer.zero import Shards

    join()
    torch.set_num_threads(1)
    moved = 0
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal moved
        moved += tensor.numel()
        return all_reduce(tensor, *args, **kwargs)

    found: dict[str, Any] = {}
    for stage in (0, 2):
        torch.manual_seed(0)
        method = GaloreTuning(Galore(rank=16, refresh_every=3), Setup())
        shards = Shards(method.attach(Small()), method, stage)
        steps = []
        for step in range(6):
            before, moved = method.exchange.sent.copy(), 0
            dist.all_reduce = counted
            shards.backward(
                shards.engine(torch.randn(8, 64, generator=torch.Generator().manual_seed(2 * step + rank)))
            )
            shards.step(1e-3, 1.0)
            dist.all_reduce = all_reduce
            steps.append({"moved": moved, **(method.exchange.sent - before)})
        found[str(stage)] = {"steps": steps, "bytes": held(method)}
    for name, variant in STATES.items():
        method = GaloreTuning(variant, Setup())
        Shards(method.attach(Small()), method, 2)
        found[name] = held(method)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_only_the_subspace_is_reduced_between_refreshes_and_kept(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(measure, (str(tmp_path), free_port()), 2)
    found = json.loads((tmp_path / "0.json").read_text())
    low, full, others = 2 * 128 * 16, 2 * 128 * 64, 64
    for step, sent in enumerate(found["0"]["steps"]):
        assert sent["projected"] == low == full * 16 // 64
        assert sent.get("full", 0) == (full if step % 3 == 0 else 0)
        assert sent["moved"] == low + others, "all that is reduced over ranks, DeepSpeed's own share included"
    for sent in found["2"]["steps"]:
        assert sent["projected"] == sent["updates"] == low
    for stage, share in (("0", 1), ("2", 2)):
        assert found[stage]["bytes"] == pytest.approx(4 * (2 * low / share + 2 * 64 * 16), rel=0.02)
    for name, variant in STATES.items():
        shared, whole = variant.optimizer_bytes({"up": (128, 64), "down": (64, 128)}, {})
        assert found[name] == pytest.approx(shared / 2 + whole, rel=0.02), name


@pytest.mark.timeout(300)
def test_curves_and_restarts_over_layouts(new_run: Any, launch: Any) -> None:
    layouts = [("galore", 0, 3), ("galore", 3, 1), ("fast", 1, 1), ("q-galore", 2, 3), ("apollo", 3, 3)]

    def run(variant: str, zero: int, micro: int, name: str) -> Path:
        made: Path = new_run(
            f"{variant}-{zero}-{name}",
            method=VARIANTS[variant],
            sharding={"zero": zero},
            train={"micro_batch": micro},
            checkpoint={"every": 10, "keep": 9},
        )
        return made

    expected = {variant: run(variant, 0, 3, "alone") for variant in VARIANTS}
    found = {key: run(*key, "pair") for key in layouts}
    launch(1, *expected.values())
    launch(2, *found.values())
    worst = {whole.name: difference(curve(whole), curve(expected[key[0]])) for key, whole in found.items()}
    print(worst)
    assert max(worst.values()) < 1e-6
    wholes = list(found.values())[2:]
    same = [interrupted(whole, f"{whole.name}-same", 10) for whole in wholes]
    other = [interrupted(whole, f"{whole.name}-other", 10, sharding={"zero": 1}) for whole in wholes]
    launch(2, *same)
    launch(1, *other)
    for whole, again, moved in zip(wholes, same, other, strict=True):
        assert curve(again, 2) == curve(whole)[10:]
        one, two = (load_file(folder / "output" / "model.safetensors") for folder in (whole, again))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert difference(curve(moved, 2), curve(whole)[10:]) < 1e-5
