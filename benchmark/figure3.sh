#!/usr/bin/env bash
# Figure 3: training curves of the reward model over alpha.
# Runs what is missing, then prints the table; flags as in `python benchmark/run_table.py --help`.
#
#   bash benchmark/figure3.sh --scale cpu
exec "$(dirname "$0")/table.sh" figure3 "$@"
