"""This worker among the others: rank, device, and how they talk."""

import logging
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from runfolder.folders import library_folders
from trainer.libraries import import_lean
from trainer.shared_rows.group import OWN_ROWS, SequenceGroup
from trainer.versions import check_versions
from trainer.zero.engine import prepare_deepspeed


@dataclass(frozen=True)
class World:
    """One worker's place: its rank of `size`, its device, and the neighbours with which it shares rows."""

    rank: int
    size: int
    device: torch.device
    sequence: SequenceGroup = OWN_ROWS

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` groups it is in, that have rows of their own."""
        return self.rank // self.sequence.size

    @property
    def data_size(self) -> int:
        """How many groups have rows of their own."""
        return self.size // self.sequence.size

    @property
    def leads(self) -> bool:
        """Whether this is the worker that writes what is written once."""
        return self.rank == 0

    def told(self, flag: bool) -> bool:
        """What rank 0 says, on every rank; a collective."""
        if self.size == 1:
            return flag
        said = torch.tensor(float(flag), device=self.device)
        dist.broadcast(said, 0)
        return said.item() > 0


def join_process_group(sequence: int = 1) -> World:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    A group that a launcher has already made is taken as it is. Alone, no variable is needed. `sequence` is the number
    of neighbours that share rows; raises ValueError where it does not divide the number of workers.
    """
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **library_folders()}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        local_rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", local_rank)
        backend = "nccl"
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _quieten()
    check_versions()
    import_lean()
    prepare_deepspeed()
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    neighbours = SequenceGroup.join(sequence)
    return World(dist.get_rank(), dist.get_world_size(), device, neighbours)


def _quieten() -> None:
    """Keep what only developers of the libraries can act on out of a worker's log."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)
    deepspeed.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # the placeholder: ours
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|transformers)\.")
