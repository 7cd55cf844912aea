"""What a row of a stage that writes draws: one of some principles, and a seed for the tokens of a column.

The principle depends on the row's id, the seed, the round, and the ids of the principles, by the highest of their
digests (rendezvous hashing, Thaler and Ravishankar 1998). So another wording of a principle changes what the rows ask
that draw it, a principle that comes or goes changes the rows that draw that one, and nothing changes any other row.
"""

import hashlib
from collections.abc import Mapping, Sequence

Principle = Mapping[str, str]


def drawn_principle(principles: Sequence[Principle], row_id: str, seed: int, round_number: int) -> Principle:
    """The principle that a row draws in a round."""

    def place(principle: Principle) -> bytes:
        principle_id = principle["id"]
        text = f"{seed} {round_number} {row_id} {principle_id}"
        digest = hashlib.sha256(text.encode())
        return digest.digest()

    return max(principles, key=place)


def seed_of_row(row_id: str, seed: int, column: str) -> int:
    """What the tokens of a column of a row are drawn from."""
    text = f"{seed} {column} {row_id}"
    digest = hashlib.sha256(text.encode())
    first_bytes = digest.digest()[:4]
    return int.from_bytes(first_bytes)
