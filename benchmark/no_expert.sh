#!/usr/bin/env bash
# Data without experts (rookies and random play): VDN-RLHF over beta, beside BC. Here imitation reaches the rookie at best.
SEEDS=${SEEDS:-4 5 6 7 8}
source "$(dirname "$0")/settings.sh"
for game in $games; do collect $game no-expert; done | run

for seed in $seeds; do
  for game in $games; do
    reward_model $game no-expert $seed $(no_expert_reward $game no-expert)
    bc $game no-expert $seed
  done | run
  for beta in ${BETAS:-0 0.03 0.1 0.3 1}; do
    for game in $games; do vdn $game no-expert $seed --beta $beta; done
  done | run
done
report
