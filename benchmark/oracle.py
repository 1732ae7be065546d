"""What each learned part costs: the learner of vdn_rlhf.py with one part after the other swapped for the truth.

Usage: python benchmark/oracle.py --env spread --true-reward    (from the repository root, when vdn_rlhf.py has made the models)

--true-reward      the game's step rewards, standardized like r_std, instead of the reward model's
--true-players     who played each trajectory is known, so that pi_ref imitates exactly what experts played; else the posterior
                   of the BC policy's modes, weighted by learned return
--true-reference   pi_ref is the experts' policy itself, with its random actions, instead of an imitation
Prints and, with --json-path, writes the returns of the policy learned and of its reference.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import vdn_rlhf
from vdn_rlhf import (
    TEST_EPISODES,
    AgentNetwork,
    RewardNetwork,
    UserError,
    build_network,
    find_game,
    game_name,
    learn_policies,
    load_checkpoint,
    load_dataset,
    make_reference_policies,
    mean_return,
    run_command_line,
    save_file,
    set_up,
    standardized_rewards,
)


@dataclass
class Args(vdn_rlhf.Args):
    true_reward: bool = False
    """true step rewards instead of the reward model's"""
    true_players: bool = False
    """imitate exactly what experts played"""
    true_reference: bool = False
    """the experts' policy itself as pi_ref"""
    json_path: str = ""
    """where to write the returns"""


class NoisyGreedy(nn.Module):
    """The policy that plays an expert's greedy action, but with probability epsilon any; outputs its log-probabilities."""

    def __init__(self, expert: AgentNetwork, epsilon: float):
        super().__init__()
        self.expert, self.epsilon, self.num_modes = expert, epsilon, 1
        for name in ("observation_dim", "num_agents", "num_actions", "horizon"):
            setattr(self, name, getattr(expert, name))

    def forward(self, observations, first_step=0, memory=None):
        q_values, memory = self.expert(observations, first_step, memory)
        greedy = F.one_hot(q_values.argmax(dim=-1), self.num_actions)
        return ((1 - self.epsilon) * greedy + self.epsilon / self.num_actions).log(), memory


def load(kind: str, path: Path, network_class: type, device) -> tuple[dict, nn.Module]:
    checkpoint = load_checkpoint(path, (kind,) if kind != "expert" else ("vdn", "pathwise"))
    return checkpoint, build_network(network_class, path, checkpoint, device)


def main(args: Args) -> None:
    for flag in ("data_path", "vdn_path", "run_name", "track"):
        if getattr(args, flag):
            raise UserError(
                f"--{flag.replace('_', '-')}: not for this script, which reads default paths and writes --json-path"
            )
    if args.true_players and (args.true_reference or args.imitation_updates == 0 or args.beta == 0):
        raise UserError("--true-players: there is nothing to imitate with --true-reference, --imitation-updates 0 or --beta 0")
    device = set_up(args)
    env_name = game_name(args)
    folder = Path(f"runs/{env_name}/{args.dataset}")
    data, meta = load_dataset(folder / "dataset.npz", env_name, ("observations", "actions", "true_rewards"))
    with np.load(folder / "dataset.npz") as file:
        data |= {name: torch.from_numpy(file[name]) for name in ("behavior", "deviator")}
    data = {name: array.to(device) for name, array in data.items()}
    observations, actions = data["observations"], data["actions"]
    _, T, A = actions.shape
    shape = dict(observation_dim=observations.shape[-1], num_agents=A, num_actions=meta["num_actions"], horizon=T)
    game = find_game(folder / "dataset.npz", env_name, (A, shape["observation_dim"], shape["num_actions"], T))

    if args.true_reward:
        r_std = data["true_rewards"]
        r_std = (r_std - r_std.mean()) / r_std.std(correction=0)
    else:
        path = Path(args.reward_path or folder / f"reward-alpha{args.alpha:g}-seed{args.seed}.pt")
        checkpoint, reward_model = load("reward", path, RewardNetwork, device)
        chunks = zip(observations.split(1024), actions.split(1024), strict=True)
        r_std = torch.cat([standardized_rewards(reward_model, checkpoint["stats"], *chunk) for chunk in chunks])
    rewards = r_std.sum(dim=-1)[None]  # (1, N, T)

    bc_checkpoint, bc_policy = load("bc", Path(args.bc_path or folder / f"bc-seed{args.seed}.pt"), AgentNetwork, device)
    generators = [torch.Generator().manual_seed(args.seed)]
    if args.true_players:
        deviates = torch.arange(A, device=device) == data["deviator"][:, None]  # (N, A)
        expert_team = (data["behavior"] < 2)[:, None]  # 0 expert, 1 unilateral
        vdn_rlhf.trajectory_weights = lambda *_: (expert_team & ~deviates).float()
    if args.true_reference:
        _, expert = load("expert", Path(f"policies/{env_name}/expert.pt"), AgentNetwork, device)
        reference_policy = NoisyGreedy(expert, meta["epsilon"])
    else:
        reference_shape = bc_checkpoint["meta"]["network"]
        team_returns = rewards.sum(dim=-1)
        (reference_policy,) = make_reference_policies(
            [args], [bc_policy], reference_shape, observations, actions, team_returns, generators
        )
    shape |= dict(network=args.network, hidden_dim=args.hidden_dim, num_layers=args.num_layers, time_input=args.time_input)
    (result,) = learn_policies(
        [args], game, shape, observations, actions, rewards, [reference_policy], generators, lambda *_: None
    )
    report = {name: getattr(args, name) for name in ("env", "dataset", "seed", "beta", "true_reward", "true_players")}
    report |= {
        "true_reference": args.true_reference,
        "reference_score": game.metrics(result["metrics"]["charts/reference_return"])["charts/score"],
    }
    report |= game.metrics(mean_return(game, result["policy"], TEST_EPISODES, 12345, device))
    print(json.dumps(report))
    if args.json_path:
        save_file(args.json_path, lambda file: file.write(json.dumps(report, indent=1).encode()))


if __name__ == "__main__":
    run_command_line(main, Args, vdn_rlhf.PRESETS)
