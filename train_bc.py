"""Approximate the behavior policy by imitation (section 5.3): one network learns the action logits of all
agents by maximum likelihood over the whole dataset; it is pi_ref of Eq. (3). With --keep 0.25 it imitates
only the quarter of the trajectories with the highest learned team return (filtered BC), the cheap rival of
everything else here. Reads observations and actions of a dataset.npz, for --keep a reward-*.pt; writes
bc-*.pt.
Usage: python train_bc.py --env spread --dataset diversified

Metrics in NAME.json, those of bc/ with --track also in wandb, of held-out trajectories and fresh episodes:
    bc/nll, bc/accuracy     negative log-likelihood per action; share of actions that are the likeliest
    charts/test_return      mean over agents of the undiscounted greedy return of 25 steps, fresh episodes
    charts/score            with the random policy at 0, the authors' best expert at 100 (tag: our expert)

Deviations from the paper:
1. The network also sees the time step, because the game of section 3 is time-inhomogeneous.
2. Fewer updates than the paper's 100 epochs, at a higher learning rate that falls along a cosine.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

try:  # test returns are the work of evaluate.py, where it stands beside this script
    from evaluate import find_game, mean_return
except ImportError:
    find_game = None

VERSION = 1  # raised when a change of this file changes its results by more than rounding


@dataclass
class Args:
    env: str = "spread"
    """the game; must be the dataset's"""
    dataset: str = "diversified"
    """folder in runs/<game>/"""
    keep: float = 1.0
    """imitate this share of the trajectories, those with the highest learned team return"""
    seed: int = 1
    """fixes everything; also picks the reward model of that seed"""
    preset: Literal["default", "paper"] = "default"
    """paper: the values of the paper's Table 5"""
    run_name: str = ""
    """marks the file name of a run with other settings: bc-<run name>-seed1.pt"""
    data_path: str = ""
    """dataset, instead of runs/<game>/<dataset>/dataset.npz"""
    reward_path: str = ""
    """reward model of --keep, instead of reward-alpha1-seed1.pt beside the dataset"""
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
    checkpoint_every: int = 1_000
    """updates between two checkpoints, NAME.training.pt beside the output"""
    resume: bool = False
    """go on where a run of the same command was stopped"""
    hidden_dim: int = 256
    """width of every hidden layer"""
    learning_rate: float = 5e-3
    """of Adam; falls to zero along a cosine"""
    num_updates: int = 4_000
    """gradient steps"""
    batch_size: int = 64
    """trajectories per update"""


PAPER = dict(run_name="paper", hidden_dim=128, learning_rate=1e-3, batch_size=128, num_updates=29_200)
PRESETS = {"default": {}, "paper": {"all": PAPER}}  # Table 5: 100 epochs of what is not held out


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


def bc_loss(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of actions (B, T, A) under logits (B, T, A, num_actions), section 5.3."""
    return F.cross_entropy(logits.flatten(0, 2), actions.flatten().long())


def main(args: Args) -> None:
    started, device = time.time(), set_up(args)
    data_path = Path(args.data_path or f"runs/{args.env}/{args.dataset}/dataset.npz")
    data, meta, checksums = load_dataset(data_path, args.env, ("observations", "actions"))
    observations, actions = data["observations"].to(device), data["actions"].to(device)
    N, T, A = actions.shape
    sources = {"version": VERSION} | {name: checksums[name] for name in ("meta", "observations", "actions")}

    kept, keep = torch.arange(N), ""  # the trajectories to imitate
    if args.keep < 1:
        mark, keep = "paper-" if args.preset == "paper" else "", f"keep{args.keep:g}-"
        reward_path = data_path.parent / f"reward-{mark}alpha1-seed{args.seed}.pt"
        reward_path = Path(args.reward_path or reward_path)
        reward = load_checkpoint(reward_path, "reward")
        made_from = {name: checksums[name] for name in reward["meta"]["sources"] if name in checksums}
        check_same(reward_path, reward, {}, made_from)  # it knows the returns of its own dataset alone
        returns = reward["stats"].get("team_returns")
        if getattr(returns, "shape", None) != (N,) or not returns.isfinite().all():
            raise UserError(f"{reward_path}: has no returns of these trajectories; make it again")
        kept = returns.topk(round(args.keep * N)).indices
        sources["reward"] = reward["meta"].get("checksum")
    if len(kept) < 2:
        raise UserError(f"{data_path}: {len(kept)} trajectories to imitate; it takes 2, one is held out")
    name = f"bc-{args.run_name}{args.run_name and '-'}{keep}seed{args.seed}.pt"
    path = Path(args.bc_path or data_path.parent / name)
    if is_finished(path, "bc", args, sources):
        return

    kept = kept[torch.randperm(len(kept))].to(device)
    held_out, training = kept.tensor_split([min(max(len(kept) // 10, 1), 1024)])
    draws = torch.randint(len(training), (args.num_updates, args.batch_size))
    batches = training[draws.to(device)]  # (updates, B): indices of trajectories
    shape = {"sizes": (observations.shape[-1], A, meta["num_actions"], T), "hidden_dim": args.hidden_dim}
    policy = AgentNetwork(**shape).to(device)
    lr = torch.tensor(args.learning_rate, device=device)  # a tensor, so that a CUDA graph reads it anew
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, fused=True, capturable=lr.is_cuda)

    def update(batch):
        loss = bc_loss(policy(observations[batch, :-1])[0], actions[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def evaluate(_) -> dict[str, float]:
        logits, chosen = policy(observations[held_out, :-1])[0], actions[held_out]
        accuracy = (logits.argmax(dim=-1) == chosen).float().mean().item()
        return {"bc/nll": bc_loss(logits, chosen).item(), "bc/accuracy": accuracy}

    parts = {"policy": policy, "optimizer": optimizer}
    speed, history = train(args, path, sources, parts, update, batches, evaluate, len(batches) // 20 or 1)
    metrics = {name: curve[-1] for name, curve in history.items()} | {"speed/updates_per_second": speed}
    if game := find_game(args.env, device, policy.sizes) if find_game else None:
        metrics |= game.metrics(mean_return(game, policy, device, args.seed + 10**6))
    else:
        print("test return skipped: evaluate.py is not beside this script, or does not know the game")
    print(f"{path}:", *(f"{name} {value:.4f}" for name, value in metrics.items()), sep="\n  ")
    save_json(path, args, {**metrics, "history": history}, VERSION, started)
    meta = {"env": args.env, "network": shape, "sources": sources}
    save_checkpoint(path, "bc", args, meta, policy.state_dict(), {}, metrics)
    path.with_suffix(".training.pt").unlink(missing_ok=True)


# --- shared block: training ---
# Origin: train_bc.py. The loop around update(batch): measure, log, checkpoint, resume.
def is_finished(path: Path, kind: str, args, sources: dict[str, str]) -> bool:
    """Whether `path` is there, with these settings; raises UserError where it is there with others."""
    if path.suffix != ".pt":  # NAME.json and NAME.training.pt stand beside it
        raise UserError(f"{path}: the name of an output ends in .pt")
    if finished := path.exists():
        check_same(path, load_checkpoint(path, kind), vars(args), sources)
        print(f"{path}: already there, with these settings")
    return finished


def train(args, path: Path, sources: dict, parts: dict, update, batches, evaluate, every: int):
    """update(batch) for all rows of `batches`, the rate falling along a cosine, and evaluate(its output) ->
    metrics after each `every`. parts: optimizer, all else with a state. -> updates per second, history."""
    training_path, done, history, run_id = path.with_suffix(".training.pt"), 0, {}, f"{time.time_ns():x}"
    if training_path.exists():
        if not args.resume:
            raise UserError(f"{training_path}: of a stopped or running command; pass --resume or delete it")
        stored = load_checkpoint(training_path, "training")
        check_same(training_path, stored, vars(args), sources)
        try:
            for name, part in parts.items():  # minibatches are redrawn from the seed
                part.load_state_dict(stored["stats"][name])
            for group in parts["optimizer"].param_groups:  # which may come from another device
                group.update(lr=group["lr"].to(batches.device), capturable=batches.is_cuda)
            done, run_id, history = int(stored["meta"]["update"]), stored["meta"]["run_id"], stored["metrics"]
        except Exception as error:
            raise UserError(f"{training_path}: cannot be resumed ({error!r:.80}); delete it") from None
    if args.track:
        try:
            import wandb

            run = wandb.init(project="marlhf", name=path.stem, id=run_id, resume="allow", config=vars(args))
        except Exception as error:
            raise UserError(f"--track: wandb does not start ({error!r:.80})") from None
    update = capture(update, batches.device) if batches.is_cuda else update
    progress = tqdm(batches[done:], path.stem, len(batches), unit="update", initial=done, mininterval=1)
    begun, start = done, time.time()
    for batch in progress:
        if done % args.checkpoint_every == 0:  # and at 0: what cannot be written is told now
            meta = {"sources": sources, "update": done, "run_id": run_id}
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(training_path, "training", args, meta, {}, states, history)
        for group in parts["optimizer"].param_groups:
            group["lr"].fill_(args.learning_rate * (1 + math.cos(math.pi * done / len(batches))) / 2)
        output, done = update(batch), done + 1
        if done % every == 0 or done == len(batches):
            metrics = evaluate(output)
            for name, value in {**metrics, "update": done}.items():
                if not math.isfinite(value):
                    training_path.unlink(missing_ok=True)
                    raise UserError(f"{name} is {value} after {done} updates; try a smaller --learning-rate")
                history.setdefault(name, []).append(value)
            if args.track:
                run.log(metrics, step=done)
            progress.set_postfix({name.split("/")[-1]: f"{value:.4g}" for name, value in metrics.items()})
    return (done - begun) / max(time.time() - start, 1e-9), history


def capture(update, device):
    """update(batch), recorded as one CUDA graph: small networks spend their time on launching kernels."""
    torch.cuda.synchronize(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))  # before a recording nothing may use the default stream
    graph, calls, given, output = torch.cuda.CUDAGraph(), 0, None, None

    def replay(batch):
        nonlocal calls, given, output
        calls += 1
        if calls <= 3:  # as they are, so that the optimizer makes its state
            return update(batch)
        if calls == 4:
            given = batch.clone()
            with torch.cuda.graph(graph):
                output = update(given)
        given.copy_(batch)
        graph.replay()
        return output

    return replay


# --- end shared block ---


# --- shared block: dataset ---
# Origin: train_reward.py. Reading dataset.npz (format 1, README), whatever tool wrote it.
def load_dataset(path: Path, env: str, names: tuple, optional: tuple = ()) -> tuple[dict, dict, dict]:
    """Tensors of the arrays `names` and of those `optional` that are there, the meta, checksums of all
    arrays. Raises UserError, naming file and key, for whatever does not fit the format or the game `env`."""

    def check(fine, key: str, problem: str) -> None:
        if not fine:
            raise UserError(f"{path}: '{key}' {problem}")

    try:
        with np.load(path, allow_pickle=False) as file:  # checks the CRC of what it reads
            info = {member.filename.removesuffix(".npy"): member for member in file.zip.infolist()}
            if sum(x.file_size for x in info.values()) > max(2**30, 50 * os.path.getsize(path)):
                raise ValueError("packed too tightly")
            arrays = {key: file[key] for key in ("meta", *names, *optional) if key in file.files}
        meta = dict(json.loads(str(arrays.pop("meta"))))
    except Exception as error:  # truncated, foreign or malicious: numpy and zipfile raise many kinds
        games = "spread, spread-5x4, tag, reference"
        raise UserError(f"{path}: no dataset ({error!r:.80}); collect_data.py makes it for {games}") from None
    game, num_actions = meta.get("env"), meta.get("num_actions")
    check(meta.get("format") == 1, "meta", "is not of format 1")
    check(game == env, "meta", f"is of the game {game!r:.40}, not {env}; name it with --env")
    check(type(num_actions) is int and 0 < num_actions <= 256, "meta", "has no num_actions from 1 to 256")
    for key in names:
        check(key in arrays and arrays[key].ndim, key, "is missing")
    check(arrays["actions"].ndim == 3, "actions", "is not of the shape (N, T, A)")
    (N, T, A), M = arrays["actions"].shape, len(arrays.get("pairs", ()))
    layout = {  # kinds of numbers, type here, allowed shapes (-1: any), smallest and largest value
        "observations": ("f", np.float32, [(N, T + 1, A, -1)], -3e38, 3e38),
        "actions": ("iu", np.uint8, [(N, T, A)], 0, num_actions - 1),
        "pairs": ("iu", np.int64, [(M, 2)], 0, N - 1),
        "labels": ("iu", np.int8, [(M, A), (M, 1)], -1, 1),
        "block": ("iu", np.int64, [(N,)], -(2**62), 2**62),
        "true_rewards": ("f", np.float32, [(N, T, A)], -3e38, 3e38),
    }
    data = {}
    for key, array in arrays.items():
        kinds, dtype, shapes, low, high = layout[key]
        fits = [len(s) == array.ndim and all(np.equal(s, array.shape) | np.equal(s, -1)) for s in shapes]
        problem = f"is {array.dtype} {array.shape}, expected {dtype.__name__} {shapes[0]} (-1: any)"
        check(array.dtype.kind in kinds and any(fits) and array.size, key, problem)
        problem = f"has values {array.min()} to {array.max()}, {env} has {low} to {high}; of another --env?"
        check(array.min() >= low and array.max() <= high, key, problem)
        data[key] = torch.from_numpy(array.astype(dtype))
    if "pairs" in data:
        check((data["pairs"].diff() != 0).all(), "pairs", "compares a trajectory with itself")
        block = data.get("block", torch.zeros(N))
        check((block[data["pairs"]].diff() == 0).all(), "block", "has pairs that cross blocks")
    return data, meta, {key: f"{member.CRC:08x}" for key, member in info.items()}


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


if __name__ == "__main__":
    run_command_line(main, Args, PRESETS)
