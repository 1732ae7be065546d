#!/usr/bin/env bash
# Table 3: beta, and alpha 0, on diversified data. MIXTURE=mix-unilateral bash ...: on others.
source "$(dirname "$0")/settings.sh"
mixture=${MIXTURE:-diversified}
for game in $games; do collect $game $mixture; done | run

for seed in $seeds; do
  for game in $games; do
    bc $game $mixture $seed
    for alpha in 0 1; do reward_model $game $mixture $seed --alpha $alpha; done
  done | run
  for game in $games; do
    for beta in 0 0.1 1 3 10 100; do vdn $game $mixture $seed --beta $beta; done
    vdn $game $mixture $seed --alpha 0
  done | run
done
report
