#!/usr/bin/env bash
# Why the scores are what they are: one setting after the other put back, and one learned part after the other swapped for the
# truth, on the dataset that the settings were chosen on (seed 1, training seeds 1 to 3). Every finished run
# is a small file in benchmark/results/ablations/ and is skipped, so that this can be stopped and started again; when
# the code changed, delete them and the models in runs/*/diversified. Three minutes of one core a run.
#
#   bash benchmark/ablations.sh                      spread, reference and tag, two processes at a time, then the table
#   bash benchmark/ablations.sh spread 1             one game and seed, then the table
#   bash benchmark/ablations.sh table                only the table, into benchmark/ablations.md
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/logs benchmark/results/ablations
games=${1:-spread reference tag}
seeds=${2:-1 2 3}

# name, then how it differs from the default
settings() {
  cat <<'EOF'
default
narrow-bc --bc-path FOLDER/bc-narrow-seedSEED.pt
one-mode --bc-path FOLDER/bc-one-mode-seedSEED.pt
mixture-reference --imitation-updates 0
learned-kl --no-known-kl
plain-td-lambda --no-off-policy
one-step --td-lambda 0
gamma-0.97 --gamma 0.97
gru --network gru --hidden-dim 64 --learning-rate 5e-3
before --bc-path FOLDER/bc-one-mode-seedSEED.pt --no-known-kl --no-off-policy --gamma 0.97
float32 --no-bf16
true-reward --true-reward
true-players --true-players
true-reference --true-reference
true-reward-and-reference --true-reward --true-reference
EOF
}

run_one() { # a failed run names its command and its log, and fails the script
  local game=$1 seed=$2 name=$3 folder=runs/$1/diversified
  shift 3
  local report=benchmark/results/ablations/$game-$name-$seed.json log=runs/logs/ablation-$game-$name-$seed.log flags=("$@")
  [ -e "$report" ] && return
  flags=("${flags[@]//FOLDER/$folder}")
  flags=("${flags[@]//SEED/$seed}")
  python benchmark/oracle.py --env "$game" --seed "$seed" "${flags[@]}" --json-path "$report" >"$log" 2>&1 ||
    { echo "failed: oracle.py --env $game --seed $seed ${flags[*]} (see $log)" >&2; return 255; }
  echo "done: $game, seed $seed, $name"
}

make_models() { # reward model and BC policies of one game and seed
  local game=$1 seed=$2 folder=runs/$1/diversified
  local log=runs/logs/ablation-models-$game-$seed.log
  {
    { [ -e "$folder/reward-alpha1-seed$seed.pt" ] || python train_reward.py --env "$game" --seed "$seed"; } &&
      { [ -e "$folder/bc-seed$seed.pt" ] || python train_bc.py --env "$game" --seed "$seed"; } &&
      { [ -e "$folder/bc-one-mode-seed$seed.pt" ] ||
        python train_bc.py --env "$game" --seed "$seed" --num-modes 1 --run-name one-mode; } &&
      { [ -e "$folder/bc-narrow-seed$seed.pt" ] ||
        python train_bc.py --env "$game" --seed "$seed" --hidden-dim 128 --run-name narrow; }
  } >"$log" 2>&1 || { echo "failed: models of $game, seed $seed (see $log)" >&2; return 255; }
}
export -f run_one make_models

if [ "$games" != table ]; then
  for game in $games; do
    [ -e "runs/$game/diversified/dataset.npz" ] || python collect_data.py --env "$game"
  done
  for seed in $seeds; do
    for game in $games; do echo "$game $seed"; done
  done | xargs -P 2 -L 1 bash -c 'make_models "$@"' _
  for seed in $seeds; do
    for game in $games; do settings | sed "s/^/$game $seed /"; done
  done | xargs -P 2 -L 1 bash -c 'run_one "$@"' _
fi
python benchmark/ablation_table.py | tee benchmark/ablations.md
