#!/usr/bin/env bash
# Table 3: test returns over beta, and with alpha 0.
# Runs what is missing, then prints the table; flags as in `python benchmark/run_table.py --help`.
#
#   bash benchmark/table3.sh --scale cpu
exec "$(dirname "$0")/table.sh" table3 "$@"
