#!/usr/bin/env bash
# Trains under SLURM with one process per GPU, as JAX expects there; queues the job again when it
# ran out of time, so that it goes on from its last checkpoint until the run is done:
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
srun --kill-on-bad-exit=0 .venv/bin/python -m sret_jax.tools.launch main.py "$@" || status=$?
if [[ "$status" == 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
