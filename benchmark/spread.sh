#!/usr/bin/env bash
# The numbers on simple_spread in the README: the learned policies over three seeds, the reward model's input and its alpha.
# Finished runs are skipped, so that it can be stopped and started again. About 30 minutes of two cores.
#
#   bash benchmark/spread.sh          everything, two processes at a time, logs in runs/logs/, then the tables
#   bash benchmark/spread.sh tables   only the tables, from the runs that are there
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/logs
folder=runs/spread/diversified

commands() { # output file, command
  for seed in 1 2 3; do
    echo "$folder/reward-alpha1-seed$seed.pt python train_reward.py --seed $seed"
    echo "$folder/bc-seed$seed.pt python train_bc.py --seed $seed"
    echo "$folder/reward-own-alpha1-seed$seed.pt python train_reward.py --seed $seed --input own --run-name own"
  done
  for alpha in 0 0.001 0.01 0.1 10 100 1000; do
    echo "$folder/reward-alpha$alpha-seed1.pt python train_reward.py --alpha $alpha"
  done
  for seed in 1 2 3; do
    echo "$folder/vdn-beta1-alpha1-seed$seed.pt python vdn_rlhf.py --env spread --beta 1 --seed $seed"
  done
}

run_one() { # a failed run names its command and its log
  local output=$1 log
  log=runs/logs/$(basename "$output" .pt).log
  shift
  [ -e "$output" ] && return
  "$@" >"$log" 2>&1 || { echo "failed: $* (see $log)" >&2; return 255; }
  echo "done: $*"
}
export -f run_one

if [ "${1:-}" != tables ]; then
  [ -e "$folder/dataset.npz" ] || python collect_data.py --env spread --dataset diversified
  commands | grep -v vdn_rlhf | xargs -P 2 -L 1 bash -c 'run_one "$@"' _
  commands | grep vdn_rlhf | xargs -P 2 -L 1 bash -c 'run_one "$@"' _
fi
for seed in 1 2 3; do
  for suffix in "" -best; do
    policy=$folder/vdn-beta1-alpha1-seed$seed$suffix.pt
    [ -e "$policy" ] && python evaluate.py --policy-path "$policy" --seed 12345 --json-path "runs/logs/vdn-seed$seed$suffix.json" >/dev/null 2>&1
  done
done
python benchmark/spread_tables.py
