#!/usr/bin/env bash
# Table 2: test returns, scores and reward errors over four datasets and three games, defaults and --preset paper.
# Runs what is missing, then prints the table; flags as in `python benchmark/run_table.py --help`.
#
#   bash benchmark/table2.sh --scale cpu
exec "$(dirname "$0")/table.sh" table2 "$@"
