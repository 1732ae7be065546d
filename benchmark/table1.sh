#!/usr/bin/env bash
# Table 1: the mixtures, counted in real datasets.
# Runs what is missing, then prints the table; flags as in `python benchmark/run_table.py --help`.
#
#   bash benchmark/table1.sh --scale cpu
exec "$(dirname "$0")/table.sh" table1 "$@"
