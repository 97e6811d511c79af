#!/bin/bash
# Train on the nodes of a SLURM cluster, one process a node, each with all of the node's GPUs:
#
#     sbatch --nodes=4 launch/slurm.sh RECIPE --out runs/big mesh.fsdp=32
#
# The processes find each other by themselves: JAX reads the node list that srun sets. RUN must be on a file system that
# all nodes share. Adapt the lines below that name a partition, a time and a module.

#SBATCH --job-name=polygpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Five minutes before the time is up every process is sent SIGTERM: they save the same step and end with exit code 143.
#SBATCH --signal=TERM@300
# A node that fails has the job started again, which goes on from the newest checkpoint.
#SBATCH --requeue
##SBATCH --partition=gpu

set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch $0 RECIPE --out RUN [KEY=VALUE]..." >&2
    exit 2
fi

# module load cuda    # only where the driver is a module; CUDA itself comes with polygpt[gpu]

# The folder after --out: a job that is started again resumes the run in it.
run=""
words=("$@")
for i in "${!words[@]}"; do
    [[ "${words[i]}" == --out && $((i + 1)) -lt ${#words[@]} ]] && run="${words[i + 1]}"
done
[[ -n "$run" && -f "$run/config.yaml" ]] && words+=(--resume)

# --kill-on-bad-exit ends the whole step when one process fails, and the requeued job starts all of them anew.
exec srun --kill-on-bad-exit=1 polygpt train "${words[@]}"
