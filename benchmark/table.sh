#!/usr/bin/env bash
# What table1.sh to figure4.sh and all.sh have in common: the runs that are missing, then the tables. A failed run fails it.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 scale=cpu
shift
python benchmark/run_table.py "$name" "$@"
while [ $# -gt 0 ]; do
  case $1 in --print-commands) exit ;; --scale) scale=$2 ;; --scale=*) scale=${1#--scale=} ;; esac
  shift
done
python benchmark/report.py "$name" --scale "$scale"
