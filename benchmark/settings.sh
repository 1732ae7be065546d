# What the table scripts share; they source it. Results are reported on dataset seed 2 and training seeds 4 to 8, on which
# hardly a setting was chosen (benchmark/README.md). SCALE=smoke runs one game and seed small, to see that it runs; the default is the paper's scale.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
games=${GAMES:-spread tag reference}
seeds=${SEEDS:-4 5 6}
data_seed=${DATA_SEED:-2}
presets=${PRESETS:-default} # PRESETS="default paper": also the paper's settings
print=${1:-}                # --print: show the commands instead of running them
collect_flags= reward_flags= policy_flags=
if [ "${SCALE:-paper}" = smoke ]; then
  collect_flags="--num-trajectories 2560" reward_flags="--max-epochs 1" policy_flags="--num-updates 20"
  games=${GAMES:-spread} seeds=${seeds%% *} data_seed=$data_seed-smoke
fi

flags() { echo "--env $1 --dataset $2 --data-path runs/$1/$2-data$data_seed/dataset.npz"; } # game, mixture

collect() { echo "python collect_data.py $(flags "$1" "$2") --seed ${data_seed%-smoke} $collect_flags ${*:3}"; }

# game, mixture, training seed, further flags
reward_model() { echo "python train_reward.py $(flags "$1" "$2") --seed $3 --resume $reward_flags ${*:4}"; }
bc() { echo "python train_bc.py $(flags "$1" "$2") --seed $3 --resume $policy_flags ${*:4}"; }
vdn() { echo "python vdn_rlhf.py $(flags "$1" "$2") --seed $3 --resume $policy_flags ${*:4}"; }

# Data without experts takes more training, and a reward of what the agent itself sees where that tells its reward.
no_expert_reward() { # game, mixture
  [ "$2" = no-expert ] || return 0
  [ "$1" = reference ] || echo "--input own"
  [ -n "$reward_flags" ] || echo "--max-epochs 40"
}

beta() { [ "$1" != no-expert ] || echo "--beta 0"; } # of a mixture: NO_EXPERT_BETA of report.py, else the scripts' default

run() { bash benchmark/run.sh $print; }
report() { [ -n "$print" ] || python benchmark/report.py; }
