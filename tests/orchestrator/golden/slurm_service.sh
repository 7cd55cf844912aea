#!/bin/bash
#SBATCH --job-name=mine-0123456789-s1
#SBATCH --comment=fleetune:mine-0123456789-s1
#SBATCH --nodes=1
#SBATCH --cpus-per-task=16
#SBATCH --output=HOME/slurm/mine-0123456789-s1.log
#SBATCH --open-mode=append
#SBATCH --export=NONE
#SBATCH --signal=B:USR1@120
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:4
#SBATCH --time=480
#SBATCH --partition=gpu
#SBATCH --requeue
trap '' USR1
export FLEETUNE_HOME=HOME
exec PYTHON -P -m clusters.allocation HOME/runs/mine-0123456789 mine-0123456789-s1
