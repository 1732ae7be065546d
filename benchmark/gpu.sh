#!/usr/bin/env bash
# All that needs a GPU, in less than 9 minutes of one H100: tests, the README's command, speeds, cells of Table 2. Every part has
# a time limit and a log in OUT, and the next part follows whatever happens. WHEELS: a folder of packages that the machine lacks.
#
#   bash benchmark/gpu.sh OUT [WHEELS]
#   PARTS=45 bash benchmark/gpu.sh OUT                   two of its parts
#   DEVICE=cpu SCALE=smoke bash benchmark/gpu.sh OUT     tries all of it, small, without a GPU
set -uo pipefail
mkdir -p "$1" && OUT=$(realpath "$1") work=$(mktemp -d)
wheels=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.." && cp -r -- *.py *.md *.toml benchmark policies tests "$work" && cd "$work" || exit
if [ -n "$wheels" ]; then
  python3 -m pip install -q --no-index --no-deps --target packages "$wheels"/*.whl || exit
  export PYTHONPATH=$work/packages
fi
mkdir bin && printf '#!/bin/sh\nexec python3 "$@"\n' >bin/python && chmod +x bin/python
command -v python >/dev/null || export PATH=$PATH:$work/bin

export OUT DEVICE=${DEVICE:-cuda} SCALE=${SCALE:-paper} OMP_NUM_THREADS=1 TQDM_MININTERVAL=30
processes=8 seconds=1 slower=1 few= first=true games="spread reference" # tag has 50,000 updates of a GRU
if [ "$SCALE" = smoke ]; then
  export MIXTURES=diversified
  processes=2 seconds=0.01 slower=5 few="--num-updates 20" games=spread
  first="python collect_data.py --num-trajectories 2560 && python train_reward.py --max-epochs 1 && python train_bc.py $few"
fi

part() { # name, seconds, command line
  [[ ${PARTS:-123456} == *${1%%-*}* ]] || return 0
  local start=$SECONDS status=0
  timeout -k 5 $(($2 * slower)) bash -c "$3" >"$OUT/$1.log" 2>&1 || status=$?
  echo "$1: status $status after $((SECONDS - start)) s" | tee -a "$OUT/parts.txt"
  return $status
}

speed="python benchmark/speed.py --device $DEVICE --seconds $seconds"
together="for i in \$(seq $processes); do $speed --only 'VDN, mlp' --result-path \$0-\$i.md & done; wait
  cat \$0-*.md | awk -F '|' '/^\| VDN/ { gsub(\",\", \"\"); n[\$2]++; sum[\$2] += \$3 }
    END { for (what in n) print n[what] \" processes:\" what sum[what] \" updates/s in all\"; exit !length(n) }'"

part 1-tests 150 "TEST_DEVICE=$DEVICE python -m pytest -o addopts= -q --durations=0 tests/test_cuda.py"
part 2-readme 120 "$first; time python vdn_rlhf.py --env spread --beta 1 --device $DEVICE $few
  grep -H '\"seconds\"' runs/spread/diversified/*.json"
part 3-speed 130 "$speed --result-path $OUT/speed-$DEVICE.md"
part 4-together 50 "${together//\$0/alone}"
if command -v nvidia-cuda-mps-control >/dev/null && nvidia-cuda-mps-control -d; then
  trap 'echo quit | timeout 10 nvidia-cuda-mps-control' EXIT
  part 5-together-mps 50 "${together//\$0/mps}" || echo quit | timeout 10 nvidia-cuda-mps-control # else Table 2 has it too
fi
save() { tar czf "$OUT/new" runs/*/*/*.json runs/logs; mv "$OUT/new" "$OUT/results.tar.gz"; }
while kill -0 $$ && sleep 15; do save; done >/dev/null 2>&1 & # the machine may be taken away
saving=$!
rest=$((530 - SECONDS))
part 6-table2 $((rest > 20 ? rest : 20)) \
  "NUM_PROCESSES=$processes PRESETS=paper SEEDS=4 GAMES='$games' bash benchmark/table2.sh"
kill $saving; wait $saving; save
cat "$OUT/parts.txt"
