"""Many adapters on one base: new tokens per second of Fleetune, PEFT's mixed batches and transformers, in one run.

    python benchmarks/serve_mixed.py --out benchmarks/results/serve-mixed.json [--only fleetune]

Random weights in the shape of Llama-3.2-1B, bf16, greedy, 128 tokens of prompt and 64 new ones, adapters of rank 16
on all linear layers. A figure is new tokens over the seconds of a whole `generate` call with fresh prompts: the
median of several calls, after one that is not counted. Beside each figure of ours stands what is measured over the
floor: the time to read the weights, the caches and the adapters' bytes once per step, and to compute the prompts, at
the rates that a large copy and a large product reach on this GPU. FourierFT counts the waves that it shares.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_1b
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from serving.engine import Engine
from serving.sequence import Request

ROOT = Path(__file__).parent.parent
SHAPE = llama_1b.SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
LINEARS = {  # module, outputs, inputs
    "q_proj": ("self_attn", 2048, 2048),
    "k_proj": ("self_attn", 512, 2048),
    "v_proj": ("self_attn", 512, 2048),
    "o_proj": ("self_attn", 2048, 2048),
    "gate_proj": ("mlp", 8192, 2048),
    "up_proj": ("mlp", 8192, 2048),
    "down_proj": ("mlp", 2048, 8192),
}
RANK, PROMPT, NEW = 16, 128, 64
KINDS = ("lora", "rslora", "dora", "adalora", "ia3", "vera", "prefix", "bottleneck", "fourierft")
CACHE_BYTES = 2 * 16 * 8 * 64 * 2  # of a token: keys and values of all layers and heads


def model() -> Any:
    """A random model on the GPU, the same at every call."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(LlamaConfig(**SHAPE, dtype=torch.bfloat16)).bfloat16().eval()


def tensors(kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Random weights of an adapter, by their names in its file."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int, size: float = 0.02, mean: float = 0.0) -> torch.Tensor:
        return (mean + size * torch.randn(*shape, generator=generator, device="cuda")).cpu()

    if kind == "prefix":
        return {"prompt_embeddings": draw(20, 16 * 2 * 8 * 64, size=0.5)}
    found = {"base_model.vera_A": draw(256, 8192), "base_model.vera_B": draw(8192, 256)} if kind == "vera" else {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for name, (module, out, inputs) in LINEARS.items():
            place = f"base_model.model.model.layers.{layer}.{module}.{name}"
            if kind == "bottleneck" and name == "down_proj":
                place = place.removeprefix("base_model.model.")
                found |= {f"{place}.down.weight": draw(64, out), f"{place}.down.bias": draw(64)}
                found |= {f"{place}.up.weight": draw(out, 64), f"{place}.up.bias": draw(out)}
            elif kind == "ia3" and name in ("k_proj", "v_proj", "down_proj"):
                shape = (1, inputs) if name == "down_proj" else (out, 1)
                found[f"{place}.ia3_l"] = draw(*shape, size=0.1, mean=1.0)
            elif kind == "vera":
                found |= {
                    f"{place}.vera_lambda_d": draw(256, mean=0.1),
                    f"{place}.vera_lambda_b": draw(out, size=0.5),
                }
            elif kind == "fourierft":
                found[f"{place}.fourierft_spectrum"] = draw(1000, size=1.0)
            elif kind == "adalora":
                found |= {f"{place}.lora_A": draw(RANK, inputs), f"{place}.lora_B": draw(out, RANK)}
                found[f"{place}.lora_E"] = draw(RANK, 1, size=1.0)
            elif kind not in ("ia3", "bottleneck"):
                found |= {f"{place}.lora_A.weight": draw(RANK, inputs), f"{place}.lora_B.weight": draw(out, RANK)}
                if kind == "dora":
                    found[f"{place}.lora_magnitude_vector"] = draw(out, size=0.1, mean=0.9)
    return found


def config(kind: str) -> dict[str, Any]:
    """The config beside an adapter's weights."""
    linear = {"target_modules": list(LINEARS), "task_type": "CAUSAL_LM", "bias": "none"}
    low_rank = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, **linear}
    adalora = {"peft_type": "ADALORA", "init_r": RANK, "r": 8, "target_r": 8, "lora_alpha": 32, **linear}
    return {
        "lora": low_rank,
        "rslora": low_rank | {"use_rslora": True},
        "dora": low_rank | {"use_dora": True},
        "adalora": adalora,
        "ia3": {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        "vera": {"peft_type": "VERA", "r": 256, "save_projection": True, **linear},
        "fourierft": {
            "peft_type": "FOURIERFT", "n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777, **linear
        },
        "bottleneck": {"kind": "bottleneck", "placement": "pfeiffer", "size": 64, "activation": "relu"},
        "prefix": {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 20},
    }[kind]  # fmt: skip


def write_adapter(folder: Path, kind: str, seed: int) -> Path:
    """An adapter's folder, as PEFT loads it."""
    folder.mkdir()
    names = ("bottleneck.safetensors", "bottleneck_config.json")
    names = names if kind == "bottleneck" else ("adapter_model.safetensors", "adapter_config.json")
    save_file({name: value.bfloat16() for name, value in tensors(kind, seed).items()}, folder / names[0])
    (folder / names[1]).write_text(json.dumps(config(kind)))
    return folder


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    """So many prompts of PROMPT random token ids, another set for each seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(SHAPE["vocab_size"], (count, PROMPT), generator=generator)
    return [tuple(row) for row in drawn.tolist()]


def timed(call: Callable[[list[tuple[int, ...]]], int], count: int, calls: int) -> dict[str, float]:
    """New tokens per second: median and best of several calls, after one that is not counted."""
    rates = []
    for number in range(calls + 1):
        fresh = prompts(count, number)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        tokens = call(fresh)
        torch.cuda.synchronize()
        rates.append(tokens / (time.perf_counter() - begin))
    return {"tokens_per_second": statistics.median(rates[1:]), "best": max(rates[1:])}


def ours(engine: Engine, names: list[str | None], count: int, calls: int) -> dict[str, float]:
    """Requests whose adapters are these in turn."""

    def call(fresh: list[tuple[int, ...]]) -> int:
        asked = [Request(prompt, names[row % len(names)], new_tokens=NEW) for row, prompt in enumerate(fresh)]
        return sum(map(len, engine.generate(asked)))

    return timed(call, count, calls)


def rates() -> tuple[float, float]:
    """Bytes per second of a large copy, and operations per second of a large bf16 product."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 2**31 / seconds(lambda: target.copy_(source)), 2 * 8192**3 / seconds(lambda: left @ right)


def seconds(run: Callable[[], Any]) -> float:
    """The median time of something on the GPU."""
    found = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return statistics.median(found[3:])


def floor(engine: Engine, count: int, names: list[str | None], speeds: tuple[float, float]) -> float:
    """The fewest seconds of a whole call."""
    matrices = sum(group.outputs * group.weight_LNI.shape[2] for group in engine.base.groups.values())
    weights = 2 * (matrices * SHAPE["num_hidden_layers"] + SHAPE["vocab_size"] * SHAPE["hidden_size"])
    used = {name for name in names[:count] if name is not None}
    adapters = sum(engine.pool.packed_of(name).block.numel() * 2 for name in used)
    cache = count * (PROMPT + NEW / 2) * CACHE_BYTES
    prefill = 2 * matrices * SHAPE["num_hidden_layers"] * count * PROMPT / speeds[1]
    return (NEW - 1) * (weights + adapters + cache) / speeds[0] + prefill


def load_times(engine: Engine, folders: list[Path]) -> dict[str, float]:
    """Milliseconds from an adapter's folder to the host, and from there to the device, where others were before."""
    read, placed = [], []
    for number, folder in enumerate(folders):
        begin = time.perf_counter()
        engine.load(f"timed-{number}", folder)
        read.append(time.perf_counter() - begin)
        packed = engine.pool.packed_of(f"timed-{number}")
        while (idle := engine.pool.evictable()) is not None and idle.packed.digest != packed.digest:
            engine.pool.evict(idle)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        resident = engine.pool.acquire(packed)
        assert resident is not None
        torch.cuda.synchronize()
        placed.append(time.perf_counter() - begin)
        engine.pool.release(resident)
        engine.unload(f"timed-{number}")
    return {"host_to_device_ms": statistics.median(placed) * 1e3, "folder_to_host_ms": statistics.median(read) * 1e3}


def measure_ours(place: Path, calls: int) -> list[dict[str, Any]]:
    """All rows of Fleetune."""
    speeds = rates()
    engine = Engine(model(), residents=80, rows=256, positions=512, tokens=65536, adapter_bytes=6 * 2**30)
    loras: list[str | None] = [f"lora-{number}" for number in range(64)]
    for name in loras:
        engine.load(str(name), place / str(name))
    for kind in KINDS:
        engine.load(kind, place / kind)
    loads: list[tuple[str, list[str | None], int]] = [
        ("base only", [None], 64),
        ("1 adapter", loras[:1], 64),
        ("4 adapters", loras[:4], 64),
        ("16 adapters", loras[:16], 64),
        ("64 adapters", loras, 64),
        ("base only, batch 256", [None], 256),
        ("64 adapters, batch 256", loras, 256),
        ("8 kinds", list(KINDS[:8]), 64),
        ("8 kinds, FourierFT among them", [kind for kind in KINDS if kind != "bottleneck"], 64),
        *((f"only {kind}", [kind], 64) for kind in KINDS[2:]),
    ]
    rows = []
    for title, names, count in loads:
        row: dict[str, Any] = {"engine": "fleetune", "load": title, "batch": count}
        row |= ours(engine, names, count, calls)
        row["over_floor"] = count * NEW / row["tokens_per_second"] / floor(engine, count, names, speeds)
        rows.append(row)
        print(
            title, round(row["tokens_per_second"]), round(row["best"]), f"{row['over_floor']:.2f} x floor", flush=True
        )
    fresh = [write_adapter(place / f"fresh-{number}", "lora", 1000 + number) for number in range(8)]
    rows.append({"engine": "fleetune", "load": "hot load", **load_times(engine, fresh)})
    print(rows[-1], flush=True)
    return rows


def measure_peers(place: Path, new: int) -> list[dict[str, Any]]:
    """Transformers, and PEFT with one name per row; fewer new tokens, as a step takes them so much longer."""
    from peft import PeftModel

    rows: list[dict[str, Any]] = []
    base = model()

    def call(fresh: list[tuple[int, ...]], running: Any, **extra: Any) -> int:
        ids = torch.tensor(fresh, device="cuda")
        given = running.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new,
            do_sample=False, pad_token_id=0, **extra,
        )  # fmt: skip
        return int(given.shape[0] * (given.shape[1] - ids.shape[1]))

    rows.append({"engine": "transformers", "load": "base only"} | timed(lambda f: call(f, base), 64, 2))
    print(rows[-1], flush=True)
    tuned: Any = None
    for number in range(64):
        if tuned is None:
            tuned = PeftModel.from_pretrained(base, place / "lora-0", adapter_name="lora-0")
        elif number < 16:
            tuned.load_adapter(str(place / f"lora-{number}"), adapter_name=f"lora-{number}")
    tuned.eval()
    for count in (1, 4, 16):
        names = [f"lora-{row % count}" for row in range(64)]
        row = {"engine": "peft", "load": f"{count} adapters"}
        rows.append(row | timed(lambda f, n=names: call(f, tuned, adapter_names=n), 64, 1))  # type: ignore[misc]
        print(rows[-1], flush=True)
    return rows


def commit() -> str:
    """The commit that is measured, where git knows it."""
    said = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown"


def main() -> None:
    """Measure all rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--only", choices=["fleetune", "peers"])
    parser.add_argument("--peers-new-tokens", type=int, default=8)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for number in range(64):
            write_adapter(place / f"lora-{number}", "lora", number)
        for kind in KINDS:
            write_adapter(place / kind, kind, 100)
        if arguments.only != "peers":
            rows += measure_ours(place, arguments.calls)
        if arguments.only != "fleetune":
            rows += measure_peers(place, arguments.peers_new_tokens)
    device = torch.cuda.get_device_name()
    found = {"commit": commit(), "device": device, "torch": torch.__version__, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
