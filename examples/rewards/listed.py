"""What an answer of `examples/rewards/grpo.yaml` is worth: `listed(prompt, completion, row)`, a number."""

from typing import Any


def listed(prompt: str, completion: str, row: dict[str, Any]) -> float:  # noqa: ARG001
    """1 where all that is written is words of the list that the prompt has behind its colon, else 0."""
    _, _, words_and_arrow = prompt.partition(":")
    allowed = words_and_arrow.replace("->", " ").split()
    written = completion.split()
    is_listed = bool(written) and all(word in allowed for word in written)
    return float(is_listed)
