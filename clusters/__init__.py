"""Where workers come from: this machine, SLURM, Kubernetes; and how commands get there."""
