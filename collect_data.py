"""Collect the offline preference dataset of section 6.2: play a mixture of expert, unilateral, rookie and trivial joint
policies (Table 1), draw pairs of trajectories and one Bradley-Terry preference label per pair and agent, and write
`runs/<game>/<dataset>/dataset.npz`. Experts and rookies come from `policies/<game>/`; what is missing there is trained
first by online VDN (Sunehag et al., 2017), the rookie being an early checkpoint of the expert's run.

Usage: python collect_data.py --env spread --dataset diversified

Logged metrics of the policy training (stdout and, with --track, wandb):
    charts/test_return  mean over agents of the undiscounted greedy return, fresh episodes
    charts/score        the same on the scale random policy = 0, the paper's authors' best expert = 100
    losses/td_loss      mean squared TD error of the last minibatch

Deviations from the paper:
1. 5 % of all expert and rookie actions are uniformly random (`--epsilon`). The paper does not mention them, its code does.
2. The deviator of unilateral trajectories rotates over the agents, because unilateral coverage (Definition 1) is about
   a deviation of every agent; the published code always lets agent 0 deviate.
3. Labels are drawn once and stored, so that nothing downstream can see the true reward. The published code draws them
   afresh in every minibatch.
4. Pairs stay within blocks of 256 trajectories, so that one minibatch of 256 trajectories serves 2,560 pairs and a
   held-out set of whole blocks shares no trajectory with the training set.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

MIXTURES = {  # Table 1: parts of expert, unilateral, rookie, trivial
    "diversified": (1, 1, 1, 1),
    "mix-unilateral": (2, 1, 0, 1),
    "mix-expert": (3, 0, 0, 1),
    "pure-expert": (4, 0, 0, 0),
}
EXPERT, UNILATERAL, ROOKIE, TRIVIAL = range(4)  # the values of `behavior` in the dataset
BLOCK_SIZE = 256
ENVIRONMENTS_AT_ONCE = 3840  # per rollout while collecting; bounds the memory (another value: other random numbers)


@dataclass
class Args:
    env: str = "spread"
    """the game: spread"""
    dataset: str = "diversified"
    """the mixture of Table 1: diversified, mix-unilateral, mix-expert or pure-expert"""
    num_trajectories: int = 38_400
    """N, a multiple of the block size 256 (paper: 38,400)"""
    pairs_per_trajectory: int = 10
    """M / N (paper: 10)"""
    steepness: float = 5.0
    """of the Bradley-Terry labels: P(first preferred) = sigmoid(steepness * difference of standardised returns) (paper: 5)"""
    epsilon: float = 0.05
    """share of uniformly random actions of experts and rookies (deviation 1)"""
    seed: int = 1
    """fixes everything"""
    data_path: str = ""
    """where to write, instead of runs/<game>/<dataset>/dataset.npz"""
    policies_path: str = ""
    """folder of <game>/expert.pt and <game>/rookie.pt, instead of policies/ beside this script"""
    train_policies: bool = False
    """train expert and rookie even if they exist (about 25 minutes of one core)"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""
    track: bool = False
    """log the policy training to wandb"""

    # Online VDN, used only when policies are trained.
    network: str = "mlp"
    """Q-network: mlp or gru"""
    hidden_dim: int = 128
    """width of every hidden layer"""
    num_layers: int = 3
    """hidden layers of the mlp (the gru always has one layer before and one after the recurrence)"""
    learning_rate: float = 1e-3
    """of Adam; falls linearly to 2 % over the second half"""
    gamma: float = 0.95
    """discount"""
    td_lambda: float = 0.3
    """lambda of TD(lambda); 0: one-step targets"""
    num_updates: int = 60_000
    """gradient steps"""
    updates_per_rollout: int = 4
    """gradient steps after each rollout of num_envs episodes"""
    num_envs: int = 64
    """episodes per rollout"""
    batch_size: int = 64
    """episodes per gradient step"""
    buffer_size: int = 20_000
    """episodes in the replay buffer"""
    exploration_updates: int = 4_000
    """epsilon-greedy exploration falls linearly from 1 to 0.05 over this many updates"""
    target_update_rate: float = 0.01
    """the target network moves this share of the way to the online network after every update"""
    rookie_score: float = 40.0
    """the checkpoint with the score nearest to this becomes the rookie (section 6.2: early stop)"""
    max_grad_norm: float = 10.0
    """gradients are clipped to this norm"""


# --- shared block: command_line ---
# Origin: collect_data.py. Mistakes a user can mend, presets, device and seeds, tracking.
class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit status 2."""


def run_command_line(main: Callable, args_class: type, presets: dict[str, dict]) -> None:
    """Parse sys.argv into args_class and call main. `--preset NAME` replaces defaults; a flag given by hand wins over it."""
    try:
        defaults = None
        if presets:
            parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            parser.add_argument("--preset", default="default")
            preset = parser.parse_known_args()[0].preset
            if preset not in ("default", *presets):
                raise UserError(f"--preset {preset}: unknown, choose from {', '.join(['default', *presets])}")
            defaults = args_class(preset=preset, **presets.get(preset, {}))
        main(tyro.cli(args_class) if defaults is None else tyro.cli(args_class, default=defaults))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def set_up(args) -> torch.device:
    """Check the flags, apply --num-threads, --seed and --deterministic; return the device that --device names."""
    choices = {"network": ("mlp", "gru"), "input": ("joint", "own"), "backend": ("torch", "mpe2")}
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        low = 0 if name == "seed" else 1
        if name in choices and value not in choices[name]:
            raise UserError(f"{flag}: unknown, choose {' or '.join(choices[name])}")
        if type(value) is int and not low <= value < 2**31:
            raise UserError(f"{flag}: must be at least {low} and below 2^31")
        if type(value) is float and not 0 <= value < float("inf"):
            raise UserError(f"{flag}: must be a finite number and not negative")
        if name in ("learning_rate", "max_grad_norm") and value == 0:
            raise UserError(f"{flag}: must be above 0")
        if name in ("gamma", "td_lambda", "epsilon", "target_update_rate") and value > 1:
            raise UserError(f"{flag}: must be at most 1")
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: cannot be used ({str(error).splitlines()[0]})") from None
    return device


def start_tracking(args, name: str) -> Callable[[dict, int], None]:
    """-> log(metrics, step). Without --track it does nothing and wandb is not imported."""
    if not args.track:
        return lambda metrics, step: None
    try:
        import wandb

        run = wandb.init(project="marlhf", name=name, config=vars(args), reinit="finish_previous")
    except Exception as error:
        raise UserError(f"--track: wandb does not start ({type(error).__name__}: {str(error).splitlines()[0]})") from None
    return lambda metrics, step: run.log(metrics, step=step)


# --- end shared block ---


# --- shared block: checkpoint ---
# Origin: collect_data.py. Files that are written whole or not at all, and read without executing anything.
FORMAT = 1
# Flags that may differ between the command that made a file and the one that reuses it or writes it anew. What stands in
# the files that paths name is compared by its hash.
NEUTRAL_ARGS = {"device", "num_threads", "track", "deterministic", "data_path", "reward_path", "bc_path", "vdn_path"}


def save_file(path: Path | str, write: Callable) -> None:
    """Call write(file) on a file beside `path`, then rename it, so that nobody ever sees half a file."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):  # where the folder itself cannot be written
            partial.unlink(missing_ok=True)


def save_checkpoint(path, kind: str, args, meta: dict, network: nn.Module, stats: dict, metrics: dict) -> None:
    state_dict = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    if not all(torch.isfinite(tensor).all() for tensor in state_dict.values()):
        raise UserError(f"{path}: not written, the weights are NaN or infinite; try a smaller --learning-rate")
    content = dict(format=FORMAT, kind=kind, args=vars(args), meta=meta, state_dict=state_dict, stats=stats, metrics=metrics)
    buffer = io.BytesIO()  # torch.save hides the reason of a failed write, a plain write does not
    torch.save(content, buffer)
    save_file(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path | str, kinds: tuple[str, ...]) -> dict:
    """Read a `.pt` file of this project; raises UserError, naming file and key, when it is anything else."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, foreign or malicious: torch raises many kinds
        raise UserError(f"{path}: truncated or not a checkpoint ({type(error).__name__})") from None
    fields = {"format": int, "kind": str, "args": dict, "meta": dict, "state_dict": dict, "stats": dict, "metrics": dict}
    for key, expected in fields.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), expected):
            raise UserError(f"{path}: '{key}' is missing or no {expected.__name__}; is this a checkpoint of this project?")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path}: 'format' is {checkpoint['format']} but this code reads {FORMAT}; train it again")
    if checkpoint["kind"] not in kinds:
        raise UserError(f"{path}: 'kind' is {checkpoint['kind']!r}, expected {' or '.join(map(repr, kinds))}")
    return checkpoint


def build_network(network_class: type, path: Path | str, checkpoint: dict, device) -> nn.Module:
    """The network that `meta["network"]` and `state_dict` describe, in evaluation mode."""
    try:
        network = network_class(**checkpoint["meta"]["network"])
        network.load_state_dict(checkpoint["state_dict"])
    except Exception as error:
        raise UserError(f"{path}: 'state_dict' or 'meta' is damaged ({str(error).splitlines()[0]})") from None
    if not all(torch.isfinite(tensor).all() for tensor in network.state_dict().values()):
        raise UserError(f"{path}: 'state_dict' has values that are NaN or infinite; train it again")
    return network.to(device).eval().requires_grad_(False)


def check_same_args(path: Path | str, stored: dict, wanted: dict, advice: str) -> None:
    """Raise UserError, naming the flags, where a file was made with other settings than this command asks for."""
    differing = [
        f"--{name.replace('_', '-')} is {stored.get(name)!r} there and {wanted[name]!r} here"
        for name in wanted
        if name not in NEUTRAL_ARGS and stored.get(name) != wanted[name]
    ]
    if differing:
        raise UserError(f"{path}: made with other settings ({'; '.join(differing)}); {advice}")


def check_replaceable(path: Path | str, kind: str, args, sources: dict[str, str]) -> None:
    """A file may only be written over by the command that made it, from the same sources {name: hash}."""
    if Path(path).exists():
        checkpoint = load_checkpoint(path, (kind,))
        check_same_args(path, checkpoint["args"], vars(args), "choose a --run-name or delete it")
        for name, digest in sources.items():
            if checkpoint["meta"].get("sources", {}).get(name) != digest:
                raise UserError(f"{path}: made from another {name}; choose a --run-name or delete it")


def hash_weights(network: nn.Module, stats: dict) -> str:
    """Tells models apart whatever their timings or file names; `stats` are the checkpoint's."""
    digest = hashlib.sha256(json.dumps(stats, sort_keys=True).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- end shared block ---


# --- shared block: particle_env ---
# Origin: collect_data.py. The multi-agent particle environments (package mpe2), N of them at once. Inside, tensors keep
# the environments last, e.g. positions (A, 2, N), because elementwise work on long rows is fastest; observations,
# actions and rewards come and go with the environments first. A game is a table of constants and a reward function.
@dataclass(frozen=True)
class Game:
    """Constants of one game; tuples have one entry per agent. Returns low and high fix the scale of the score."""

    name: str
    num_agents: int
    num_landmarks: int
    num_actions: int
    agent_sizes: tuple[float, ...]
    accelerations: tuple[float, ...]
    max_speeds: tuple[float, ...]
    """of the agents; infinite: no limit"""
    landmark_size: float
    """landmarks push agents away within this radius; minus infinity: they do not touch"""
    landmark_range: float
    """landmarks start in +- this, agents in +-1"""
    observation_dim: int
    observe: Callable[[ParticleEnv], torch.Tensor]
    """(A, D, N) from the environment as it is"""
    reward: Callable[[ParticleEnv], torch.Tensor]
    """(A, N) from the environment as it is after a step"""
    low: float
    """mean return of the random policy: score 0"""
    high: float
    """mean return of the paper's authors' best expert: score 100"""
    horizon: int = 25

    def score(self, mean_return: float) -> float:
        return 100 * (mean_return - self.low) / (self.high - self.low)


def spread_observation(env: ParticleEnv) -> torch.Tensor:
    """Own velocity and position, landmarks and other agents relative to it, zeros for the messages of silent agents."""
    messages = env.positions.new_zeros(len(env.positions), 2 * (len(env.positions) - 1), env.num_envs)
    return torch.cat([env.velocities, env.positions, env.relative.flatten(1, 2), messages], dim=1)


def spread_reward(env: ParticleEnv) -> torch.Tensor:
    """0.5 * (-sum over landmarks of the distance to the nearest agent) + 0.5 * (-number of other agents touched)."""
    L = env.game.num_landmarks
    coverage = env.distances[:, :L].amin(dim=0).sum(dim=0)  # (A, L, N) -> (N,)
    touched = (env.distances[:, L:] < env.contact_distances[:, L:]).sum(dim=1)  # (A, A - 1, N) -> (A, N)
    return -0.5 * coverage - 0.5 * touched


def spread(num_agents: int = 3, num_landmarks: int = 3, low: float = -26.46, high: float = -10.03) -> Game:
    A, L, infinity = num_agents, num_landmarks, float("inf")
    sizes = dict(name="spread", num_agents=A, num_landmarks=L, num_actions=5, observation_dim=4 + 2 * L + 4 * (A - 1))
    bodies = dict(agent_sizes=(0.15,) * A, accelerations=(5.0,) * A, max_speeds=(infinity,) * A)
    landmarks = dict(landmark_size=-infinity, landmark_range=1.0)
    return Game(**sizes, **bodies, **landmarks, observe=spread_observation, reward=spread_reward, low=low, high=high)


GAMES = {"spread": spread()}


def find_game(path: Path | str, env: str, shape: tuple[int, int, int, int]) -> Game | None:
    """The game a file says it is of, None if it is not one of GAMES. Raises UserError where the file's numbers of agents,
    observations, actions and steps are not the game's."""
    game = GAMES.get(env)
    if game is not None:
        expected = (game.num_agents, game.observation_dim, game.num_actions, game.horizon)
        if shape != expected:
            raise UserError(f"{path}: (agents, observation size, actions, steps) are {shape} but {env} has {expected}")
    return game


class ParticleEnv:
    """N copies of a game, stepped together. All of them last `game.horizon` steps, so there is no done flag.

    Equal to mpe2 within rounding (tests/test_particle_env.py): a position moves with the old velocity, then the velocity
    is damped, then the force of action and contacts is added.
    """

    dt, damping, contact_force, contact_margin = 0.1, 0.25, 100.0, 1e-3  # mpe2/_mpe_utils/core.py; masses are 1

    def __init__(self, game: Game, num_envs: int, device="cpu", dtype=torch.float32):
        A, L = game.num_agents, game.num_landmarks
        self.game, self.num_envs, self.device, self.dtype = game, num_envs, torch.device(device), dtype
        options = dict(device=device, dtype=dtype)
        others = [[j for j in range(A) if j != i] for i in range(A)]
        # What agent i observes and touches, in MPE2's order: all landmarks (entities A, A + 1, ...), then the other agents.
        self.observed = torch.tensor([[*range(A, A + L), *others[i]] for i in range(A)], device=device)
        sizes = torch.tensor([*game.agent_sizes, *[game.landmark_size] * L], **options)
        self.contact_distances = (sizes[:A, None] + sizes[self.observed])[..., None]  # (A, L + A - 1, 1)
        self.first_contact = L if game.landmark_size < 0 else 0  # skips the landmarks where nothing touches them
        self.accelerations = torch.tensor(game.accelerations, **options)[:, None]  # (A, 1)
        self.max_speeds = torch.tensor(game.max_speeds, **options)[:, None]  # (A, 1)
        self.moves = torch.tensor([[0, -1, 1, 0, 0], [0, 0, 0, -1, 1]], **options)  # (x and y, action)

    def reset(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """New random start states -> observations (N, A, D)."""
        A, L = self.game.num_agents, self.game.num_landmarks
        shape = (self.num_envs, A + L, 2)
        uniform = 2 * torch.rand(shape, generator=generator, device=self.device, dtype=self.dtype) - 1
        return self.set_state(uniform[:, :A], torch.zeros_like(uniform[:, :A]), uniform[:, A:] * self.game.landmark_range)

    def set_state(self, positions, velocities, landmarks) -> torch.Tensor:
        """Start from positions and velocities (N, A, 2) and landmarks (N, L, 2) -> observations (N, A, D)."""
        self.positions, self.velocities, self.landmarks = (
            x.to(self.device, self.dtype).permute(1, 2, 0).contiguous() for x in (positions, velocities, landmarks)
        )
        self._measure()
        return self.game.observe(self).permute(2, 0, 1).contiguous()

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """actions (N, A) in 0 .. num_actions - 1 -> observations (N, A, D), rewards (N, A)."""
        force = (self.moves[:, actions.T] * self.accelerations).transpose(0, 1)  # (A, 2, N)
        # Contacts: a softplus of the overlap, written so that neither exp overflows nor its slow subnormal range is
        # reached (beyond 80 it adds less than 1e-34).
        first = self.first_contact
        distances = self.distances[:, first:]  # (A, landmarks and agents it can touch, N)
        overlap = (self.contact_distances[:, first:] - distances) / self.contact_margin
        softplus = overlap.clamp(min=0) + torch.log1p(torch.exp(-overlap.abs().clamp(max=80)))
        push = self.contact_force * self.contact_margin * softplus / distances
        force = force - (self.relative[:, first:] * push[:, :, None]).sum(dim=1)
        self.positions = self.positions + self.velocities * self.dt
        self.velocities = self.velocities * (1 - self.damping) + force * self.dt
        if min(self.game.max_speeds) < float("inf"):
            x, y = self.velocities.unbind(dim=1)
            speeds = (x * x + y * y).sqrt()  # (A, N)
            self.velocities = self.velocities * (self.max_speeds / speeds).clamp(max=1)[:, None]
        self._measure()
        return self.game.observe(self).permute(2, 0, 1).contiguous(), self.game.reward(self).T

    def _measure(self) -> None:
        """Where every agent sees landmarks and other agents, and how far they are."""
        entities = torch.cat([self.positions, self.landmarks])  # (A + L, 2, N)
        self.relative = entities[self.observed] - self.positions[:, None]  # (A, L + A - 1, 2, N)
        x, y = self.relative.unbind(dim=2)
        self.distances = (x * x + y * y).sqrt()  # (A, L + A - 1, N)


# --- end shared block ---


# --- shared block: agent_network ---
# Origin: vdn_rlhf.py. The network of every policy in this project: Q-values of VDN, action logits of imitation learning.
class AgentNetwork(nn.Module):
    """One network for all agents, told apart by a one-hot id. With an MLP its policy is Markov in observation and step, like
    pi_h(a_i | o_i) of the time-inhomogeneous game of section 3; with a GRU it reads the observations so far."""

    def __init__(
        self, observation_dim, num_agents, num_actions, horizon, network="mlp", hidden_dim=128, num_layers=3, time_input=True
    ):
        super().__init__()
        input_dim = observation_dim + num_agents + time_input
        if network == "mlp":
            dims = [input_dim] + [hidden_dim] * num_layers
            layers = [layer for i in range(num_layers) for layer in (nn.Linear(dims[i], dims[i + 1]), nn.ReLU())]
            self.body = nn.Sequential(*layers)
        elif network == "gru":
            self.embedding = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU())
            self.body = nn.GRU(hidden_dim, hidden_dim, batch_first=True)
        else:
            raise UserError(f"--network {network}: unknown, choose mlp or gru")
        self.head = nn.Linear(hidden_dim, num_actions)
        self.network, self.observation_dim, self.num_agents = network, observation_dim, num_agents
        self.num_actions, self.horizon, self.time_input = num_actions, horizon, time_input

    def forward(self, observations, first_step=0, memory=None):
        """observations (B, T, A, D) of the steps first_step, first_step + 1, ... -> outputs (B, T, A, num_actions), memory.

        `memory` is the GRU's state after the steps before first_step, None at the start of an episode."""
        B, T, A, _ = observations.shape
        ids = torch.eye(A, device=observations.device).expand(B, T, A, A)
        x = torch.cat([observations, ids], dim=-1)
        if self.time_input:
            steps = torch.arange(first_step, first_step + T, device=observations.device) / self.horizon
            x = torch.cat([x, steps[None, :, None, None].expand(B, T, A, 1)], dim=-1)
        if self.network == "mlp":
            return self.head(self.body(x)), None
        x = self.embedding(x).transpose(1, 2).flatten(0, 1)  # (B * A, T, H): every agent of every episode is a sequence
        x, memory = self.body(x, memory)
        return self.head(x.unflatten(0, (B, A)).transpose(1, 2)), memory


# --- end shared block ---


# --- shared block: rollout ---
# Origin: collect_data.py. Policies that act, and whole episodes in all environments at once.
TEST_EPISODES = 4096  # behind every return that is reported at the end


def make_actor(network: nn.Module | None, num_actions: int, generator, sample=False, epsilon=0.0) -> Callable:
    """-> act(observations (N, A, D), step) -> actions (N, A): greedy in the network's outputs, or sampled from their
    softmax; with probability epsilon, or without a network, uniformly random."""
    memory = None

    def act(observations, step):
        nonlocal memory
        (N, A, _), device = observations.shape, observations.device
        if network is None:
            return torch.randint(num_actions, (N, A), generator=generator, device=device)
        outputs, memory = network(observations[:, None], step, memory if step > 0 else None)
        if sample:
            flat = torch.softmax(outputs.flatten(0, 2), dim=-1)
            actions = torch.multinomial(flat, 1, generator=generator).view(N, A)
        else:
            actions = outputs[:, 0].argmax(dim=-1)
        if epsilon == 0:
            return actions
        random_actions = torch.randint(num_actions, (N, A), generator=generator, device=device)
        explore = torch.rand((N, A), generator=generator, device=device) < epsilon
        return torch.where(explore, random_actions, actions)

    return act


@torch.no_grad()
def rollout(env, act: Callable, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One episode in each environment, from env's present state -> observations (N, T + 1, A, D), actions (N, T, A),
    rewards (N, T, A)."""
    T = env.game.horizon
    all_observations, all_actions, all_rewards = [observations], [], []
    for step in range(T):
        actions = act(all_observations[-1].float(), step)
        observations, rewards = env.step(actions)
        all_observations.append(observations)
        all_actions.append(actions)
        all_rewards.append(rewards)
    return torch.stack(all_observations, 1), torch.stack(all_actions, 1), torch.stack(all_rewards, 1)


def mean_return(game, network, num_episodes: int, seed: int, device, sample=False) -> float:
    """Mean over fresh episodes and agents of the undiscounted return; equal seeds give equal start states."""
    generator = torch.Generator(device).manual_seed(seed)
    env = ParticleEnv(game, num_episodes, device)
    observations = env.reset(generator)
    rewards = rollout(env, make_actor(network, game.num_actions, generator, sample), observations)[2]
    return rewards.sum(dim=1).mean().item()


# --- end shared block ---


# --- shared block: vdn ---
# Origin: vdn_rlhf.py. Value decomposition: the team's Q is the sum of the agents' (Sunehag et al., 2017).
def td_lambda_targets(rewards: torch.Tensor, next_values: torch.Tensor, gamma: float, td_lambda: float) -> torch.Tensor:
    """Targets G_t = r_t + gamma * ((1 - lambda) * V_{t+1} + lambda * G_{t+1}) with V_T = G_T = 0: the game ends after step T,
    so nothing is bootstrapped past it. (B, T) and (B, T) -> (B, T); next_values[:, t] is V_{t+1}, its last column is ignored.

    Unrolled, G_t = sum over k >= t of (gamma * lambda)^(k - t) * (r_k + gamma * (1 - lambda) * V_{k+1}): one matrix product."""
    T = rewards.shape[1]
    steps = torch.arange(T, device=rewards.device)
    lag = steps[:, None] - steps[None, :]  # (k, t)
    decay = torch.where(lag >= 0, (gamma * td_lambda) ** lag.clamp(min=0).to(rewards.dtype), 0)
    bootstrap = gamma * (1 - td_lambda) * next_values * (steps < T - 1)
    return (rewards + bootstrap) @ decay


def vdn_loss(online, target, observations, actions, rewards, gamma: float, td_lambda: float) -> torch.Tensor:
    """Mean squared TD error of Q_tot = sum_i Q_i over whole episodes. observations (B, T + 1, A, D), actions (B, T, A),
    team rewards (B, T). Double Q-learning: the online network chooses the next action, the target network values it."""
    q_values, _ = online(observations[:, :-1])  # (B, T, A, num_actions); the step T + 1 is never needed
    q_chosen = q_values.gather(-1, actions[..., None]).squeeze(-1).sum(dim=-1)  # (B, T)
    with torch.no_grad():
        target_q_values, _ = target(observations[:, :-1])
        greedy = q_values.argmax(dim=-1, keepdim=True)
        values = target_q_values.gather(-1, greedy).squeeze(-1).sum(dim=-1)  # (B, T): V_0 .. V_{T-1}
        next_values = F.pad(values[:, 1:], (0, 1))  # V_1 .. V_{T-1}, V_T = 0
        targets = td_lambda_targets(rewards, next_values, gamma, td_lambda)
    return F.mse_loss(q_chosen, targets)


# --- end shared block ---


def train_policies(args: Args, game: Game, folder: Path, device: torch.device) -> None:
    """Online VDN with replay; writes expert.pt (the last network) and rookie.pt (the checkpoint nearest to rookie_score)."""
    generator = torch.Generator(device).manual_seed(args.seed)
    shape = dict(observation_dim=game.observation_dim, num_agents=game.num_agents, num_actions=game.num_actions)
    shape |= dict(horizon=game.horizon, network=args.network, hidden_dim=args.hidden_dim, num_layers=args.num_layers)
    online, target = AgentNetwork(**shape).to(device), AgentNetwork(**shape).to(device).requires_grad_(False)
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), lr=args.learning_rate)
    num_rollouts = -(-args.num_updates // args.updates_per_rollout)
    eval_every = max(num_rollouts // 200, 1)
    log = start_tracking(args, f"policies-{args.env}-seed{args.seed}")

    env = ParticleEnv(game, args.num_envs, device)
    T, A, D = game.horizon, game.num_agents, game.observation_dim
    capacity = max(args.buffer_size, args.num_envs)
    buffer_observations = torch.zeros(capacity, T + 1, A, D, device=device)
    buffer_actions = torch.zeros(capacity, T, A, dtype=torch.int64, device=device)
    buffer_rewards = torch.zeros(capacity, T, device=device)  # of the team: the sum over its agents

    rookie_distance, rookie_updates, rookie, history = float("inf"), 0, None, []
    progress = tqdm(range(num_rollouts), desc=f"online VDN on {game.name}", unit="rollout", mininterval=1)
    for i in progress:
        done = i / num_rollouts
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, max(0.02, 2 * (1 - done)))
        epsilon = max(0.05, 1 - 0.95 * i * args.updates_per_rollout / args.exploration_updates)

        act = make_actor(online, game.num_actions, generator, epsilon=epsilon)
        observations, actions, rewards = rollout(env, act, env.reset(generator))
        slots = torch.arange(i * args.num_envs, (i + 1) * args.num_envs, device=device) % capacity
        buffer_observations[slots], buffer_actions[slots], buffer_rewards[slots] = observations, actions, rewards.sum(-1)
        filled = min((i + 1) * args.num_envs, capacity)

        for _ in range(args.updates_per_rollout):
            batch = torch.randint(filled, (args.batch_size,), generator=generator, device=device)
            episodes = buffer_observations[batch], buffer_actions[batch], buffer_rewards[batch]
            loss = vdn_loss(online, target, *episodes, args.gamma, args.td_lambda)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(online.parameters(), args.max_grad_norm)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), args.target_update_rate)

        if (i + 1) % eval_every == 0 or i + 1 == num_rollouts:
            test_return = mean_return(game, online, 1024, args.seed + 1000 + i, device)
            metrics = {"charts/test_return": test_return, "charts/score": game.score(test_return)}
            metrics["losses/td_loss"] = loss.item()
            log(metrics, (i + 1) * args.updates_per_rollout)
            history.append([(i + 1) * args.updates_per_rollout, test_return])
            progress.set_postfix({"return": f"{test_return:.2f}"})
            distance = abs(game.score(test_return) - args.rookie_score)
            if distance < rookie_distance:
                rookie_distance, rookie_updates, rookie = distance, history[-1][0], copy.deepcopy(online.state_dict())

    expert = copy.deepcopy(online.state_dict())
    for name, updates, weights in (("expert", history[-1][0], expert), ("rookie", rookie_updates, rookie)):
        online.load_state_dict(weights)
        final_return = mean_return(game, online, TEST_EPISODES, args.seed + 10**6, device)
        score = game.score(final_return)
        metrics = {"charts/test_return": final_return, "charts/score": score, "updates": updates}
        meta = dict(env=game.name, num_agents=A, num_landmarks=game.num_landmarks, network=shape)
        command = " ".join(["python", *sys.argv]) if sys.argv[0].endswith(".py") else "collect_data.main"
        meta |= dict(command=command, seed=args.seed, torch=str(torch.__version__))
        history_metrics = {"history": history} if name == "expert" else {}
        save_checkpoint(folder / f"{name}.pt", "vdn", args, meta, online, {}, metrics | history_metrics)
        print(f"{folder / name}.pt: greedy return {final_return:.2f}, score {score:.0f}, after {updates} updates")


def play_mixture(args: Args, game: Game, expert, rookie, device) -> dict[str, torch.Tensor]:
    """All trajectories of the mixture (Table 1), in random order -> observations, actions, rewards, behavior, deviator."""
    generator = torch.Generator(device).manual_seed(args.seed)
    parts = MIXTURES[args.dataset]
    counts = [args.num_trajectories * part // sum(parts) for part in parts]
    counts[EXPERT] += args.num_trajectories - sum(counts)
    deviators = (torch.arange(max(counts[UNILATERAL], 1), device=device) % game.num_agents).split(ENVIRONMENTS_AT_ONCE)
    chunks = []
    progress = tqdm(total=args.num_trajectories, desc="collecting", unit="trajectory", mininterval=0.5)
    for behavior, count in enumerate(counts):
        for number, start in enumerate(range(0, count, ENVIRONMENTS_AT_ONCE)):
            n = min(ENVIRONMENTS_AT_ONCE, count - start)
            deviator = torch.full((n,), -1, device=device)
            network = {EXPERT: expert, UNILATERAL: expert, ROOKIE: rookie, TRIVIAL: None}[behavior]
            act = make_actor(network, game.num_actions, generator, epsilon=args.epsilon)
            if behavior == UNILATERAL:
                deviator = deviators[number]
                act = let_deviate(act, make_actor(rookie, game.num_actions, generator, epsilon=args.epsilon), deviator)
            env = ParticleEnv(game, n, device)
            observations, actions, rewards = rollout(env, act, env.reset(generator))
            chunks.append((observations, actions.to(torch.uint8), rewards, torch.full_like(deviator, behavior), deviator))
            progress.update(n)
    progress.close()
    order = torch.randperm(args.num_trajectories, generator=generator, device=device)
    names = ("observations", "actions", "true_rewards", "behavior", "deviator")
    return {name: torch.cat(parts)[order] for name, parts in zip(names, zip(*chunks, strict=True), strict=True)}


def let_deviate(act: Callable, deviating_act: Callable, deviator: torch.Tensor) -> Callable:
    """Unilateral policy: in environment n, agent deviator[n] follows deviating_act and all others follow act."""

    def unilateral_act(observations, step):
        deviates = torch.arange(observations.shape[1], device=deviator.device) == deviator[:, None]  # (N, A)
        return torch.where(deviates, deviating_act(observations, step), act(observations, step))

    return unilateral_act


def draw_pairs(num_trajectories: int, pairs_per_trajectory: int, generator: torch.Generator) -> torch.Tensor:
    """(M, 2) indices of two different trajectories of one block of BLOCK_SIZE, uniformly, block after block."""
    num_pairs = num_trajectories * pairs_per_trajectory
    kwargs = dict(generator=generator, device=generator.device)
    first = torch.randint(BLOCK_SIZE, (num_pairs,), **kwargs)
    second = (first + torch.randint(1, BLOCK_SIZE, (num_pairs,), **kwargs)) % BLOCK_SIZE
    start = torch.arange(num_trajectories // BLOCK_SIZE, device=generator.device) * BLOCK_SIZE
    start = start.repeat_interleave(BLOCK_SIZE * pairs_per_trajectory)
    return torch.stack([start + first, start + second], dim=1)


def draw_labels(returns, pairs, steepness: float, generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bradley-Terry labels over standardised returns (section 6): one Bernoulli draw per pair and agent.

    returns (N, A), pairs (M, 2) -> labels (M, A) in +-1, and the mean and standard deviation (A,) used per agent."""
    mean, std = returns.mean(dim=0), returns.std(dim=0, correction=0)
    standardized = (returns - mean) / std.clamp(min=1e-8)
    difference = standardized[pairs[:, 0]] - standardized[pairs[:, 1]]
    uniform = torch.rand(difference.shape, generator=generator, device=returns.device)
    prefers_first = uniform < torch.sigmoid(steepness * difference)
    return torch.where(prefers_first, 1, -1).to(torch.int8), mean, std


def main(args: Args) -> None:
    if args.env not in GAMES:
        raise UserError(f"--env {args.env}: unknown game, choose from {', '.join(GAMES)}")
    if args.dataset not in MIXTURES:
        raise UserError(f"--dataset {args.dataset}: unknown mixture, choose from {', '.join(MIXTURES)}")
    if args.num_trajectories % BLOCK_SIZE:
        raise UserError(f"--num-trajectories {args.num_trajectories}: must be a multiple of the block size {BLOCK_SIZE}")
    device = set_up(args)
    game = GAMES[args.env]
    data_path = Path(args.data_path or f"runs/{args.env}/{args.dataset}/dataset.npz")

    folder = Path(args.policies_path or Path(__file__).parent / "policies") / args.env
    paths = {name: folder / f"{name}.pt" for name in ("expert", "rookie")}
    missing = [path for path in paths.values() if not path.exists()]
    if len(missing) == 1 and not args.train_policies:
        raise UserError(
            f"{missing[0]}: no such file; --train-policies makes expert and rookie anew, writing over the other one"
        )
    if missing or args.train_policies:
        print(f"training expert and rookie of {args.env} for {folder}", flush=True)
        train_policies(args, game, folder, device)
    networks, hashes = {}, {}
    for name, path in paths.items():
        checkpoint = load_checkpoint(path, ("vdn",))
        networks[name] = network = build_network(AgentNetwork, path, checkpoint, device)
        if checkpoint["meta"].get("env") != args.env:
            raise UserError(f"{path}: 'meta' says it plays {checkpoint['meta'].get('env')}, not --env {args.env}")
        find_game(path, args.env, (network.num_agents, network.observation_dim, network.num_actions, network.horizon))
        hashes[name] = hash_weights(network, {})
    if data_path.exists():
        stored = read_meta(data_path)
        check_same_args(data_path, stored, dataset_args(args), "choose another --data-path or delete it")
        if stored.get("policies") != hashes:
            raise UserError(f"{data_path}: made with other policies; choose another --data-path or delete it")

    data = play_mixture(args, game, networks["expert"], networks["rookie"], device)
    generator = torch.Generator(device).manual_seed(args.seed + 1)
    returns = data["true_rewards"].sum(dim=1)
    pairs = draw_pairs(args.num_trajectories, args.pairs_per_trajectory, generator)
    labels, mean, std = draw_labels(returns, pairs, args.steepness, generator)

    meta = dict(format=FORMAT, env=args.env, num_agents=game.num_agents, num_landmarks=game.num_landmarks)
    meta |= dict(num_actions=game.num_actions, horizon=game.horizon, mixture=args.dataset, **dataset_args(args))
    meta |= dict(return_mean=mean.tolist(), return_std=std.tolist(), policies=hashes)
    meta |= dict(versions=dict(torch=str(torch.__version__), numpy=np.__version__))
    arrays = {name: tensor.cpu().numpy() for name, tensor in data.items()}
    arrays["behavior"], arrays["deviator"] = arrays["behavior"].astype(np.int8), arrays["deviator"].astype(np.int8)
    arrays["pairs"], arrays["labels"] = pairs.to(torch.int32).cpu().numpy(), labels.cpu().numpy()
    arrays["block"] = (np.arange(args.num_trajectories) // BLOCK_SIZE).astype(np.int32)
    save_file(data_path, lambda file: np.savez(file, **arrays, meta=np.array(json.dumps(meta))))

    print(f"{data_path}: {args.num_trajectories} trajectories, {len(pairs)} pairs")
    print("mean return over agents and episodes (undiscounted, 25 steps):")
    for behavior, name in enumerate(("expert", "unilateral", "rookie", "trivial")):
        chosen = returns[data["behavior"] == behavior]
        if len(chosen):
            print(f"  {name:10s} {chosen.mean():7.2f}  ({len(chosen)} trajectories)")


def dataset_args(args: Args) -> dict:
    """The flags that a dataset depends on, as they stand in its meta."""
    names = ("env", "dataset", "num_trajectories", "pairs_per_trajectory", "steepness", "epsilon", "seed")
    return {name: getattr(args, name) for name in names}


def read_meta(path: Path) -> dict:
    """The meta of an existing dataset, before it is written over."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(json.loads(str(file["meta"])))
    except Exception:
        raise UserError(f"{path}: is there but no readable dataset; choose another --data-path or delete it") from None


if __name__ == "__main__":
    run_command_line(main, Args, presets={})
