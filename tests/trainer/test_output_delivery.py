"""Whatever goes wrong after training: the output is delivered, and what is missing is said; a wrong one is caught."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from llamas import random_llama
from transformers import AutoTokenizer

from methods.lora import LoraTuning
from runfolder.chain import Attempt, claim_next
from trainer import export, reload
from trainer.__main__ import main
from trainer.omissions import dispensable, omissions_line
from trainer.verify import LogitsGap, OutputDiffers

OTHER_END = "!"
FULL_DISK = OSError(28, "No space left on device")


class FillsTheDisk:
    """A merged model of which only a part can be written."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise FULL_DISK


def broken(*_: Any) -> Any:
    raise RuntimeError("something\nbroke")


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A base whose config names another end than its tokenizer, and whose generation config would not be saved."""
    folder = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(OTHER_END)
    random_llama(vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=0).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "temperature": 0.5}))
    return folder


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What stands in for functions of trainer/export.py, by the run's name."""
    made: dict[str, dict[str, Any]] = {}

    def patch(name: str) -> None:
        real = getattr(export, name)
        monkeypatch.setattr(
            export, name, lambda run, *a: made.get(run.attempt.run_dir.name, {}).get(name, real)(run, *a)
        )

    for name in ("merge", "card", "observe", "write_ends"):
        patch(name)
    return made


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """This process trains."""
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in {**places, "DS_ACCELERATOR": "cpu", "FLEETUNE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(key, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_what_is_trained_is_delivered_and_what_is_missing_is_said(
    new_run: Any, base: Path, faults: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, **parts: Any) -> Path:
        job = {"base": str(base), "train": {"steps": 2}, "output": {"merge": True}, **parts}
        run: Path = new_run(name, **job)
        return run

    faults |= {
        "full-disk": {"merge": lambda *_: FillsTheDisk()},
        "no-merge": {"merge": broken},
        "wrong-merge": {"merge": lambda run, adapter: reload.load_base(run, adapter, {})},
        "no-card": {"card": broken},
        "no-check": {"observe": broken},
        "no-ends": {"write_ends": broken},
    }
    said = {
        "full-disk": "the merged model is missing: OSError: [Errno 28] No space left on device",
        "no-merge": "the merged model is missing: RuntimeError: something broke",
        "wrong-merge": "the merged model is missing: OutputDiffers: its logits differ from the trained model's by ",
        "no-card": "the model card is missing: RuntimeError: something broke",
        "no-check": "the check of the output is missing: RuntimeError: something broke",
        "no-ends": "generation_config.json is missing: RuntimeError: something broke",
        "died-twice": "what follows the export is missing: 2 workers ended in it",
    }
    runs = {name: make(name) for name in ("plain", *said)} | {"full": make("full", method={"kind": "full"})}
    for _ in range(2):
        earlier = claim_next(runs["died-twice"], None)
        assert earlier
        (earlier.folder / "output").mkdir()
    corrupt = make("corrupt")
    real = LoraTuning.export

    def spoilt(method: Any, model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
        ruined = {name: value * 1.01 if "lora_B" in name else value for name, value in weights.items()}
        real(method, model, ruined if corrupt in folder.parents else weights, folder)

    monkeypatch.setattr(LoraTuning, "export", spoilt)
    with pytest.raises(OutputDiffers, match="logits differ by .* It is kept in .*output.rejected"):
        main([*runs.values(), corrupt])

    assert (corrupt / "attempts" / "1" / "output.rejected" / "adapter_model.safetensors").exists()
    assert not (corrupt / "output").exists() and not (corrupt / "result.json").exists()
    for name, run in runs.items():
        result = json.loads((run / "result.json").read_text())
        assert result["state"] == "succeeded"
        weights = "model.safetensors" if name == "full" else "adapter_model.safetensors"
        assert (run / "output" / weights).exists()
        assert not list(run.rglob("*unfinished*"))
        merged = (run / "output" / "merged" / "model.safetensors").exists()
        assert merged == (name not in ("full", "full-disk", "no-merge", "wrong-merge", "died-twice", "no-ends"))
        if name not in said:
            assert result["reason"] is None
            continue
        assert said[name] in result["reason"] and "\n" not in result["reason"]
        if name != "no-card":
            assert f"**Note:** {said[name]}" in (run / "output" / "README.md").read_text()
    ends_are_named(runs, base)


def ends_are_named(runs: dict[str, Path], base: Path) -> None:
    """Adapter, merged and full model say where answers end, and keep what else the base's generation config says."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ends = sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(OTHER_END)])
    for output in (runs["plain"] / "output", runs["plain"] / "output" / "merged", runs["full"] / "output"):
        config = json.loads((output / "generation_config.json").read_text())
        assert (config["eos_token_id"], config["temperature"]) == (ends, 0.5)
    assert "GenerationConfig.from_pretrained" in (runs["plain"] / "output" / "README.md").read_text()
    assert f"| {ends[0]}, {ends[1]} |" in (runs["full"] / "output" / "README.md").read_text()


def test_reasons_come_from_the_events_of_the_attempt(tmp_path: Path) -> None:
    attempt = claim_next(tmp_path, None)
    assert attempt
    attempt.event("checkpoint", step=1)
    assert omissions_line(attempt) == ""
    attempt.event("missing", what="this", why="that")
    attempt.event("missing", what="the card", why="full")
    assert omissions_line(Attempt(tmp_path, 1)) == "this is missing: that; the card is missing: full"


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, 7)  # its folder is not there
    with dispensable(attempt, "the card"):
        raise RuntimeError("boom")
    assert not attempt.folder.exists()


def test_what_is_no_number_is_no_match() -> None:
    assert LogitsGap(0.0, 1e-5).holds
    assert not LogitsGap(float("inf"), 1e-5).holds
    assert not LogitsGap(float("nan"), 1e-5).holds
