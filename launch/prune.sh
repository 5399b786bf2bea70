#!/usr/bin/env bash
# Run a recipe up to the pruned student as one Slurm job: convert, prepare, correct, calibrate, score-depth, repair, prune.
#
#   sbatch [sbatch options] launch/prune.sh RECIPE [key=value ...]
#
# What launch/distill.sh does, and by the same rules, but it ends before the distillation: for a pruning on fewer nodes.
# launch/distill.sh goes on from there.
#
#SBATCH --job-name=minitron
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
set -euo pipefail
script=prune.sh

if [[ -z ${SLURM_JOB_ID:-} || $# == 0 ]]; then
    echo "$script: error: usage, as a Slurm job: sbatch launch/$script RECIPE [key=value ...]" >&2
    exit 2
fi
# sbatch runs a copy of this file from its spool directory, so $0 does not tell where the repository is.
command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
home=${MINITRON_HOME:-${command%%/launch/"$script"*}}
if [[ ! -f $home/launch/common.sh ]]; then
    echo "$script: error: no repository in '$home'; set MINITRON_HOME to where minitron_nemo was cloned" >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$home/launch/common.sh"

run_job "$@" -- run --until prune
