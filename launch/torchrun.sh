#!/usr/bin/env bash
# Train with torchrun, on one node or on several nodes that meet at a rendezvous.
#
#   launch/torchrun.sh CONFIG [key=value ...]
#   PROCESSES_PER_NODE=2 launch/torchrun.sh configs/quickstart.yaml training.micro_batch=8      (two on a CPU)
#   NODES=2 RENDEZVOUS=node-1:29500 launch/torchrun.sh CONFIG              (the same line on both nodes)
#
# Variables, with their defaults:
#   PROCESSES_PER_NODE=gpu   processes of a node; `gpu`: one for each GPU
#   NODES=1                  nodes of the job
#   RENDEZVOUS=              HOST:PORT where the nodes meet: one of them, and a port free there; needed when NODES > 1
#   JOB=emotrain             name of the job at the rendezvous; two jobs must not share one
#   MAX_RESTARTS=3           how often torchrun starts the processes again after one has died
#   SAVE_SECONDS=600         how long a stopped run may take to finish its step and to save
#   PYTHON=python            the Python that emotrain is installed in
#   PYTORCH_ALLOC_CONF=expandable_segments:True   options of torch's allocator
#   PYTORCH_CUDA_ALLOC_CONF=   their older name; where it is set it is left alone
#   TMPDIR=/tmp                a folder on each node's own disk
#   TRITON_CACHE_DIR=          where kernels are compiled to: by default below TMPDIR
#
# TERM, USR1 or Ctrl-C: the step is finished, a checkpoint is written, and the exit code is 75: the same line goes on from
# the newest whole checkpoint. A second signal stops at once. With several nodes, send the signal to all of them; when only
# one is taken away, the others save too, and then wait for its replacement. Exit codes: docs/cluster.md.
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit $(($# == 0 ? 2 : 0))
fi

NODES="${NODES:-1}"
options=(--nproc-per-node "${PROCESSES_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-3}" --shutdown-timeout "${SAVE_SECONDS:-600}")
if [[ $NODES -eq 1 ]]; then
    options+=(--standalone)
elif [[ -z ${RENDEZVOUS:-} ]]; then
    echo "error: NODES=$NODES needs RENDEZVOUS=HOST:PORT, the same on every node; HOST is one of the nodes" >&2
    exit 2
else
    options+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${JOB:-emotrain}")
fi

# A new store at every start of the processes: in the one that torchrun would keep stand the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Expert parallelism asks for buffers of another size in every layer and step: in segments that cannot grow, the memory between
# them is lost. Kernels are compiled onto the node's own disk: processes of many nodes would wait for one shared home.
if [[ -z ${PYTORCH_CUDA_ALLOC_CONF:-} ]]; then
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
fi
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}"

# Job control gives torchrun a process group of its own: Ctrl-C reaches it once, through the trap, and not twice.
set -m
"${PYTHON:-python}" -m torch.distributed.run "${options[@]}" "$(dirname "${BASH_SOURCE[0]}")/pretrain.py" "$@" &
torchrun=$!
stopped=
on_signal() {
    stopped=yes
    kill -TERM "$torchrun" 2>/dev/null || true
}
trap on_signal TERM INT USR1

code=0
wait "$torchrun" || code=$?
# A trapped signal ends `wait` while torchrun still waits for its processes to save.
while kill -0 "$torchrun" 2>/dev/null; do
    code=0
    wait "$torchrun" || code=$?
done
# torchrun ends with 1 whatever its processes ended with.
if [[ -n $stopped && $code -ne 0 ]]; then
    exit 75
fi
exit "$code"
