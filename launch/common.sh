# shellcheck shell=bash
# What the batch scripts of this directory share; they source it. docs/cluster.md tells the whole story.
#
# Runs `minitron` in every task of a Slurm job by plain srun, and requeues the job when RUN/status.json says that the
# run stopped with its state saved, or when a node of the job no longer answers. The exit code of srun decides nothing.

: "${script:?set by the script that sources this}" "${home:?}"

fail() {
    echo "$script: error: $1" >&2
    exit 2
}

# Runs `minitron ARGUMENTS` in all tasks of this job. usage: run_job RECIPE OVERRIDES... -- ARGUMENTS...
# Sets run_dir and max_requeues by the recipe; a recipe that is wrong ends the job here, with one line and 2.
run_job() {
    local recipe=$1 overrides=()
    shift
    while [[ $1 != -- ]]; do
        overrides+=("$1")
        shift
    done
    shift

    if [[ ! -f $recipe ]]; then
        [[ -f $home/$recipe ]] || fail "$recipe: no such recipe, neither in $PWD nor in $home"
        recipe=$home/$recipe
    fi
    choose_tasks
    choose_environment "$recipe" "${overrides[@]}"

    # What Slurm gave, by the recipe or against it.
    local geometry=(
        cluster.nodes="$SLURM_JOB_NUM_NODES" cluster.processes_per_node="$tasks_per_node" cluster.gpus_per_node=null
    )
    local settings run_dir='' max_requeues=0
    settings=$(once plan "$recipe" "${overrides[@]}" "${geometry[@]}" --shell) || exit
    eval "$settings" # assignments of the two, quoted by minitron

    local arguments=("$@" "$recipe" "${overrides[@]}" cluster.launcher=none)
    local logs=$run_dir/logs code=0 before
    mkdir -p "$logs" 2>/dev/null || fail "$logs: cannot be created; choose another run_dir"
    local rank_0=$logs/$SLURM_JOB_ID-0.log
    touch "$rank_0"
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)" \
        "x $tasks_per_node processes${container:+ in $container}; logs in $logs"
    echo "minitron ${arguments[*]}"

    before=$(stamp "$run_dir")
    # A signal that reaches this script as well must not end it before the processes have saved.
    trap : TERM USR1
    # A process that dies leaves the others waiting in a collective; all that end well end together.
    srun "${tasks[@]}" "${environment[@]}" --kill-on-bad-exit=0 --wait=60 --open-mode=append \
        --output="${logs//%/%%}/%j-%t.log" "$minitron" "${arguments[@]}" &
    local srun=$!
    (
        trap '' TERM USR1
        exec tail --bytes=+$(($(stat --format=%s "$rank_0") + 1)) --follow=name --pid="$srun" "$rank_0"
    ) &
    local console=$!
    while kill -0 "$srun" 2>/dev/null; do
        wait "$srun" || true # it returns early when a trapped signal arrives
    done
    wait "$srun" || code=$?
    wait "$console" || true
    conclude "$code" "$run_dir" "$before" "$max_requeues"
}

# What a task is: `tasks` are srun's options for one process per GPU, or --ntasks-per-node where there are none.
choose_tasks() {
    tasks_per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    local cpus_per_task=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / tasks_per_node))}
    ((cpus_per_task > 0)) || fail "$tasks_per_node tasks on a node with $SLURM_CPUS_ON_NODE processors"
    tasks=(
        --nodes="$SLURM_JOB_NUM_NODES"
        --ntasks="$((SLURM_JOB_NUM_NODES * tasks_per_node))"
        --ntasks-per-node="$tasks_per_node"
        --cpus-per-task="$cpus_per_task"
    )
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        tasks+=(--gpus-per-node="$SLURM_GPUS_ON_NODE") # a step of an exclusive job has none unless it asks
    fi

    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${hosts%%$'\n'*}
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node must not share a port
    export MASTER_ADDR MASTER_PORT
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_task}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron-core's overlap relies on kernel order
    export PYTHONUNBUFFERED=1
}

# Which `minitron`, and in which container: `environment` are srun's options for pyxis.
choose_environment() {
    # The last of: the recipe's block-style `cluster:` section, an override, the environment. Read without Python,
    # since only the container may have one.
    local recipe=$1 override
    shift
    container=$(sed -n '/^cluster:/,/^[^ #]/s/^  *container: *["'\'']\{0,1\}\([^"'\'' ]*\).*/\1/p' "$recipe")
    for override in "$@"; do
        [[ $override != cluster.container=* ]] || container=${override#*=}
    done
    container=${MINITRON_CONTAINER:-$container}
    [[ $container != null ]] || container=''

    environment=()
    minitron=minitron
    if [[ -n $container ]]; then
        local mounts=$home:$home,$PWD:$PWD${MINITRON_CONTAINER_MOUNTS:+,$MINITRON_CONTAINER_MOUNTS}
        environment=(--container-image="$container" --container-mounts="$mounts" --container-workdir="$PWD")
    elif [[ -x $home/.venv/bin/minitron ]]; then
        minitron=$home/.venv/bin/minitron
    fi
}

# Runs `minitron ARGUMENTS` in one process: on this node, or in the container.
once() {
    if [[ -n $container ]]; then
        srun --nodes=1 --ntasks=1 "${environment[@]}" "$minitron" "$@"
    else
        "$minitron" "$@"
    fi
}

# Which status.json there is: it is replaced, never rewritten, so that a new one is another file.
stamp() {
    stat --format='%i %y' "$1/status.json" 2>/dev/null || true
}

# The value of a key in status.json, which minitron writes with one key on a line.
status() {
    sed -n "s/^ *\"$2\": \"\\{0,1\\}\\(.*[^\",]\\)\"\\{0,1\\},\\{0,1\\}\$/\\1/p" "$1/status.json"
}

# Ends the job by what the run says of itself. usage: conclude CODE_OF_SRUN RUN_DIR STAMP_BEFORE MAX_REQUEUES
conclude() {
    local code=$1 run_dir=$2 before=$3 max_requeues=$4 state=''
    if [[ $(stamp "$run_dir") != "$before" ]]; then # else it is what an earlier job left
        state=$(status "$run_dir" state)
    fi
    case $state in
        done) exit 0 ;;
        stopped) requeue "stopped ($(status "$run_dir" reason)), its state is saved" "$max_requeues" 75 ;;
    esac
    ((code != 0)) || exit 0
    if ! nodes_answer; then
        requeue "a node does not answer" "$max_requeues" "$code"
    fi
    local why="srun ended with $code"
    [[ $state != failed ]] || why=$(status "$run_dir" reason)
    if ! (echo >"$run_dir/.room") 2>/dev/null; then
        why+=", and $run_dir takes no more files: no room on the disk?" # then status and logs are old
    fi
    rm -f "$run_dir/.room"
    echo "$script: not requeued: ${why:-failed}; see $run_dir/logs" >&2
    exit "$code"
}

nodes_answer() {
    timeout 120 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true
}

# Puts this job back into the queue, unless it was cancelled or has been put back too often. Never returns.
requeue() {
    local why=$1 max_requeues=$2 code=$3 count=${SLURM_RESTART_COUNT:-0} now starts
    read -r now starts < <(squeue --noheader --jobs="$SLURM_JOB_ID" --Format=State,RestartCnt) || true
    if [[ $now != RUNNING || $starts != "$count" ]]; then # a script that was cut off must not touch the next start
        echo "$script: $why; the rest is left to Slurm, which has the job as ${now:-gone}" >&2
    elif ((count >= max_requeues)); then
        echo "$script: $why; not requeued, cluster.max_requeues is $max_requeues; submit again to go on" >&2
    else
        echo "$script: $why; requeued ($((count + 1)) of at most $max_requeues)" >&2
        trap - TERM USR1 # Slurm ends this script by SIGTERM
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60
    fi
    exit "$code"
}
