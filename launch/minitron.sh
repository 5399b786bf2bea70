#!/usr/bin/env bash
# Submit a recipe, from a login node: the jobs that its `cluster` section describes, one after the other.
#
#   launch/minitron.sh RECIPE [key=value ...] [--dry-run]
#
# This is `minitron submit` of the repository's environment. One job (launch/distill.sh) is enough for the whole chain:
# its steps share the allocation, and a requeued job skips those that are done. With cluster.prune_nodes the pruning gets
# a job of its own on that many nodes (launch/prune.sh), and the distillation starts when it has ended well (afterok).
# Without Python on the login node, do by hand what --dry-run prints elsewhere:
#
#   sbatch launch/distill.sh RECIPE
#   sbatch --dependency=afterok:$(sbatch --parsable launch/prune.sh RECIPE) launch/distill.sh RECIPE
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
minitron=minitron
if [[ -x $home/.venv/bin/minitron ]]; then
    minitron=$home/.venv/bin/minitron
fi
exec "$minitron" submit "$@"
