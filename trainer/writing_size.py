"""How many answers the engine beside a model in training writes at a time; plain numbers, which a plan reads too."""

ANSWERS_AT_ONCE = 256  # answers that are written at a time
CACHED_TOKENS = 65536  # tokens whose keys and values are kept at a time, of all answers
