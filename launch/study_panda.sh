#!/usr/bin/env bash
# Learning in imagination on the robot arm, from a finished demo: PPO and pathwise gradients from clones of few and of all demonstrations.
#   bash launch/study_panda.sh [--workdir=runs/demo] [--tasks=push,touch] [--seeds=5] [--starts=200]     run it again to resume
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

workdir=runs/demo tasks=push,touch seeds=5 starts=200
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#*=} ;;
    --tasks=*) tasks=${argument#*=} ;;
    --seeds=*) seeds=${argument#*=} ;;
    --starts=*) starts=${argument#*=} ;;
    *) sed -n '2,3s/^# //p' "$0"; [ "$argument" = --help ] && exit 0; echo "error: unknown option $argument" >&2; exit 1 ;;
  esac
done
[ -d "$workdir/checkpoints" ] || { echo "error: $workdir: expected a world model, found none; first run bash launch/demo.sh --workdir=$workdir" >&2; exit 1; }

use_venv requirements.txt launch/requirements-demo.txt
use_arm
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export TQDM_MININTERVAL=60
few=20 # demonstrations with actions; the bank's videos are all of them
clone() { # TASK RUN FLAGS...: once, and judged
  [ -f "$study/$2/validation.json" ] ||
    python -m launch.train_policy --config=configs/panda_policy.py:demo --workdir="$study/$2" \
      --config.world_model="$workdir" --config.data.demonstrations="('panda:$1',)" \
      --config.data.video="('panda:$1',)" "${@:3}"
  judge "$study/$2"
}
learn() { # TASK CLONE RUN FLAGS...: once, and judged
  [ -f "$study/$3/imagined_returns.json" ] ||
    python -m launch.train_rl --config=configs/panda_rl.py:demo --workdir="$study/$3" --config.policy="$study/$2" \
      --config.bank.datasets="('panda:$1',)" "${@:4}"
  judge "$study/$3" --against="$study/$2"
}
judge() { # RUN FLAGS...: once
  [ -f "$1/closed_loop.json" ] ||
    python -m launch.evaluate_policy --workdir="$1" --episodes="$starts" --videos=0 "${@:2}"
}
runs() { local IFS=,; echo "$*"; } # comma-separated

for task in ${tasks//,/ }; do
  study=$workdir/study/$task
  python -m data.build panda --data_dir=datasets --image_size=112 --only="$task"
  ours=() theirs=()
  for ((seed = 0; seed < seeds; seed++)); do
    clone "$task" "few_$seed" --config.seed=$seed --config.data.n_labelled=$few
    for learner in ppo pathwise; do
      learn "$task" "few_$seed" "${learner}_$seed" --config.seed=$seed --config.learner=$learner
      ours+=("$study/${learner}_$seed") theirs+=("$study/few_$seed")
    done
  done
  clone "$task" all
  learn "$task" all pathwise_all --config.learner=pathwise
  ours+=("$study/pathwise_all") theirs+=("$study/all")
  for learner in ppo pathwise; do
    echo "== $task: $learner against its clones of $few demonstrations"
    python -m launch.compare_runs --runs="$(runs "$study/${learner}"_[0-9]*)" --against="$(runs "$study"/few_[0-9]*)"
  done
  echo "== $task: does imagination rank policies as the simulator does?"
  python -m launch.rank_policies --runs="$(runs "${ours[@]}")" --clones="$(runs "${theirs[@]}")"
done
