#!/bin/bash
# Train on several machines by mpirun (Open MPI, or another that sets PMI_RANK and PMI_SIZE), one process a machine:
#
#     HOSTFILE=hosts launch/mpi.sh 4 RECIPE --out runs/big mesh.fsdp=32
#
# mpirun only starts the processes; what they send each other goes through NCCL, not MPI. The first line of HOSTFILE
# (PBS_NODEFILE where PBS sets it) is the machine of process 0, at whose port PORT all of them meet. RUN must be on a
# file system that all machines share.

set -euo pipefail

if (($# < 2)) || ! [[ "$1" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: HOSTFILE=FILE $0 NUMBER-OF-PROCESSES RECIPE --out RUN [KEY=VALUE]..." >&2
    exit 2
fi
count="$1"
shift

hostfile="${HOSTFILE:-${PBS_NODEFILE:-}}"
if [[ -z "$hostfile" ]]; then # this machine alone
    host=127.0.0.1
    hosts=()
else
    read -r host _ < "$hostfile"
    hosts=(--hostfile "$hostfile" --map-by ppr:1:node)
fi
export POLYGPT_COORDINATOR="$host:${PORT:-29500}"

# Each rank turns the variables of its launcher into options. `exec` passes SIGTERM on to polygpt, which saves.
rank='
    exec polygpt train "$@" \
        --coordinator "$POLYGPT_COORDINATOR" \
        --num-processes "${OMPI_COMM_WORLD_SIZE:-$PMI_SIZE}" \
        --process-id "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}"
'
# -x is how Open MPI hands on a variable; other launchers hand on all of them.
pass=()
if mpirun --version 2> /dev/null | grep -q "Open MPI"; then pass=(-x POLYGPT_COORDINATOR -x PATH); fi
exec mpirun -np "$count" "${hosts[@]}" "${pass[@]}" bash -c "$rank" rank "$@"
