#!/usr/bin/env bash
# Everything beside everything, on diversified data and on data without experts: BC; BC of the quarter of the trajectories with
# the highest return, learned or true; VDN-RLHF on top of plain and of filtered BC; the placebos and rivals of rivals.py.
source "$(dirname "$0")/settings.sh"
mixtures=${MIXTURES:-diversified no-expert}
methods=${METHODS:-zero shuffled oracle cql ipl}
each() { for mixture in $mixtures; do for game in $games; do "$@" $game $mixture; done; done; } # command
rival() { echo "python benchmark/rivals.py $(flags $1 $2) --seed $seed --resume $policy_flags $(beta $2) ${*:3}"; }
imitate() {
  bc $1 $2 $seed
  bc $1 $2 $seed --keep 0.25
  truth=runs/$1/$2-data$data_seed/reward-true-returns-alpha1-seed$seed.pt
  bc $1 $2 $seed --keep 0.25 --run-name true-returns --reward-path $truth
}
learn() {
  vdn $1 $2 $seed $(beta $2)
  vdn $1 $2 $seed $(beta $2) --keep 0.25
  for method in $methods; do rival $1 $2 --method $method; done
}

each collect | run
for seed in $seeds; do
  stage() { reward_model $1 $2 $seed $(no_expert_reward $1 $2); } && each stage | run
  stage() { rival $1 $2 --method true-returns; } && each stage | run
  each imitate | run
  each learn | run
done
report
