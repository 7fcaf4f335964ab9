#!/usr/bin/env bash
# The only launcher. Sets up what is missing, then trains, tests or passes flags on.
#
#   ./run.sh                    no GPU: demo; 1 to 7 GPUs: solo; 8 and more: the record run on all of them
#   ./run.sh demo|race|solo [flags]   that preset, then its score; flags are those of train_prx.py
#   ./run.sh test [--all] [flags]     the tests that a newcomer runs, or every one; flags are those of pytest
#   ./run.sh bench [file]       every benchmark of speed, about ten minutes; the file (benchmarks/results.txt) takes what is printed
#   ./run.sh plan [flags]       what a run would take: hours, dollars, memory, disk, and what is missing; writes nothing
#   ./run.sh enter records/NAME [--track=demo] [-- flags]   train the baseline and this working tree in turns: a record
#   ./run.sh verify records/NAME [--rerun=3]               check a record's logs, then train it again: yes or no
#   ./run.sh table [--write]    each track's records; into README.md and records/README.md
#   ./run.sh --preset=record --name=try1 ...          train_prx.py on all GPUs of this node
#   NNODES=4 NODE_RANK=k MASTER_ADDR=host ./run.sh    the same on each of 4 nodes;   srun ./run.sh under SLURM
#   RESTARTS=3 ./run.sh         start again after a failure; NPROC_PER_NODE=2: so many processes, where there is no GPU
set -euo pipefail
cd "$(dirname "$0")"

# Two OpenMP threads on two cores wait for each other by spinning; with any other process at work that made sampling six
# times slower. A short spin costs 7% on a quiet machine.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}  # else stack traces wherever a store ends before its clients

usage() { sed -n '2,14s/^# \{0,1\}//p' run.sh; }
fail() { echo "error: $*" >&2; exit 2; }

# Whether a Python has every requirement of the given files, in a version of their ranges.
has() {
    "$@" 2>/dev/null <<'PY'
import importlib.metadata, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
for file in sys.argv[1:]:
    for line in open(file):
        line = line.partition("#")[0].strip()
        if line:
            need = Requirement(line)
            wanted = need.marker is None or need.marker.evaluate()  # on this version of Python
            if wanted and not need.specifier.contains(importlib.metadata.version(need.name), prereleases=True):
                sys.exit(1)
PY
}

# Set PYTHON: the active one if it has what the given files ask for, else that of .venv, which holds what the lock says.
set_up() {
    PYTHON=$(command -v python3) || fail "python3 is not installed"
    if has "$PYTHON" - "$@"; then return; fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed, not $(python3 -V)"
    PYTHON=.venv/bin/python
    if [ -x "$PYTHON" ] && cmp -s requirements.lock .venv/requirements.lock; then return; fi
    exec 9>.venv.lock
    if command -v flock >/dev/null; then flock 9; fi  # several nodes or shells may start at once: one installs, the others wait
    if ! { [ -x "$PYTHON" ] && cmp -s requirements.lock .venv/requirements.lock; }; then
        echo "setting up .venv from requirements.lock (PyTorch is a download of several GB)"
        "$PYTHON" -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv ||
            fail "python3 -m venv does not work; on Debian: apt install python3-venv"
        "$PYTHON" -m pip install --quiet --require-hashes -r requirements.lock || fail "pip could not install requirements.lock; its message is above"
        cp requirements.lock .venv/  # last: it says that all is there
    fi
    exec 9>&-
}

# How many GPUs this node has; also those that this torch cannot use, which train_prx.py then says.
count_gpus() { "$PYTHON" -W ignore -c 'import torch; print(torch.cuda.device_count())'; }

# Run a command and hand it the signals: by itself, bash would end before it, or act only after it has ended.
supervise() {
    local child status=0
    set -m  # a process group of its own, in which an interrupt is not ignored
    "$@" &
    child=$!
    set +m
    for signal in TERM USR1 INT HUP; do trap "kill -$signal $child 2>/dev/null || true" $signal; done
    while wait "$child" && status=0 || status=$?; kill -0 "$child" 2>/dev/null; do :; done
    trap - TERM USR1 INT HUP
    return $status
}

# Train with the given flags on all GPUs of this node, or of all nodes.
train() {
    local gpus processes nodes=${NNODES:-${SLURM_NNODES:-1}} where=()
    gpus=$(count_gpus)
    case " $* " in
        *" --preset=demo "* | *" --preset=race "* | *" --device=cpu "*) gpus=0 ;;  # for the CPU, by one process
        *" --preset=solo "*) gpus=$((gpus > 3 ? 4 : gpus == 3 ? 2 : gpus)) ;;  # whose step has 4 chunks
    esac
    processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
    if [ "$nodes" -gt 1 ]; then
        local head=${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | head -n 1)}
        [ -n "$head" ] || fail "NNODES=$nodes needs MASTER_ADDR=host, the name of the first node"
        where=(--nnodes="$nodes" --node-rank="${NODE_RANK:-${SLURM_NODEID:-0}}" --master-addr="$head" --master-port="${MASTER_PORT:-29500}")
    elif [ "$processes" -gt 1 ] || [ "${RESTARTS:-0}" -gt 0 ]; then
        where=(--standalone)
    else
        supervise "$PYTHON" train_prx.py "$@"
        return
    fi
    supervise "$PYTHON" ranks.py "${where[@]}" --nproc-per-node="$processes" --max-restarts="${RESTARTS:-0}" train_prx.py "$@"
}

# A preset on the scenes of the level of its name: data and teacher if they are missing, training, score and grid.
scenes() {
    local preset=$1 size=$2 score_every=$3 name=$1; shift 3
    "$PYTHON" -c 'from train_prx import *; run_main(lambda flags: check_gpu(parse_config(flags)[0]))' --preset="$preset" "$@"
    [ -e "data/$preset" ] || "$PYTHON" scenes.py make --out="data/$preset" --rows=20000 --size="$size" --level="$preset"
    for flag in "$@"; do
        case $flag in
            --name=*) name=${flag#--name=} ;;
            --frozen=scene) [ -e "data/$preset/teacher" ] || "$PYTHON" scenes.py teacher --data="data/$preset" ;;
        esac
    done
    train --preset="$preset" --score=scenes --score_every="$score_every" --score_n=64 "$@"
    "$PYTHON" sample.py score --checkpoint="runs/$name"
}

# Each benchmark in a process of its own; what fails is named at the end and the others still run.
bench() {
    local out=$1 failed=() gpus
    gpus=$(count_gpus)
    : > "$out"
    measure() { printf '\n$ python benchmarks/%s\n' "$*" | tee -a "$out"; "$PYTHON" benchmarks/"$@" 2>&1 | tee -a "$out" || failed+=("$1"); }
    scale() {  # what step.py measured last of one rank of 32
        local step optimizer
        step=$(awk '$1 == "ours" { step = $2 } END { print step }' "$out")
        optimizer=$(awk '$1 == "optimizer" { ms = $2 } END { print ms }' "$out")
        measure scale.py --step_ms="$step" --optimizer_ms="$optimizer" "$@"
    }
    if [ "$gpus" -gt 0 ]; then
        measure step.py --stage=1 --batch=32 --arms=ours --ranks=32 --parts
        scale --stage=1 --batch=32
        measure step.py --stage=2 --batch=16 --arms=ours --ranks=32 --parts
        scale --stage=2 --batch=16
        measure step.py --stage=1 --batch=32
        measure step.py --stage=2 --batch=16 --arms=ours,diffusers-routed --rounds=3
        measure muon.py --only=one,fake
    else
        measure step.py --parts
        measure muon.py
    fi
    measure sampling.py
    [ ${#failed[@]} -eq 0 ] || fail "these did not run to their end: ${failed[*]}"
}

command=${1:-auto}
case $command in
    -h | --help) usage ;;
    test)
        set_up requirements.txt tests/requirements.txt
        shift
        flags=(-m "not slow")
        for flag in "$@"; do
            if [ "$flag" = --all ]; then flags+=(-m "slow or not slow"); else flags+=("$flag"); fi
        done
        "$PYTHON" -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder "${flags[@]}" tests ;;  # two files at a time
    auto)
        set_up requirements.txt
        gpus=$(count_gpus)
        if [ "${NNODES:-${SLURM_NNODES:-1}}" -gt 1 ] || [ "$gpus" -ge 8 ]; then train --preset=record
        elif [ "$gpus" -ge 1 ]; then scenes solo 256 1000
        else scenes demo 32 200
        fi ;;
    bench)
        set_up requirements.txt benchmarks/requirements.txt
        bench "${2:-benchmarks/results.txt}" ;;
    plan)
        set_up requirements.txt
        "$PYTHON" benchmarks/plan.py "${@:2}" ;;
    enter | verify | table) set_up requirements.txt; supervise "$PYTHON" race.py "$@" ;;  # they make missing data themselves
    demo) set_up requirements.txt; scenes demo 32 200 "${@:2}" ;;
    race) set_up requirements.txt; scenes race 64 200 "${@:2}" ;;
    solo) set_up requirements.txt; scenes solo 256 1000 "${@:2}" ;;
    --*) set_up requirements.txt; train "$@" ;;
    *) fail "unknown command $command; known are demo, race, solo, enter, verify, table, bench, plan, test and any flag of train_prx.py (./run.sh --help)" ;;
esac
