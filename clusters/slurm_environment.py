"""What SLURM's commands get of the environment. It needs Python alone."""

import os
import re

# Variables of a shell that would come before the options of a script, or change how an answer is printed.
_OVERRULING = re.compile("(SBATCH|SQUEUE|SINFO|SACCT|SCANCEL)_.*|SLURM_TIME_FORMAT")


def slurm_environment() -> dict[str, str]:
    """This process's environment, without the variables that change what SLURM's commands ask and how they answer."""
    kept = dict(os.environ)
    for name in os.environ:
        if _OVERRULING.fullmatch(name):
            del kept[name]
    return kept
