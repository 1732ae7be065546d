#!/usr/bin/env bash
# Table 2: four datasets, three games: VDN-RLHF, and BC, its pi_ref, beside it. First one seed of everything, then the next.
SEEDS=${SEEDS:-4 5 6 7 8}
source "$(dirname "$0")/settings.sh"
mixtures=${MIXTURES:-diversified mix-unilateral mix-expert pure-expert}

for mixture in $mixtures; do
  for game in $games; do collect $game $mixture; done
done | run

for seed in $seeds; do
  for preset in $presets; do
    for mixture in $mixtures; do
      for game in $games; do
        reward_model $game $mixture $seed --preset $preset
        bc $game $mixture $seed --preset $preset
      done
    done | run
    for mixture in $mixtures; do
      for game in $games; do vdn $game $mixture $seed --preset $preset; done
    done | run
  done
done
report
