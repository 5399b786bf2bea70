#!/usr/bin/env bash
# Run a recipe's whole chain as one Slurm job: every task is one process of it, started by plain srun.
#
#   sbatch [sbatch options] launch/distill.sh RECIPE [key=value ...]
#   sbatch --nodes=8 --time=12:00:00 ~/minitron_nemo/launch/distill.sh recipes/llama31_8b_to_4b_width.yaml train.lr=5e-5
#
# `minitron submit RECIPE` writes this line by the recipe's `cluster` section. Steps that an earlier job finished are not
# run again, so this is also how an interrupted run goes on.
#
# RECIPE is looked up in the directory sbatch was called from, then in the repository. Relative paths inside the recipe
# (run_dir among them) count from the directory sbatch was called from.
#
# Processes   one per GPU of a node; on nodes without GPUs --ntasks-per-node, or 1
# Stopping    `scancel --signal=USR1 JOB`, and Slurm by itself 5 minutes before the time limit: every process saves and
#             the job requeues itself, at most cluster.max_requeues times. Make the lead longer than a save takes:
#             sbatch --signal=USR1@SECONDS. Slurm may send the signal up to a minute early. `scancel JOB` ends it
# Logs        RUN/logs/JOB-RANK.log; rank 0's goes to the job's output as well
# Container   MINITRON_CONTAINER, or cluster.container of the recipe: an image for pyxis with the package installed
#             (docker/Dockerfile). MINITRON_CONTAINER_MOUNTS adds to its mounts: SRC:DST[,SRC:DST...]
# Python      without a container: the repository's .venv, or else the `minitron` that PATH finds
# Repository  where this file was submitted from; MINITRON_HOME overrides it
#
#SBATCH --job-name=minitron
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
set -euo pipefail
script=distill.sh

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

run_job "$@" -- run
