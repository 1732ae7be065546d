"""Play any policy file of this project (vdn-*.pt, bc-*.pt, policies/*/*.pt) for a number of episodes and report its return.
Two backends start from the same states: `torch`, the batched environment of this project, and `mpe2`, the real package.

Usage: python evaluate.py --policy-path policies/spread/expert.pt --num-episodes 1000 --backend mpe2

Reported (text on stdout, JSON with --json-path):
    charts/test_return  mean over agents and episodes of the undiscounted return of one episode
    charts/score        the same on the scale random policy = 0, the paper's authors' best expert = 100
    standard_error      of charts/test_return, over episodes
    agent_returns       mean return of each agent
    episode_returns     of every episode, mean over its agents
"""

from __future__ import annotations

import argparse
import contextlib
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
import tyro
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    policy_path: str
    """a policy file, or the word random"""
    env: str = ""
    """the game; taken from the policy file where this is empty"""
    num_episodes: int = 4096
    """episodes to play"""
    backend: str = "torch"
    """torch (batched) or mpe2 (the real package, about 100 times slower)"""
    sample: bool = False
    """sample actions from the softmax of the outputs (for BC policies) instead of playing the best one"""
    seed: int = 1
    """fixes start states and sampled actions, the same ones for both backends"""
    json_path: str = ""
    """also write the report there"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ...; physics run in float64, as mpe2's do"""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""


EPISODES_AT_ONCE = 128  # in both backends, because a network's rounding depends on the size of its batch


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


class Mpe2Env:
    """The package's environments behind the interface of ParticleEnv, so that `rollout` plays both."""

    def __init__(self, game: Game, num_envs: int, device):
        from mpe2 import simple_spread_v3  # imported here, because it starts pygame

        make = {"spread": lambda: simple_spread_v3.parallel_env(N=game.num_agents, max_cycles=game.horizon)}[game.name]
        self.game, self.device, self.envs = game, device, [make() for _ in range(num_envs)]

    def set_state(self, positions, velocities, landmarks) -> torch.Tensor:
        for env, *state in zip(self.envs, positions, velocities, landmarks, strict=True):
            env.reset(seed=0)
            world = env.unwrapped.world
            position, velocity, landmark = (x.double().cpu().numpy() for x in state)
            for i, agent in enumerate(world.agents):
                agent.state.p_pos, agent.state.p_vel = position[i].copy(), velocity[i].copy()
            for i, entity in enumerate(world.landmarks):
                entity.state.p_pos = landmark[i].copy()
        return self._stack([[env.unwrapped.observe(name) for name in env.possible_agents] for env in self.envs])

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        observations, rewards = [], []
        for env, joint_action in zip(self.envs, actions.tolist(), strict=True):
            names = env.possible_agents
            observation, reward, *_ = env.step(dict(zip(names, joint_action, strict=True)))
            observations.append([observation[name] for name in names])
            rewards.append([reward[name] for name in names])
        return self._stack(observations), self._stack(rewards)

    def _stack(self, values: list) -> torch.Tensor:
        return torch.from_numpy(np.array(values)).to(self.device)


def play(game: Game, network, args: Args, device: torch.device) -> torch.Tensor:
    """Returns (num_episodes, A) of the episodes whose start states and action draws args.seed fixes."""
    generator = torch.Generator(device).manual_seed(args.seed)
    returns = []
    progress = tqdm(total=args.num_episodes, desc=f"{game.name} in {args.backend}", unit="episode", mininterval=1)
    while progress.n < args.num_episodes:
        num_envs = min(EPISODES_AT_ONCE, args.num_episodes - progress.n)
        env = ParticleEnv(game, num_envs, device, torch.float64)
        observations = env.reset(generator)
        if args.backend == "mpe2":
            state = [x.permute(2, 0, 1) for x in (env.positions, env.velocities, env.landmarks)]  # (N, entities, 2)
            env = Mpe2Env(game, num_envs, device)
            observations = env.set_state(*state)
        act = make_actor(network, game.num_actions, generator, args.sample)
        returns.append(rollout(env, act, observations)[2].sum(dim=1))
        progress.update(num_envs)
    progress.close()
    return torch.cat(returns)


def main(args: Args) -> dict:
    device = set_up(args)
    network, env = None, args.env
    if args.policy_path != "random":
        checkpoint = load_checkpoint(args.policy_path, ("vdn", "bc"))
        network = build_network(AgentNetwork, args.policy_path, checkpoint, device)
        env = checkpoint["meta"].get("env")
        if args.env and args.env != env:
            raise UserError(f"{args.policy_path}: 'meta' says it plays {env!r}, not --env {args.env}")
        sizes = (network.num_agents, network.observation_dim, network.num_actions, network.horizon)
        find_game(args.policy_path, env, sizes)
    if env not in GAMES:
        source = "--env" if network is None else f"{args.policy_path}: 'meta' has the game"
        raise UserError(f"{source} {env or 'is missing'}: choose from {', '.join(GAMES)}")
    game = GAMES[env]

    returns = play(game, network, args, device)  # (N, A)
    episode_returns = returns.mean(dim=1)
    test_return = episode_returns.mean().item()
    report = dict(policy=args.policy_path, env=env, backend=args.backend, num_episodes=args.num_episodes, seed=args.seed)
    report |= {"sample": args.sample, "charts/test_return": test_return, "charts/score": game.score(test_return)}
    report["standard_error"] = episode_returns.std().item() / len(episode_returns) ** 0.5 if len(episode_returns) > 1 else None
    report |= {"agent_returns": returns.mean(dim=0).tolist(), "episode_returns": episode_returns.tolist()}
    error = "" if report["standard_error"] is None else f" +- {report['standard_error']:.2f}"
    print(f"{args.policy_path} on {env}, {args.num_episodes} episodes in {args.backend}:")
    print(
        f"  charts/test_return {test_return:.2f}{error} (mean over agents of the undiscounted return of {game.horizon} steps)"
    )
    print(f"  charts/score       {report['charts/score']:.1f} (random policy 0, the paper's authors' best expert 100)")
    print(f"  agent_returns      {'  '.join(f'{value:.2f}' for value in report['agent_returns'])}")
    if args.json_path:
        save_file(args.json_path, lambda file: file.write(json.dumps(report, indent=1).encode()))
    return report


if __name__ == "__main__":
    run_command_line(main, Args, presets={})
