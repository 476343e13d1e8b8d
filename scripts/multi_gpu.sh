#!/usr/bin/env bash
# Trains on all GPUs of this host.
#
#   scripts/multi_gpu.sh [--dry_run] [--processes=N] [--port=PORT] -- --config=FILE [FLAG ...]
#
# One process drives all GPUs (JAX's own way) where N is 1, the default. With N > 1 each of N
# processes drives one GPU, which helps where one process cannot decode images fast enough.
# What follows -- goes to covid_flax.main; PYTHON names the interpreter;
# without it .venv's is taken, or python3.
set -euo pipefail

usage() {
  echo "usage: $0 [--dry_run] [--processes=N] [--port=PORT] -- --config=FILE [FLAG ...]" >&2
  exit 2
}

dry_run=false processes=1 port=8476
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=true ;;
    --processes=*) processes=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --) shift && break ;;
    *) usage ;;
  esac
  shift
done
[[ $# -gt 0 && $processes =~ ^[1-9][0-9]*$ && $port =~ ^[1-9][0-9]*$ ]] || usage

here=.venv/bin/python
[ -x $here ] || here=python3
train=("${PYTHON:-$here}" -m covid_flax.main "$@")
if [ "$processes" = 1 ]; then
  if $dry_run; then
    printf '%q ' "${train[@]}" && echo
    exit
  fi
  exec "${train[@]}"
fi

pids=()
for ((i = 0; i < processes; i++)); do
  together=(
    "--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$i"
    "--local_devices=$i"
  )
  if $dry_run; then
    printf '%q ' "${train[@]}" "${together[@]}" '&' | sed 's/\\& $/\&/' && echo
  else
    "${train[@]}" "${together[@]}" &
    pids+=($!)
  fi
done
$dry_run && exit
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
status=0
for pid in "${pids[@]}"; do
  # A signal ends a wait before the process.
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid" || status=$?
  done
  wait "$pid" || status=$?
done
exit "$status"
