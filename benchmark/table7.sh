#!/usr/bin/env bash
# Table 7 and Figure 3: reward models over alpha on diversified data; and Eq. (1) as printed (--variance step).
source "$(dirname "$0")/settings.sh"
for game in $games; do collect $game diversified; done | run

for seed in $seeds; do
  for game in $games; do
    for alpha in 0 0.001 0.01 0.1 1 10 100 1000; do reward_model $game diversified $seed --alpha $alpha; done
    reward_model $game diversified $seed --variance step --run-name step
  done | run
done
report
