#!/usr/bin/env bash
# Table 6: 4 to 7 agents and 5 landmarks in spread.
source "$(dirname "$0")/settings.sh"
games="spread-4x5 spread-5x5 spread-6x5 spread-7x5"
[ "${SCALE:-paper}" = paper ] || games=spread-4x5
for mixture in mix-unilateral pure-expert; do
  for game in $games; do collect $game $mixture; done
done | run

for seed in $seeds; do
  for mixture in mix-unilateral pure-expert; do
    for game in $games; do
      reward_model $game $mixture $seed
      bc $game $mixture $seed
    done
  done | run
  for mixture in mix-unilateral pure-expert; do
    for game in $games; do vdn $game $mixture $seed; done
  done | run
done
report
