"""The base's tokenizer, and the ids at which its generation stops; needs transformers, not torch."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from runfolder.job import Base
from trainer.end_tokens import end_tokens


class TokenizerError(ValueError):
    """A base whose tokenizer cannot be loaded; the message is one line."""


def load_tokenizer(base: Base, folder: Path | None = None) -> Any:
    """The base's tokenizer, from `folder` where the base is known to lie there; raises TokenizerError.

    Its padding token is its end token where it has none of its own.
    """
    from transformers import AutoTokenizer

    place = folder or base.model
    revision = base.revision or "main"
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers and its readers raise what they like
        kind = type(error).__name__
        message = str(error).strip()
        lines = message.splitlines() or [kind]
        reason = lines[0]
        if reason.endswith(":"):  # what is wrong with a config.json stands below which of its keys it is
            cause = " ".join(lines[1:2])
            reason = f"{reason} {cause.strip()}"
        raise TokenizerError(f"base.model: {place}: its tokenizer cannot be loaded: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_ids(tokenizer: Any, base: Base, folder: Path | None = None) -> tuple[int, ...]:
    """The ids at which generation stops, by the tokenizer and by the base's two configs."""
    from transformers import AutoConfig, GenerationConfig

    place = folder or base.model
    revision = base.revision or "main"
    config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    configs = [config.to_dict()]
    with suppress(OSError):  # it need not have one
        generation_config = GenerationConfig.from_pretrained(place, revision=revision)
        configs.append(generation_config.to_dict())
    return end_tokens(tokenizer, *configs)
