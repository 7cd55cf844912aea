"""Which tokens end an answer: the tokenizer, the base's config and its generation config may each name others.

A chat template ends a turn with the tokenizer's EOS (`<|im_end|>`, say), which is what training teaches the model to
write, while the base's config may still name the EOS of its pretraining. Whoever generates stops at any of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def end_tokens(tokenizer: Any, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids at which generation stops, ascending: all that a tokenizer and configs, as plain data, call EOS.

    The `eos_token_id` of a config may be an id, several, or null; that of a nested `text_config` counts too.
    """
    ends = set(_listed(tokenizer.eos_token_id))
    for config in configs:
        of_config = config.get("eos_token_id")
        ends.update(_listed(of_config))
        text_config = config.get("text_config") or {}
        of_text = text_config.get("eos_token_id")
        ends.update(_listed(of_text))
    return tuple(sorted(ends))


def until_end(ids: Sequence[int], ends: Iterable[int]) -> list[int]:
    """The ids before the first end token; all of them where there is none."""
    stops = set(ends)
    answer: list[int] = []
    for token in ids:
        if token in stops:
            break
        answer.append(token)
    return answer


def _listed(value: int | Iterable[int] | None) -> Iterator[int]:
    """The ids that a config's `eos_token_id` stands for."""
    if value is None:
        return
    if isinstance(value, int):
        yield value
    else:
        yield from value
