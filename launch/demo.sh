#!/usr/bin/env bash
# The whole job on one laptop: environment, Push-T from the simulator, DINOv2 tokens, training, evaluation, report.
#   bash launch/demo.sh [--workdir=runs/demo]     run it again after an interruption and it goes on where it stopped
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

workdir=runs/demo
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#*=} ;;
    *) sed -n '2,3s/^# //p' "$0"; [ "$argument" = --help ] && exit 0; echo "error: unknown option $argument" >&2; exit 1 ;;
  esac
done

begin=$SECONDS
say() { printf '\n[%02d:%02d] %s\n' $(((SECONDS - begin) / 60)) $(((SECONDS - begin) % 60)) "$*"; }

say "environment"
use_venv requirements.txt launch/requirements-demo.txt
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
[ -t 2 ] || export TQDM_MININTERVAL=15 # in a log file, a line now and then

say "data: re-rendering Push-T episodes in the simulator"
python -m data.build pusht --data_dir=datasets --image_size=112 --limit=200

say "training: tokens of every frame once, then RLA, denoiser and image decoder"
python -m launch.train --config=configs/pusht.py:demo --workdir="$workdir"

say "evaluation on held-out episodes, and the report"
python -m launch.evaluate --workdir="$workdir"

say "done: open $workdir/report/index.html (numbers in $workdir/metrics.json)"
