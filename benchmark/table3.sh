#!/usr/bin/env bash
# Table 3: beta, and alpha 0, on diversified data.
source "$(dirname "$0")/settings.sh"
for game in $games; do collect $game diversified; done | run

for seed in $seeds; do
  for game in $games; do
    bc $game diversified $seed
    for alpha in 0 1; do reward_model $game diversified $seed --alpha $alpha; done
  done | run
  for game in $games; do
    for beta in 0 0.1 1 3 10 100; do vdn $game diversified $seed --beta $beta; done
    vdn $game diversified $seed --alpha 0
  done | run
done
report
