#!/usr/bin/env bash
# How many labels: reward models and policies from few of the 384,000 pairs of diversified data; and labels of annotators that
# err. The trajectories stay the same, and so does pi_ref.
source "$(dirname "$0")/settings.sh"
games=${GAMES:-spread reference}
[ "${SCALE:-paper}" = paper ] || games=spread
errors=${ERRORS:-"mistakes=0.1 ties=0.1 myopia=0.9 team-labels"}
folder() { echo runs/$1/diversified${2:+-${2%=*}}-data$data_seed; } # game, error
for game in $games; do
  collect $game diversified
  for error in $errors; do collect $game diversified --data-path $(folder $game $error)/dataset.npz --${error/=/ }; done
done | run

for seed in $seeds; do
  for game in $games; do
    bc $game diversified $seed
    for pairs in ${PAIRS:-100 300 1000 3000 10000}; do
      reward_model $game diversified $seed --run-name pairs$pairs --max-pairs $pairs --max-epochs 20
    done
    for error in "" $errors; do reward_model $game diversified${error:+-${error%=*}} $seed; done
  done | run
  for game in $games; do
    for pairs in ${PAIRS:-100 300 1000 3000 10000}; do
      vdn $game diversified $seed --run-name pairs$pairs --reward-path $(folder $game)/reward-pairs$pairs-alpha1-seed$seed.pt
    done
    vdn $game diversified $seed
    for error in $errors; do vdn $game diversified-${error%=*} $seed --bc-path $(folder $game)/bc-seed$seed.pt; done
  done | run
done
report
