#!/usr/bin/env bash
# The main result: scores of the learned policies with the default settings, five training seeds (4 to 8) on datasets (seed 2)
# that no setting was chosen on. Every finished run is a small file in benchmark/results/scores/ and is skipped, so that this
# can be stopped and started again; when the code changed, delete them and runs/*/*-data2. Six minutes of one core a run.
#
#   bash benchmark/scores.sh                      everything, two processes at a time, logs in runs/logs/, then the table
#   bash benchmark/scores.sh spread diversified   one game and mixture, then the table
#   bash benchmark/scores.sh table                only the table, into benchmark/results/scores.md
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/logs benchmark/results/scores
games=${1:-spread reference tag}
mixtures=${2:-diversified mix-unilateral mix-expert pure-expert}

run_one() { # a failed run names its log, and fails the script
  local game=$1 mixture=$2 seed=$3 beta=1
  [ "$game" = tag ] && beta=3
  local folder=runs/$game/$mixture-data2 vdn=vdn-beta$beta-alpha1-seed$seed log=runs/logs/scores-$game-$mixture-$seed
  local result=benchmark/results/scores/$game-$mixture-$seed.json
  [ -e "$result" ] && return
  {
    { [ -e "$folder/$vdn.pt" ] ||
      python vdn_rlhf.py --env "$game" --dataset "$mixture" --seed "$seed" --data-path "$folder/dataset.npz"; } &&
      python evaluate.py --policy-path "$folder/$vdn.pt" --seed 12345 --json-path "$log.json" &&
      python evaluate.py --policy-path "$folder/bc-seed$seed.pt" --seed 12345 --json-path "$log-bc.json" &&
      python benchmark/score_table.py "$folder/$vdn.pt" "$log.json" "$log-bc.json" "$result"
  } >"$log.log" 2>&1 || { echo "failed: $game $mixture seed $seed (see $log.log)" >&2; return 255; }
  echo "done: $game $mixture seed $seed"
}
export -f run_one

if [ "$games" != table ]; then
  for game in $games; do
    for mixture in $mixtures; do
      data=runs/$game/$mixture-data2/dataset.npz
      [ -e "$data" ] || python collect_data.py --env "$game" --dataset "$mixture" --seed 2 --data-path "$data"
    done
  done
  for mixture in $mixtures; do
    for game in $games; do
      for seed in 4 5 6 7 8; do echo "$game $mixture $seed"; done
    done
  done | xargs -P 2 -L 1 bash -c 'run_one "$@"' _
fi
python benchmark/score_table.py | tee benchmark/results/scores.md
