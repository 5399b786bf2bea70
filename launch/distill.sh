#!/usr/bin/env bash
# Run a recipe's whole chain as one Slurm job: every task is one process of it, started by plain srun.
#
#   sbatch [sbatch options] launch/distill.sh RECIPE [key=value ...]
#   sbatch --nodes=8 --time=12:00:00 ~/minitron_nemo/launch/distill.sh recipes/llama31_8b_to_4b_width.yaml train.lr=5e-5
#
# RECIPE is looked up in the directory sbatch was called from, then in the repository. Relative paths inside the recipe
# (run_dir among them) count from the directory sbatch was called from. Submitting the same line again resumes.
#
# Processes   one per GPU of a node; on nodes without GPUs --ntasks-per-node, or 1
# Stopping    `scancel --signal=USR1 JOB`, and Slurm by itself 5 minutes before the time limit: every process saves and
#             the job ends with 75. Make the lead longer than a save takes: sbatch --signal=USR1@SECONDS. Slurm may
#             send the signal up to a minute early
# Container   MINITRON_CONTAINER, or cluster.container of the recipe: an image for pyxis with the package installed
#             (docker/Dockerfile). MINITRON_CONTAINER_MOUNTS adds to its mounts: SRC:DST[,SRC:DST...]
# Python      without a container: the repository's .venv, or else the `minitron` that PATH finds
# Repository  where this file was submitted from; MINITRON_HOME overrides it
#
#SBATCH --job-name=minitron
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
set -euo pipefail

fail() {
    echo "distill.sh: error: $1" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job; submit it: sbatch launch/distill.sh RECIPE [key=value ...]"
(($# > 0)) || fail "no recipe given; usage: sbatch launch/distill.sh RECIPE [key=value ...]"

# sbatch runs a copy of this file from its spool directory, so $0 does not tell where the repository is.
command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
home=${MINITRON_HOME:-${command%%/launch/distill.sh*}}
[[ -f $home/pyproject.toml ]] || fail "no repository in '$home'; set MINITRON_HOME to where minitron_nemo was cloned"

recipe=$1
shift
if [[ ! -f $recipe ]]; then
    [[ -f $home/$recipe ]] || fail "$recipe: no such recipe, neither in $PWD nor in $home"
    recipe=$home/$recipe
fi

# The last of: the recipe's block-style `cluster:` section, an override, the environment.
container=$(sed -n '/^cluster:/,/^[^ #]/s/^  *container: *["'\'']\{0,1\}\([^"'\'' ]*\).*/\1/p' "$recipe")
for override in "$@"; do
    [[ $override != cluster.container=* ]] || container=${override#*=}
done
container=${MINITRON_CONTAINER:-$container}

tasks_per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
cpus_per_task=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / tasks_per_node))}
((cpus_per_task > 0)) || fail "$tasks_per_node tasks on a node with $SLURM_CPUS_ON_NODE processors"

options=(
    --nodes="$SLURM_JOB_NUM_NODES"
    --ntasks="$((SLURM_JOB_NUM_NODES * tasks_per_node))"
    --ntasks-per-node="$tasks_per_node"
    --cpus-per-task="$cpus_per_task"
    --label
    # A process that dies leaves the others waiting in a collective; all that end well end together.
    --kill-on-bad-exit=0
    --wait=60
)
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    options+=(--gpus-per-node="$SLURM_GPUS_ON_NODE") # a step of an exclusive job has none unless it asks
fi

minitron=minitron
if [[ -n $container && $container != null ]]; then
    mounts=$home:$home,$PWD:$PWD${MINITRON_CONTAINER_MOUNTS:+,$MINITRON_CONTAINER_MOUNTS}
    options+=(--container-image="$container" --container-mounts="$mounts" --container-workdir="$PWD")
elif [[ -x $home/.venv/bin/minitron ]]; then
    minitron=$home/.venv/bin/minitron
fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node must not share a port
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_task}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron-core's overlap relies on kernel order
export PYTHONUNBUFFERED=1

arguments=(run "$recipe" "$@" cluster.launcher=none)
echo "job $SLURM_JOB_ID: $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x $tasks_per_node processes${container:+ in $container}"
echo "$minitron ${arguments[*]}"
exec srun "${options[@]}" "$minitron" "${arguments[@]}"
