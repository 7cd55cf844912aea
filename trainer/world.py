"""This worker among the others: rank, device, and how they talk."""

import logging
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from runfolder.folders import library_folders
from trainer.libraries import import_lean
from trainer.versions import check_versions
from trainer.zero.engine import prepare_deepspeed


@dataclass(frozen=True)
class World:
    """One worker's place: its rank of `size`, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the worker that writes what is written once."""
        return self.rank == 0


def join_process_group() -> World:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    A group that a launcher has already made is taken as it is. Alone, no variable is needed.
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
    return World(dist.get_rank(), dist.get_world_size(), device)


def _quieten() -> None:
    """Keep what only developers of the libraries can act on out of a worker's log."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)
    deepspeed.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # the placeholder: ours
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|transformers)\.")
