#!/usr/bin/env bash
# The tables of rlawm_jax/rl/README.md over several seeds, from a finished demo of Push-T: PPO, BC against BC + RLA, and what limits PPO.
#   bash launch/study_pusht.sh [--workdir=runs/pusht]     about three hours on two cores; run it again to resume
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

workdir=runs/pusht
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#*=} ;;
    *) sed -n '2,3s/^# //p' "$0"; [ "$argument" = --help ] && exit 0; echo "error: unknown option $argument" >&2; exit 1 ;;
  esac
done
[ -d "$workdir/bc/checkpoints" ] || { echo "error: $workdir/bc: expected a cloned policy, found none; first run bash launch/demo.sh --world=pusht --workdir=$workdir" >&2; exit 1; }

use_venv requirements.txt launch/requirements-demo.txt
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export TQDM_MININTERVAL=60
study=$workdir/study
mkdir -p "$study"
rl_config=(--config=configs/pusht_rl.py:demo "--config.policy=$workdir/bc")
clone() { # RECIPE RUN FLAGS...: once
  [ -f "$study/$2/validation.json" ] ||
    python -m launch.train_policy --config="configs/pusht_policy.py:$1" --workdir="$study/$2" \
      "--config.world_model=$workdir" "${@:3}"
}
learn() { # SEED: once
  [ -f "$study/rl_$1/imagined_returns.json" ] ||
    python -m launch.train_rl --workdir="$study/rl_$1" "${rl_config[@]}" --config.seed="$1"
}
table() { # FILE COMMAND...: print it, once
  if [ ! -s "$study/$1" ]; then
    "${@:2}" > "$study/.new"
    mv "$study/.new" "$study/$1"
  fi
  cat "$study/$1"
}
evaluate() { # RUN [STARTS]: once
  [ -f "$1/closed_loop.json" ] || python -m launch.evaluate_policy --workdir="$1" --episodes="${2:-200}" --videos=0
}
runs() { local IFS=,; echo "$*"; } # comma-separated

echo "== what PPO can gain, what the reward depends on, how fast imagination is"
table probe.md python -m launch.probe_rl "${rl_config[@]}"
table throughput.md python -m launch.benchmark_rl "${rl_config[@]}"

echo "== PPO in imagination, five seeds"
if [ ! -d "$study/bc_all" ]; then # the same clone, on 200 starts
  cp -r "$workdir/bc" "$study/.bc_all"
  rm -f "$study"/.bc_all/closed_loop.*
  mv "$study/.bc_all" "$study/bc_all"
fi
evaluate "$study/bc_all"
for seed in 0 1 2 3 4; do
  learn $seed
  evaluate "$study/rl_$seed"
done
table rl.md python -m launch.compare_runs --runs="$(runs "$study"/rl_?)" --against="$study/bc_all"

echo "== what the policy sees (recorded instead of decoded frames)"
clone demo bc_raw --config.observation=raw
evaluate "$study/bc_raw"

echo "== BC against BC + RLA"
for percent in 05 20; do
  for seed in 0 1 2; do
    few=(--config.data.labelled_fraction=0.$percent --config.seed=$seed)
    clone demo bc${percent}_$seed "${few[@]}"
    clone rla_demo rla${percent}_$seed "${few[@]}"
    evaluate "$study/bc${percent}_$seed" 50
    evaluate "$study/rla${percent}_$seed" 50
  done
  table labels_$percent.md python -m launch.compare_runs \
    --runs="$(runs "$study/rla${percent}"_?)" --against="$(runs "$study/bc${percent}"_?)"
done
