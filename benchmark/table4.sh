#!/usr/bin/env bash
# Table 4 and the theorems behind it, into benchmark/results/table4.md and table4.png: the same command gives the same files,
# bit for bit. About a minute of one core. Flags are those of matrix_games.py.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --print ]; then exec echo "python benchmark/matrix_games.py"; fi
if [ "${SCALE:-paper}" = smoke ]; then set -- --num-seeds 2 --num-datasets 2 --result-path runs/table4-smoke.md; fi
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 # sums in one order
python benchmark/matrix_games.py "$@"
