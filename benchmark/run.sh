#!/usr/bin/env bash
# Run command lines from standard input, NUM_PROCESSES (2) at a time, each with a log of its own in runs/logs/. A line that
# fails is named with its log, and fails the script; the scripts themselves skip what is finished, so it can be stopped and
# started again. With --print the lines are printed instead, for GNU parallel, Slurm or another machine.
#
#   echo "python vdn_rlhf.py --env spread --seed 2" | bash benchmark/run.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --print ]; then exec cat; fi
mkdir -p runs/logs
export TQDM_MININTERVAL=30 OMP_NUM_THREADS=1

run_line() { # number, number of lines, line
  local log
  log=runs/logs/$(sed 's/^python //; s/--//g; s/[^A-Za-z0-9._=-]\+/-/g' <<<"$3" | cut -c1-200).log
  if bash -c "$3" >"$log" 2>&1; then
    echo "[$1/$2] $(date +%H:%M) done: $3"
  else
    echo "[$1/$2] $(date +%H:%M) FAILED: $3 (see $log)" >&2
    return 1
  fi
}
export -f run_line

mapfile -t lines
for i in "${!lines[@]}"; do printf '%s\0%s\0%s\0' "$((i + 1))" "${#lines[@]}" "${lines[i]}"; done |
  xargs -0 -r -n 3 -P "${NUM_PROCESSES:-2}" bash -c 'run_line "$@"' run_line
