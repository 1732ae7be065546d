"""Train the prey that the tag experiments are played against (B.2: "a MAPPO pretrained policy"): MAPPO (Yu et al., 2022) for
the prey and, at the same time, for the three adversaries that hunt it. Each side has an actor, which sees what its agents
see, and a centralised critic, which sees what all bodies see and the time step; both are fitted by PPO with a clipped
surrogate objective and generalised advantage estimation. Writes policies/tag/prey.pt, the actor of the prey alone.

Usage: python benchmark/train_prey.py        (from the repository root)

Logged metrics (stdout and `history` in the file), means over episodes of sampled actions:
    adversary_return    undiscounted return of an adversary
    prey_return         undiscounted return of the prey: -10 for every touch, and a penalty for leaving the arena
    random_return       what uniformly random adversaries get against the prey
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from tqdm import tqdm

from collect_data import (
    AgentNetwork,
    ParticleEnv,
    check_replaceable,
    make_actor,
    mean_return,
    prey_observation,
    run_command_line,
    save_checkpoint,
    set_up,
    tag,
)


@dataclass
class Args:
    prey_path: str = "policies/tag/prey.pt"
    """where to write"""
    seed: int = 1
    """fixes everything"""
    num_iterations: int = 3000
    """rollouts, each followed by num_epochs passes over it"""
    num_envs: int = 256
    """episodes per rollout"""
    num_epochs: int = 4
    """passes over each rollout"""
    num_minibatches: int = 4
    """updates per pass"""
    learning_rate: float = 1e-3
    """of Adam, for actor and critic of the adversaries; falls linearly to zero"""
    prey_learning_rate: float = 5e-4
    """the same of the prey: slower, so that it learns against adversaries that are nearly as good as they can be"""
    gamma: float = 0.95
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip: float = 0.2
    """PPO keeps the ratio of new to old probabilities within 1 +- this"""
    entropy_coefficient: float = 0.003
    """weight of the entropy bonus of the adversaries"""
    prey_entropy_coefficient: float = 0.1
    """the same of the prey: a predictable prey is caught by whoever knows it"""
    max_grad_norm: float = 0.5
    """gradients of the actors are clipped to this norm, those of the critics to 20 times as much"""
    hidden_dim: int = 128
    """width of the actors' two hidden layers; critics are twice as wide"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""


def prey_reward(env: ParticleEnv) -> torch.Tensor:
    """-10 for every adversary that touches the prey, and the penalty that MPE2 puts on leaving the arena -> (N,)."""
    touches = (env.distances[3, 2:] < env.contact_distances[3, 2:]).sum(dim=0)
    outside = env.positions[3].abs()  # (2, N)
    penalty = torch.where(outside < 1.0, (outside - 0.9).clamp(min=0) * 10, torch.exp(2 * outside - 2).clamp(max=10))
    return -10.0 * touches - penalty.sum(dim=0)


class Side:
    """Actor, critic and optimizer of the adversaries or of the prey."""

    def __init__(self, observation_dim, num_agents, state_dim, learning_rate, entropy_coefficient, args: Args, device):
        self.shape = dict(observation_dim=observation_dim, num_agents=num_agents, num_actions=5, horizon=25)
        self.shape |= dict(hidden_dim=args.hidden_dim, num_layers=2, time_input=False)
        self.actor = AgentNetwork(**self.shape).to(device)
        width = 2 * args.hidden_dim
        layers = [nn.Linear(state_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)]
        self.critic = nn.Sequential(*layers).to(device)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)
        self.learning_rate, self.entropy_coefficient = learning_rate, entropy_coefficient

    def update(self, observations, actions, states, rewards, args: Args, generator) -> None:
        """PPO on one rollout. observations (N, T, A, D), actions (N, T, A), states (N, T, S), rewards (N, T)."""
        with torch.no_grad():
            old_log_probs = self.log_probs(observations, actions)[0]
            values = self.critic(states).squeeze(-1)  # (N, T)
            advantages = gae(rewards, values, args.gamma, args.gae_lambda)
            returns = advantages + values
            advantages = (advantages - advantages.mean()) / advantages.std()
        for _ in range(args.num_epochs):
            order = torch.randperm(len(actions), generator=generator, device=actions.device)
            for batch in order.chunk(args.num_minibatches):
                log_probs, entropy = self.log_probs(observations[batch], actions[batch])
                ratio = (log_probs - old_log_probs[batch]).exp()  # (n, T, A)
                advantage = advantages[batch][..., None]  # all agents of a side share their reward
                clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                actor_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
                critic_loss = (self.critic(states[batch]).squeeze(-1) - returns[batch]).square().mean()
                loss = actor_loss - self.entropy_coefficient * entropy + critic_loss  # they share no weights
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.actor.parameters(), args.max_grad_norm)
                nn.utils.clip_grad_norm_(self.critic.parameters(), 20 * args.max_grad_norm)
                self.optimizer.step()

    def log_probs(self, observations, actions):
        """Log-probabilities of actions (N, T, A), and the mean entropy of the policy."""
        log_policy = self.actor(observations)[0].log_softmax(dim=-1)
        entropy = -(log_policy.exp() * log_policy).sum(dim=-1).mean()
        return log_policy.gather(-1, actions[..., None]).squeeze(-1), entropy


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, gae_lambda: float) -> torch.Tensor:
    """Generalised advantage estimates (N, T); the game ends after step T, so the value after it is zero."""
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = advantages[:, t] = delta + gamma * gae_lambda * next_advantage
        next_value = values[:, t]
    return advantages


@torch.no_grad()
def play(env: ParticleEnv, adversaries: Side, prey: Side, generator) -> dict[str, torch.Tensor]:
    """One episode per environment, all actions sampled."""
    observations, T = env.reset(generator), env.game.horizon
    hunt, flee = (make_actor(side.actor, 5, generator, sample=True) for side in (adversaries, prey))
    steps = []
    for t in range(T):
        prey_observations = prey_observation(env).permute(2, 0, 1).contiguous()  # (N, 1, 14)
        actions = torch.cat([hunt(observations, t), flee(prey_observations, t)], dim=1)
        time = torch.full((env.num_envs, 1), t / T, device=env.device)
        state = torch.cat([observations.flatten(1), prey_observations.flatten(1), time], dim=1)
        before = (observations, prey_observations, actions, state)
        observations, rewards = env.step(actions)
        steps.append((*before, rewards[:, 0], prey_reward(env)))
    names = ("observations", "prey_observations", "actions", "states", "rewards", "prey_rewards")
    return {name: torch.stack(values, dim=1) for name, values in zip(names, zip(*steps, strict=True), strict=True)}


def main(args: Args) -> None:
    device = set_up(args)
    check_replaceable(args.prey_path, "prey", args, {})
    generator = torch.Generator(device).manual_seed(args.seed)
    game = tag(prey=None)
    state_dim = 3 * 16 + 14 + 1
    adversaries = Side(16, 3, state_dim, args.learning_rate, args.entropy_coefficient, args, device)
    prey = Side(14, 1, state_dim, args.prey_learning_rate, args.prey_entropy_coefficient, args, device)
    env, history = ParticleEnv(game, args.num_envs, device), []
    progress = tqdm(range(args.num_iterations), desc="MAPPO on tag", unit="rollout", mininterval=1)
    for i in progress:
        for side in (adversaries, prey):
            for group in side.optimizer.param_groups:
                group["lr"] = side.learning_rate * (1 - i / args.num_iterations)
        data = play(env, adversaries, prey, generator)
        # Rewards are counted in tens: one touch is 1.
        hunting = data["observations"], data["actions"][:, :, :3], data["states"], data["rewards"] / 10
        fleeing = data["prey_observations"], data["actions"][:, :, 3:], data["states"], data["prey_rewards"] / 10
        adversaries.update(*hunting, args, generator)
        prey.update(*fleeing, args, generator)
        if (i + 1) % max(args.num_iterations // 30, 1) == 0 or i + 1 == args.num_iterations:
            random_return = mean_return(tag(prey.actor), None, 4096, args.seed + i, device)
            means = [data[name].sum(dim=1).mean().item() for name in ("rewards", "prey_rewards")]
            history.append([i + 1, *means, random_return])
            progress.set_postfix(adversary=f"{means[0]:.1f}", prey=f"{means[1]:.1f}", random=f"{random_return:.2f}")
    names = ("adversary_return", "prey_return", "random_return")
    metrics = dict(zip(names, history[-1][1:], strict=True)) | {"history": history}
    meta = dict(env="tag", network=prey.shape, command=" ".join(["python", *sys.argv]), torch=str(torch.__version__))
    save_checkpoint(args.prey_path, "prey", args, meta, prey.actor, {}, metrics)
    print(f"{args.prey_path}: " + ", ".join(f"{name} {metrics[name]:.2f}" for name in names))


if __name__ == "__main__":
    run_command_line(main, Args, presets={})
