#!/usr/bin/env bash
# One run on several machines. Start the same command on each of them, in a folder that all share:
#
#     bash runs/multinode.sh NODES HEAD_NODE:PORT GPUS_A_NODE CONFIG.toml [--key=value ...]
#
# If a process dies, the run goes back to the last checkpoint by itself, three times at most. The global batch is the config's,
# whatever the number of machines: grad_accum_steps must be a multiple of NODES x GPUS_A_NODE.
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: bash runs/multinode.sh NODES HEAD_NODE:PORT GPUS_A_NODE CONFIG.toml [--key=value ...]" >&2; exit 2; }
[ -f "$4" ] || { echo "$0: $4 is not a file" >&2; exit 2; }
nodes=$1 head=$2 gpus=$3 config=$(realpath "$4")
shift 4
cd "$(dirname "$(realpath "$0")")/.."
[ ! -f .venv/bin/activate ] || . .venv/bin/activate
exec torchrun --nnodes="$nodes" --nproc_per_node="$gpus" --max-restarts=3 --rdzv-id="${RUN_ID:-tauformer}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head" train.py "$config" --init_from=auto "$@"
