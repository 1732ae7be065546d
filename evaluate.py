"""Play policy files of one game (vdn-*.pt, bc-*.pt, policies/*/*.pt) and print one table: the return of each,
all from the same start states. Actions are the most probable ones, with --sample drawn from the softmax of
the outputs. Two backends play the same episodes: torch, the batched environment of this project, and mpe2,
the real package.

Usage: python evaluate.py --policies random policies/spread/expert.pt runs/spread/diversified/bc-seed1.pt

Reported for every policy (on stdout the first three, all of it with --json-path):
    charts/test_return   mean over agents and episodes of the undiscounted return of one episode (25 steps)
    charts/score         the same with the random policy at 0, the best expert of the paper's authors at 100
    standard_error       of the return, over episodes
    agent_returns        mean return of each agent; episode_returns: of each episode, mean over its agents
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

EPISODES_AT_ONCE = 1024  # the same in both backends: how a network rounds depends on the size of its batch


@dataclass
class Args:
    policies: tuple[str, ...]
    """policy files, and the word random for the random policy"""
    env: str = ""
    """the game; needed for random alone, else that of the files"""
    num_episodes: int = 4096
    """episodes that every policy plays"""
    backend: Literal["torch", "mpe2"] = "torch"
    """torch (batched) or mpe2 (the real package, about 100 times slower)"""
    sample: bool = False
    """sample actions from the softmax of the outputs instead of playing the best one"""
    seed: int = 1
    """fixes start states and all draws, the same for all policies and both backends"""
    json_path: str = ""
    """also write the report there"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ...; physics run in float64, as mpe2's do"""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""


# --- shared block: agent_network ---
# Origin: train_bc.py. The network of every policy here: imitation logits, Q-values of VDN.
class AgentNetwork(nn.Module):
    """One network for all agents, told apart by a one-hot id. An "mlp" sees observation and time step, like
    the pi_{h,i} of the time-inhomogeneous game of section 3; a "gru" reads the observations so far."""

    def __init__(self, sizes, network="mlp", hidden_dim=128):
        """sizes: observation size D, agents A (paper: m), number of actions |A_i|, horizon T (paper: H)."""
        super().__init__()
        self.sizes, self.network, width = tuple(sizes), network, hidden_dim
        D, A, num_actions, self.horizon = self.sizes
        if network == "mlp":
            shapes = [(D + A + 1, width), (width, width), (width, width)]
            self.body = nn.Sequential(*[layer for s in shapes for layer in (nn.Linear(*s), nn.ReLU())])
        else:
            self.embedding = nn.Linear(D + A, width)
            self.body = nn.GRU(width, width)
        self.head = nn.Linear(width, num_actions)

    def forward(self, observations, first_step=0, memory=None):
        """observations (B, T, A, D) from first_step on -> outputs (B, T, A, num_actions) and memory: the
        GRU's after the last step, for the next call (None: start of an episode)."""
        B, T, A, _ = observations.shape
        x = [observations, torch.eye(A, device=observations.device).expand(B, T, A, A)]
        if self.network == "mlp":
            steps = torch.arange(first_step, first_step + T, device=observations.device) / self.horizon
            x = self.body(torch.cat([*x, steps[:, None, None].expand(B, T, A, 1)], dim=-1))
        else:
            x = F.relu(self.embedding(torch.cat(x, dim=-1)))
            x = x.transpose(0, 1).flatten(1, 2)  # every agent is a sequence of its own: (T, B * A, width)
            x, memory = self.body(x, memory)
            x = x.unflatten(1, (B, A)).transpose(0, 1)
        return self.head(x), memory


# --- end shared block ---


# --- shared block: vdn_policy ---
# Origin: vdn_rlhf.py. What it learns.
class VDNPolicy(nn.Module):
    """Q_i(o_i, a) = f_i(o_i, a) + beta * (log pi_ref(a | o_i) + log |A_i|). The second term is the KL part of
    Eq. (3), known for every action; only f is learned. A network that learns all of Q never sees that part
    for actions that the dataset lacks. values (f), reference (pi_ref): AgentNetworks, or their arguments."""

    def __init__(self, values, reference, beta: float):
        super().__init__()
        self.values = AgentNetwork(**values) if isinstance(values, dict) else values
        self.reference = AgentNetwork(**reference) if isinstance(reference, dict) else reference
        self.beta, self.sizes = float(beta), self.values.sizes
        if self.reference.sizes != self.sizes or not math.isfinite(self.beta):
            raise ValueError("values and reference differ in size, or beta is no number")

    def forward(self, observations, first_step=0, memory=None):
        """As AgentNetwork: observations (B, T, A, D) -> Q-values (B, T, A, num_actions), memory of both."""
        memory = memory or (None, None)
        f, values_memory = self.values(observations, first_step, memory[0])
        logits, reference_memory = self.reference(observations, first_step, memory[1])
        return f + kl_rewards(logits, self.beta), (values_memory, reference_memory)


def kl_rewards(logits: torch.Tensor, beta: float) -> torch.Tensor:
    """The KL part of Eq. (3), beta * (log pi_ref(a | o_i) + log |A_i|), for all actions, from pi_ref's logits
    (..., num_actions), with 1 / |A_i| for pi_w (5.3). Soft values subtract beta * (log pi_w + log |A_i|)."""
    return beta * (logits.log_softmax(dim=-1) + math.log(logits.shape[-1]))


# --- end shared block ---


def play(game: Game, policy, device, seed: int, num_episodes: int, sample=False, backend="torch", bar=None):
    """Returns (num_episodes, A) of the episodes that `seed` fixes. `policy`: a network, None: random."""
    starts = torch.Generator(device).manual_seed(seed)
    draws = torch.Generator(device).manual_seed(seed + 2**31)  # of actions and prey; start states need none
    returns = []
    for first in range(0, num_episodes, EPISODES_AT_ONCE):
        env = ParticleEnv(game, min(EPISODES_AT_ONCE, num_episodes - first), device, torch.float64)
        observations = env.reset(starts, draws)
        if backend == "mpe2":
            env = Mpe2Env(env)
            observations = env.reset()
        act = make_actor(policy, game.num_actions, draws, sample)
        returns.append(rollout(env, act, observations)[2].sum(dim=1))
        if bar is not None:
            bar.update(env.num_envs)
    return torch.cat(returns)


def compare(game: Game, policies: dict, device, seed: int, num_episodes=4096, sample=False, backend="torch"):
    """Play all policies {name: network, None for random} from the same start states and print the table ->
    the numbers that the docstring of this file lists, by name."""
    report, title = {}, f"{game.name}, {num_episodes:,} episodes in {backend}"
    bar = tqdm(total=len(policies) * num_episodes, desc=title, unit="episode", mininterval=1)
    for name, policy in policies.items():
        returns = play(game, policy, device, seed, num_episodes, sample, backend, bar)
        episode_returns = returns.mean(dim=1)
        report[name] = game.metrics(episode_returns.mean().item())
        report[name]["standard_error"] = episode_returns.std(correction=0).item() / num_episodes**0.5
        report[name]["agent_returns"] = returns.mean(dim=0).tolist()
        report[name]["episode_returns"] = episode_returns.tolist()
    bar.close()
    print(f"\n{title}: mean over agents of the undiscounted return of {game.horizon} steps")
    print("score: the random policy is 0, the best expert of the paper's authors 100 (tag: our expert)\n")
    width = max(map(len, ["policy", *policies]))
    print(f"| {'policy':{width}s} | {'return':>14s} | {'score':>6s} |")
    print(f"|{'-' * (width + 2)}|{'-' * 15}:|{'-' * 7}:|")
    for name, row in report.items():
        score = f"{row['charts/score']:.1f}" if "charts/score" in row else ""
        value = f"{row['charts/test_return']:.2f} ± {row['standard_error']:.2f}"
        print(f"| {name:{width}s} | {value:>14s} | {score:>6s} |")
    return report


def mean_return(game: Game, policy, device, seed: int, num_episodes=4096) -> float:
    """For the trainers: greedy return, mean over agents and episodes."""
    return play(game, policy, device, seed, num_episodes).mean().item()


def find_game(name: str, device, sizes: tuple) -> Game | None:
    """For the trainers: None where the game is not known here, or has other sizes than their data."""
    try:
        game = make_game(name, device)
        return game if game.sizes == tuple(sizes) else None
    except UserError:
        return None


def load_policies(paths: Sequence[str], device, env="") -> tuple[Game, dict[str, nn.Module | None]]:
    """-> the game that all of them play and {path: network}, None for the path "random"."""
    files = [path for path in paths if path != "random"]
    checkpoints = {path: load_checkpoint(Path(path), "vdn", "bc", "expert") for path in files}
    for path, checkpoint in checkpoints.items():
        plays = str(checkpoint["meta"].get("env", ""))
        env = env or plays
        if plays != env:
            raise UserError(f"{path}: plays {plays!r:.40}, not {env!r:.40}; one table is of one game")
    if not env:
        raise UserError("--env is missing: name the game, or a policy file that plays it")
    game, policies = make_game(env, device), dict.fromkeys(paths)
    for path, checkpoint in checkpoints.items():
        is_vdn = "values" in str(checkpoint["meta"].get("network"))
        network_class = VDNPolicy if is_vdn else AgentNetwork
        policies[path] = build_network(network_class, Path(path), checkpoint, device, game.sizes)
    return game, policies


# --- shared block: rollout ---
# Origin: collect_data.py. Policies that act, and whole episodes in all environments at once.
def make_actor(network, num_actions: int, generator, sample=False, epsilon=0.0) -> Callable:
    """-> act(observations (N, A, D), step) -> actions (N, A): greedy in the network's outputs, or sampled
    from their softmax; with probability epsilon, or where the network is None, uniformly random."""
    memory = None

    def act(observations, step):
        nonlocal memory
        (N, A, _), device = observations.shape, observations.device
        random_actions = torch.randint(num_actions, (N, A), generator=generator, device=device)
        if network is None:
            return random_actions
        outputs, memory = network(observations[:, None], step, memory if step > 0 else None)
        actions = outputs[:, 0].argmax(dim=-1)
        if sample:
            probabilities = outputs.flatten(0, 2).softmax(dim=-1)
            actions = torch.multinomial(probabilities, 1, generator=generator).view(N, A)
        explore = torch.rand((N, A), generator=generator, device=device) < epsilon
        return torch.where(explore, random_actions, actions)

    return act


@torch.no_grad()
def rollout(env, act: Callable, observations: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One episode in each environment from env's present state, which shows `observations` (N, A, D)
    -> observations (N, T+1, A, D), actions (N, T, A), rewards (N, T, A)."""
    all_observations, all_actions, all_rewards = [observations], [], []
    for step in range(env.game.horizon):
        actions = act(all_observations[-1].float(), step)
        observations, rewards = env.step(actions)
        all_observations.append(observations)
        all_actions.append(actions)
        all_rewards.append(rewards)
    return torch.stack(all_observations, 1), torch.stack(all_actions, 1), torch.stack(all_rewards, 1)


# --- end shared block ---


# --- shared block: particle_env ---
# Origin: collect_data.py. The multi-agent particle environments (package mpe2), N of them at once. Inside,
# tensors keep the environments last, e.g. positions (bodies, 2, N), because elementwise work on long rows is
# fastest; observations, actions and rewards come and go with the environments first.
@dataclass(frozen=True)
class Game:
    """Constants of one game and two functions. The bodies are the A agents and, in tag, then the prey."""

    name: str
    num_agents: int
    num_landmarks: int
    num_actions: int
    observation_dim: int
    observe: Callable[[ParticleEnv], torch.Tensor]
    """-> (A, D, N), from the environment as it is"""
    reward: Callable[[ParticleEnv], torch.Tensor]
    """-> (A, N), from the environment as it is after a step"""
    low: float
    """mean return of the random policy: score 0"""
    high: float
    """mean return of the authors' best expert (tag: of the expert shipped here): score 100"""
    body_sizes: tuple[float, ...]
    """radius of each body; minus infinity: touches nothing"""
    acceleration: tuple[float, ...]
    max_speed: tuple[float, ...]
    landmark_size: float = -math.inf
    landmark_range: float = 1.0
    """landmarks start in +- this, bodies in +-1"""
    num_words: int = 0
    """an action is also one of so many words to the partner: action % 5 moves, action // 5 speaks"""
    prey: nn.Module | None = None
    """moves the last body by sampling from the softmax of its outputs"""
    horizon: int = 25

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.observation_dim, self.num_agents, self.num_actions, self.horizon

    def metrics(self, test_return: float) -> dict[str, float]:
        """Return and score; no score where low and high were never measured (spread, other counts)."""
        score = 100 * (test_return - self.low) / (self.high - self.low)
        return {"charts/test_return": test_return} | ({} if math.isnan(score) else {"charts/score": score})


SPREAD_SCORES = {  # (agents, landmarks): returns of the random policy and of the authors' best expert
    (3, 3): (-26.46, -10.03),
    (4, 5): (-38.65, -26.58),
    (5, 5): (-35.34, -18.73),
    (6, 5): (-33.08, -25.03),
    (7, 5): (-31.32, -24.16),
}


def spread(num_agents: int, num_landmarks: int) -> Game:
    """simple_spread_v3, where MPE2 has as many landmarks as agents: cover the landmarks, touch nobody."""

    def observe(env):
        """Own velocity and position, landmarks and other agents relative to it, zeros for silent messages."""
        messages = env.positions.new_zeros(num_agents, 2 * (num_agents - 1), env.num_envs)
        return torch.cat([env.velocities, env.positions, env.relative.flatten(1, 2), messages], dim=1)

    def reward(env):
        """0.5 * (-sum over landmarks of the distance to the nearest agent) + 0.5 * (-agents touched)."""
        coverage = env.distances[:, :num_landmarks].amin(dim=0).sum(dim=0)  # (A, L, N) -> (N,)
        touches = env.distances[:, num_landmarks:] < env.contact_distances[:, num_landmarks:]
        return -0.5 * coverage - 0.5 * touches.sum(dim=1)

    low, high = SPREAD_SCORES.get((num_agents, num_landmarks), (math.nan, math.nan))
    return Game(
        name="spread" if (num_agents, num_landmarks) == (3, 3) else f"spread-{num_agents}x{num_landmarks}",
        num_agents=num_agents,
        num_landmarks=num_landmarks,
        num_actions=5,
        observation_dim=4 + 2 * num_landmarks + 4 * (num_agents - 1),
        observe=observe,
        reward=reward,
        low=low,
        high=high,
        body_sizes=(0.15,) * num_agents,
        acceleration=(5.0,) * num_agents,
        max_speed=(math.inf,) * num_agents,
    )


def reference() -> Game:
    """simple_reference_v3: two agents tell each other, one of ten words a step, which landmark to reach."""

    def observe(env):
        """Own velocity, landmarks relative to it, colour of the partner's goal, the partner's last word."""
        colors = 0.25 + 0.5 * F.one_hot(env.goals, 3).transpose(1, 2)  # (A, 3, N)
        landmarks = env.relative[:, :3].flatten(1, 2)
        return torch.cat([env.velocities, landmarks, colors, env.words.flip(0)], dim=1)

    def reward(env):
        """0.5 * (-distance of the partner to its goal, which only the agent sees) + 0.5 * (mean of both)."""
        distances = env.distances[:, :3].flip(0).gather(1, env.goals[:, None]).squeeze(1)  # (A, N)
        return -0.5 * distances - 0.5 * distances.mean(dim=0)

    return Game(
        name="reference",
        num_agents=2,
        num_landmarks=3,
        num_actions=50,
        observation_dim=21,
        observe=observe,
        reward=reward,
        low=-28.34,
        high=-10.36,
        body_sizes=(-math.inf,) * 2,
        acceleration=(5.0,) * 2,
        max_speed=(math.inf,) * 2,
        num_words=10,
    )


def tag(prey: nn.Module | None) -> Game:
    """simple_tag_v3 as a game of its three adversaries. Without a prey `step` takes its actions, too."""

    def observe(env):
        """Own velocity and position, landmarks and other bodies relative to it, the velocity of the prey."""
        own = torch.cat([env.velocities, env.positions, env.relative.flatten(1, 2)], dim=1)[:3]
        return torch.cat([own, env.velocities[3:].expand(3, -1, -1)], dim=1)

    def reward(env):
        """10 for every adversary that touches the prey, for each of them."""
        touches = env.distances[3, 2:] < env.contact_distances[3, 2:]  # (A, N)
        return 10.0 * touches.sum(dim=0).expand(3, -1)

    return Game(
        name="tag",
        num_agents=3,
        num_landmarks=2,
        num_actions=5,
        observation_dim=16,
        observe=observe,
        reward=reward,
        low=3.42,  # against policies/tag/prey.pt
        high=39.02,
        body_sizes=(0.075, 0.075, 0.075, 0.05),
        acceleration=(3.0, 3.0, 3.0, 4.0),
        max_speed=(1.0, 1.0, 1.0, 1.3),
        landmark_size=0.2,
        landmark_range=0.9,
        prey=prey,
    )


def prey_observation(env: ParticleEnv) -> torch.Tensor:
    """The prey's own velocity and position, landmarks and adversaries relative to it -> (N, 14)."""
    return torch.cat([env.velocities[3], env.positions[3], env.relative[3].flatten(0, 1)]).T


class PreyNetwork(nn.Sequential):
    """What the prey sees (N, 14) -> action logits (N, 5); made by benchmark/train_prey.py."""

    def __init__(self, hidden_dim=128):
        H = hidden_dim
        super().__init__(nn.Linear(14, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, 5))


def make_game(name: str, device="cpu") -> Game:
    """Raises UserError for a name that is no game of this project."""
    if (sizes := re.fullmatch(r"spread-([1-9]\d?)x([1-9]\d?)", name)) and name != "spread-3x3":
        return spread(int(sizes[1]), int(sizes[2]))
    if name not in ("spread", "reference", "tag"):
        known = "spread, spread-5x4 (agents, landmarks), tag or reference"
        raise UserError(f"--env {name!r:.40}: unknown, choose {known}")
    if name != "tag":
        return spread(3, 3) if name == "spread" else reference()
    path = Path(__file__).parent / "policies" / "tag" / "prey.pt"
    if not path.exists():
        raise UserError(f"{path}: no such file; tag needs the policy of its prey, from the repository")
    return tag(build_network(PreyNetwork, path, load_checkpoint(path, "prey"), device))


class ParticleEnv:
    """N copies of a game, stepped together. All of them last game.horizon steps, so there is no done flag.

    Equal to mpe2 within rounding (tests/test_particle_env.py): positions move with the old velocity, then it
    is damped, then the force of action and contacts is added. Constants: mpe2/_mpe_utils/core.py; masses are
    1."""

    dt, damping, contact_force, contact_margin = 0.1, 0.25, 100.0, 1e-3

    def __init__(self, game: Game, num_envs: int, device="cpu", dtype=torch.float32):
        bodies, L = len(game.body_sizes), game.num_landmarks
        self.game, self.num_envs, self.device, self.dtype = game, num_envs, torch.device(device), dtype
        others = [[j for j in range(bodies) if j != i] for i in range(bodies)]
        # What body i observes and touches, in MPE2's order: all landmarks, then the other bodies.
        observed = [[*range(bodies, bodies + L), *others[i]] for i in range(bodies)]
        self.observed = torch.tensor(observed, device=device)  # (bodies, L + bodies - 1)
        sizes = torch.tensor([*game.body_sizes, *[game.landmark_size] * L], device=device, dtype=dtype)
        self.contact_distances = (sizes[:bodies, None] + sizes[self.observed])[..., None]
        self.first_contact = L if game.landmark_size < 0 else 0  # landmarks that nothing touches are skipped
        self.acceleration = torch.tensor(game.acceleration, device=device, dtype=dtype)[:, None]
        self.max_speed = torch.tensor(game.max_speed, device=device, dtype=dtype)[:, None]  # (bodies, 1)
        moves = [[0, -1, 1, 0, 0], [0, 0, 0, -1, 1]]  # (x and y, action)
        self.moves = torch.tensor(moves, device=device, dtype=dtype)

    def reset(self, generator: torch.Generator, prey_generator=None) -> torch.Tensor:
        """New random start states -> observations (N, A, D). A prey draws from prey_generator, if given."""
        game, bodies = self.game, len(self.game.body_sizes)
        shape = (self.num_envs, bodies + game.num_landmarks, 2)
        uniform = 2 * torch.rand(shape, generator=generator, device=self.device, dtype=self.dtype) - 1
        positions, landmarks, goals = uniform[:, :bodies], uniform[:, bodies:] * game.landmark_range, None
        if game.num_words:
            shape = (self.num_envs, game.num_agents)
            goals = torch.randint(game.num_landmarks, shape, generator=generator, device=self.device)
        self.prey_generator = prey_generator or generator
        return self.set_state(positions, torch.zeros_like(positions), landmarks, goals)

    def set_state(self, positions, velocities, landmarks, goals=None) -> torch.Tensor:
        """Start from positions and velocities (N, bodies, 2), landmarks (N, L, 2) and, in reference, the
        landmarks (N, A) to which the agents are to send their partners -> observations (N, A, D)."""
        state = (x.to(self.device, self.dtype) for x in (positions, velocities, landmarks))
        self.positions, self.velocities, self.landmarks = (x.permute(1, 2, 0).contiguous() for x in state)
        if self.game.num_words:
            self.goals = goals.to(self.device).T.contiguous()  # (A, N)
            self.words = self.positions.new_zeros(self.game.num_agents, self.game.num_words, self.num_envs)
        return self._observe()

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """actions (N, A) in 0 .. num_actions - 1 -> observations (N, A, D), rewards (N, A)."""
        if self.game.prey is not None:
            probabilities = self.game.prey(prey_observation(self).float()).softmax(dim=-1)
            prey_actions = torch.multinomial(probabilities, 1, generator=self.prey_generator)
            actions = torch.cat([actions, prey_actions], dim=1)
        if self.game.num_words:
            words = F.one_hot(actions.T // 5, self.game.num_words)
            self.words, actions = words.transpose(1, 2).to(self.dtype), actions % 5  # (A, words, N)
        force = (self.moves[:, actions.T] * self.acceleration).transpose(0, 1)  # (bodies, 2, N)
        if max(self.game.body_sizes) > 0:
            force = force - self._contact_forces()
        self.positions = self.positions + self.velocities * self.dt
        self.velocities = self.velocities * (1 - self.damping) + force * self.dt
        if min(self.game.max_speed) < math.inf:
            speed = self.velocities.square().sum(dim=1).sqrt()  # (bodies, N)
            self.velocities = self.velocities * (self.max_speed / speed).clamp(max=1)[:, None]
        return self._observe(), self.game.reward(self).T

    def _contact_forces(self) -> torch.Tensor:
        """Towards what is touched, (bodies, 2, N): a softplus of the overlap, written so that neither exp
        overflows nor its slow subnormal range is reached (beyond 80 it adds less than 1e-34)."""
        first = self.first_contact
        distances = self.distances[:, first:]  # (bodies, landmarks and bodies it can touch, N)
        overlap = (self.contact_distances[:, first:] - distances) / self.contact_margin
        softplus = overlap.clamp(min=0) + torch.log1p(torch.exp(-overlap.abs().clamp(max=80)))
        push = self.contact_force * self.contact_margin * softplus / distances
        return (self.relative[:, first:] * push[:, :, None]).sum(dim=1)

    def _observe(self) -> torch.Tensor:
        """Measure where every body sees landmarks and other bodies, and how far -> observations (N, A, D)."""
        entities = torch.cat([self.positions, self.landmarks])  # (bodies + L, 2, N)
        self.relative = entities[self.observed] - self.positions[:, None]  # (bodies, L + bodies - 1, 2, N)
        x, y = self.relative.unbind(dim=2)
        self.distances = (x * x + y * y).sqrt()  # (bodies, L + bodies - 1, N)
        return self.game.observe(self).permute(2, 0, 1).contiguous()


# --- end shared block ---


def make_mpe2_env(game: Game):
    """The package's environment of a game, as a parallel environment of PettingZoo."""
    try:
        from mpe2 import simple_reference_v3, simple_tag_v3  # imported here, because they start pygame
        from mpe2._mpe_utils.core import Landmark
        from mpe2._mpe_utils.simple_env import SimpleEnv
        from mpe2.simple_spread import simple_spread
        from pettingzoo.utils.conversions import aec_to_parallel
    except ImportError as error:
        raise UserError(f"--backend mpe2 needs the package mpe2 ({error}); pip install mpe2") from None

    class SpreadScenario(simple_spread.Scenario):
        """With any number of landmarks; the package has as many as agents."""

        def make_world(self, N):
            world = super().make_world(N)
            world.landmarks = [Landmark() for _ in range(game.num_landmarks)]
            for i, landmark in enumerate(world.landmarks):
                landmark.name, landmark.collide, landmark.movable = f"landmark {i}", False, False
            return world

    if game.name in ("tag", "reference"):
        module = {"tag": simple_tag_v3, "reference": simple_reference_v3}[game.name]
        return module.parallel_env(max_cycles=game.horizon)
    scenario = SpreadScenario()
    world = scenario.make_world(game.num_agents)
    return aec_to_parallel(SimpleEnv(scenario, world, max_cycles=game.horizon, local_ratio=0.5))


class Mpe2Env:
    """The package's environments behind the interface of ParticleEnv, so that `rollout` plays both; they
    start from the present state of the ParticleEnv `start`."""

    def __init__(self, start: ParticleEnv):
        self.start, self.game, self.num_envs = start, start.game, start.num_envs
        self.envs = [make_mpe2_env(self.game) for _ in range(self.num_envs)]

    def reset(self) -> torch.Tensor:
        start = self.start
        positions, velocities, landmarks = (
            x.permute(2, 0, 1).double().cpu().numpy()
            for x in (start.positions, start.velocities, start.landmarks)
        )
        for n, env in enumerate(self.envs):
            env.reset(seed=0)
            world = env.unwrapped.world
            for i, agent in enumerate(world.agents):
                agent.state.p_pos, agent.state.p_vel = positions[n, i].copy(), velocities[n, i].copy()
                if self.game.num_words:
                    agent.goal_b = world.landmarks[start.goals[i, n]]
                    agent.goal_a.color = agent.goal_b.color  # the partner is drawn in the colour of its goal
            for i, landmark in enumerate(world.landmarks):
                landmark.state.p_pos = landmarks[n, i].copy()
        return self._observe()

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.game.prey is not None:
            seen = self._stack([env.unwrapped.observe("agent_0") for env in self.envs])
            probabilities = self.game.prey(seen.float()).softmax(dim=-1)
            prey_actions = torch.multinomial(probabilities, 1, generator=self.start.prey_generator)
            actions = torch.cat([actions, prey_actions], dim=1)
        rewards = []
        for env, joint_action in zip(self.envs, actions.tolist(), strict=True):
            reward = env.step(dict(zip(env.possible_agents, joint_action, strict=True)))[1]
            rewards.append([reward[name] for name in env.possible_agents[: self.game.num_agents]])
        return self._observe(), self._stack(rewards)

    def _observe(self) -> torch.Tensor:
        names = self.envs[0].possible_agents[: self.game.num_agents]
        return self._stack([[env.unwrapped.observe(name) for name in names] for env in self.envs])

    def _stack(self, values: list) -> torch.Tensor:
        return torch.from_numpy(np.array(values)).to(self.start.device)


# --- shared block: build_network ---
# Origin: collect_data.py.
def build_network(network_class: type, path: Path, checkpoint: dict, device, sizes=()) -> nn.Module:
    """The network of `sizes` that meta["network"] and state_dict describe, without gradients."""
    try:
        with torch.device("meta"):  # takes no memory, however large the sizes in the file
            network = network_class(**checkpoint["meta"]["network"])
        if not all(x.is_contiguous() and x.isfinite().all() for x in checkpoint["state_dict"].values()):
            raise ValueError("weights that are NaN, infinite or larger than the file")
        weights = {name: tensor.float().clone() for name, tensor in checkpoint["state_dict"].items()}
        network.load_state_dict(weights, assign=True)
        if sizes and network.sizes != sizes:
            raise ValueError(f"sizes {network.sizes}, not {sizes}")
        return network.to(device).requires_grad_(False)
    except Exception as error:
        raise UserError(f"{path}: no network can be built ({error!r:.80}); make it again") from None


# --- end shared block ---


# --- shared block: command_line ---
# Origin: collect_data.py. Mistakes that a user can mend, presets, device and seed.
class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit status 2."""


def run_command_line(main, args_class: type, presets: dict[str, dict[str, dict]]) -> None:
    """Call main with sys.argv. presets[--preset]["all"] and [--env] replace defaults, given flags win."""
    try:
        args = tyro.cli(args_class)
        if presets:
            values = presets[args.preset].get("all", {}) | presets[args.preset].get(args.env, {})
            args = tyro.cli(args_class, default=replace(args_class(), **values))
        main(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def set_up(args) -> torch.device:
    """Check the numbers, apply --num-threads, --seed, --deterministic -> the device that --device names."""
    for field in fields(args):
        value, low = getattr(args, field.name), 1 if field.type == "int" and field.name != "seed" else 0
        high = 1 if field.name in ("gamma", "td_lambda", "epsilon", "keep", "mistakes", "myopia") else 2**31
        if field.type in ("int", "float") and not low <= value <= high:
            raise UserError(f"--{field.name.replace('_', '-')} {value}: must be from {low} to {high}")
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)  # CPUs take six times as long for tiny probabilities
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({error!r:.80})") from None


# --- end shared block ---


# --- shared block: files ---
# Origin: collect_data.py. Files that are written whole or not at all, and read without executing anything.
def save_file(path: Path, content) -> None:
    """Write beside `path`, then rename, so that nobody ever sees half a file."""
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if os.path.exists(partial):
            partial.unlink()


def save_json(path: Path, args, metrics: dict, version: int, started: float) -> None:
    """The results beside an output NAME.pt or NAME.npz, as NAME.json."""
    get = torch.cuda.get_device_name if torch.cuda.is_initialized() else torch.backends.cpu.get_cpu_capability
    content = {"version": version, "args": vars(args), "metrics": metrics, "machine": get()}
    content["command"] = " ".join(["python", *sys.argv])
    content |= {"packages": {"torch": str(torch.__version__)}, "seconds": round(time.time() - started, 1)}
    save_file(path.with_suffix(".json"), json.dumps(content, indent=1).encode())


def save_checkpoint(path: Path, kind: str, args, meta: dict, weights: dict, stats: dict, metrics: dict):
    weights = {name: tensor.cpu() for name, tensor in weights.items()}
    checksum = zlib.crc32(b"".join(tensor.numpy().tobytes() for tensor in weights.values()))
    content = {"format": 1, "kind": kind, "args": vars(args), "meta": {**meta, "checksum": f"{checksum:08x}"}}
    buffer = io.BytesIO()  # torch.save hides why a write failed, a plain write does not
    torch.save({**content, "state_dict": weights, "stats": stats, "metrics": metrics}, buffer)
    save_file(path, buffer.getbuffer())


def load_checkpoint(path: Path, *kinds: str) -> dict:
    """Read a .pt file of this project; raises UserError when it is anything else."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.save packs nothing
            if sum(x.file_size for x in file.infolist()) > os.path.getsize(path) or file.testzip():
                raise ValueError("packed or damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != 1 or checkpoint["kind"] not in kinds:
            raise ValueError(f"kind {checkpoint['kind']!r:.40}")
        checkpoint["meta"]["sources"] = dict(checkpoint["meta"].get("sources", {}))
        return {key: dict(checkpoint[key]) for key in ("args", "meta", "state_dict", "stats", "metrics")}
    except Exception as error:  # truncated, foreign or malicious: zipfile and torch raise many kinds
        raise UserError(f"{path}: no {' or '.join(kinds)} checkpoint ({error!r:.80})") from None


def check_same(path: Path, stored: dict, wanted: dict, sources: dict[str, str]) -> None:
    """Raise UserError where a checkpoint has other flags than `wanted`, or was made from other `sources`."""
    neutral = {"device", "num_threads", "deterministic", "track", "checkpoint_every", "resume"}
    there, stored_sources = stored["args"], stored["meta"]["sources"]
    differing = [f"another {name}" for name in sources if stored_sources.get(name) != sources[name]]
    for name, value in wanted.items():  # what a path names is compared by its checksum
        if name not in neutral and not name.endswith("_path") and (there.get(name) == value) is not True:
            differing.append(f"--{name.replace('_', '-')} {there.get(name)!r:.40} there, {value!r} here")
    if differing:
        raise UserError(f"{path}: made with other settings ({'; '.join(differing)}); delete or rename it")


# --- end shared block ---


def main(args: Args) -> dict[str, dict]:
    device = set_up(args)
    game, policies = load_policies(args.policies, device, args.env)
    report = compare(game, policies, device, args.seed, args.num_episodes, args.sample, args.backend)
    if args.json_path:
        path, content = Path(args.json_path), json.dumps(report, indent=1).encode()
        special = path.exists() and not path.is_file()  # /dev/null, a pipe: written through
        path.write_bytes(content) if special else save_file(path, content)
    return report


if __name__ == "__main__":
    run_command_line(main, Args, presets={})
