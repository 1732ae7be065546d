#!/usr/bin/env bash
# Table 7: training and held-out likelihood of the reward model over alpha.
# Runs what is missing, then prints the table; flags as in `python benchmark/run_table.py --help`.
#
#   bash benchmark/table7.sh --scale cpu
exec "$(dirname "$0")/table.sh" table7 "$@"
