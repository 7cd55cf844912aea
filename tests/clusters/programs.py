"""Programs that stand for SLURM's commands, and say what no real slurmctld says on demand."""

from pathlib import Path


def program(asked: Path, name: str, script: str) -> None:
    """Make a program that writes down its arguments, and then does what a line of sh says."""
    path = asked.parent / "bin" / name
    path.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n{script}\n')
    path.chmod(0o755)
