#!/usr/bin/env bash
# The only launcher. Sets up what is missing, then trains, tests or passes flags on.
#
#   ./run.sh                          no GPU: demo; 1 to 7 GPUs: solo; 8 and more: the record run on all of them
#   ./run.sh demo|race|solo [flags]   that preset on its scenes, then its score; flags are those of train_prx.py
#   ./run.sh test [--all] [flags]     the tests that a newcomer runs, or every one; flags are those of pytest
#   ./run.sh plan [flags]             what a run would take: hours, dollars, memory, disk, and what is missing
#   ./run.sh enter|verify records/X   race this working tree against a baseline; check a record (records/README.md)
#   ./run.sh --preset=record --name=try1 ...         train_prx.py on all GPUs of this node
#   NNODES=4 NODE_RANK=k MASTER_ADDR=host ./run.sh   the same on each of 4 nodes;  srun ./run.sh under SLURM
#   RESTARTS=3 ./run.sh               start again after a failure;  NPROC_PER_NODE=2: so many processes without a GPU
set -euo pipefail
cd "$(dirname "$0")"
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}  # OpenMP threads that spin for each other made sampling six times slower
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}  # else stack traces wherever a store ends before its clients
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else ranks that start again read the addresses of those before

fail() { echo "error: $*" >&2; exit 2; }

# Set PYTHON: the active one if it satisfies the given files, else that of .venv, which holds what the lock says.
set_up() {
    PYTHON=$(command -v python3) || fail "python3 is not installed"
    if "$PYTHON" -m pip install -q --dry-run --no-index --no-deps "${@/#/-r}" >/dev/null 2>&1; then return; fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed"
    PYTHON=.venv/bin/python
    exec 9>.venv.lock
    if command -v flock >/dev/null; then flock 9; fi  # several may start at once: one installs, the others wait
    if ! { "$PYTHON" -c "" && cmp requirements.lock .venv/requirements.lock; } >/dev/null 2>&1; then
        echo "setting up .venv from requirements.lock (PyTorch is a download of several GB)"
        python3 -m venv --clear .venv || fail "python3 -m venv does not work; on Debian: apt install python3-venv"
        "$PYTHON" -m pip install -q --require-hashes -r requirements.lock || fail "pip has failed; its words are above"
        cp requirements.lock .venv/  # last: it says that all is there
    fi
    exec 9>&-
}

# Run a command and hand it the signals; 143 where it was asked to stop and did.
supervise() {
    local child status=0 stopped=0
    set -m  # a process group of its own, in which an interrupt is not ignored
    "$@" &
    child=$! && set +m
    for signal in TERM USR1 INT HUP; do trap "stopped=1; kill -$signal $child 2>/dev/null || true" $signal; done
    while wait "$child" && status=0 || status=$?; kill -0 "$child" 2>/dev/null; do :; done
    if [ $stopped = 1 ] && [ $status -ne 0 ] && [ $status -ne 2 ]; then status=143; fi
    return $status
}

# Train with the given flags on all GPUs of this node, or of all nodes.
train() {
    local nodes=${NNODES:-${SLURM_NNODES:-1}} rank=${NODE_RANK:-${SLURM_NODEID:-0}} processes head where patience=""
    case " $* " in
        *" --preset=demo "* | *" --preset=race "* | *" --device=cpu "*) gpus=0 ;;  # for the CPU, by one process
        *" --preset=solo "*) gpus=$((gpus > 3 ? 4 : gpus == 3 ? 2 : gpus)) ;;  # whose step has 4 chunks
    esac
    processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
    where=(--standalone --local-addr=127.0.0.1)  # this machine's own name may not resolve, as in many containers
    if [ "$nodes" -gt 1 ]; then
        head=${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | head -n 1)}
        [ -n "$head" ] || fail "NNODES=$nodes needs MASTER_ADDR=host, the name of the first node"
        local address; address=$("$PYTHON" -c 'import socket, sys
way = socket.socket(type=socket.SOCK_DGRAM); way.connect((sys.argv[1], 1)); print(way.getsockname()[0])' "$head")
        where=(--nnodes="$nodes" --local-addr="$address" --rdzv-id="nanoprx-${SLURM_JOB_ID:-0}" --rdzv-backend=c10d
               --rdzv-endpoint="$head:${MASTER_PORT:-29500}" --rdzv-conf="is_host=$((rank == 0))")
    elif [ "$processes" -eq 1 ] && [ "${RESTARTS:-0}" -eq 0 ]; then
        supervise "$PYTHON" train_prx.py "$@"
        return
    fi
    # First alone, so that a user's mistake is one line and not a report of every rank
    WORLD_SIZE=$((nodes * processes)) "$PYTHON" -c 'import train_prx; train_prx.run_main(train_prx.prepare)' "$@"
    if "$PYTHON" -m torch.distributed.run --help | grep -q shutdown-timeout; then patience=--shutdown-timeout=600; fi
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes ))} \
        supervise "$PYTHON" -W ignore -m torch.distributed.run "${where[@]}" --nproc-per-node="$processes" $patience \
        --max-restarts="${RESTARTS:-0}" --signals-to-handle=SIGTERM,SIGUSR1,SIGINT,SIGHUP train_prx.py "$@"
}

# A preset on the scenes of the level of its name: data if they are missing, training, score.
scenes() {
    local preset=$1 name=$1 size trouble; shift
    case $preset in demo) size=32 ;; race) size=64 ;; solo) size=256 ;; esac
    trouble=$("$PYTHON" -c 'import train_prx; print(train_prx.gpu_trouble())')  # before the data, which take a while
    [ "$preset" != solo ] || [ -z "$trouble" ] || fail "no GPU can be used ($trouble)"
    [ -e "data/$preset" ] ||
        "$PYTHON" tools/scenes.py make --out="data/$preset" --rows=20000 --size=$size --level="$preset"
    for flag in "$@"; do case $flag in --name=*) name=${flag#--name=} ;; esac; done
    train --preset="$preset" "$@"
    "$PYTHON" tools/score.py --checkpoint="runs/$name" --metric=scenes
}

case ${1:-} in
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' run.sh; exit ;;
    test) set_up requirements.txt tests/requirements.txt ;;
    *) set_up requirements.txt ;;
esac
gpus=$("$PYTHON" -W ignore -c 'import torch; print(torch.cuda.device_count())')
case ${1:-} in
    "") if [ "${NNODES:-${SLURM_NNODES:-1}}" -gt 1 ] || [ "$gpus" -ge 8 ]; then train --preset=record
        elif [ "$gpus" -ge 1 ]; then scenes solo; else scenes demo; fi ;;
    demo | race | solo) scenes "$@" ;;
    plan) "$PYTHON" tools/plan.py "${@:2}" ;;
    enter | verify | table) supervise "$PYTHON" records/race.py "$@" ;;
    test)
        if [ "${2:-}" = --all ]; then flags=("${@:3}"); else flags=(-m "not slow" "${@:2}"); fi
        "$PYTHON" -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder "${flags[@]}" tests ;;  # two files at a time
    --*) train "$@" ;;
    *) fail "unknown command $1: known are demo, race, solo, test, plan, enter, verify, table (./run.sh --help)" ;;
esac
