#!/usr/bin/env bash
# Figure 2: learned and true rewards along a trajectory, with and without the smoothness term, and how spiky they are.
# Runs what is missing, then prints the table; flags as in `python benchmark/run_table.py --help`.
#
#   bash benchmark/figure2.sh --scale cpu
exec "$(dirname "$0")/table.sh" figure2 "$@"
