#!/usr/bin/env bash
# The cheap rival of everything: filtered BC (the quarter of the trajectories with the highest learned team return), alone and
# as pi_ref, beside the plain one.
source "$(dirname "$0")/settings.sh"
for game in $games; do collect $game diversified; done | run

for seed in $seeds; do
  for game in $games; do reward_model $game diversified $seed; done | run
  for game in $games; do
    bc $game diversified $seed
    bc $game diversified $seed --keep 0.25
  done | run
  for game in $games; do
    vdn $game diversified $seed
    vdn $game diversified $seed --keep 0.25
  done | run
done
report
