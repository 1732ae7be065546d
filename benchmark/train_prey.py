"""Train the prey that the tag experiments are played against (B.2: "a MAPPO pretrained policy"). The prey learns by MAPPO (Yu
et al., 2022): its actor sees what the prey sees, its centralised critic what all bodies see and the time step; both are fitted
by PPO with a clipped surrogate objective and generalised advantage estimation. At the same time three adversaries learn to
catch it by online VDN, as the experts of collect_data.py do. Writes policies/tag/prey.pt, the actor alone.

Deviation from the paper: its hunters are not described. MAPPO hunters stayed a third weaker than the expert, which then earned
more against a prey that had only met those than against one that moves at random.

Usage: python benchmark/train_prey.py        (from the repository root)

Logged metrics (progress bar, and `history` in the file after the number of rollouts), means over episodes:
    adversary_return    undiscounted return of an adversary, exploration included
    prey_return         undiscounted return of the prey: -10 for every touch, and a penalty for leaving the arena
    random_return       what uniformly random adversaries get against the prey
"""

import copy
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
    UserError,
    check_same_args,
    load_checkpoint,
    make_actor,
    mean_return,
    prey_observation,
    run_command_line,
    save_checkpoint,
    set_up,
    tag,
    vdn_loss,
)


@dataclass
class Args:
    prey_path: str = ""
    """where to write, instead of policies/tag/prey.pt beside the scripts"""
    seed: int = 1
    """fixes everything"""
    num_iterations: int = 3000
    """rollouts, each followed by updates of both sides"""
    num_envs: int = 256
    """episodes per rollout"""
    gamma: float = 0.95
    """discount, of both sides"""
    max_grad_norm: float = 10.0
    """gradients are clipped to this norm, those of the prey's actor to a twentieth of it"""
    hidden_dim: int = 128
    """width of the hidden layers"""

    # PPO, for the prey.
    prey_learning_rate: float = 1e-3
    """of Adam; falls linearly to zero"""
    num_epochs: int = 3
    """passes over each rollout"""
    num_minibatches: int = 4
    """updates per pass"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip: float = 0.2
    """PPO keeps the ratio of new to old probabilities within 1 +- this"""
    entropy_coefficient: float = 0.1
    """weight of the entropy bonus: a predictable prey is caught by whoever knows it"""

    # Online VDN, for the adversaries.
    learning_rate: float = 1e-3
    """of Adam"""
    td_lambda: float = 0.3
    """lambda of TD(lambda)"""
    updates_per_rollout: int = 4
    """gradient steps after each rollout"""
    batch_size: int = 64
    """episodes per gradient step"""
    buffer_size: int = 10_240
    """episodes in the replay buffer, a multiple of num_envs: few, because the prey of old ones was another"""
    exploration_iterations: int = 500
    """epsilon-greedy exploration falls linearly from 1 to final_epsilon over this many iterations"""
    final_epsilon: float = 0.05
    """share of uniformly random actions from then on"""
    target_update_rate: float = 0.01
    """the target network moves this share of the way to the online network after every update"""

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


class Prey:
    """Actor, centralised critic and PPO."""

    def __init__(self, state_dim: int, args: Args, device):
        self.shape = dict(observation_dim=14, num_agents=1, num_actions=5, horizon=25)
        self.shape |= dict(hidden_dim=args.hidden_dim, num_layers=2, time_input=False)
        self.actor = AgentNetwork(**self.shape).to(device)
        width = args.hidden_dim
        layers = [nn.Linear(state_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)]
        self.critic = nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.Adam([*self.actor.parameters(), *self.critic.parameters()], lr=args.prey_learning_rate)

    def update(self, observations, actions, states, rewards, args: Args, generator) -> None:
        """PPO on one rollout. observations (N, T, 1, 14), actions (N, T, 1), states (N, T, S), rewards (N, T)."""
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
                ratio = (log_probs - old_log_probs[batch]).exp()  # (n, T)
                clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                actor_loss = -torch.minimum(ratio * advantages[batch], clipped * advantages[batch]).mean()
                critic_loss = (self.critic(states[batch]).squeeze(-1) - returns[batch]).square().mean()
                loss = actor_loss - args.entropy_coefficient * entropy + critic_loss  # they share no weights
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.actor.parameters(), args.max_grad_norm / 20)
                nn.utils.clip_grad_norm_(self.critic.parameters(), args.max_grad_norm)
                self.optimizer.step()

    def log_probs(self, observations, actions):
        """Log-probabilities (N, T) of actions (N, T, 1), and the mean entropy of the policy."""
        log_policy = self.actor(observations)[0].log_softmax(dim=-1)
        entropy = -(log_policy.exp() * log_policy).sum(dim=-1).mean()
        return log_policy.gather(-1, actions[..., None]).squeeze(-1).squeeze(-1), entropy


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
def play(env: ParticleEnv, hunt, flee, generator) -> dict[str, torch.Tensor]:
    """One episode per environment."""
    observations, T = env.reset(generator), env.game.horizon
    all_observations, steps = [observations], []
    for t in range(T):
        prey_observations = prey_observation(env).permute(2, 0, 1).contiguous()  # (N, 1, 14)
        actions = torch.cat([hunt(observations, t), flee(prey_observations, t)], dim=1)
        time = torch.full((env.num_envs, 1), t / T, device=env.device)
        state = torch.cat([observations.flatten(1), prey_observations.flatten(1), time], dim=1)
        observations, rewards = env.step(actions)
        all_observations.append(observations)
        steps.append((prey_observations, actions, state, rewards[:, 0], prey_reward(env)))
    names = ("prey_observations", "actions", "states", "rewards", "prey_rewards")
    data = {name: torch.stack(values, dim=1) for name, values in zip(names, zip(*steps, strict=True), strict=True)}
    return data | {"observations": torch.stack(all_observations, dim=1)}


def main(args: Args) -> None:
    device = set_up(args)
    if args.buffer_size % args.num_envs:
        raise UserError(f"--buffer-size {args.buffer_size}: must be a multiple of --num-envs {args.num_envs}")
    path = Path(args.prey_path or Path(__file__).parent.parent / "policies" / "tag" / "prey.pt")
    if path.exists():
        stored = load_checkpoint(path, ("prey",))["args"]
        check_same_args(path, stored, vars(args), "choose another --prey-path or delete it")
    generator = torch.Generator(device).manual_seed(args.seed)
    game = tag(prey=None)
    env, history, T, N = ParticleEnv(game, args.num_envs, device), [], game.horizon, args.num_envs
    prey = Prey(3 * 16 + 14 + 1, args, device)
    shape = dict(observation_dim=16, num_agents=3, num_actions=5, horizon=T, hidden_dim=args.hidden_dim)
    online = AgentNetwork(**shape).to(device)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.Adam(online.parameters(), lr=args.learning_rate)
    buffer = dict(observations=torch.zeros(args.buffer_size, T + 1, 3, 16, device=device))
    buffer |= dict(actions=torch.zeros(args.buffer_size, T, 3, dtype=torch.uint8, device=device))
    buffer |= dict(rewards=torch.zeros(args.buffer_size, T, device=device))

    progress = tqdm(range(args.num_iterations), desc="prey and hunters on tag", unit="rollout", mininterval=1)
    for i in progress:
        done = i / args.num_iterations
        prey.optimizer.param_groups[0]["lr"] = args.prey_learning_rate * (1 - done)
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, max(0.02, 2 * (1 - done)))
        epsilon = 1 - min(i / args.exploration_iterations, 1) * (1 - args.final_epsilon)
        hunt = make_actor(online, 5, generator, epsilon=epsilon)
        data = play(env, hunt, make_actor(prey.actor, 5, generator, sample=True), generator)
        start = i * N % args.buffer_size
        buffer["observations"][start : start + N] = data["observations"]
        buffer["actions"][start : start + N] = data["actions"][:, :, :3].to(torch.uint8)
        buffer["rewards"][start : start + N] = 3 * data["rewards"]  # of the team
        for _ in range(args.updates_per_rollout):
            filled = min((i + 1) * N, args.buffer_size)
            batch = torch.randint(filled, (args.batch_size,), generator=generator, device=device)
            episodes = buffer["observations"][batch], buffer["actions"][batch].long(), buffer["rewards"][batch]
            loss = vdn_loss(online, target, *episodes, args.gamma, args.td_lambda)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(online.parameters(), args.max_grad_norm)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), args.target_update_rate)
        # The prey's rewards are counted in tens: one touch is -1.
        fleeing = data["prey_observations"], data["actions"][:, :, 3:], data["states"], data["prey_rewards"] / 10
        prey.update(*fleeing, args, generator)

        if (i + 1) % max(args.num_iterations // 30, 1) == 0 or i + 1 == args.num_iterations:
            random_return = mean_return(tag(prey.actor), None, 4096, args.seed + i, device)
            means = [data[name].sum(dim=1).mean().item() for name in ("rewards", "prey_rewards")]
            history.append([i + 1, *means, random_return])
            progress.set_postfix(adversary=f"{means[0]:.1f}", prey=f"{means[1]:.1f}", random=f"{random_return:.2f}")
    names = ("adversary_return", "prey_return", "random_return")
    metrics = dict(zip(names, history[-1][1:], strict=True)) | {"history": history}
    meta = dict(
        env="tag", network=prey.shape, seed=args.seed, command=" ".join(["python", *sys.argv]), torch=str(torch.__version__)
    )
    save_checkpoint(path, "prey", args, meta, prey.actor, {}, metrics)
    print(f"{path}: " + ", ".join(f"{name} {metrics[name]:.2f}" for name in names))


if __name__ == "__main__":
    run_command_line(main, Args, presets={})
