#!/usr/bin/env bash
# How far policies are from a Nash equilibrium: `evaluate.py --nash-gap` of the expert and rookie of each game, and of the BC and
# the VDN-RLHF policy of each mixture (training seed 4, dataset seed 2: those of benchmark/table2.sh --scale paper), which are made
# where they are missing. Every finished cell is a small file in benchmark/results/nash_gap/ and is skipped, so that this can be stopped and
# started again; when the code changed, delete them. Two minutes of one core a cell, six more where the policies are missing.
#
#   bash benchmark/nash_gap.sh                      everything, one process at a time, logs in runs/logs/, then the table
#   bash benchmark/nash_gap.sh spread pure-expert   one game, and expert, rookie or a mixture, then the table
#   bash benchmark/nash_gap.sh table                only the table, into benchmark/results/nash_gap.md
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/logs benchmark/results/nash_gap
games=${1:-spread reference tag}
sources=${2:-expert rookie pure-expert diversified mix-expert mix-unilateral}

make_policies() { # game, mixture
  local game=$1 mixture=$2 data=runs/$1/$2-data2/dataset.npz
  [ -e "$data" ] || python collect_data.py --env "$game" --dataset "$mixture" --seed 2 --data-path "$data"
  python vdn_rlhf.py --env "$game" --dataset "$mixture" --seed 4 --data-path "$data"
}

measure() { # name, policy file, game, source
  local name=$1 policy=$2 game=$3 source=$4 log=runs/logs/nash-gap-$1
  local result=benchmark/results/nash_gap/$name.json
  [ -e "$result" ] && return
  {
    { [ -e "$policy" ] || make_policies "$game" "$source"; } &&
      python evaluate.py --policy-path "$policy" --nash-gap --seed 12345 --json-path "$log.json" &&
      python benchmark/nash_gap_table.py "$log.json" "$result"
  } >"$log.log" 2>&1 || { echo "failed: $name (see $log.log)" >&2; failed=1; return; }
  echo "done: $name"
}

failed=0
if [ "$games" != table ]; then
  for source in $sources; do
    for game in $games; do
      beta=1
      [ "$game" = tag ] && beta=3
      case $source in
      expert | rookie) measure "$game-$source" "policies/$game/$source.pt" "$game" "$source" ;;
      *)
        measure "$game-$source-vdn" "runs/$game/$source-data2/vdn-beta$beta-alpha1-seed4.pt" "$game" "$source"
        measure "$game-$source-bc" "runs/$game/$source-data2/bc-seed4.pt" "$game" "$source"
        ;;
      esac
    done
  done
fi
python benchmark/nash_gap_table.py | tee benchmark/results/nash_gap.md
exit $failed
