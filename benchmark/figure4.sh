#!/usr/bin/env bash
# Figures 2 and 4: learned and true rewards along a trajectory, for reward models of pure-expert data, without smoothness, and
# of diversified data with it.
SEEDS=${SEEDS:-4}
source "$(dirname "$0")/settings.sh"
for game in $games; do
  collect $game diversified
  collect $game pure-expert
done | run

for game in $games; do
  reward_model $game pure-expert ${seeds%% *}
  for alpha in 0 1; do reward_model $game diversified ${seeds%% *} --alpha $alpha; done
done | run
folder=benchmark
[ "${SCALE:-paper}" = paper ] || folder=runs
[ -n "$print" ] || python benchmark/figures.py --data-seed $data_seed --seed ${seeds%% *} --folder $folder
