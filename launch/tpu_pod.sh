#!/bin/bash
# Train on all hosts of a Cloud TPU slice:
#
#     launch/tpu_pod.sh NAME ZONE RECIPE --out /mnt/shared/runs/big mesh.fsdp=32
#
# The same command runs on every host of the slice. The hosts find each other by themselves: JAX asks the TPU's metadata
# server. polygpt and `jax[tpu]` must be installed on each (run this script once with SETUP='pip install ...'), and RUN
# must be in a folder that all of them share, such as a Filestore, or a bucket mounted by gcsfuse.

set -euo pipefail

if (($# < 3)); then
    echo "usage: [SETUP=COMMAND] $0 NAME ZONE RECIPE --out RUN [KEY=VALUE]..." >&2
    exit 2
fi
name="$1" zone="$2"
shift 2

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}

if [[ -n "${SETUP:-}" ]]; then on_all_hosts "$SETUP"; fi
printf -v command '%q ' polygpt train "$@"    # quoted for the shell on the hosts
on_all_hosts "$command"
