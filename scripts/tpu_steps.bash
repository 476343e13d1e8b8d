# shellcheck shell=bash
# What tpu_vm.sh and tpu_pod.sh share; they set `worker`: 0, or all hosts.

usage() {
  sed -n '/^#   /s/^# *//p' "$0" >&2
  exit 2
}

dry_run=false name='' zone='' project='' version=v2-alpha-tpuv5-lite steps=()
type=v5litepod-8
[ "${worker:?}" = 0 ] || type=v5litepod-16
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=true ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    create | install | run | stop | delete) steps+=("$1") ;;
    --) shift && break ;;
    *) usage ;;
  esac
  shift
done
[ -n "$name" ] && [ -n "$zone" ] || usage
[ ${#steps[@]} -gt 0 ] || steps=(create install run)
if [[ " ${steps[*]} " == *' run '* && $# -eq 0 ]]; then usage; fi

where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
tpu=(gcloud compute tpus tpu-vm)
# Not the shell that waits for it, whose command line names it too.
running='^[^ ]*python -m [c]ovid_flax.main'
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

run() {
  if $dry_run; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

on_workers() {
  run "${tpu[@]}" ssh "$name" "${where[@]}" "--worker=$worker" "--command=$1"
}

for step in "${steps[@]}"; do
  case $step in
    create)
      run "${tpu[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version"
      ;;
    install)
      archive=${TMPDIR:-/tmp}/covid_flax.tar.gz
      run git -C "$root" archive --format=tar.gz --prefix=covid_flax/ "--output=$archive" HEAD
      run "${tpu[@]}" scp "$archive" "$name:covid_flax.tar.gz" "${where[@]}" "--worker=$worker"
      # Images with Ubuntu 22.04 have Python 3.10, and 3.11 among their packages.
      on_workers "python=python3; \
python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
{ python=python3.11; apt='sudo apt-get -qqy -o DPkg::Lock::Timeout=300'; \
\$apt update && \$apt install python3.11-venv; } || \
{ echo 'error: no Python 3.11 (see above): run install again, or create the VM with another \
--version' >&2; exit 2; }; \
tar xzf covid_flax.tar.gz && cd covid_flax && \$python -m venv .venv && \
.venv/bin/python -m pip install --quiet --editable '.[tpu,lite0]'"
      ;;
    run)
      # Apart from the connection, which may break: what it says goes to run.log, which is followed.
      # gcloud then gives the command again, and a run that is still there is followed on.
      # Quoted once more, for the shell at the other end.
      on_workers "cd covid_flax || exit; : >>run.log; run=\$(pgrep -o -f '$running'); \
if [ -n \"\$run\" ]; then from='-n 20'; \
echo 'note: a run is there, and is followed; these arguments are not used' >&2; \
else from=\"-c +\$((\$(wc -c <run.log) + 1))\"; rm -f run.status; \
{ trap '' HUP; .venv/bin/python -m covid_flax.main$(printf ' %q' "$@"); echo \$? >run.status; } \
>>run.log 2>&1 </dev/null & run=\$!; fi; \
tail \$from --pid=\$run -f run.log; sleep 1; exit \"\$(cat run.status)\""
      ;;
    stop) # it saves, and ends with status 143
      on_workers "pkill -TERM -f '$running'"
      ;;
    delete)
      run "${tpu[@]}" delete "$name" "${where[@]}" --quiet
      ;;
  esac
done
