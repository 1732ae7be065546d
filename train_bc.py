"""Approximate the behavior policy by imitation (section 5.3): the policy network learns the action logits of every agent by
maximum likelihood over the whole dataset, the mixture of experts, rookies and random players that it is. The result is
pi_ref of Eq. (3). Reads observations and actions of a dataset.npz; writes bc.pt.

Usage: python train_bc.py --env spread --dataset diversified

Logged metrics (stdout, `metrics` in the file and, with --track, wandb):
    bc/nll                      mean negative log-likelihood per action on held-out trajectories; uniform: log |A_i|
    bc/accuracy                 share of held-out actions that are the most probable one
    charts/test_return          mean over agents of the undiscounted return of the sampled policy, fresh episodes
    charts/score                the same on the scale random policy = 0, the paper's authors' best expert = 100
    charts/greedy_test_return   return when every agent plays its most probable action

Deviations from the paper:
1. The network also sees the time step, because the game of section 3 is time-inhomogeneous (README).
2. The learning rate falls along a cosine, and training ends with it, after far fewer than the paper's 100 epochs.
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
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    env: str = "spread"
    """the game; must be the dataset's"""
    dataset: str = "diversified"
    """folder in runs/<game>/"""
    seed: int = 1
    """fixes everything"""
    preset: str = "default"
    """default, or paper: the values of the paper's Table 5"""
    run_name: str = ""
    """marks the file name of a run with other settings: bc-<run name>-seed1.pt"""
    data_path: str = ""
    """dataset, instead of runs/<game>/<dataset>/dataset.npz"""
    bc_path: str = ""
    """where to write, instead of beside the dataset"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""
    track: bool = False
    """log to wandb"""

    network: str = "mlp"
    """mlp or gru"""
    hidden_dim: int = 128
    """width of every hidden layer"""
    num_layers: int = 3
    """hidden layers of the mlp (the gru always has one layer before and one after the recurrence)"""
    time_input: bool = True
    """the policy sees the time step too (paper: no)"""
    learning_rate: float = 3e-3
    """of Adam; falls to zero along a cosine over max_epochs"""
    batch_size: int = 128
    """trajectories per update"""
    max_epochs: int = 12
    """passes over the training trajectories"""
    patience: int = 5
    """stop after this many epochs without a better held-out likelihood"""


PRESETS = {"paper": dict(run_name="paper", time_input=False, learning_rate=1e-3, max_epochs=100, patience=100)}  # Table 5


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


# --- shared block: dataset ---
# Origin: train_reward.py. Reading dataset.npz (format 1, README), whatever tool wrote it, checked before anything is computed.
def load_dataset(path: Path | str, env: str, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> tuple[dict, dict]:
    """The arrays `names`, those of `optional` that are there, and the meta. Other arrays of the file are not even read.

    Raises UserError, naming file and key, for whatever does not fit the format or the game `env`."""

    def check(fine, key: str, problem: str) -> None:
        if not fine:
            raise UserError(f"{path}: '{key}' {problem}")

    data = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in ("meta", *names):
                check(key in file.files, key, "is missing")
            meta_text = str(file["meta"])
            for key in (*names, *optional):
                if key in file.files:
                    data[key] = file[key]
    except UserError:
        raise
    except Exception as error:  # truncated, foreign or malicious: numpy and zipfile raise many kinds
        if isinstance(error, OSError) and error.errno:
            hint = "; collect_data.py makes it" if isinstance(error, FileNotFoundError) else ""
            raise UserError(f"{path}: cannot be read ({error.strerror}){hint}") from None
        raise UserError(f"{path}: truncated or not a dataset ({type(error).__name__}: {error})") from None

    try:
        meta = json.loads(meta_text)
    except ValueError:
        meta = None
    check(isinstance(meta, dict), "meta", "is no JSON object")
    check(meta.get("format") == 1, "meta", f"says format {meta.get('format')}, but this code reads 1")
    check(meta.get("env") == env, "meta", f"says it is of the game {meta.get('env')!r}; pass --env {meta.get('env')}")
    num_actions = meta.get("num_actions")
    check(type(num_actions) is int and 1 <= num_actions <= 256, "meta", f"has num_actions {num_actions}, not 1 to 256")

    # dimensions, kind of number and the type in which the scripts use it
    kinds = {"observations": (4, "f", np.float32), "actions": (3, "iu", np.uint8), "true_rewards": (3, "f", np.float32)}
    kinds |= {"pairs": (2, "iu", np.int64), "labels": (2, "iu", np.int8), "block": (1, "iu", np.int64)}
    for key, array in data.items():
        dims, kind, _ = kinds[key]
        check(array.dtype.kind in kind, key, f"has the type {array.dtype}; expected {'floats' if kind == 'f' else 'integers'}")
        check(array.ndim == dims, key, f"has the shape {array.shape}; expected {dims} dimensions")
        check(array.size > 0, key, "is empty")
    N, T, A = data["actions"].shape
    expected = {"observations": (N, T + 1, A), "true_rewards": (N, T, A), "labels": (..., A), "block": (N,), "pairs": (..., 2)}
    for key in expected.keys() & data.keys():
        fits = all(want in (..., have) for want, have in zip(expected[key], data[key].shape, strict=False))
        check(fits, key, f"has the shape {data[key].shape}, which does not fit actions {(N, T, A)}")
    low, high = data["actions"].min(), data["actions"].max()
    problem = f"has values from {low} to {high} but {env} has {num_actions} actions; was it collected for another --env?"
    check(low >= 0 and high < num_actions, "actions", problem)
    if "pairs" in data:
        pairs, labels = data["pairs"], data["labels"]
        check(len(pairs) == len(labels), "labels", f"has {len(labels)} rows for {len(pairs)} pairs")
        check(pairs.min() >= 0 and pairs.max() < N, "pairs", f"has indices outside 0 .. {N - 1}")
        check((pairs[:, 0] != pairs[:, 1]).all(), "pairs", "compares a trajectory with itself")
        check(np.isin(labels, (-1, 1)).all(), "labels", "has values other than +1 and -1")
        if "block" in data:
            block = data["block"]
            check((block[pairs[:, 0]] == block[pairs[:, 1]]).all(), "block", "has pairs that cross blocks")
    tensors, digest = {}, hashlib.sha256(meta_text.encode())
    for key, array in data.items():
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array.astype(kinds[key][2], copy=False))
        check(kinds[key][1] != "f" or np.isfinite(array).all(), key, "has values that are NaN or infinite in float32")
        tensors[key] = torch.from_numpy(array)
        if key in ("observations", "actions"):
            digest.update(array)
    meta["hash"] = digest.hexdigest()[:16]  # tells datasets apart
    return tensors, meta


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


def bc_loss(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of actions (B, T, A) under logits (B, T, A, num_actions)."""
    return F.cross_entropy(logits.flatten(0, 2), actions.flatten().long())


@torch.no_grad()
def evaluate(policy, observations, actions, trajectories) -> dict[str, float]:
    """Likelihood and accuracy over whole trajectories (N, T, A)."""
    totals = torch.zeros(2, device=actions.device)
    for chunk in trajectories.split(1024):
        logits, _ = policy(observations[chunk, :-1])
        accuracy = (logits.argmax(dim=-1) == actions[chunk]).float().mean()
        totals += torch.stack([bc_loss(logits, actions[chunk]), accuracy]) * len(chunk)
    return dict(zip(("bc/nll", "bc/accuracy"), (totals / len(trajectories)).tolist(), strict=True))


def main(args: Args) -> None:
    device = set_up(args)
    data_path = Path(args.data_path or f"runs/{args.env}/{args.dataset}/dataset.npz")
    run_name = f"-{args.run_name}" if args.run_name else ""
    bc_path = Path(args.bc_path or data_path.parent / f"bc{run_name}-seed{args.seed}.pt")
    data, meta = load_dataset(data_path, args.env, ("observations", "actions"))
    check_replaceable(bc_path, "bc", args, {"dataset": meta["hash"]})
    log = start_tracking(args, bc_path.stem)

    observations, actions = data["observations"].to(device), data["actions"].to(device)
    N, T, A = actions.shape
    game = find_game(data_path, args.env, (A, observations.shape[-1], meta["num_actions"], T))
    if N < 2:
        raise UserError(f"{data_path}: 'actions' has {N} trajectory; at least 2 are needed, one of them held out")
    generator = torch.Generator(device).manual_seed(args.seed)
    order = torch.randperm(N, generator=generator, device=device)
    held_out, training = order.split([max(N // 10, 1), N - max(N // 10, 1)])

    shape = dict(observation_dim=observations.shape[-1], num_agents=A, num_actions=meta["num_actions"], horizon=T)
    shape |= dict(network=args.network, hidden_dim=args.hidden_dim, num_layers=args.num_layers, time_input=args.time_input)
    policy = AgentNetwork(**shape).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate)
    updates_per_epoch = -(-len(training) // args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_epochs * updates_per_epoch)

    best_nll, best_epoch, best_weights, history = float("inf"), 0, None, []
    progress = tqdm(total=args.max_epochs * updates_per_epoch, desc="imitation", unit="update", mininterval=1)
    training_time = 0.0
    for epoch in range(1, args.max_epochs + 1):
        start = time.time()
        shuffled = training[torch.randperm(len(training), generator=generator, device=device)]
        for batch in shuffled.split(args.batch_size):
            logits, _ = policy(observations[batch, :-1])
            loss = bc_loss(logits, actions[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
        training_time += time.time() - start
        metrics = evaluate(policy, observations, actions, held_out)
        log(metrics, epoch * updates_per_epoch)
        history.append([epoch, metrics["bc/nll"], metrics["bc/accuracy"]])
        progress.set_postfix(nll=f"{metrics['bc/nll']:.4f}")
        if metrics["bc/nll"] < best_nll:
            best_nll, best_epoch, best_weights = metrics["bc/nll"], epoch, copy.deepcopy(policy.state_dict())
        elif epoch - best_epoch >= args.patience:
            break
    progress.close()
    if best_weights is None:
        raise UserError(f"--learning-rate {args.learning_rate:g}: the loss was never finite; try a smaller one")

    policy.load_state_dict(best_weights)
    metrics = evaluate(policy, observations, actions, held_out)
    num_updates = len(history) * updates_per_epoch
    metrics |= {"best_epoch": best_epoch, "speed/updates_per_second": num_updates / training_time}
    if game is not None:
        metrics["charts/test_return"] = mean_return(game, policy, TEST_EPISODES, args.seed + 10**6, device, sample=True)
        metrics["charts/score"] = game.score(metrics["charts/test_return"])
        metrics["charts/greedy_test_return"] = mean_return(game, policy, TEST_EPISODES, args.seed + 10**6, device)
    else:
        print(f"{args.env} is no game of this script: evaluation skipped")
    log(metrics, num_updates)

    meta = dict(env=args.env, sources={"dataset": meta["hash"]}, network=shape)
    save_checkpoint(bc_path, "bc", args, meta, policy, {}, metrics | {"history": history})
    print(f"{bc_path}: epoch {best_epoch} of {len(history)}")
    for name, value in metrics.items():
        print(f"  {name:28s} {value:.4f}")


if __name__ == "__main__":
    run_command_line(main, Args, PRESETS)
