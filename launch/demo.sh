#!/usr/bin/env bash
# Everything on one laptop: episodes from a simulator, a world model, its report, plans, a policy improved in imagination.
#   bash launch/demo.sh [--world=panda] [--workdir=runs/demo] [--no-rl] [--pretrained]     run it again to resume
# --world=pusht is Push-T instead of the robot arm: it installs everywhere and is harder to learn; its --workdir is runs/pusht.
# --pretrained trains nothing: it shows predictions and plans of the arm's model that comes with the repository, in runs/pretrained.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

world=panda
workdir=
rl=yes
pretrained=no
for argument in "$@"; do
  case $argument in
    --world=*) world=${argument#*=} ;;
    --workdir=*) workdir=${argument#*=} ;;
    --no-rl) rl=no ;;
    --pretrained) pretrained=yes ;;
    *) sed -n '2,5s/^# //p' "$0"; [ "$argument" = --help ] && exit 0; echo "error: unknown option $argument" >&2; exit 1 ;;
  esac
done

if [ $pretrained = yes ]; then
  [ $world = panda ] || { echo "error: --pretrained: expected --world=panda, found $world: only the arm's model comes along" >&2; exit 1; }
  workdir=${workdir:-runs/pretrained}
fi
case $world in
  panda) play="--only=play --limit=220" workdir=${workdir:-runs/demo} ;;
  pusht) play="--limit=200" workdir=${workdir:-runs/pusht} ;; # its demonstrations are built with it
  *) echo "error: --world: expected panda or pusht, found $world" >&2; exit 1 ;;
esac

begin=$SECONDS
announce() { printf '\n[%02d:%02d] %s\n' $(((SECONDS - begin) / 60)) $(((SECONDS - begin) % 60)) "$*"; }

announce "environment"
use_venv requirements.txt launch/requirements-demo.txt
[ $world = pusht ] || use_arm
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
[ -t 2 ] || export TQDM_MININTERVAL=15 # in a log file, an occasional line

if [ $pretrained = yes ]; then
  announce "data: rendering a few episodes in the simulator"
  few=datasets/few # in a folder of their own: the whole demo wants more of them
  python -m data.build panda --data_dir=$few --image_size=112 --only=play --limit=60

  announce "predictions on held-out episodes, and the report"
  [ -d "$workdir/checkpoints" ] ||
    python -m launch.pack --unpack --file=launch/pretrained/panda.rlawm --workdir="$workdir"
  python -m launch.evaluate --workdir="$workdir" --data_dir=$few --windows=40

  announce "plans to goal frames, carried out in the real simulator"
  python -m launch.plan --workdir="$workdir" --data_dir=$few --goals=panda:play --ahead=16 --count=10

  announce "done: open $workdir/report/index.html and the films in $workdir/plans/"
  exit 0
fi

announce "data: rendering episodes of $world in the simulator"
python -m data.build $world --data_dir=datasets --image_size=112 $play

announce "training: tokens of every frame once, then RLA, denoiser and image decoder"
python -m launch.train --config=configs/$world.py:demo --workdir="$workdir"

announce "evaluation on held-out episodes, and the report"
python -m launch.evaluate --workdir="$workdir"

announce "the world model is done: open $workdir/report/index.html (numbers in $workdir/metrics.json)"
[ "$rl" = yes ] || exit 0

if [ $world = panda ]; then
  announce "plans to goal frames, carried out in the real simulator"
  python -m launch.plan --workdir="$workdir" --goals=panda:play --ahead=16 --count=30

  announce "data: rendering demonstrations of the push"
  python -m data.build panda --data_dir=datasets --image_size=112 --only=push
fi

announce "behaviour cloning of the demonstrations, as decoded by the world model"
python -m launch.train_policy --config=configs/${world}_policy.py:demo --workdir="$workdir/bc" \
  --config.world_model="$workdir"

announce "PPO inside the world model"
python -m launch.train_rl --config=configs/${world}_rl.py:demo --workdir="$workdir/rl" --config.policy="$workdir/bc"

announce "both policies in the real simulator, on the same starts"
python -m launch.evaluate_policy --workdir="$workdir/bc" --episodes=50
python -m launch.evaluate_policy --workdir="$workdir/rl" --against="$workdir/bc" --episodes=50

announce "done: open $workdir/report/index.html and $workdir/rl/closed_loop.html"
