"""Walltimes in SLURM's own forms (sbatch(1), --time)."""

import pytest

from clusters.slurm_walltime import seconds_in


@pytest.mark.parametrize(
    ("option", "minutes"),
    [
        ("30", 30),
        ("2:01", 3),
        ("1:00:30", 61),
        ("1-0", 1440),
        ("1-2:30", 1590),
        ("1-12:00:01", 2161),
        ("0", None),
        ("UNLIMITED", None),
        ("-5", None),
        ("1-", None),
        ("1:2:3:4", None),
    ],
)
def test_a_time_is_read_as_slurm_reads_it(option: str, minutes: int | None) -> None:
    assert seconds_in(option) == (None if minutes is None else 60 * minutes)
