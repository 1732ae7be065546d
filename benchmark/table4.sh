#!/usr/bin/env bash
# Table 4 and the theorems behind it: prints the two games and what Algorithm 4 makes of single-policy, unilateral and uniform
# data, and checks the lemmas on a random Markov game. The same command gives the same files, bit for bit. About a minute of one core.
#
#   bash benchmark/table4.sh            into benchmark/results/table4.md and table4.png; takes the flags of matrix_games.py
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in *print*commands*)
  [ -e benchmark/results/table4.md ] || echo "bash benchmark/table4.sh"
  exit
  ;;
esac
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 # sums in one order
python benchmark/matrix_games.py "$@"
