#!/usr/bin/env bash
# One machine's part of a run: a process for each of its GPUs, one SIGTERM for each of them, and the
# exit code of train.py, which launchers do not pass on. slurm.sbatch, skypilot.yaml and gke.yaml call
# it on every machine with the same words.
#
#   bash cloud/node.sh --config production [more words for train.py]
#
# NUM_NODES, NODE_RANK     machines, and which one this is (default: 1, 0)
# MAIN_ADDRESS, MAIN_PORT  the first machine, as the others reach it (default: 127.0.0.1, 29500)
# GPUS                     processes here (default: the GPUs that torch sees, at least 1)
# GRACE_SECONDS            from SIGTERM to the end (default: the configuration's grace_seconds)
# JOIN_SECONDS             how long to wait for the other machines (default: 1800)
# ACCELERATE_CONFIG        a file of configs/accelerate for `accelerate launch` (default: torchrun, DDP)
# VENV                     the environment of setup.sh (default: venv/ of the project)
#
# It always goes on from the newest checkpoint: after a preemption the same words run again.
# Exit codes are those of train.py, which `python train.py --help` lists.
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

for word in "$@"; do
    case "$word" in
    -h | --help)
        sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --fresh | --resume | --resume=*)
        echo "node.sh: $word cannot be said here: a restart would do it again. It resumes the" \
            "newest checkpoint; for a new run say --set run_name=NAME." >&2
        exit 2
        ;;
    esac
done

environment="${VENV:-venv}"
[ "${environment#/}" = "$environment" ] && environment="$project/$environment"
[ -d "$environment/bin" ] && PATH="$environment/bin:$PATH"
export PATH

nodes="${NUM_NODES:-1}"
gpus="${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
words=("$project/train.py" "$@" --resume latest)
if [ -n "${GRACE_SECONDS:-}" ]; then
    words+=(--set "grace_seconds=$GRACE_SECONDS")
    # torchrun kills 30 s after a SIGTERM unless told otherwise.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$((${GRACE_SECONDS%%.*} + 1))"
fi

# Ranks are numbered by machine, not by who comes first: rank 0 stays where the checkpoints are.
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
    launch=(accelerate launch --config_file "$ACCELERATE_CONFIG"
        --num_machines "$nodes" --num_processes "$((nodes * gpus))"
        --machine_rank "${NODE_RANK:-0}" --main_process_ip "${MAIN_ADDRESS:-127.0.0.1}"
        --main_process_port "${MAIN_PORT:-29500}" --rdzv_backend static --same_network
        --rdzv_conf "timeout=${JOIN_SECONDS:-1800}" --no_python)
else
    launch=(torchrun --nnodes "$nodes" --nproc-per-node "$gpus"
        --node-rank "${NODE_RANK:-0}" --master-addr "${MAIN_ADDRESS:-127.0.0.1}"
        --master-port "${MAIN_PORT:-29500}" --rdzv-conf "timeout=${JOIN_SECONDS:-1800}" --no-python)
fi

RANK_CODES="$(mktemp -d)"
export RANK_CODES
trap 'rm -rf "$RANK_CODES"' EXIT
# The launcher signals a rank's whole process group: this shell only has to outlive the rank.
rank='trap : TERM INT HUP; code=0; "$@" || code=$?
echo "$code" >"$RANK_CODES/${RANK:-0}"; exit "$code"'

launcher=
asked=
woken=
forward() {
    woken=1
    if [ -n "$launcher" ] && [ -z "$asked" ]; then
        asked=1
        kill -TERM "$launcher" 2>/dev/null || true
    fi
}
trap forward TERM INT
# In a session of its own, because some schedulers signal all of ours: ranks take a second SIGTERM
# for "leave at once".
setsid "${launch[@]}" bash -c "$rank" rank python "${words[@]}" &
launcher=$!
[ -z "$woken" ] || forward # it came before there was anyone to tell

code=0
while :; do
    woken=
    status=0
    wait "$launcher" || status=$?
    [ "$status" -eq 127 ] || code=$status # 127: it was waited for already
    [ -n "$woken" ] || break
done
trap '' TERM INT

# A rank's own error before a stop on request, and that before what a signal ended.
worst() {
    local file found rank_code
    found=
    for file in "$RANK_CODES"/*; do
        [ -f "$file" ] || continue
        rank_code="$(cat "$file")"
        case "$rank_code" in
        0) ;;
        75) [ "${found:-200}" -lt 128 ] || found=75 ;;
        *)
            if [ "$rank_code" -ge 128 ]; then
                found="${found:-$rank_code}"
            else
                echo "$rank_code"
                return
            fi
            ;;
        esac
    done
    echo "${found:-$code}"
}
[ "$code" -eq 0 ] || code="$(worst)"
echo "node.sh: machine ${NODE_RANK:-0} of $nodes ends with code $code."
exit "$code"
