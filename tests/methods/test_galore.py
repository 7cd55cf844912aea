"""GaLore against the paper's equations and galore-torch; over ranks, ZeRO stages and restarts; its bytes."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from alone import Whole
from finished_runs import curve, difference, interrupted
from safetensors.torch import load_file
from torch import nn

from methods.base import Setup
from methods.galore import GaloreTuning
from methods.options import Galore
from methods.subspace.matrix import canonical, exact_basis, fast_basis, generator, lay_out
from methods.subspace.projector import Calendar, Int4Projector

ADAM: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
RANK, EVERY, SCALE, LR, STEPS = 6, 50, 0.25, 3e-3, 200
Grads = dict[str, torch.Tensor]
TUNED = {"kind": "galore", "rank": 4, "refresh_every": 7}
VARIANTS: dict[str, dict[str, Any]] = {
    "galore": TUNED,
    "fast": {**TUNED, "refresh": "fast", "optimizer": "adamw8bit"},
    "q-galore": {**TUNED, "variant": "q-galore", "refresh_every": 3},
    "apollo": {**TUNED, "variant": "apollo"},
}


class Matrices(nn.Module):
    """A tall, a wide and a square matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = nn.Linear(20, 48, bias=False), nn.Linear(48, 20, bias=False)
        self.square = nn.Linear(24, 24, bias=False)


def same_matrices() -> Matrices:
    torch.manual_seed(0)
    return Matrices()


def gradients(weights: dict[str, nn.Parameter], seed: int = 3) -> Iterator[Grads]:
    """A gradient per step: of a quadratic, and singular values with gaps that turn slowly."""
    random = torch.Generator().manual_seed(seed)
    parts = {
        name: torch.linalg.svd(torch.randn(w.shape, generator=random), full_matrices=False)
        for name, w in weights.items()
    }
    turns = {name: 0.02 * torch.randn(w.shape, generator=random) for name, w in weights.items()}
    for step in range(STEPS):
        yield {
            name: (u * 0.7 ** torch.arange(len(s))) @ v + step * turns[name] / STEPS + 0.1 * weights[name].detach()
            for name, (u, s, v) in parts.items()
        }


def ours(model: nn.Module, **options: Any) -> Callable[[Grads], None]:
    """A step of the method, as the trainer takes it."""
    method = GaloreTuning(Galore(**{"rank": RANK, "refresh_every": EVERY, "scale": SCALE, **options}), Setup())
    method.attach(model)
    flat = [Whole(name, nn.Parameter(p.data.view(-1))) for name, p in model.named_parameters()]
    optimizer = method.optimizer(flat, LR, **ADAM)

    def step(grads: Grads) -> None:
        for fragment in flat:
            fragment.parameter.grad = grads[fragment.name].reshape(-1).clone()
        with torch.no_grad():
            method.gradients(None)  # type: ignore[arg-type]
            method.before_step(None)  # type: ignore[arg-type]
            optimizer.step()

    return step


def vectors(grad: torch.Tensor) -> torch.Tensor:
    """Leading singular vectors of the shorter side, with the signs that we choose; fp64 inside."""
    u, _, v = torch.linalg.svd(grad.double(), full_matrices=False)
    return canonical(v[:RANK].T if grad.shape[0] >= grad.shape[1] else u[:, :RANK]).float()


def by_equations(model: nn.Module) -> Callable[[Grads], None]:
    """Algorithm 2 of the paper with the authors' AdamW, for one matrix after another."""
    state: dict[str, Any] = {}
    beta1, beta2 = ADAM["betas"]

    @torch.no_grad()
    def step(grads: Grads) -> None:
        t = state["t"] = state.get("t", 0) + 1
        for name, weight in model.named_parameters():
            tall = weight.shape[0] >= weight.shape[1]
            if (t - 1) % EVERY == 0:
                state[name, "p"] = vectors(grads[name])
            p = state[name, "p"]
            low = grads[name] @ p if tall else p.T @ grads[name]
            m = state[name, "m"] = beta1 * state.get((name, "m"), 0) + (1 - beta1) * low
            v = state[name, "v"] = beta2 * state.get((name, "v"), 0) + (1 - beta2) * low**2
            n = m / (v.sqrt() + ADAM["eps"])
            size = LR * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
            weight -= size * SCALE * (n @ p.T if tall else p @ n)
            weight -= LR * ADAM["weight_decay"] * weight

    return step


def by_galore_torch(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Callable[[Grads], None]:
    """The authors' package; a singular vector's sign is free, so it gets ours."""
    package = pytest.importorskip("galore_torch")
    projector = pytest.importorskip("galore_torch.galore_projector").GaLoreProjector
    monkeypatch.setattr(
        projector, "get_orthogonal_matrix", lambda _, g, __, type: vectors(g).T if type == "right" else vectors(g)
    )
    group = {"rank": RANK, "update_proj_gap": EVERY, "scale": SCALE, "proj_type": "std"}
    optimizer = package.GaLoreAdamW(
        [{"params": model.parameters(), **group}], LR, no_deprecation_warning=True, **ADAM
    )

    def step(grads: Grads) -> None:
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name].clone()
        optimizer.step()

    return step


def apart(one: nn.Module, other: nn.Module) -> float:
    """The largest relative distance between two models' weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("reference", ["equations", "galore-torch"])
def test_two_hundred_steps_are_the_authors(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = same_matrices(), same_matrices()
    other_step = by_equations(other) if reference == "equations" else by_galore_torch(other, monkeypatch)
    one_step = ours(one)
    weights = dict(other.named_parameters())
    for grads in gradients(weights):
        one_step(grads)
        other_step(grads)
    assert apart(one, other) < 1e-5
    assert apart(one, same_matrices()) > 0.1


def test_apollo_is_its_equations() -> None:
    model, check = same_matrices(), same_matrices()
    step = ours(model, variant="apollo")
    state: dict[str, Any] = {}
    for t, grads in enumerate(gradients(dict(check.named_parameters())), 1):
        step(grads)
        for matrix in lay_out({name: tuple(p.shape) for name, p in check.named_parameters()}, RANK):
            name, grad, weight = matrix.name, grads[matrix.name], check.get_parameter(matrix.name).data
            last = (t - 1) // EVERY * EVERY
            p = torch.randn(matrix.side, RANK, generator=generator(0, last, name)) / RANK**0.5
            low = grad @ p if matrix.right else p.T @ grad
            m = state[name, "m"] = 0.9 * state.get((name, "m"), 0) + 0.1 * low
            v = state[name, "v"] = 0.99 * state.get((name, "v"), 0) + 0.01 * low**2
            across = 1 if matrix.right else 0
            scale = (m / (v.sqrt() + 1e-8)).norm(dim=across, keepdim=True) / low.norm(dim=across, keepdim=True)
            scaled = grad * scale
            if name in state:
                scaled *= min(1.0, 1.01 * state[name] / scaled.norm().item())
            state[name] = scaled.norm().item()
            weight -= LR * (1 - 0.99**t) ** 0.5 / (1 - 0.9**t) * SCALE * scaled
            weight -= LR * 0.1 * weight
    assert apart(model, check) < 1e-5


def test_a_fast_basis_spans_the_exact_one() -> None:
    for name, grad in next(gradients(dict(same_matrices().named_parameters()))).items():
        exact, fast = exact_basis(grad, RANK), fast_basis(grad, RANK, generator(0, 0, name))
        sines = torch.linalg.matrix_norm(exact - fast @ (fast.T @ exact), 2)
        assert sines < 0.02, f"{name}: the largest principal angle"
        assert torch.allclose(exact.T @ exact, torch.eye(RANK), atol=1e-6)


def test_a_four_bit_basis_is_near_and_an_eighth_as_large() -> None:
    basis = exact_basis(torch.randn(256, 96, generator=torch.Generator().manual_seed(0)), 32).contiguous()
    kept = Int4Projector(96, 32, basis.device)
    kept.set(basis)
    blocks = basis.view(-1, 256)
    step = (blocks.amax(1) - blocks.amin(1)) / 15
    assert ((kept.get() - basis).view(-1, 256).abs().amax(1) <= step * 1.001).all()
    size = sum(t.numel() * t.element_size() for piece in kept.pieces("w") for t in piece.tensors.values())
    assert size < 0.2 * basis.numel() * 4


def test_a_matrix_whose_direction_stays_is_refreshed_half_as_often() -> None:
    calendar = Calendar(10, True, [8, 8], torch.device("cpu"))
    turning = torch.eye(8)
    for k in range(6):
        calendar.note(0, torch.ones(8, 1) * (-1) ** k)
        calendar.note(1, turning[:, k : k + 1])
    assert calendar.due(10) == [1]
    assert calendar.due(20) == [0, 1]


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
    galore, adamw = options.optimizer_elements(linears, others), 2 * options.trained(linears, others)
    assert round(2 * galore / giga, 2) == 8.76
    assert round(2 * adamw / giga, 2) == 25.10
    assert round(100 * (1 - galore / adamw), 1) == 65.1


class Small(nn.Module):
    """Matrices whose low-rank gradients fill whole blocks, and a vector beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)
        self.norm = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = self.down(self.up(x * self.norm).relu())
        return (moved - x).square().mean()


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
        kinds: dict[str, int] = {"exp_avg": 0, "exp_avg_sq": 0, "basis": 0}
        for piece in method.pieces():
            for kind, tensor in piece.tensors.items():
                kinds[kind] += tensor.numel() * tensor.element_size()
        found[str(stage)] = {"steps": steps, "bytes": kinds}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_between_refreshes_only_the_subspace_is_reduced(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(measure, (str(tmp_path), port), 2)
    found = json.loads((tmp_path / "0.json").read_text())
    low, full, others = 2 * 128 * 16, 2 * 128 * 64, 64
    for step, sent in enumerate(found["0"]["steps"]):
        assert sent["projected"] == low == full * 16 // 64
        assert sent.get("full", 0) == (full if step % 3 == 0 else 0)
        assert sent["moved"] == low + others, "all that is reduced over ranks, DeepSpeed's own share included"
    for sent in found["2"]["steps"]:
        assert sent["projected"] == sent["updates"] == low
    for stage, share in (("0", 1), ("2", 2)):
        state = found[stage]["bytes"]
        formula = 4 * (2 * low / share + 2 * 64 * 16)
        assert abs(sum(state.values()) - formula) / formula < 0.02


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
