"""How many answers the engine beside a model in training writes at a time; plain numbers, which a plan reads too."""

ANSWERS_AT_ONCE = 512  # answers that are written at a time
CACHED_TOKENS = 196_608  # tokens whose keys and values are kept at a time, of all answers,
CACHE_BYTES = 8 * 2**30  # unless they would take more than so much; there is room for two answers always


def cached_tokens(positions: int, bytes_of_token: int) -> int:
    """The tokens whose keys and values are kept, where an answer with its prompt has at most so many `positions`."""
    needed = positions * ANSWERS_AT_ONCE
    allowed = CACHE_BYTES // max(1, bytes_of_token)
    kept = min(needed, CACHED_TOKENS, allowed)
    of_two_answers = 2 * positions
    return max(of_two_answers, kept)
