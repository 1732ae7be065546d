"""Train expert, rookie and novice of spread with 4 to 7 agents (Table 6), where the online VDN of collect_data.py stays far
from a good expert: with 5 agents and 5 landmarks at -24 after 14,000 updates. Here the gradient of the return with respect to
the weights is taken through the simulator itself (pathwise derivatives over whole episodes: SVG(infinity), Heess et al., 2015),
which leaves no value function to learn; actions are drawn by the straight-through Gumbel-softmax (Jang et al., 2017): a
discrete action forward, its probabilities backward. Writes policies/<game>/{expert,rookie,novice}.pt, of kind "pathwise".

Usage: python benchmark/train_spread_experts.py --num-agents 5 --num-landmarks 5        (from the repository root)

Progress bar: the mean over agents of the undiscounted greedy return of fresh episodes (also `history` in the expert's file,
after the number of updates), and the loss, minus the mean over agents of the return with touches counted by their depth.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from collect_data import (
    HISTORY_EPISODES,
    AgentNetwork,
    Game,
    ParticleEnv,
    UserError,
    check_same_args,
    load_checkpoint,
    mean_return,
    run_command_line,
    save_content,
    save_policies,
    set_up,
    spread,
)


@dataclass
class Args:
    num_agents: int = 5
    """agents"""
    num_landmarks: int = 5
    """landmarks"""
    seed: int = 1
    """fixes everything"""
    policies_path: str = ""
    """folder of <game>/{expert,rookie,novice}.pt, instead of policies/ beside the scripts"""
    num_updates: int = 3_000
    """gradient steps"""
    num_envs: int = 128
    """episodes per gradient step, never used again"""
    learning_rate: float = 1e-2
    """of Adam; falls linearly to zero"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    feedback: float = 0.25
    """share of the gradient that flows through what the agents see; falls linearly to zero. With all of it gradients through 25
    steps of action and reaction explode, and the sooner the surer the policy; with none learning starts slower"""
    hidden_dim: int = 128
    """width of the three hidden layers"""
    touch_depth: float = 0.1
    """a touch this deep costs as much as the game charges for any touch: counting touches has no gradient"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""


class DifferentiableSpread(ParticleEnv):
    """Spread whose steps take weights of the five actions and can be differentiated."""

    def step(self, weights: torch.Tensor) -> torch.Tensor:
        """weights (N, A, 5), one-hot up to rounding -> observations (N, A, D). Contacts are stiff springs, whose derivatives
        would drown everything else, so their force counts as a constant."""
        with torch.no_grad():
            contact_forces = self._contact_forces()
        force = torch.einsum("nak,ck->acn", weights, self.moves) * self.accelerations[..., None]
        self._move(force - contact_forces)
        return self.game.observe(self).permute(2, 0, 1)

    def cost(self, touch_depth: float) -> torch.Tensor:
        """Minus the mean over environments and agents of spread_reward, with touches counted by their depth."""
        L = self.game.num_landmarks
        coverage = self.distances[:, :L].amin(dim=0).sum(dim=0)  # (A, L, N) -> (N,)
        depth = F.relu(self.contact_distances[:, L:] - self.distances[:, L:])  # (A, A - 1, N)
        return 0.5 * coverage.mean() + 0.5 / touch_depth * depth.sum(dim=1).mean()


def loss_of_episodes(env: DifferentiableSpread, network, feedback: float, touch_depth: float, generator) -> torch.Tensor:
    """Play one episode in every environment; the loss is differentiable with respect to the network's weights."""
    observations, loss = env.reset(generator), 0.0
    for step in range(env.game.horizon):
        observations = feedback * observations + (1 - feedback) * observations.detach()
        logits = network(observations[:, None], step)[0][:, 0]  # (N, A, 5)
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()  # Gumbel: argmax samples from the softmax
        soft = torch.softmax(logits + noise, dim=-1)
        hard = F.one_hot(soft.argmax(dim=-1), 5).float()
        observations = env.step(hard + soft - soft.detach())
        loss = loss + env.cost(touch_depth)
    return loss


def train(args: Args, game: Game, folder: Path, device: torch.device) -> None:
    """A run that was interrupted goes on from training.pt in the same folder, and ends with the same weights."""
    generator = torch.Generator(device).manual_seed(args.seed)
    shape = dict(observation_dim=game.observation_dim, num_agents=game.num_agents, num_actions=5, horizon=game.horizon)
    shape |= dict(hidden_dim=args.hidden_dim)
    network = AgentNetwork(**shape).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    parts = dict(network=network, optimizer=optimizer)
    env = DifferentiableSpread(game, args.num_envs, device)
    eval_every, save_every = max(args.num_updates // 200, 1), max(args.num_updates // 20, 1)

    start, history, checkpoints = 0, [], []  # history: [updates, return] of the checkpoint at the same place
    partial_path = folder / "training.pt"
    if partial_path.exists():
        partial = load_checkpoint(partial_path, ("training",))
        if partial["meta"].get("device") != device.type:
            raise UserError(f"{partial_path}: begun on {partial['meta'].get('device')}, cannot go on on {device.type}")
        check_same_args(partial_path, partial["args"], vars(args), "delete it to start anew")
        for name, part in parts.items():
            part.load_state_dict(partial["state_dict"][name])
        generator.set_state(partial["state_dict"]["generator"])
        start, history, checkpoints = (partial["metrics"][name] for name in ("updates", "history", "checkpoints"))
        print(f"{partial_path}: going on after {start} of {args.num_updates} updates", flush=True)

    progress = tqdm(range(start, args.num_updates), desc=f"experts of {game.name}", unit="update", mininterval=1)
    for i in progress:
        remaining = 1 - i / args.num_updates
        optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        loss = loss_of_episodes(env, network, args.feedback * remaining, args.touch_depth, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
        optimizer.step()

        early = i < args.num_updates // 100  # where most changes, rookies and novices come from
        if (i + 1) % (max(eval_every // 10, 1) if early else eval_every) == 0 or i + 1 == args.num_updates:
            test_return = mean_return(game, network, HISTORY_EPISODES, args.seed + 1000 + i, device)
            history.append([i + 1, test_return])
            checkpoints.append(copy.deepcopy(network.state_dict()))
            progress.set_postfix({"return": f"{test_return:.2f}", "loss": f"{loss.item():.2f}"})
        if (i + 1) % save_every == 0 and i + 1 < args.num_updates:
            state = {name: part.state_dict() for name, part in parts.items()} | {"generator": generator.get_state()}
            metrics, meta = dict(updates=i + 1, history=history, checkpoints=checkpoints), dict(device=device.type)
            save_content(partial_path, kind="training", args=vars(args), meta=meta, state_dict=state, stats={}, metrics=metrics)
    save_policies("pathwise", args, game, folder, network, shape, history, checkpoints, device)
    partial_path.unlink(missing_ok=True)


def main(args: Args) -> None:
    device = set_up(args)
    game = spread(args.num_agents, args.num_landmarks)
    folder = Path(args.policies_path or Path(__file__).parent.parent / "policies") / game.name
    path = folder / "expert.pt"
    if path.exists():
        stored = load_checkpoint(path, ("pathwise",))["args"]
        check_same_args(path, stored, vars(args), "choose another --policies-path or delete it")
    train(args, game, folder, device)


if __name__ == "__main__":
    run_command_line(main, Args, presets={})
