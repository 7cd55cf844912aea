"""`python -m clusters.ray_process ARGUMENTS`: the command line of Ray, deaf to SIGTERM.

SLURM sends that to the processes of a step when it preempts a job, while workers are still to save. A container's
runtime may hand it on, whatever its own parent has blocked.
"""

import runpy
import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    runpy.run_module("ray.scripts.scripts", run_name="__main__", alter_sys=True)
