#!/bin/bash
#SBATCH --job-name=a-1-s1
#SBATCH --comment=fleetune:a-1-s1
#SBATCH --nodes=2
#SBATCH --cpus-per-task=16
#SBATCH --output=HOME/slurm/a-1-s1.log
#SBATCH --open-mode=append
#SBATCH --export=NONE
#SBATCH --signal=B:USR1@90
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:h100:4
#SBATCH --time=180
#SBATCH --partition=gpu
#SBATCH --account=ml
#SBATCH --requeue
trap '' USR1
module load cuda
export QUOTED='a '"'"'b'"'"' $(c)
`d`'
export FLEETUNE_HOME=HOME
exec PYTHON -P -m clusters.allocation HOME/runs/a-1 a-1-s1
