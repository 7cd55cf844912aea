"""What TRL's trainers are told so that they take the steps that ours take, and what they say of these."""

from pathlib import Path
from typing import Any

from finished_runs import Curve


def plain_steps(folder: Path, rate: float, steps: int, rows: int) -> dict[str, Any]:
    """The options of a trainer of TRL: AdamW without decay at a constant rate, in fp32, all rows in each step."""
    return {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1e9,
        "optim": "adamw_torch",
        "learning_rate": rate,
        "per_device_train_batch_size": rows,
        "max_steps": steps,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
    }


def trained_curve(trainer: Any) -> Curve:
    """Train, and give the loss and the gradient norm of each step."""
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
