#!/usr/bin/env bash
# Installs the Debian packages that the local Slurm cluster of the tests needs, where they are missing.
# Nothing they bring is started: the tests run daemons of their own.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge iproute2)
PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in slurmctld slurmd srun munged ip; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [[ ${#missing[@]} == 0 ]]; then
    exit 0
fi
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "Missing: ${missing[*]}. The Slurm tests need root and the packages ${packages[*]} (Debian's names)." >&2
    echo "Install them and run the tests as root, or run the others alone: pytest -m 'not slurm and not soak'." >&2
    exit 1
fi
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends "${packages[@]}"
