#!/usr/bin/env bash
# The numbers on simple_spread in the README: the learned policies over three seeds, MLP against GRU, the reward model's input
# and its alpha. Finished runs are skipped, so that it can be stopped and started again. Under an hour of two cores.
#
#   bash benchmark/spread.sh          everything, two processes at a time, logs in runs/logs/, then the tables
#   bash benchmark/spread.sh tables   only the tables, into benchmark/results/spread.md
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/logs benchmark/results
folder=runs/spread/diversified

models() { # output file, command
  for seed in 1 2 3; do
    echo "$folder/reward-alpha1-seed$seed.pt python train_reward.py --seed $seed"
    echo "$folder/bc-seed$seed.pt python train_bc.py --seed $seed"
    echo "$folder/reward-own-alpha1-seed$seed.pt python train_reward.py --seed $seed --input own --run-name own"
  done
  for alpha in 0 0.001 0.01 0.1 10 100 1000; do
    echo "$folder/reward-alpha$alpha-seed1.pt python train_reward.py --alpha $alpha"
  done
}

policies() {
  for seed in 1 2 3; do
    echo "$folder/vdn-beta1-alpha1-seed$seed.pt python vdn_rlhf.py --env spread --beta 1 --seed $seed"
  done
  gru="--network gru --hidden-dim 64 --learning-rate 5e-3 --run-name gru"
  echo "$folder/vdn-gru-beta1-alpha1-seed1.pt python vdn_rlhf.py --env spread --beta 1 $gru"
}

evaluations() {
  for name in vdn-beta1-alpha1-seed{1,2,3}{,-best} vdn-gru-beta1-alpha1-seed1; do
    echo "runs/logs/$name.json python evaluate.py --policy-path $folder/$name.pt --seed 12345 --json-path runs/logs/$name.json"
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

run_all() { xargs -P 2 -L 1 bash -c 'run_one "$@"' _; }

if [ "${1:-}" != tables ]; then
  [ -e "$folder/dataset.npz" ] || python collect_data.py --env spread --dataset diversified
  models | run_all
  policies | run_all
fi
evaluations | run_all
python benchmark/spread_tables.py | tee benchmark/results/spread.md
