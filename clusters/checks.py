"""What a look at a machine finds. It needs Python alone: some machines have nothing else yet."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runfolder.folders import nearest_existing

Level = Literal["ok", "warn", "fail"]
GIB = 1 << 30
# A program that prints the devices that torch sees.
DEVICES = """
import torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print("; ".join(f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices) or "CPU only")
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `mend` says how to fix it where it is not ok."""

    name: str
    level: Level
    found: str
    mend: str = ""


def disk_check(folder: Path, mend: str) -> Check:
    """How much may be written where a folder is, or will be."""
    usage = shutil.disk_usage(nearest_existing(folder))
    level: Level = "fail"
    if usage.free > 20 * GIB:
        level = "ok"
    elif usage.free > 2 * GIB:
        level = "warn"
    return Check("disk", level, f"{usage.free / GIB:.1f} GiB free", mend)
