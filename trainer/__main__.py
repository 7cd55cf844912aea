"""`python -m trainer RUN_DIR...`: train as plain processes, under any launcher that sets RANK and WORLD_SIZE."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from runfolder.chain import Attempt, attempts
from trainer.checkpoint.lineage import claim_from_newest
from trainer.loop import train
from trainer.omissions import omissions_line
from trainer.world import World, join_process_group


def main(run_dirs: Iterable[Path]) -> None:
    """For each run: claim the next attempt from the newest checkpoint, train, and close the run."""
    world = join_process_group()
    for run_dir in run_dirs:
        number = _claimed_number(run_dir, world)
        finished = train(run_dir, number)
        if not finished:
            print(f"{run_dir} has stopped as it was asked to; started again, it goes on", flush=True)
            continue
        attempt = Attempt(run_dir, number)
        missing = omissions_line(attempt)
        result = {"state": "succeeded", "attempt": number, "reason": missing or None}
        if world.leads and not attempt.close(result):
            sys.exit(f"{run_dir} went on without attempt {number}")
    dist.destroy_process_group()


def _claimed_number(run_dir: Path, world: World) -> int:
    """The number of the attempt that rank 0 claims for all; every rank exits where it could not, and sent 0."""
    numbers = [0]
    if world.leads:
        attempt = claim_from_newest(run_dir)
        if attempt is not None:
            numbers = [attempt.number]
    dist.broadcast_object_list(numbers, device=world.device)
    if numbers[0] == 0:
        sys.exit(f"{run_dir} is closed, or another process has just claimed it; attempts: {len(attempts(run_dir))}")
    return numbers[0]


if __name__ == "__main__":
    paths = map(Path, sys.argv[1:])
    main([path.resolve() for path in paths])
