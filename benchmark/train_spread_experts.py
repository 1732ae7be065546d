"""Train expert, rookie and novice of spread with 4 to 7 agents (Table 6), where the online VDN of
train_experts.py stays far from a good expert: with 5 agents and 5 landmarks at -24 after 14,000 updates. Here
the gradient of the return with respect to the weights is taken through the simulator itself (pathwise
derivatives over whole episodes: SVG(infinity), Heess et al., 2015), which leaves no value function to learn;
actions are drawn by the straight-through Gumbel-softmax (Jang et al., 2017): a discrete action forward, its
probabilities backward. Writes policies/<game>/{expert,rookie,novice}.pt.

Usage: python benchmark/train_spread_experts.py --env spread-5x5

Progress bar: mean over agents of the undiscounted greedy return of fresh episodes; the loss, minus that of
the episodes played, with touches counted by their depth.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import evaluate
from benchmark.train_experts import HISTORY_EPISODES, ROOT, dense_weights, is_finished, save_experts
from evaluate import AgentNetwork, Game, ParticleEnv, UserError, make_game, mean_return


@dataclass
class Args:
    env: str = "spread-5x5"
    """the game: spread, or spread with so many agents and landmarks"""
    seed: int = 1
    """fixes everything"""
    policies_path: str = ""
    """folder to write to, instead of policies/<game>/ beside the scripts"""
    num_updates: int = 3_000
    """gradient steps"""
    num_envs: int = 128
    """episodes per gradient step, never used again"""
    learning_rate: float = 1e-2
    """of Adam; falls linearly to zero"""
    feedback: float = 0.25
    """share of the gradient that flows through what the agents see; falls linearly to zero. With all of it
    gradients through 25 steps of action and reaction explode, and the sooner the surer the policy; with none
    learning starts slower"""
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
        """weights (N, A, 5), one-hot up to rounding -> observations (N, A, D). Contacts are stiff springs,
        whose derivatives would drown everything else, so their force counts as a constant."""
        with torch.no_grad():
            contact_forces = self._contact_forces()
        force = torch.einsum("nak,ck->acn", weights, self.moves) * self.acceleration[..., None]
        self.positions = self.positions + self.velocities * self.dt
        self.velocities = self.velocities * (1 - self.damping) + (force - contact_forces) * self.dt
        return self._observe()

    def cost(self, touch_depth: float) -> torch.Tensor:
        """Minus the mean over environments and agents of the reward, with touches counted by their depth."""
        L = self.game.num_landmarks
        coverage = self.distances[:, :L].amin(dim=0).sum(dim=0)  # (A, L, N) -> (N,)
        depth = F.relu(self.contact_distances[:, L:] - self.distances[:, L:])  # (A, A - 1, N)
        return 0.5 * coverage.mean() + 0.5 / touch_depth * depth.sum(dim=1).mean()


def loss_of_episodes(env: DifferentiableSpread, network, feedback: float, touch_depth: float, generator):
    """One episode in every environment -> a loss that is differentiable with respect to the weights."""
    observations, loss = env.reset(generator), 0.0
    for step in range(env.game.horizon):
        observations = feedback * observations + (1 - feedback) * observations.detach()
        logits = network(observations[:, None], step)[0][:, 0]  # (N, A, 5)
        gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
        soft = torch.softmax(logits + gumbel, dim=-1)
        hard = F.one_hot(soft.argmax(dim=-1), 5).float()  # a draw from the softmax of the logits
        observations = env.step(hard + soft - soft.detach())
        loss = loss + env.cost(touch_depth)
    return loss


def train_experts(args: Args, game: Game, device) -> list[tuple]:
    """-> (updates, greedy return, weights) of checkpoints along the training, the last after all updates."""
    generator = torch.Generator(device).manual_seed(args.seed)
    network = AgentNetwork(game.sizes, hidden_dim=args.hidden_dim).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    env, checkpoints = DifferentiableSpread(game, args.num_envs, device), []
    progress = tqdm(range(args.num_updates), f"experts of {game.name}", unit="update", mininterval=1)
    for i in progress:
        remaining = 1 - i / args.num_updates
        optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        loss = loss_of_episodes(env, network, args.feedback * remaining, args.touch_depth, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        # As in train_experts.py: more checkpoints at first, where most changes.
        every = max(args.num_updates // (2000 if remaining > 0.99 else 200), 1)
        if (i + 1) % every == 0 or i + 1 == args.num_updates:
            if not loss.isfinite():
                raise UserError(f"the loss is {loss.item()}; try a smaller --learning-rate")
            value = mean_return(game, network, device, args.seed + 1000 + i, HISTORY_EPISODES)
            checkpoints.append((i + 1, value, dense_weights(network)))
            progress.set_postfix({"return": f"{value:.2f}", "loss": f"{loss.item():.2f}"})
    return checkpoints


def main(args: Args) -> None:
    device, game = evaluate.set_up(args), make_game(args.env)
    if not game.name.startswith("spread"):
        raise UserError(f"--env {args.env}: must be spread; train_experts.py trains those of other games")
    folder = Path(args.policies_path or ROOT / "policies" / args.env)
    if not is_finished(args, game, folder):
        save_experts(args, game, folder, train_experts(args, game, device), device)


if __name__ == "__main__":
    evaluate.run_command_line(main, Args, presets={})
