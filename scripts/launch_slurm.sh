#!/usr/bin/env bash
# Trains under SLURM with one process per GPU, as JAX expects there; queues the job again when it
# ran out of time or crashed, so that it continues from its last checkpoint until the run is done:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 --time=4:00:00 \
#     scripts/launch_slurm.sh --config=configs/sret_s.py --workdir=/shared/RUN
#
# Two minutes before the time is up every process gets SIGTERM, saves and ends with status 75.
#SBATCH --job-name=sret_jax
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

status=0
# The first process that ends must not cut the others' checkpoint off.
srun --kill-on-bad-exit=0 .venv/bin/python main.py "$@" || status=$?
case "$status" in
  0 | 2) ;; # done; bad input, which another start does not fix
  75) scontrol requeue "$SLURM_JOB_ID" ;; # asked to stop, and saved
  *) ((SECONDS < 600)) || scontrol requeue "$SLURM_JOB_ID" ;; # at once, it would come again
esac
exit "$status"
