#!/usr/bin/env bash
# What table1.sh to figure4.sh and all.sh have in common: the runs that are missing, then the tables. A failed run fails it.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 scale=cpu
shift
status=0
python benchmark/run_table.py "$name" "$@" || status=$?
case $status in 2 | 130 | 143) exit $status ;; esac # a mistake in the flags, or stopped
while [ $# -gt 0 ]; do
  case $1 in --print*commands | -h | --help) exit $status ;; --scale) scale=$2 ;; --scale=*) scale=${1#--scale=} ;; esac
  shift
done
python benchmark/report.py "$name" --scale "$scale"
exit $status
