#!/usr/bin/env bash
# Trains on a TPU pod slice of several hosts: one process on each, all started at once.
#
#   scripts/tpu_pod.sh [--dry_run] --name=NAME --zone=ZONE [--type=v5litepod-16]
#       [--version=v2-alpha-tpuv5-lite] [--project=PROJECT] [STEP ...] -- --config=FILE
#       --workdir=DIR [FLAG ...]
#
# STEP is create, install, run, stop or delete; without one: create, install, run. The slice costs
# money until it is deleted. What follows -- goes to covid_flax.main on every host, with what it
# says in ~/covid_flax/run.log: it goes on if the connection breaks, until its end or `stop`. DIR
# must lie on a file system that all hosts have mounted (Filestore, for example). The processes
# find each other by the TPU's metadata.
set -euo pipefail
worker=all
# shellcheck source=scripts/tpu_steps.bash
source "$(dirname "${BASH_SOURCE[0]}")/tpu_steps.bash"
