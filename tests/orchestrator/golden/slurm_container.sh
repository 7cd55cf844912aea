#!/bin/bash
#SBATCH --job-name=a-1-s1
#SBATCH --comment=fleetune:a-1-s1
#SBATCH --nodes=1
#SBATCH --cpus-per-task=4
#SBATCH --output=HOME/slurm/a-1-s1.log
#SBATCH --open-mode=append
#SBATCH --export=NONE
#SBATCH --signal=B:USR1@90
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --requeue
trap '' USR1
module load apptainer
export PYTHONPATH=HOME/code/CODE:/scratch/mine
export FLEETUNE_HOME=HOME
exec PYTHON -P -m clusters.allocation HOME/runs/a-1 a-1-s1 apptainer exec --env PYTHONNOUSERSITE=1 --nv --bind /tmp --bind HOME --bind /data --bind /scratch --bind /a:/b:ro /images/fleetune.sif /opt/fleetune/bin/python
