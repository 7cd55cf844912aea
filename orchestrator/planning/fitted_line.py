"""A worker's peak memory without torch: lines that were fitted to dry runs of each method, good for about a fifth.

Activations of a token are in each layer a multiple of the hidden size H and one of the MLP's width F, and once more a
multiple of H; logits are a multiple of the vocabulary V. Where the base's own weights are trained, copies of them in
bf16 stand beside, a multiple of their number; or the gradient of the head is the worst moment, a multiple of V H.
What a method keeps of them lies in memory_lines.json.
"""

import json
from functools import cache
from pathlib import Path

from orchestrator.planning.model import Model
from orchestrator.planning.sizes import sizes
from runfolder.job import Job
from trainer.data.survey import Sample
from trainer.dry_run.fit import FITTED_LINE, LINE_MARGIN, Forecast

LINES = Path(__file__).parent / "memory_lines.json"
LABELS_HELD = 2048  # labels whose logits the fast path holds at most
MemoryLine = tuple[float, float, float, float, float, float]  # bytes by H and F in a layer, H, V, weights, V H


def fitted(job: Job, model: Model, sample: Sample | None, precision: str, fast: bool) -> Forecast | None:
    """The forecast by the method's line; None for a base, a method or an objective that has none."""
    if job.objective.kind != "sft":
        return None
    line = lines().get(line_name(job, fast))
    kind = "gpu" if precision == "bf16" else "cpu"
    known = sizes(job, model, kind)
    config = model.config
    try:
        hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    except KeyError:
        return None
    if line is None or known is None or model.embeddings is None:
        return None
    of_hidden, of_wide, beside, of_vocabulary, of_trained, of_head = line
    if not job.train.master_weights:
        of_trained = 0.0  # the weights are in bf16 themselves
    tokens = _row_positions(job, sample) / job.sharding.sequence
    in_layers = layers * (of_hidden * hidden + of_wide * wide)
    activations = tokens * (in_layers + beside * hidden) + of_trained * known.trained
    with_logits = min(tokens, LABELS_HELD) if fast else tokens
    logits = with_logits * of_vocabulary * model.embeddings
    if precision == "fp32":
        activations *= 2
        logits *= 2
    of_last_gradient = of_head * model.embeddings * hidden
    if of_last_gradient > activations + logits:
        activations = of_last_gradient
        logits = 0.0
    parts = {
        "weights": known.memory.weights,
        "gradients": known.memory.gradients,
        "optimizer": known.memory.optimizer,
        "activations": int(activations),
        "logits": int(logits),
    }
    return Forecast(parts, FITTED_LINE, LINE_MARGIN)


def line_name(job: Job, fast: bool) -> str:
    """What the line of a job is called."""
    words = [job.method.kind, "fast" if fast else "plain"]
    if job.train.gradient_checkpointing:
        words.append("checkpointed")
    return " ".join(words)


@cache
def lines() -> dict[str, MemoryLine]:
    """The lines by their names."""
    found: dict[str, MemoryLine] = json.loads(LINES.read_text())
    return found


def _row_positions(job: Job, sample: Sample | None) -> int:
    """The positions of the longest micro-batch."""
    longest = job.data.seq_len
    if sample and not job.data.packing:
        longest, _ = sample[0]
    return job.train.micro_batch * longest
