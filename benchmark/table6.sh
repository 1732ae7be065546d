#!/usr/bin/env bash
# Table 6: spread with 4 to 7 agents and 5 landmarks.
# Runs what is missing, then prints the table; flags as in `python benchmark/run_table.py --help`.
#
#   bash benchmark/table6.sh --scale cpu
exec "$(dirname "$0")/table.sh" table6 "$@"
