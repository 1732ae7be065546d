#!/usr/bin/env bash
# The reward model on simple_spread, diversified data: its input over three seeds, and its alpha. Finished runs are skipped, so
# that it can be stopped and started again. Half an hour of two cores.
#
#   bash benchmark/reward_model.sh          everything, two processes at a time, logs in runs/logs/, then the tables
#   bash benchmark/reward_model.sh tables   only the tables, into benchmark/results/reward_model.md
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/logs benchmark/results
folder=runs/spread/diversified

models() { # output file, command
  local command="python train_reward.py --no-bf16"
  for seed in 1 2 3; do
    echo "$folder/reward-joint-alpha1-seed$seed.pt $command --seed $seed --run-name joint"
    echo "$folder/reward-own-alpha1-seed$seed.pt $command --seed $seed --input own --run-name own"
  done
  for alpha in 0 0.001 0.01 0.1 10 100 1000; do
    echo "$folder/reward-joint-alpha$alpha-seed1.pt $command --alpha $alpha --run-name joint"
  done
}

run_one() { # a failed run names its command and its log, and fails the script
  local output=$1 log
  log=runs/logs/$(basename "$output").log
  shift
  [ -e "$output" ] && return
  "$@" >"$log" 2>&1 || { echo "failed: $* (see $log)" >&2; return 255; }
  echo "done: $*"
}
export -f run_one

if [ "${1:-}" != tables ]; then
  [ -e "$folder/dataset.npz" ] || python collect_data.py --env spread --dataset diversified
  models | xargs -P 2 -L 1 bash -c 'run_one "$@"' _
fi
python benchmark/reward_model_tables.py | tee benchmark/results/reward_model.md
