#!/usr/bin/env bash
# Train from nothing: set up, prepare sample data where it is asked for, train, show what was made.
#
#   bash run.sh test                     a small model on the CPU or GPU, in minutes
#   bash run.sh production 5000          the 1.2B model for 5000 steps
#   bash run.sh NAME [MAX_STEPS] [more words for train.py ...]
#
# A run that has checkpoints goes on from the newest. Two or more GPUs: one process each, through
# accelerate. The exit code is train.py's (python train.py --help lists them).
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$project"

config="${1:-test}"
[ $# -gt 0 ] && shift
case "$config" in
-h | --help)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
arguments=(--config "$config")
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    arguments+=(--max-steps "$1")
    shift
fi
if [[ "${1:--}" != -* ]]; then
    echo "run.sh: $1 is no number of steps and no option. Write: bash run.sh $config [MAX_STEPS] [--OPTION ...]" >&2
    exit 2
fi
case " $* " in
*" --resume"* | *" --fresh "* | *" --dry-run "*) ;;
*) arguments+=(--resume latest) ;;
esac
arguments+=("$@")
# Where the run is; what lies there says all else.
run=()
[ "$config" = test ] || run=(--config "$config")
for word in "$@"; do
    case "$word" in
    run_name=* | output_dir=*) run+=(--set "$word") ;;
    esac
done

bash setup.sh
PATH="$(cd "${VENV:-venv}/bin" && pwd):$PATH"
export PATH

if [ "$config" = test ]; then
    python scripts/prepare_data.py --sample --output bucket/data
fi

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
launch=(python)
if [ "$gpus" -ge 2 ]; then
    # One process finds out whether the run can start, and says so once.
    python train.py "${arguments[@]}" --dry-run --quiet >/dev/null
    own="${HF_HOME:-$HOME/.cache/huggingface}/accelerate/default_config.yaml"
    launch=(accelerate launch)
    if [ -f "$own" ]; then
        echo "run.sh: using your accelerate configuration $own."
    else
        launch+=(--config_file configs/accelerate/ddp.yaml --num_processes "$gpus")
    fi
fi

code=0
"${launch[@]}" train.py "${arguments[@]}" || code=$?
if [ "$code" -eq 0 ] || [ "$code" -eq 4 ] || [ "$code" -eq 75 ]; then
    echo
    python scripts/checkpoint_viewer.py list ${run[@]+"${run[@]}"} || true
    words="${run[*]:+ ${run[*]}}"
    compare=""
    count="$(python scripts/checkpoint_viewer.py list ${run[@]+"${run[@]}"} --json | grep -c '"name":' || true)"
    [ "$count" -lt 2 ] || compare=$'\n  python scripts/checkpoint_viewer.py compare'"$words"
    cat <<EOF

Made: these checkpoints, metrics and curves below logs/, archives in the bucket.
Look at it:
  source ${VENV:-venv}/bin/activate
  python scripts/checkpoint_viewer.py view latest$words$compare
  python scripts/checkpoint_viewer.py plot latest$words --save curves.png
  python scripts/checkpoint_viewer.py report$words --output run.html
  python scripts/upload_manager.py status$words
  python scripts/monitor_training.py --once$words
  tensorboard --logdir logs
Use it:
  python scripts/generate.py latest$words --prompt "The"
  python scripts/evaluate.py latest$words
  python scripts/export_model.py latest$words --output my-model
EOF
fi
exit "$code"
