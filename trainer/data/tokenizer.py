"""The base's tokenizer, and the ids at which its generation stops; needs transformers, not torch."""

from pathlib import Path
from typing import Any

from orchestrator.job import Base
from trainer.ends import end_tokens


def load_tokenizer(base: Base, folder: Path | None = None) -> Any:
    """The base's tokenizer, from `folder` where the base is known to lie there.

    Its padding token is its end token where it has none of its own.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder or base.model, revision=base.revision or "main")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_ids(tokenizer: Any, base: Base, folder: Path | None = None) -> tuple[int, ...]:
    """The ids at which generation stops, by the tokenizer and by the base's two configs."""
    from transformers import AutoConfig, GenerationConfig

    place, revision = folder or base.model, base.revision or "main"
    configs = [AutoConfig.from_pretrained(place, revision=revision).to_dict()]
    try:
        configs.append(GenerationConfig.from_pretrained(place, revision=revision).to_dict())
    except OSError:  # it need not have one
        pass
    return end_tokens(tokenizer, *configs)
