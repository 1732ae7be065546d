#!/usr/bin/env bash
# Figure 4: learned and true rewards in all games.
# Runs what is missing, then prints the table; flags as in `python benchmark/run_table.py --help`.
#
#   bash benchmark/figure4.sh --scale cpu
exec "$(dirname "$0")/table.sh" figure4 "$@"
