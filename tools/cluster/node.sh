#!/bin/bash
# One node of a run: the same command on every node, in any order.
#
#   NODES=4 HEAD=node0 tools/cluster/node.sh recipes/7b_gstack.toml --set run.folder=/shared/7b --set data.path=/shared/data
#
# HEAD      host name of one of the nodes, where they meet; PORT (29500) must be free on it
# GPUS      ranks on this node (8)
# RESTARTS  how often the ranks start again after one died (3): the run goes on from its newest checkpoint
# JOB       name of the rendezvous, different for every run on the same HEAD and PORT (stackgrow)
# SAVE_SECONDS  how long the ranks have to save after SIGTERM (600)
# ADDRESS   of this node, where its host name does not lead to it
#
# The run folder and the data must be on a file system that all nodes share. A node that was lost for good is replaced by
# giving this command on another. SIGTERM saves and ends; the same commands go on from there.
set -euo pipefail
# torchrun 2.13 lets all rounds of a rendezvous share one store, and its agents count restarts apart: after one died, the
# ranks would look for each other under different names. So each round gets a store of its own, kept by its rank 0.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# As in torchtitan's run_train.sh: each stage has tensors of other sizes than the one before.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}"
cd "$(dirname "$0")/../.."
exec torchrun --nnodes "${NODES:?how many nodes}" --nproc-per-node "${GPUS:-8}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?host name of a node}:${PORT:-29500}" --rdzv-id "${JOB:-stackgrow}" \
    ${ADDRESS:+--local-addr "$ADDRESS"} --shutdown-timeout "${SAVE_SECONDS:-600}" \
    tools/run_recipe.py "$@"
