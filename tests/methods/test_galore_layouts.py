"""GaLore over ranks, ZeRO stages and restarts; what it reduces, and the bytes of its state.

q-galore rounds its bases to 16 codes, and a value that differs in its last bits (layouts, numbers of threads and
processors sum in another order) may fall to either side of the edge between two. So its runs are compared with its
equations written out, which check that a run chose the nearest codes, and go on with the run's.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from by_hand import adamw, base, train
from finished_runs import Curve, curve, difference, interrupted, saved
from ports import free_port
from safetensors.torch import load_file
from sampling import method_sampled
from torch import nn

from methods.base import UNSHARDED, Setup
from methods.galore import GaloreTuning
from methods.options.subspace import Galore
from methods.parts.weights import shapes
from methods.subspace.matrix import Matrix, canonical, lay_out
from methods.subspace.projector import Int4Projector, RefreshSchedule
from runfolder.record import load_job

TUNED = {"kind": "galore", "rank": 4, "refresh_every": 7}
VARIANTS: dict[str, dict[str, Any]] = {
    "galore": TUNED,
    "fast": {**TUNED, "refresh": "fast", "optimizer": "adamw8bit"},
    "q-galore": {**TUNED, "variant": "q-galore", "refresh_every": 3},
    "apollo": {**TUNED, "variant": "apollo"},
    # On one row again and again, whose gradients have fewer directions; k_proj and v_proj have 16 rows.
    "deficient": {**TUNED, "rank": 16},
    "plain": {"kind": "galore"},  # no matrix is larger than the default rank
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
    galore, adamw = sum(options.optimizer_bytes(linears, others)), 8 * options.trained_parameters(linears, others)
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

    from trainer.world import join_process_group
    from trainer.zero.sharded import ShardedModel

    join_process_group()
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
        sharded = ShardedModel(method.attach(Small()), method, stage)
        steps = []
        for step in range(6):
            before, moved = method.exchange.sent.copy(), 0
            dist.all_reduce = counted
            sharded.backward(
                sharded.engine(torch.randn(8, 64, generator=torch.Generator().manual_seed(2 * step + rank)))
            )
            sharded.step(1e-3, 1.0)
            dist.all_reduce = all_reduce
            steps.append({"moved": moved, **(method.exchange.sent - before)})
        found[str(stage)] = {"steps": steps, "bytes": held(method)}
    for name, variant in STATES.items():
        method = GaloreTuning(variant, Setup())
        ShardedModel(method.attach(Small()), method, 2)
        found[name] = held(method)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.usefixtures("workers")  # it makes forks cheap
def test_only_the_subspace_is_reduced_between_refreshes_and_kept(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(measure, (str(tmp_path), free_port()), 2, start_method="forkserver")
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


class Subspace:
    """One matrix of q-galore by the paper's equations, in bases of a run's own codes."""

    def __init__(self, matrix: Matrix, model: nn.Module) -> None:
        self.matrix, self.weight = matrix, model.get_parameter(matrix.name)
        self.low = nn.Parameter(torch.zeros(matrix.low_shape))
        model.register_parameter(
            f"low_{matrix.offset}", self.low
        )  # the norm and clipping are of what is in the model
        self.first, self.second = torch.zeros(2, *matrix.low_shape)
        self.basis = torch.empty(0)

    def choose(self, run_dir: Path, step: int) -> torch.Tensor:
        """Take the run's basis as a checkpoint has it, once it is known to be the gradient's; gives the latter."""
        u, _, v = torch.linalg.svd(self.weight.grad.double(), full_matrices=False)
        rank = self.matrix.rank
        exact = canonical(v[:rank].T if self.matrix.right else u[:, :rank]).float()
        own, found = (Int4Projector(self.matrix.side, rank, exact.device) for _ in range(2))
        own.set(exact)
        reader = saved(run_dir, step)
        for piece in found.pieces(self.matrix.name):
            for kind, tensor in piece.tensors.items():
                tensor.copy_(reader.read(kind, piece.name, 0, len(tensor)))
        self.basis = found.get()
        # Codes are some 0.05 apart.
        assert ((self.basis - exact).abs() - (own.get() - exact).abs()).max() < 1e-4
        return exact

    def project(self) -> None:
        """Put the low-rank gradient in place of the gradient."""
        grad = self.weight.grad
        self.low.grad = grad @ self.basis if self.matrix.right else self.basis.T @ grad
        self.weight.grad = None

    def move(self, t: int, lr: float, scale: float) -> None:
        """AdamW's step t = 1, 2, ... in the subspace."""
        self.first.lerp_(self.low.grad, 0.1)
        self.second.lerp_(self.low.grad**2, 0.001)
        step = self.first / (self.second.sqrt() + 1e-8) * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        self.weight -= lr * scale * (step @ self.basis.T if self.matrix.right else self.basis @ step)


def transcription(run_dir: Path, cache: Path) -> Curve:
    """A job of q-galore, with a checkpoint at the end of each refresh interval."""
    model, method = base(run_dir), load_job(run_dir).method
    assert isinstance(method, Galore)
    targets = {f"{name}.weight": shape for name, shape in method.projected(*shapes(model, UNSHARDED)).items()}
    optimizer = adamw(model)
    matrices = lay_out(targets, method.rank)
    subspaces = [Subspace(matrix, model) for matrix in matrices]
    schedule = RefreshSchedule(method.refresh_every, True, [matrix.side for matrix in matrices], torch.device("cpu"))

    @torch.no_grad()
    def before(k: int) -> None:
        for index in schedule.due(k):
            schedule.note(index, subspaces[index].choose(run_dir, k + method.refresh_every))
        for subspace in subspaces:
            subspace.project()

    @torch.no_grad()
    def after(k: int) -> None:
        for subspace in subspaces:
            subspace.move(k + 1, optimizer.param_groups[0]["lr"], method.scale)

    return train(run_dir, cache, model, optimizer, before=before, after=after)


LAYOUTS = [("galore", 0, 3), ("galore", 3, 1), ("plain", 3, 3)]  # variant, ZeRO, micro-batch
RESTARTED = [("fast", 1, 1), ("q-galore", 2, 3), ("apollo", 3, 3), ("deficient", 3, 1)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cases", method_sampled("galore", [*LAYOUTS, *RESTARTED], 2))
def test_curves_and_restarts_over_layouts(
    cases: list[tuple[str, int, int]], new_run: Any, launch: Any, cache: Path, tmp_path: Path
) -> None:
    variants = {variant for variant, *_ in cases}
    restarted = [case for case in cases if case in RESTARTED]
    row = tmp_path / "row.jsonl"
    row.write_text(40 * (json.dumps({"prompt": "7 plus 12 is ", "completion": "19."}) + "\n"))
    repeats = ("deficient", "plain")
    trains: dict[str, dict[str, Any]] = {"q-galore": {"steps": 21}}  # seven whole intervals
    trains |= {variant: {"lr": 1e-3} for variant in repeats}

    def run(variant: str, zero: int, micro: int, name: str) -> Path:
        made: Path = new_run(
            f"{variant}-{zero}-{name}",
            method=VARIANTS[variant],
            sharding={"zero": zero},
            data={"train": str(row)} if variant in repeats else {},
            train={"micro_batch": micro, **trains.get(variant, {})},
            checkpoint={"every": 3 if variant == "q-galore" else 5, "keep": 9},
        )
        return made

    alone = {variant: run(variant, 0, 3, "alone") for variant in variants - {"q-galore"}}
    found = {key: run(*key, "pair") for key in cases}
    launch(1, *alone.values())
    launch(2, *found.values())
    expected = {variant: curve(whole) for variant, whole in alone.items()}
    if "q-galore" in variants:
        expected["q-galore"] = transcription(found["q-galore", 2, 3], cache)
    worst = {whole.name: difference(curve(whole), expected[key[0]]) for key, whole in found.items()}
    print(worst)
    assert max(worst.values()) < 1e-6
    steps = {key: 9 if key[0] == "q-galore" else 5 for key in restarted}
    same = {key: interrupted(found[key], f"{key[0]}-same", step) for key, step in steps.items()}
    other = {
        key: interrupted(found[key], f"{key[0]}-other", step, sharding={"zero": 1}) for key, step in steps.items()
    }
    launch(2, *same.values())
    launch(1, *other.values())
    for key, step in steps.items():
        whole = found[key]
        assert curve(same[key], 2) == curve(whole)[step:]
        one, two = (load_file(folder / "output" / "model.safetensors") for folder in (whole, same[key]))
        assert all(torch.equal(one[name], two[name]) for name in one)
        uncut = transcription(other[key], cache) if key[0] == "q-galore" else curve(whole)
        assert difference(curve(other[key], 2), uncut[step:]) < 1e-5
