#!/usr/bin/env bash
# From the paper's settings to the defaults on diversified data, one change on top of the other, BC beside each; and the
# defaults with Eq. (1) as printed.
SEEDS=${SEEDS:-4 5}
source "$(dirname "$0")/settings.sh"
for game in $games; do collect $game diversified; done | run

steps() { # game, folder
  vdn $1 diversified $seed --preset paper
  flags="--preset paper --reward-path $2/reward-paper-joint-alpha1-seed$seed.pt"
  vdn $1 diversified $seed $flags --run-name joint-reward
  flags+=" --network mlp --hidden-dim 128" && vdn $1 diversified $seed $flags --run-name mlp
  flags+=" --known-kl" && vdn $1 diversified $seed $flags --run-name known-kl
  flags+=" --soft-values" && vdn $1 diversified $seed $flags --run-name soft-values
  flags+=" --td-lambda 0.8" && vdn $1 diversified $seed $flags --run-name lambda
  flags+=" --learning-rate 5e-3" && vdn $1 diversified $seed $flags --run-name rate
  vdn $1 diversified $seed
  vdn $1 diversified $seed --run-name step --reward-path $2/reward-step-alpha1-seed$seed.pt
}

for seed in $seeds; do
  for game in $games; do
    reward_model $game diversified $seed --preset paper
    reward_model $game diversified $seed --preset paper --input joint --run-name paper-joint
    reward_model $game diversified $seed --variance step --run-name step
    reward_model $game diversified $seed
    bc $game diversified $seed --preset paper
    bc $game diversified $seed
  done | run
  for game in $games; do steps $game runs/$game/diversified-data$data_seed; done | run
done
report
