#!/usr/bin/env bash
# All tables and figures, then benchmark/README.md. Can be stopped and started again. `SCALE=smoke bash benchmark/all.sh` runs
# everything small, to see that it runs.
set -euo pipefail
cd "$(dirname "$0")"
for script in table1 table2 rivals no_expert table3 table6 table7 labels ablation figure4 nash_gap; do bash $script.sh "$@"; done
bash table4.sh "$@"
