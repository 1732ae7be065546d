#!/usr/bin/env bash
# How far policies are from a Nash equilibrium: expert and rookie of each game, and BC and VDN-RLHF on diversified and on
# pure-expert data, one training seed. Reports in benchmark/results/nash-gap/<game>-<players>.json; one that is there is kept.
SEEDS=${SEEDS:-4}
source "$(dirname "$0")/settings.sh"
mixtures=${MIXTURES:-diversified pure-expert}
results=benchmark/results/nash-gap search_flags=
if [ "${SCALE:-paper}" = smoke ]; then results=runs/nash-gap-smoke search_flags="--num-updates 8 --num-episodes 128"; fi

for mixture in $mixtures; do
  for game in $games; do collect $game $mixture; done
done | run

for seed in $seeds; do
  for mixture in $mixtures; do
    for game in $games; do
      reward_model $game $mixture $seed
      bc $game $mixture $seed
    done
  done | run
  for mixture in $mixtures; do
    for game in $games; do vdn $game $mixture $seed; done
  done | run
done

gap() { # name of the report, policy files
  [ -e "$results/$1.json" ] || echo "python benchmark/nash_gap.py --policies ${*:2} --json-path $results/$1.json $search_flags"
}
for game in $games; do
  gap $game-shipped policies/$game/expert.pt policies/$game/rookie.pt
  beta=3
  if [ $game = reference ]; then beta=1; fi
  for mixture in $mixtures; do
    folder=runs/$game/$mixture-data$data_seed
    for seed in $seeds; do gap $game-$mixture-seed$seed $folder/{bc,vdn-beta$beta-alpha1}-seed$seed.pt; done
  done
done | run
report
