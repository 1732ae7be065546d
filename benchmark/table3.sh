#!/usr/bin/env bash
# Table 3: beta, and alpha 0, on diversified data. MIXTURES="mix-unilateral mix-expert" bash ...: on others.
source "$(dirname "$0")/settings.sh"
mixtures=${MIXTURES:-diversified}
each() { for mixture in $mixtures; do for game in $games; do "$@" $game $mixture; done; done; } # command
models() {
  bc $1 $2 $seed
  for alpha in 0 1; do reward_model $1 $2 $seed --alpha $alpha; done
}
policies() {
  for beta in 0 0.1 1 3 10 100; do vdn $1 $2 $seed --beta $beta; done
  vdn $1 $2 $seed --alpha 0
}
each collect | run

for seed in $seeds; do
  each models | run
  each policies | run
done
report
