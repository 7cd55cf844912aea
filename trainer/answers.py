"""Whether what a model wrote is the answer that the data has, and whether it has the form of one."""

import re

_NUMBER_AT_END = re.compile(r"####\s*-?\d[\d,]*(\.\d+)?")


def matches(written: str, answer: str) -> bool:
    """Whether a text is the answer, spaces at its ends aside; where the answer has `#### x`, whether x is equal."""
    if "####" in answer:
        return _final(written) == _final(answer)
    return written.strip() == answer.strip()


def ends_in_number(written: str) -> bool:
    """Whether a text ends with one `####` and a number behind it, spaces aside, as answers of GSM8K do."""
    text = written.strip()
    found = _NUMBER_AT_END.search(text)
    if found is None or text.count("####") > 1:
        return False
    return found.end() == len(text)


def _final(text: str) -> str | None:
    """What stands behind the last `####`, without spaces at its ends and commas; None where there is none."""
    _, mark, final = text.rpartition("####")
    if not mark:
        return None
    return final.strip().replace(",", "")
