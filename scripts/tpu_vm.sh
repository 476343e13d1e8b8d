#!/usr/bin/env bash
# Trains on a TPU VM of one host: creates it, copies this repository (what is committed), installs,
# runs.
#
#   scripts/tpu_vm.sh [--dry_run] --name=NAME --zone=ZONE [--type=v5litepod-8]
#       [--version=v2-alpha-tpuv5-lite] [--project=PROJECT] [STEP ...] -- --config=FILE [FLAG ...]
#
# STEP is create, install, run, stop or delete; without one: create, install, run. The VM costs
# money until it is deleted. What follows -- goes to covid_flax.main on the VM, in ~/covid_flax, with
# what it says in run.log: it goes on if the connection breaks, until its end or `stop`.
set -euo pipefail
worker=0
# shellcheck source=scripts/tpu_steps.bash
source "$(dirname "${BASH_SOURCE[0]}")/tpu_steps.bash"
