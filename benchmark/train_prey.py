"""Train the prey of tag (B.2: "a MAPPO pretrained policy") by MAPPO (Yu et al., 2022): an actor that sees
what the prey sees, a centralised critic that sees what all bodies see and the time step, PPO with a clipped
objective and generalised advantage estimation. At the same time three hunters learn to catch it by online
VDN, as the experts of train_experts.py do. The longer this goes on, the less even random adversaries earn.
The authors' prey left them 3.95; against one that leaves them next to nothing most episodes have no touch,
and preferences between them say nothing. So the training ends when random adversaries earn less than 3, and
what is kept is the actor as it was when they last earned more. Writes policies/tag/prey.pt.

Usage: python benchmark/train_prey.py

Progress bar, returns per episode: adversary (exploration included), prey (-10 for every touch, and a penalty
for leaving the arena), random (uniformly random adversaries against the prey).

Deviation from the paper, which does not describe its hunters: MAPPO hunters stayed a third weaker than the
expert, which then earned more against a prey that had only met those than against one that moves at random.
"""

from __future__ import annotations

import copy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from tqdm import tqdm

import evaluate
from benchmark.train_experts import ROOT, OnlineVDN
from evaluate import AgentNetwork, ParticleEnv, PreyNetwork, make_actor, mean_return, prey_observation, tag


@dataclass
class Args:
    prey_path: str = ""
    """where to write, instead of policies/tag/prey.pt beside the scripts"""
    seed: int = 1
    """fixes everything"""
    random_return: float = 3.0
    """the training ends when random adversaries earn less"""
    num_iterations: int = 3_000
    """rollouts over which learning rates fall; in the default run a seventh of them is made"""
    measure_every: int = 25
    """rollouts between two measurements of what random adversaries earn, in 4,096 episodes"""
    num_envs: int = 256
    """episodes per rollout"""
    hidden_dim: int = 128
    """width of the hidden layers"""
    gamma: float = 0.95
    """discount, of both sides"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""

    prey_learning_rate: float = 1e-3
    """of Adam, for PPO; falls linearly to zero"""
    num_epochs: int = 3
    """PPO: passes over each rollout, in four minibatches"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip: float = 0.2
    """PPO keeps the ratio of new to old probabilities within 1 +- this"""
    entropy_coefficient: float = 0.1
    """weight of the entropy bonus: a predictable prey is caught by whoever knows it"""

    learning_rate: float = 1e-3
    """of Adam, for the hunters; falls over the second half"""
    td_lambda: float = 0.3
    """lambda of TD(lambda), for the hunters"""
    batch_size: int = 64
    """episodes per gradient step of the hunters, four after each rollout"""
    buffer_size: int = 10_240
    """episodes in their replay buffer: few, because the prey of old ones was another"""
    exploration_iterations: int = 500
    """the share of random actions falls linearly from 1 to 5 % over this many rollouts"""


def prey_reward(env: ParticleEnv) -> torch.Tensor:
    """-10 for every adversary that touches the prey, and MPE2's penalty on leaving the arena -> (N,)."""
    touches = (env.distances[3, 2:] < env.contact_distances[3, 2:]).sum(dim=0)
    outside = env.positions[3].abs()  # (2, N)
    far = torch.exp(2 * outside - 2).clamp(max=10)
    penalty = torch.where(outside < 1.0, (outside - 0.9).clamp(min=0) * 10, far)
    return -10.0 * touches - penalty.sum(dim=0)


class Prey:
    """Actor, centralised critic and PPO."""

    def __init__(self, state_dim: int, args: Args, device):
        self.actor, self.args, H = PreyNetwork(args.hidden_dim).to(device), args, args.hidden_dim
        layers = [nn.Linear(state_dim, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, 1)]
        self.critic = nn.Sequential(*layers).to(device)
        parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=args.prey_learning_rate, fused=True)

    def log_probs(self, observations, actions):
        """Log-probabilities (N, T) of actions (N, T), and the mean entropy of the policy."""
        log_policy = self.actor(observations).log_softmax(dim=-1)
        entropy = -(log_policy.exp() * log_policy).sum(dim=-1).mean()
        return log_policy.gather(-1, actions[..., None]).squeeze(-1), entropy

    def update(self, observations, actions, states, rewards, done: float, generator) -> None:
        """PPO on one rollout: observations (N, T, 14), actions (N, T), states (N, T, S), rewards (N, T)."""
        args = self.args
        with torch.no_grad():
            old_log_probs = self.log_probs(observations, actions)[0]
            values = self.critic(states).squeeze(-1)  # (N, T)
            advantages = gae(rewards, values, args.gamma, args.gae_lambda)
            returns = advantages + values
            advantages = (advantages - advantages.mean()) / advantages.std()
        self.optimizer.param_groups[0]["lr"] = args.prey_learning_rate * (1 - done)
        for _ in range(args.num_epochs):
            order = torch.randperm(len(actions), generator=generator, device=actions.device)
            for batch in order.chunk(4):
                log_probs, entropy = self.log_probs(observations[batch], actions[batch])
                ratio = (log_probs - old_log_probs[batch]).exp()  # (n, T)
                clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                actor_loss = -torch.minimum(ratio * advantages[batch], clipped * advantages[batch]).mean()
                critic_loss = (self.critic(states[batch]).squeeze(-1) - returns[batch]).square().mean()
                loss = actor_loss - args.entropy_coefficient * entropy + critic_loss  # no weights in common
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.actor.parameters(), 0.5)
                nn.utils.clip_grad_norm_(self.critic.parameters(), 10.0)
                self.optimizer.step()


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
def play(env: ParticleEnv, hunt, actor: PreyNetwork, generator) -> tuple[tuple, tuple]:
    """One episode per environment -> what the hunters learn from, observations (N, T, 3, 16), actions
    (N, T, 3) and rewards of the team (N, T), and what the prey learns from, as Prey.update takes it."""
    observations, T, steps = env.reset(generator), env.game.horizon, []
    for t in range(T):
        seen = prey_observation(env)  # (N, 14)
        flight = torch.multinomial(actor(seen).softmax(dim=-1), 1, generator=generator)  # (N, 1)
        actions = torch.cat([hunt(observations, t), flight], dim=1)
        time = torch.full((env.num_envs, 1), t / T, device=env.device)
        state = torch.cat([observations.flatten(1), seen, time], dim=1)
        following, rewards = env.step(actions)
        hunting = observations, actions[:, :3], rewards.sum(dim=1)
        steps.append((*hunting, seen, actions[:, 3], state, prey_reward(env)))
        observations = following
    data = tuple(torch.stack(values, dim=1) for values in zip(*steps, strict=True))
    return data[:3], data[3:]


def main(args: Args) -> None:
    device = evaluate.set_up(args)
    path = Path(args.prey_path or ROOT / "policies" / "tag" / "prey.pt")
    if path.exists():
        evaluate.check_same(path, evaluate.load_checkpoint(path, "prey"), vars(args), {})
        print(f"{path}: already there, with these settings")
        return
    generator = torch.Generator(device).manual_seed(args.seed)
    env = ParticleEnv(tag(prey=None), args.num_envs, device)
    prey = Prey(3 * 16 + 14 + 1, args, device)
    network = AgentNetwork(env.game.sizes, hidden_dim=args.hidden_dim)
    hunters, chosen = OnlineVDN(network.to(device), args), None
    progress = tqdm(range(args.num_iterations), desc="prey and hunters", unit="rollout", mininterval=1)
    for i in progress:
        done, epsilon = i / args.num_iterations, 1 - min(i / args.exploration_iterations, 1) * 0.95
        hunt = make_actor(hunters.online, 5, generator, epsilon=epsilon)
        hunting, fleeing = play(env, hunt, prey.actor, generator)
        hunters.store(*hunting)
        for _ in range(4):
            hunters.update(done, generator)
        prey_rewards = fleeing[-1]
        prey.update(*fleeing[:-1], prey_rewards / 10, done, generator)  # counted in tens: a touch is -1
        if (i + 1) % args.measure_every == 0:
            random_return = mean_return(tag(prey.actor), None, device, args.seed + i)
            if random_return < args.random_return:
                break
            metrics = {
                "random_return": random_return,
                "adversary_return": hunting[-1].sum(dim=1).mean().item() / 3,
                "prey_return": prey_rewards.sum(dim=1).mean().item(),
                "updates": i + 1,
            }
            chosen = copy.deepcopy(prey.actor.state_dict()), metrics
            progress.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})
    progress.close()
    if chosen is None:
        raise evaluate.UserError(
            f"random adversaries never earned {args.random_return}; lower --random-return"
        )
    weights, metrics = chosen
    meta = {"env": "tag", "network": {"hidden_dim": args.hidden_dim}, "seed": args.seed}
    meta |= {"command": shlex.join(["python", *sys.argv]), "torch": str(torch.__version__)}
    evaluate.save_checkpoint(path, "prey", args, meta, weights, {}, metrics)
    print(f"{path}: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


if __name__ == "__main__":
    evaluate.run_command_line(main, Args, presets={})
