#!/usr/bin/env bash
# How many labels: reward models and policies from few of the 384,000 pairs of diversified data; the trajectories stay the same.
SEEDS=${SEEDS:-4 5}
source "$(dirname "$0")/settings.sh"
games=${GAMES:-spread reference}
[ "${SCALE:-paper}" = paper ] || games=spread
for game in $games; do collect $game diversified; done | run

epochs() { case $1 in 100 | 300 | 1000) echo 200 ;; 3000) echo 70 ;; *) echo 20 ;; esac; } # few pairs, more passes
for seed in $seeds; do
  for game in $games; do
    bc $game diversified $seed
    for pairs in ${PAIRS:-100 300 1000 3000 10000}; do
      reward_model $game diversified $seed --run-name pairs$pairs --max-pairs $pairs --max-epochs $(epochs $pairs)
    done
    reward_model $game diversified $seed
  done | run
  for game in $games; do
    for pairs in ${PAIRS:-100 300 1000 3000 10000}; do
      reward=runs/$game/diversified-data$data_seed/reward-pairs$pairs-alpha1-seed$seed.pt
      vdn $game diversified $seed --run-name pairs$pairs --reward-path $reward
    done
    vdn $game diversified $seed
  done | run
done
report
