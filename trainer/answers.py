"""Whether what a model wrote is the answer that the data has."""


def matches(written: str, answer: str) -> bool:
    """Whether a text is the answer, spaces at its ends aside; where the answer has `#### x`, whether x is equal."""
    if "####" in answer:
        return _final(written) == _final(answer)
    return written.strip() == answer.strip()


def _final(text: str) -> str | None:
    """What stands behind the last `####`, without spaces at its ends and commas; None where there is none."""
    _, mark, final = text.rpartition("####")
    if not mark:
        return None
    return final.strip().replace(",", "")
