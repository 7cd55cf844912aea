"""What an evaluation holds in which the model writes answers: by formula, as its passes keep nothing for others.

Many answers are written at once (trainer/generation.py), each beside the cache of its tokens. The prompts' own pass
holds the widest values of a layer for all of their tokens.
"""

from collections.abc import Sequence
from types import SimpleNamespace

from methods.options.base import BaseConfig
from runfolder.job import Job
from trainer.dry_run.ledger import PARTS, Bytes
from trainer.dry_run.longest import Lengths
from trainer.dry_run.zero import FP32
from trainer.generation import PROMPTS_AT_ONCE, TOKENS_AT_ONCE, cache_bytes

OF_GATE = 3  # values as wide as the MLP that a layer holds at once,
OF_STREAM = 4  # and as wide as the base
OF_SHAPE = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")


def answering(job: Job, config: BaseConfig, documents: Sequence[Lengths], at_rest: Bytes, element: int) -> Bytes:
    """What a worker holds while it writes answers, beside what it holds `at_rest`; nothing where it writes none."""
    parts = dict.fromkeys(PARTS, 0)
    new_tokens = job.evaluation.max_new_tokens
    asks = job.data.eval is not None and job.objective.rows == "answers"
    has_shape = all(name in config for name in OF_SHAPE)
    if not asks or not new_tokens or not has_shape:
        return parts
    prompt = 1
    for length, labels in documents:
        of_document = length - labels
        prompt = max(prompt, of_document)
    width = prompt + new_tokens
    fitting = max(1, TOKENS_AT_ONCE // width)
    count = min(PROMPTS_AT_ONCE, fitting)
    shape = SimpleNamespace(**config)
    of_token, of_layer = cache_bytes(shape, element)
    of_gate = OF_GATE * config["intermediate_size"]
    of_stream = OF_STREAM * config["hidden_size"]
    widest = of_gate + of_stream
    parts["weights"] = at_rest["weights"]
    parts["optimizer"] = at_rest["optimizer"]
    cached = count * width
    read = count * prompt
    parts["cache"] = cached * (of_token + of_layer)
    parts["activations"] = read * widest * element
    logits = count * config["vocab_size"]
    parts["logits"] = logits * (element + FP32)
    return parts
