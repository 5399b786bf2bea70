#!/usr/bin/env bash
# First process of the cluster's namespaces: network, munged, slurmctld and the nodes. When it dies, all of them do.
# usage: head.sh DIRECTORY MEGABYTES NODE=ADDRESS...   (DIRECTORY holds what cluster.py wrote)
set -euo pipefail
directory=$1 megabytes=$2
shift 2

# A node that was killed comes back when DIRECTORY/NAME.down is gone.
run_node() {
    while true; do
        while [[ -e $directory/$1.down ]]; do sleep 0.2; done
        nsenter --net="/run/netns/$1" unshare --uts --ipc --pid --mount --mount-proc --fork --kill-child \
            bash "${BASH_SOURCE[0]%/*}/node.sh" "$1" &
        echo $! >"$directory/$1.pid"
        wait $! || true
        touch "$directory/$1.down"
    done
}

mount --bind "$directory/hosts" /etc/hosts
mount --bind "$directory/nsswitch.conf" /etc/nsswitch.conf # no DNS: looking names up outside takes seconds each
if [[ -d $directory/cgroup ]]; then
    mount --bind "$(readlink -f "$directory/cgroup")" /sys/fs/cgroup/freezer # apart from any other cluster's
fi
mount -t tmpfs -o "size=${megabytes}m" tmpfs "$directory/disk" # one for all nodes, small enough to fill
mkdir -p /run/netns
mount -t tmpfs tmpfs /run/netns
echo head >/proc/sys/kernel/hostname

ip link set lo up
ip link add bridge0 type bridge
ip addr add 10.77.0.1/24 dev bridge0
ip link set bridge0 up

munged --foreground --num-threads=2 --key-file="$directory/munge/key" --socket="$directory/munge/socket" \
    --pid-file="$directory/munge/pid" --seed-file="$directory/munge/seed" --log-file="$directory/log/munged" &
until [[ -S $directory/munge/socket ]]; do sleep 0.05; done
slurmctld -D -i &>>"$directory/log/slurmctld.out" &

for node in "$@"; do
    name=${node%%=*}
    ip netns add "$name"
    ip link add "to-$name" type veth peer name eth0 netns "$name"
    ip link set "to-$name" up master bridge0
    ip -n "$name" addr add "${node#*=}/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
    run_node "$name" &>>"$directory/log/$name.out" &
done
wait
