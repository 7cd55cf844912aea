"""Adapters to evaluate, and what Ray and a controller do at an attempt of a run that evaluates."""

from pathlib import Path

from orchestrator.evaluation.attempt import evaluate_attempt
from runfolder.chain import Attempt
from runfolder.outcome import final_word
from trainer.checkpoint.lineage import claim_from_newest


def make_adapter(base: Path, folder: Path, seed: int = 0) -> Path:
    """A LoRA adapter that changes what a base says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def claimed(run_dir: Path) -> Attempt:
    """The next attempt at a run."""
    attempt = claim_from_newest(run_dir)
    assert attempt
    return attempt


def end(attempt: Attempt, state: str, reason: str | None = None) -> None:
    """Write down how an attempt ended, and close its run."""
    kind = "success" if state == "succeeded" else "user_error"
    verdict = {"kind": kind, "reason": reason or "", "evidence": "", "rank": None}
    attempt.write_verdict(verdict)
    assert attempt.close(final_word(state, reason, verdict, attempt.number))


def succeed(run_dir: Path) -> None:
    """An attempt that comes to its end."""
    attempt = claimed(run_dir)
    assert evaluate_attempt(run_dir, attempt.number)
    end(attempt, "succeeded")


def fail(run_dir: Path) -> None:
    """An attempt that a bug ends."""
    end(claimed(run_dir), "failed", "a bug")
