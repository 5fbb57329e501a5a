#!/usr/bin/env bash
# A Cloud TPU pod slice, through gcloud: request, install, train, watch, delete.
#   bash launch/tpu/pod.sh create  --name=N --zone=Z [--type=v5litepod-16] [--runtime=v2-alpha-tpuv5-lite] [--spot]
#   bash launch/tpu/pod.sh install --name=N --zone=Z      copy this checkout to every host and create its .venv
#   bash launch/tpu/pod.sh train   --name=N --zone=Z -- --config=configs/X.py --workdir=SHARED_DIR ...
#   bash launch/tpu/pod.sh logs    --name=N --zone=Z      follow host 0
#   bash launch/tpu/pod.sh stop    --name=N --zone=Z      SIGTERM to every host: the run saves and ends
#   bash launch/tpu/pod.sh delete  --name=N --zone=Z
# --print shows the gcloud commands instead of running them. See launch/tpu/README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() { sed -n '2,9s/^# //p' launch/tpu/pod.sh; }
die() { echo "error: $*" >&2; exit 1; }

verb=${1:-}
case $verb in
  create | install | train | logs | stop | delete) shift ;;
  --help | -h) usage; exit 0 ;;
  *) die "expected create, install, train, logs, stop or delete, found '$verb'; see bash launch/tpu/pod.sh --help" ;;
esac

name='' zone='' type=v5litepod-16 runtime=v2-alpha-tpuv5-lite spot=() run=()
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --print) run=(echo) ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1; see bash launch/tpu/pod.sh --help" ;;
  esac
  shift
done
[ -n "$name" ] || die "--name: expected the name of the pod slice, found none"
[ -n "$zone" ] || die "--zone: expected its zone, found none"
[ ${#run[@]} -gt 0 ] || command -v gcloud > /dev/null || die "gcloud: expected the Google Cloud CLI on PATH, found none"

tpus() { "${run[@]}" gcloud compute tpus "$@" --zone="$zone"; }
on_hosts() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

case $verb in
  create)
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" "${spot[@]}"
    tpus queued-resources describe "$name" --format="value(state.state)"
    ;;
  install)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz --output="$archive" HEAD
    tpus tpu-vm scp "$archive" "$name:rlawm_jax.tar.gz" --worker=all
    on_hosts all 'mkdir -p rlawm_jax && tar -xzf rlawm_jax.tar.gz -C rlawm_jax && cd rlawm_jax &&
      python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt -r launch/requirements-tpu.txt'
    ;;
  train)
    [ $# -gt 0 ] || die "train: expected -- --config=... --workdir=..., found nothing after --"
    case " $* " in *" --workdir="*) ;; *) die "train: expected --workdir=DIR, a folder that all hosts share" ;; esac
    arguments=$(printf '%q ' "$@")
    on_hosts all "cd rlawm_jax && (nohup .venv/bin/python -m launch.train --distributed $arguments > train.log 2>&1 &
      echo \$! > train.pid)"
    ;;
  logs) on_hosts 0 'tail -n 100 -F rlawm_jax/train.log' ;;
  stop) on_hosts all "kill -TERM \$(cat rlawm_jax/train.pid)" ;;
  delete) tpus queued-resources delete "$name" --force --quiet ;;
esac
