#!/usr/bin/env bash
# First process of one node: a host of its own, as far as hostname, ports, processes and shared memory go.
# usage: node.sh NAME   (SLURM_CONF is set)
set -euo pipefail
echo "$1" >/proc/sys/kernel/hostname
mount -t tmpfs tmpfs /dev/shm
slurmd -D -N "$1" &
wait # and so reap what job steps leave behind
