#!/usr/bin/env bash
# Table 5: the paper's settings beside the defaults, read from the scripts.
# Runs what is missing, then prints the table; flags as in `python benchmark/run_table.py --help`.
#
#   bash benchmark/table5.sh --scale cpu
exec "$(dirname "$0")/table.sh" table5 "$@"
