#!/usr/bin/env bash
# Everything on one laptop: Push-T from the simulator, a world model, its report, a policy improved in imagination.
#   bash launch/demo.sh [--workdir=runs/demo] [--no-rl]     run it again to resume
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

workdir=runs/demo
rl=yes
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#*=} ;;
    --no-rl) rl=no ;;
    *) sed -n '2,3s/^# //p' "$0"; [ "$argument" = --help ] && exit 0; echo "error: unknown option $argument" >&2; exit 1 ;;
  esac
done

begin=$SECONDS
announce() { printf '\n[%02d:%02d] %s\n' $(((SECONDS - begin) / 60)) $(((SECONDS - begin) % 60)) "$*"; }

announce "environment"
use_venv requirements.txt launch/requirements-demo.txt
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
[ -t 2 ] || export TQDM_MININTERVAL=15 # in a log file, an occasional line

announce "data: rendering Push-T episodes in the simulator"
python -m data.build pusht --data_dir=datasets --image_size=112 --limit=200

announce "training: tokens of every frame once, then RLA, denoiser and image decoder"
python -m launch.train --config=configs/pusht.py:demo --workdir="$workdir"

announce "evaluation on held-out episodes, and the report"
python -m launch.evaluate --workdir="$workdir"

announce "the world model is done: open $workdir/report/index.html (numbers in $workdir/metrics.json)"
[ "$rl" = yes ] || exit 0

announce "behaviour cloning of the demonstrations, as decoded by the world model"
python -m launch.train_policy --config=configs/pusht_policy.py:demo --workdir="$workdir/bc" \
  --config.world_model="$workdir"

announce "PPO inside the world model"
python -m launch.train_rl --config=configs/pusht_rl.py:demo --workdir="$workdir/rl" --config.policy="$workdir/bc"

announce "both policies in the real simulator, on the same starts"
python -m launch.evaluate_policy --workdir="$workdir/bc" --episodes=50
python -m launch.evaluate_policy --workdir="$workdir/rl" --against="$workdir/bc" --episodes=50

announce "done: open $workdir/report/index.html and $workdir/rl/closed_loop.html"
