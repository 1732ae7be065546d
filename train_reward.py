"""Learn per-step rewards from preferences between trajectories: Eq. (1), the Bradley-Terry likelihood summed over agents,
plus Eq. (2), a penalty on the change of the reward between adjacent steps. Reads observations, actions, pairs and labels
of a dataset.npz; writes reward.pt with the weights and the mean and standard deviation of r_phi that Eq. (4) needs.
`true_rewards`, where the dataset has them, serve for diagnostics alone and never touch the training.

Usage: python train_reward.py --env spread --dataset diversified --alpha 1

Logged metrics (stdout, `metrics` in the file and, with --track, wandb). All are of the test part, which neither training nor
early stopping sees; the same ones of the early-stopping part are logged after every epoch as validation/*:
    losses/nll                  mean negative log-likelihood per label; chance is 0.693
    losses/smoothness           L_MSE of Eq. (2) divided by max(Var(trajectory return), 1), as it enters Eq. (1)
    losses/loss                 Eq. (1): likelihood summed over agents plus alpha times the smoothness
    reward/accuracy             share of labels that the model predicts; a tie counts half
    reward/bayes_nll            the same two for the true return, which drew the labels: nothing can be
    reward/bayes_accuracy       better in expectation
    reward/standardized_mse     mean squared difference of predicted and true rewards, both standardised over all steps
                                and agents
    reward/correlation          their correlation
    final/nll, final/accuracy   of the last epoch's weights; what is saved and reported above is the best epoch's
    losses/training_nll         losses/nll on the training part

Deviations from the paper:
1. Eq. (1) divides by Var_D(r_phi) of the steps. That variance vanishes while the outputs are still small, and the penalty
   then holds them there: the model collapses to a constant from alpha = 0.1 to 10 on. Here L_MSE is divided by the
   detached max(Var(trajectory return of r_phi), 1), which follows the paper's Table 7. The variance is the minibatch's.
2. `--input joint` gives the model what the paper writes, r_phi(s, a_i), s being all agents' observations; B.1 speaks of an
   observation embedding, so `--preset paper` gives it the agent's own.
3. The learning rate falls along a cosine, and training ends with it, after far fewer than the paper's 100 epochs.
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
import warnings
import zipfile
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
    num_agents: int | None = None
    """agents of spread; 3 where this is not given"""
    num_landmarks: int | None = None
    """landmarks of spread; as many as agents where this is not given"""
    alpha: float = 1.0
    """weight of the smoothness term, Eq. (1)"""
    seed: int = 1
    """fixes everything"""
    preset: str = "default"
    """default, or paper: the values of the paper's Table 5"""
    run_name: str = ""
    """marks the file name of a run with other settings: reward-<run name>-alpha1-seed1.pt"""
    data_path: str = ""
    """dataset, instead of runs/<game>/<dataset>/dataset.npz"""
    reward_path: str = ""
    """where to write, instead of beside the dataset"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""
    track: bool = False
    """log to wandb"""

    input: str = "joint"
    """what r_phi sees: joint (all agents' observations, agent id, own action) or own (own observation, id, own action)"""
    network: str = "mlp"
    """mlp or gru (paper: mlp for spread and reference, rnn for tag)"""
    hidden_dim: int = 128
    """width of every hidden layer"""
    num_layers: int = 4
    """layers of the mlp before the output, the first being the embedding (the gru has the embedding and the recurrence)"""
    learning_rate: float = 3e-3
    """of Adam; falls to zero along a cosine over max_epochs"""
    max_epochs: int = 8
    """passes over the training pairs"""
    patience: int = 5
    """stop after this many epochs without a better held-out likelihood"""
    bf16: bool = True
    """hidden layers multiply in bfloat16 in training, where the CPU has instructions for it"""


PRESETS = {  # by game
    "default": {},
    "paper": {  # Table 5
        "all": dict(run_name="paper", input="own", learning_rate=1e-3, max_epochs=100, patience=100, bf16=False),
        "reference": dict(hidden_dim=64),
        "tag": dict(network="gru", hidden_dim=64),
    },
}
RETURN_STATISTICS = ("return_mean", "return_std")  # of the meta, per agent: with the steepness they made the labels
MINIBATCH_PAIRS = 256  # for datasets without blocks


# --- shared block: command_line ---
# Origin: collect_data.py. Mistakes a user can mend, presets, device and seeds, tracking.
class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit status 2."""


def run_command_line(main: Callable, args_class: type, presets: dict[str, dict[str, dict]]) -> None:
    """Parse sys.argv into args_class and call main. `--preset NAME --env GAME` replaces defaults by presets[NAME]["all"] and
    presets[NAME][GAME]; a flag given by hand wins over them."""
    try:
        defaults = None
        if presets:
            parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            parser.add_argument("--preset", default="default")
            parser.add_argument("--env", default=args_class.env)
            chosen = parser.parse_known_args()[0]
            if chosen.preset not in presets:
                raise UserError(f"--preset {chosen.preset}: unknown, choose from {', '.join(presets)}")
            preset = presets[chosen.preset]
            values = preset.get("all", {}) | preset.get(chosen.env.split("-")[0], {})
            defaults = args_class(**values | ({"preset": chosen.preset} if len(presets) > 1 else {}))
        main(tyro.cli(args_class) if defaults is None else tyro.cli(args_class, default=defaults))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def game_name(args) -> str:
    """The game that --env, --num-agents and --num-landmarks name: spread, spread-5x4 (5 agents, 4 landmarks), tag, ..."""
    counts = {"--num-agents": args.num_agents, "--num-landmarks": args.num_landmarks}
    given = [f"{flag} {count}" for flag, count in counts.items() if count is not None]
    if args.env.startswith("spread-"):
        raise UserError(f"--env {args.env}: pass --env spread with --num-agents and --num-landmarks")
    if args.env != "spread" and given:
        raise UserError(f"{given[0]}: only --env spread lets you choose; leave it out")
    A = args.num_agents or 3
    L = args.num_landmarks or A
    return args.env if (A, L) == (3, 3) else f"spread-{A}x{L}"


def set_up(args) -> torch.device:
    """Check the flags, apply --num-threads, --seed and --deterministic; return the device that --device names."""
    choices = {"network": ("mlp", "gru"), "input": ("joint", "own"), "backend": ("torch", "mpe2")}
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        low = 0 if name in ("seed", "imitation_updates") else 1
        if name in choices and value not in choices[name]:
            raise UserError(f"{flag}: unknown, choose {' or '.join(choices[name])}")
        if type(value) is int and not low <= value < 2**31:
            raise UserError(f"{flag}: must be at least {low} and below 2^31")
        if type(value) is float and not 0 <= value < float("inf"):
            raise UserError(f"{flag}: must be a finite number and not negative")
        if (
            name in ("learning_rate", "imitation_learning_rate", "prey_learning_rate", "max_grad_norm", "touch_depth")
            and value == 0
        ):
            raise UserError(f"{flag}: must be above 0")
        shares = ("gamma", "td_lambda", "gae_lambda", "epsilon", "final_epsilon", "target_update_rate", "feedback", "annealing")
        if name in shares and value > 1:
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


# --- shared block: mixed_precision ---
# Origin: train_reward.py.
def mixed_precision(enabled: bool, device: torch.device):
    """Context for training in which the hidden layers multiply in bfloat16, where the CPU has instructions for that. The last
    layers, losses and targets stay in float32."""
    capable = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and capable)


# --- end shared block ---


# --- shared block: checkpoint ---
# Origin: collect_data.py. Files that are written whole or not at all, and read without executing anything.
FORMAT = 1
# Flags that may differ between the command that made a file and the one that reuses it or writes it anew. What stands in
# the files that paths name is compared by its hash.
NEUTRAL_ARGS = {"device", "num_threads", "track", "deterministic", "data_path", "reward_path", "bc_path", "vdn_path"}
NEUTRAL_ARGS |= {"policies_path", "prey_path"}
NEUTRAL_ARGS |= {"num_agents", "num_landmarks"}  # stand in the game's name, which is compared wherever it matters


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
    save_content(path, kind=kind, args=vars(args), meta=meta, state_dict=state_dict, stats=stats, metrics=metrics)


def save_content(path, **content) -> None:
    buffer = io.BytesIO()  # torch.save hides the reason of a failed write, a plain write does not
    torch.save(dict(format=FORMAT, **content), buffer)
    save_file(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path | str, kinds: tuple[str, ...]) -> dict:
    """Read a `.pt` file of this project; raises UserError, naming file and key, when it is anything else."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        # torch compares no checksums and fills what a damaged directory calls a folder with whatever the memory holds, so it
        # is given a copy of what zipfile reads.
        with zipfile.ZipFile(io.BytesIO(content)) as file, zipfile.ZipFile(verified := io.BytesIO(), "w") as target:
            if sum(record.file_size for record in file.infolist()) > len(content):  # torch.save packs nothing
                raise ValueError("unpacks to more than it holds")
            for name in dict.fromkeys(file.namelist()):
                target.writestr(name, file.read(name))
        verified.seek(0)
        checkpoint = torch.load(verified, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, foreign or malicious: zipfile and torch raise many kinds
        raise UserError(f"{path}: damaged, truncated or not a checkpoint ({type(error).__name__})") from None
    fields = {"format": int, "kind": str, "args": dict, "meta": dict, "state_dict": dict, "stats": dict, "metrics": dict}
    for key, expected in fields.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), expected):
            raise UserError(f"{path}: '{key}' is missing or no {expected.__name__}; is this a checkpoint of this project?")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path}: 'format' is {checkpoint['format']} but this code reads {FORMAT}; train it again")
    if checkpoint["kind"] not in kinds:
        raise UserError(f"{path}: 'kind' is {checkpoint['kind']!r}, expected {' or '.join(map(repr, kinds))}")
    read = {"env": str, "horizon": int, "sources": dict, "network": dict}  # what the scripts read from the meta
    fine = {
        "args": lambda name, value: isinstance(value, (str, int, float, type(None))),
        "meta": lambda name, value: isinstance(value, read.get(name, object)),
        "stats": lambda name, value: isinstance(value, float) and abs(value) < float("inf"),
        "metrics": lambda name, value: isinstance(value, (int, float, list)),
    }
    for key, is_fine in fine.items():
        for name, value in checkpoint[key].items():
            if not is_fine(name, value):
                raise UserError(f"{path}: '{key}' has a wrong value of {name!r}; is this a checkpoint of this project?")
    return checkpoint


def build_network(network_class: type, path: Path | str, checkpoint: dict, device) -> nn.Module:
    """The network that `meta["network"]` and `state_dict` describe, in evaluation mode."""

    def describe(tensor) -> str:
        return "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} contiguous={tensor.is_contiguous()}"

    try:
        sizes, state_dict = checkpoint["meta"]["network"], checkpoint["state_dict"]
        for part in (sizes, *sizes.values()):  # of a policy that consists of two networks, these
            for name in ("observation_dim", "num_agents", "num_actions", "horizon", "hidden_dim", "num_layers", "num_modes"):
                most = max(len(state_dict), 1000) if name == "num_layers" else 2**31
                if isinstance(part, dict) and not 1 <= part.get(name, 1) <= most:
                    raise ValueError(f"{name} is {part[name]}")
        with torch.device("meta"):  # takes no memory, however large the sizes
            expected = network_class(**sizes).state_dict()
        for name in (*expected, *state_dict):
            found, wanted = describe(state_dict.get(name)), describe(expected.get(name))
            if found != wanted:
                raise ValueError(f"{name!r} is {found}, expected {wanted}")
        network = network_class(**sizes)
        network.load_state_dict(state_dict)
    except Exception as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        problem = "".join(character if character.isprintable() else "?" for character in problem)  # may quote the file
        raise UserError(f"{path}: 'state_dict' or 'meta' is damaged ({problem})") from None
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

    data, place = {}, ""
    try:
        with zipfile.ZipFile(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's about damaged headers
            members = {member.filename.removesuffix(".npy"): member for member in file.infolist()}
            for member in members.values():
                file.open(member).close()  # raises where the directory has another name for it, as if it were not there
            for key in ("meta", *names):
                check(key in members, key, "is missing")
            for key in ("meta", *names, *(key for key in optional if key in members)):
                place, size = f"'{key}' is ", members[key].file_size
                packed = size > max(2**28, 100 * Path(path).stat().st_size)  # tighter than arrays of a game can be
                check(not packed, key, f"unpacks to {size / 1e9:.1f} GB; if it is meant to, write the file with np.savez")
                with file.open(members[key]) as member:
                    data[key] = np.lib.format.read_array(member, allow_pickle=False)
                    check(not member.read(1), key, "is longer than its header says")  # the end verifies the checksum
    except UserError:
        raise
    except Exception as error:  # truncated, foreign or malicious: numpy and zipfile raise many kinds
        if isinstance(error, OSError) and error.errno:
            hint = "; collect_data.py makes it" if isinstance(error, FileNotFoundError) else ""
            raise UserError(f"{path}: cannot be read ({error.strerror}){hint}") from None
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: {place}damaged, truncated or not a dataset ({problem})") from None

    meta_text = str(data.pop("meta"))
    try:
        meta = json.loads(meta_text)
    except (ValueError, RecursionError):
        meta = None
    check(isinstance(meta, dict), "meta", "is no JSON object")
    check(meta.get("format") == 1, "meta", f"says format {meta.get('format')!r}, but this code reads 1")
    check(meta.get("env") == env, "meta", f"is of the game {meta.get('env')!r}, not {env}; pass that game's --env and counts")
    num_actions = meta.get("num_actions")
    check(type(num_actions) is int and 1 <= num_actions <= 256, "meta", f"has num_actions {num_actions!r}, not 1 to 256")

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
    for name, size in (("num_agents", A), ("horizon", T)):
        check(meta.get(name, size) == size, "meta", f"has {name} {meta.get(name)!r}, but 'actions' has {size}")
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


# --- shared block: reward_network ---
# Origin: train_reward.py. r_phi of Eq. (1) to (4).
class RewardNetwork(nn.Module):
    """Step rewards of all agents. Embeddings of observation and action are added, hidden layers follow (B.1). With input
    "joint" the observation is that of all agents, s in the paper's r_phi(s, a_i); with "own" that of the agent itself."""

    def __init__(self, observation_dim, num_agents, num_actions, input="joint", network="mlp", hidden_dim=128, num_layers=4):
        super().__init__()
        self.observation_embedding = nn.Linear(observation_dim * (num_agents if input == "joint" else 1), hidden_dim)
        self.action_embedding = nn.Linear(num_agents + num_actions, hidden_dim, bias=False)  # of one-hot id and action
        if network == "gru":
            self.body = nn.GRU(hidden_dim, hidden_dim, batch_first=True)
        else:
            layers = [layer for _ in range(num_layers - 1) for layer in (nn.Linear(hidden_dim, hidden_dim), nn.ReLU())]
            self.body = nn.Sequential(*layers)
        self.head = nn.Linear(hidden_dim, 1)
        self.input, self.network, self.num_agents, self.num_actions = input, network, num_agents, num_actions

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """observations (B, T, A, D), actions (B, T, A) -> rewards (B, T, A)."""
        B, T, A, _ = observations.shape
        if self.input == "joint":
            observations = observations.flatten(2)[:, :, None]  # (B, T, 1, A * D): embedded once, added to every agent
        ids = torch.eye(A, device=observations.device).expand(B, T, A, A)
        chosen = F.one_hot(actions.long(), self.num_actions).to(observations.dtype)
        x = self.observation_embedding(observations) + self.action_embedding(torch.cat([ids, chosen], dim=-1))
        x = F.relu(x)  # (B, T, A, H)
        if self.network == "gru":
            x, _ = self.body(x.transpose(1, 2).flatten(0, 1))  # (B * A, T, H)
            x = x.unflatten(0, (B, A)).transpose(1, 2)
        else:
            x = self.body(x)
        with torch.autocast(x.device.type, enabled=False):  # the last layer in full precision
            return self.head(x.to(self.head.weight.dtype)).squeeze(-1)


# --- end shared block ---


def reward_loss(rewards, pairs, labels, alpha: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. (1) and (2) for one minibatch. rewards (B, T, A) of its trajectories, pairs (P, 2) indices into them,
    labels (P, A) in +-1 -> loss, negative log-likelihood per label, L_MSE over the variance (deviation 1)."""
    returns = rewards.sum(dim=1)  # (B, A)
    difference = returns[pairs[:, 0]] - returns[pairs[:, 1]]  # (P, A)
    nll = -F.logsigmoid(labels * difference)
    l_mse = (rewards[:, 1:] - rewards[:, :-1]).square().sum(dim=(1, 2)).mean()  # Eq. (2)
    # Deviation: Eq. (1) divides by Var_D(r_phi) of the steps, under which the model collapses to a constant.
    smoothness = l_mse / returns.var(correction=0).detach().clamp(min=1)
    return nll.sum(dim=1).mean() + alpha * smoothness, nll.mean(), smoothness


def split_into_minibatches(data: dict, generator) -> tuple[list, list, list]:
    """Training, early-stopping and test part (80/10/10), no trajectory in two of them. Each is a list of minibatches:
    trajectories (B,), pairs (P, 2) as positions in `trajectories`, labels (P, A).

    With blocks, a minibatch is a block. Without, the trajectories are split, pairs that cross the split are dropped, and a
    minibatch is MINIBATCH_PAIRS pairs with their trajectories."""
    num_trajectories, pairs, labels = len(data["actions"]), data["pairs"].long(), data["labels"].float()
    group = data["block"].long() if "block" in data else torch.arange(num_trajectories)
    group = group.unique(return_inverse=True)[1]
    num_groups = int(group.max()) + 1
    order = torch.randperm(num_groups, generator=generator)
    cut_1, cut_2 = num_groups - 2 * max(num_groups // 10, 1), num_groups - max(num_groups // 10, 1)
    part_of_group = torch.empty(num_groups, dtype=torch.long)
    part_of_group[order[: max(cut_1, 0)]], part_of_group[order[max(cut_1, 0) : cut_2]], part_of_group[order[cut_2:]] = 0, 1, 2
    part = part_of_group[group]  # (N,)
    part_of_pair = torch.where(part[pairs[:, 0]] == part[pairs[:, 1]], part[pairs[:, 0]], -1)
    dropped = int((part_of_pair < 0).sum())
    if dropped:
        print(f"{dropped} of {len(pairs)} pairs compare across training, early-stopping and test part: dropped")

    parts = ([], [], [])
    if "block" in data:
        position = torch.empty(num_trajectories, dtype=torch.long)
        pairs_by_group = torch.argsort(group[pairs[:, 0]], stable=True)
        counts = torch.bincount(group[pairs[:, 0]], minlength=num_groups).tolist()
        for g, chosen in enumerate(pairs_by_group.split(counts)):
            trajectories = (group == g).nonzero().squeeze(1)
            position[trajectories] = torch.arange(len(trajectories))
            if len(chosen):
                parts[part_of_group[g]].append((trajectories, position[pairs[chosen]], labels[chosen]))
    else:
        for p in range(3):
            chosen = (part_of_pair == p).nonzero().squeeze(1)
            chosen = chosen[torch.randperm(len(chosen), generator=generator)]
            for minibatch in chosen.split(MINIBATCH_PAIRS) if len(chosen) else ():
                local = torch.arange(2 * len(minibatch)).view(-1, 2)
                parts[p].append((pairs[minibatch].flatten(), local, labels[minibatch]))
    return parts


@torch.no_grad()
def evaluate(model, data: dict, minibatches: list, alpha: float) -> dict[str, float]:
    """Eq. (1) and its terms and the accuracy, means over the pairs of all minibatches."""
    totals, num_pairs = torch.zeros(4), 0
    for trajectories, pairs, labels in minibatches:
        rewards = model(data["observations"][trajectories, :-1], data["actions"][trajectories])
        loss, nll, smoothness = reward_loss(rewards, pairs, labels, alpha)
        returns = rewards.sum(dim=1)
        accuracy = 0.5 + 0.5 * (labels * (returns[pairs[:, 0]] - returns[pairs[:, 1]])).sign().mean()
        totals += torch.stack([loss, nll, smoothness, accuracy]).cpu() * len(pairs)
        num_pairs += len(pairs)
    names = ("losses/loss", "losses/nll", "losses/smoothness", "reward/accuracy")
    return dict(zip(names, (totals / num_pairs).tolist(), strict=True))


@torch.no_grad()
def predict(model, data: dict, trajectories: torch.Tensor) -> torch.Tensor:
    """r_phi of many trajectories, (len(trajectories), T, A)."""
    chunks = tqdm(trajectories.split(1024), desc="predicted rewards", unit="chunk", mininterval=1)
    return torch.cat([model(data["observations"][chunk, :-1], data["actions"][chunk]) for chunk in chunks])


def compare_with_truth(model, data: dict, minibatches: list, meta: dict) -> dict[str, float]:
    """Diagnostics on the test part: predicted against true step rewards, and what the true returns, which drew the labels,
    would reach as a model (only where the meta tells how the labels were drawn)."""
    trajectories = torch.cat([minibatch[0] for minibatch in minibatches]).unique()
    rewards = predict(model, data, trajectories).double().cpu(), data["true_rewards"][trajectories.cpu()].double()
    predicted, true = ((r - r.mean()) / r.std(correction=0).clamp(min=1e-8) for r in rewards)
    metrics = {"reward/standardized_mse": (predicted - true).square().mean().item()}
    metrics["reward/correlation"] = (predicted * true).mean().item()
    try:  # a tool that wrote the dataset may say nothing, or anything, about where the labels come from
        mean, std = (torch.tensor(meta[name], dtype=torch.float64).view(data["actions"].shape[2]) for name in RETURN_STATISTICS)
        steepness = float(meta["steepness"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        print("the meta does not tell how the labels were drawn: their Bayes likelihood and accuracy skipped")
    else:
        logits = []
        for trajectories, pairs, labels in minibatches:
            returns = data["true_rewards"][trajectories.cpu()].double().sum(dim=1)  # (B, A)
            returns = (returns - mean) / std.clamp(min=1e-8)
            pairs = pairs.cpu()
            logits.append(labels.cpu() * steepness * (returns[pairs[:, 0]] - returns[pairs[:, 1]]))
        metrics["reward/bayes_nll"] = -F.logsigmoid(torch.cat(logits)).mean().item()
        metrics["reward/bayes_accuracy"] = 0.5 + 0.5 * torch.cat(logits).sign().mean().item()
    return metrics


def main(args: Args) -> None:
    device = set_up(args)
    env_name = game_name(args)
    data_path = Path(args.data_path or f"runs/{env_name}/{args.dataset}/dataset.npz")
    run_name = f"-{args.run_name}" if args.run_name else ""
    reward_path = Path(args.reward_path or data_path.parent / f"reward{run_name}-alpha{args.alpha:g}-seed{args.seed}.pt")
    data, meta = load_dataset(data_path, env_name, ("observations", "actions", "pairs", "labels"), ("block", "true_rewards"))
    check_replaceable(reward_path, "reward", args, {"dataset": meta["hash"]})
    log = start_tracking(args, reward_path.stem)

    generator = torch.Generator().manual_seed(args.seed)
    parts = split_into_minibatches(data, generator)
    for minibatches, name in zip(parts, ("training", "early-stopping", "test"), strict=True):
        if not minibatches:
            raise UserError(f"{data_path}: 'pairs' leaves none for the {name} part; more trajectories or pairs are needed")
    training, validation, test = ([tuple(x.to(device) for x in minibatch) for minibatch in part] for part in parts)
    data["observations"], data["actions"] = data["observations"].to(device), data["actions"].to(device)

    _, T, A = data["actions"].shape
    shape = dict(observation_dim=data["observations"].shape[-1], num_agents=A, num_actions=meta["num_actions"])
    shape |= dict(input=args.input, network=args.network, hidden_dim=args.hidden_dim, num_layers=args.num_layers)
    model = RewardNetwork(**shape).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_epochs * len(training))

    best_loss, best_epoch, best_weights, history = float("inf"), 0, None, []
    progress = tqdm(
        total=args.max_epochs * len(training), desc=f"reward model, alpha {args.alpha:g}", unit="update", mininterval=1
    )
    training_time = 0.0
    for epoch in range(1, args.max_epochs + 1):
        start = time.time()
        for i in torch.randperm(len(training), generator=generator).tolist():
            trajectories, pairs, labels = training[i]
            with mixed_precision(args.bf16, device):
                rewards = model(data["observations"][trajectories, :-1], data["actions"][trajectories])
            loss, _, _ = reward_loss(rewards, pairs, labels, args.alpha)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
        training_time += time.time() - start
        metrics = evaluate(model, data, validation, args.alpha)
        log({f"validation/{name}": value for name, value in metrics.items()}, epoch * len(training))
        history.append([epoch, metrics["losses/nll"], metrics["losses/smoothness"], metrics["reward/accuracy"]])
        progress.set_postfix(nll=f"{metrics['losses/nll']:.4f}", accuracy=f"{metrics['reward/accuracy']:.3f}")
        if metrics["losses/loss"] < best_loss:  # Eq. (1) of the early-stopping part
            best_loss, best_epoch, best_weights = metrics["losses/loss"], epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= args.patience:
            break
    progress.close()
    if best_weights is None:
        raise UserError(f"--learning-rate {args.learning_rate:g}: the loss was never finite; try a smaller one")

    final = evaluate(model, data, test, args.alpha)
    model.load_state_dict(best_weights)
    metrics = evaluate(model, data, test, args.alpha)
    metrics["losses/training_nll"] = evaluate(model, data, training, args.alpha)["losses/nll"]
    metrics |= {"final/nll": final["losses/nll"], "final/accuracy": final["reward/accuracy"]}
    metrics |= {"best_epoch": best_epoch, "speed/updates_per_second": len(history) * len(training) / training_time}
    if "true_rewards" in data:
        metrics |= compare_with_truth(model, data, test, meta)
    else:
        print(f"{data_path} has no true_rewards: reward error and correlation skipped")
    log(metrics, len(history) * len(training))
    predicted = predict(model, data, torch.cat([minibatch[0] for minibatch in training]).unique())
    stats = {"mean": predicted.mean().item(), "std": predicted.std(correction=0).item()}  # Eq. (4), over the training part

    meta = dict(env=env_name, horizon=T, sources={"dataset": meta["hash"]}, network=shape)
    save_checkpoint(reward_path, "reward", args, meta, model, stats, metrics | {"history": history})
    print(f"{reward_path}: epoch {best_epoch} of {len(history)}")
    for name, value in metrics.items():
        print(f"  {name:28s} {value:.4f}")


if __name__ == "__main__":
    run_command_line(main, Args, PRESETS)
