"""Learn step rewards from preferences between trajectories: Eq. (1), the Bradley-Terry likelihood summed over
agents, plus Eq. (2), a penalty on changes of the reward between adjacent steps. Reads observations, actions,
pairs and labels of a dataset.npz; writes reward-*.pt: r_phi, its mean and standard deviation for Eq. (4), and
the learned return of every trajectory for train_bc.py --keep. true_rewards never touch the training.
Usage: python train_reward.py --env spread --dataset diversified --alpha 1

Metrics in NAME.json, those of losses/ also in wandb, of trajectories held out but losses/training_nll:
    losses/nll                mean negative log-likelihood per label, chance is 0.693; losses/training_nll
    losses/smoothness         L_MSE of Eq. (2) over the variance that divides it; losses/loss: all of Eq. (1)
    reward/accuracy           share of labels that the model predicts, but for the reward/ties labels of 0
    reward/correlation        of learned and true step rewards
    reward/bayes_*            of the true returns, which drew the labels: nothing is better in expectation

Deviations from the paper:
1. Eq. (1) divides by Var_D(r_phi) of the steps: while outputs are small it vanishes, and the penalty holds
   them there for good (--variance step). Here L_MSE is divided by the detached max(Var(trajectory returns of
   r_phi in the minibatch), 1), which follows Table 7.
2. --input joint is what the paper writes, r_phi(s, a_i), s being all agents' observations; B.1 speaks of an
   observation embedding, so --preset paper takes the agent's own.
3. A learning rate that falls along a cosine, smaller minibatches, far fewer epochs than the paper's 100."""

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

VERSION = 2  # raised when a change of this file changes its results by more than rounding


@dataclass
class Args:
    env: str = "spread"
    """the game; must be the dataset's"""
    dataset: str = "diversified"
    """folder in runs/<game>/"""
    alpha: float = 1.0
    """weight of the smoothness term, Eq. (1)"""
    seed: int = 1
    """fixes everything"""
    preset: Literal["default", "paper"] = "default"
    """paper: the values of the paper's Table 5; the variance of deviation 1 and the cosine stay"""
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
    checkpoint_every: int = 1_000
    """updates between two checkpoints, NAME.training.pt beside the output"""
    resume: bool = False
    """go on where a run of the same command was stopped"""
    input: Literal["joint", "own"] = "joint"
    """what r_phi sees: all agents' observations or the agent's own, with agent id and own action"""
    variance: Literal["return", "step"] = "return"
    """of r_phi, divides the smoothness term; step: Eq. (1) as printed, which collapses (deviation 1)"""
    network: Literal["mlp", "gru"] = "mlp"
    """body of the network (paper: mlp for spread and reference, rnn for tag)"""
    hidden_dim: int = 128
    """width of every hidden layer"""
    learning_rate: float = 3e-3
    """of Adam; falls to zero along a cosine over max_epochs"""
    max_epochs: int = 8
    """passes over the training pairs"""
    batch_size: int = 64
    """trajectories per gradient step, in whole blocks (paper: 256)"""
    max_pairs: int = 1_000_000
    """learn from at most so many of the pairs, drawn at random"""


PAPER = dict(run_name="paper", input="own", learning_rate=1e-3, max_epochs=100, batch_size=256)  # Table 5
PAPER_GAMES = {"reference": dict(hidden_dim=64), "tag": dict(network="gru", hidden_dim=64)}
PRESETS = {"default": {}, "paper": {"all": PAPER, **PAPER_GAMES}}


# --- shared block: reward_network ---
# Origin: train_reward.py. r_phi of Eq. (1) to (4).
class RewardNetwork(nn.Module):
    """Step rewards of all agents: embeddings of observation and action are added, three hidden layers follow
    (B.1). With input "joint" the observation is that of all agents, s in r_phi(s, a_i), else its own."""

    def __init__(self, sizes, input="joint", network="mlp", hidden_dim=128):
        """sizes: observation size, agents, actions."""
        super().__init__()
        self.sizes, self.input, self.network = tuple(sizes), input, network
        (D, A, num_actions), H = self.sizes, hidden_dim
        self.observation_embedding = nn.Linear(D * A if input == "joint" else D, H)
        self.action_embedding = nn.Linear(A + num_actions, H, bias=False)  # of one-hot id and action
        layers = [layer for _ in range(3) for layer in (nn.Linear(H, H), nn.ReLU())]
        self.body = nn.GRU(H, H) if network == "gru" else nn.Sequential(*layers)
        self.head = nn.Linear(H, 1)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """observations (B, T, A, D), actions (B, T, A) -> rewards (B, T, A)."""
        B, T, A = actions.shape
        if self.input == "joint":  # embedded once, added to every agent
            observations = observations.flatten(-2)[..., None, :]  # (B, T, 1, A * D)
        ids = torch.eye(A, device=observations.device).expand(B, T, A, A)
        one_hot = F.one_hot(actions.long(), self.sizes[2]).to(ids.dtype)
        x = self.action_embedding(torch.cat([ids, one_hot], dim=-1))
        x = F.relu(x + self.observation_embedding(observations))  # (B, T, A, H)
        if self.network == "gru":  # every agent of every trajectory is a sequence of its own
            x = self.body(x.transpose(0, 1).flatten(1, 2))[0].unflatten(1, (B, A)).transpose(0, 1)
        else:
            x = self.body(x)
        return self.head(x).squeeze(-1)


# --- end shared block ---


def reward_loss(rewards, pairs, labels, alpha: float, variance="return"):
    """Eq. (1) and (2) for one minibatch. rewards (B, T, A) of its trajectories, pairs (P, 2) indices into
    them, labels (P, A) in -1, 0, +1 -> loss, negative log-likelihood, L_MSE over the variance, accuracy. The
    target of a label 0, equally good, is 1/2 for both sides; labels (P, 1) are about the mean over agents."""
    returns = rewards.sum(dim=1)  # (B, A)
    difference = returns[pairs[:, 0]] - returns[pairs[:, 1]]  # (P, A)
    if labels.shape[1] < difference.shape[1]:
        difference = difference.mean(dim=1, keepdim=True)
    nll = F.binary_cross_entropy_with_logits(difference, (labels + 1) / 2, reduction="none")
    l_mse = (rewards[:, 1:] - rewards[:, :-1]).square().sum(dim=(1, 2)).mean()  # Eq. (2)
    if variance == "step":
        divisor = rewards.var(correction=0).detach().clamp(min=1e-8)
    else:  # Deviation: Eq. (1) has the variance of the steps, under which the model collapses to a constant.
        divisor = returns.var(correction=0).detach().clamp(min=1)
    hits = (labels * difference).sign() / 2 + 0.5  # ties of the model count half, labels of 0 not at all
    accuracy = (hits * labels.abs()).sum() / labels.abs().sum().clamp(min=1)
    return nll.sum(dim=1).mean() + alpha * l_mse / divisor, nll.mean(), l_mse / divisor, accuracy


@torch.no_grad()
def measure(rewards_of, blocks: tuple, args: Args) -> dict[str, float]:
    """Means of what reward_loss returns over blocks. rewards_of(trajectories (B,)) -> (B, T, A)."""
    rows, settings = [], (args.alpha, args.variance)
    for trajectories, pairs, labels in zip(*blocks, strict=True):
        rows.append(torch.stack(reward_loss(rewards_of(trajectories), pairs, labels, *settings)))
    means, told = torch.stack(rows), blocks[2].abs().mean(dim=(1, 2))  # (M, 4), labels that are not 0 (M,)
    means[:, 3] *= told / told.mean().clamp(min=1e-8)
    names = ("losses/loss", "losses/nll", "losses/smoothness", "reward/accuracy")
    return dict(zip(names, means.mean(dim=0).tolist(), strict=True))


def compare_with_truth(r_phi, true_rewards, test: tuple, meta: dict, args: Args) -> dict[str, float]:
    """Diagnostics on the trajectories held out, from learned and true step rewards (N, T, A)."""
    both = torch.stack([x[test[0].unique()].flatten().double() for x in (r_phi, true_rewards)])
    metrics = {"reward/correlation": both.corrcoef()[0, 1].nan_to_num().item()}
    if {"steepness", "return_std"} <= meta.keys():  # labels of collect_data.py, which the true returns drew
        scale = meta["steepness"] / torch.tensor(meta["return_std"]).clamp(min=1e-8)
        bayes = measure(lambda trajectories: true_rewards[trajectories] * scale, test, args)
        metrics["reward/bayes_nll"] = bayes["losses/nll"]
        metrics["reward/bayes_accuracy"] = bayes["reward/accuracy"]
    return metrics


def split_into_blocks(data: dict, data_path: Path) -> list[tuple]:
    """A training and a test part (90/10) with no trajectory in both, each M blocks of one size: trajectories
    (M, B), pairs (M, P, 2) as positions in a block, labels (M, P, A or 1). Where the dataset's blocks do not
    have one size, up to 256 pairs are one; without blocks, pairs that cross the parts are dropped."""
    pairs, labels = data["pairs"], data["labels"].float()
    block = data.get("block", torch.arange(len(data["actions"])))
    group = block.unique(return_inverse=True)[1]  # (N,): 0, 1, ...
    num_groups = int(group.max()) + 1
    is_test = torch.zeros(num_groups, dtype=torch.bool)
    is_test[torch.randperm(num_groups)[: max(num_groups // 10, 1)]] = True
    first, second = is_test[group[pairs]].T  # (pairs,)
    if dropped := int((first != second).sum()):
        print(f"{dropped} of {len(pairs)} pairs compare training with test trajectories: dropped")
    sizes, counts = group.bincount(), group[pairs[:, 0]].bincount(minlength=num_groups)
    parts = []
    for name, wanted in (("training", False), ("test", True)):
        if "block" in data and sizes.unique().numel() == counts.unique().numel() == 1:
            blocks = (is_test == wanted).nonzero().squeeze(1)
            members = group.argsort(stable=True).view(num_groups, -1)  # (blocks, B)
            position = members.flatten().argsort() % members.shape[1]  # of a trajectory in its block, (N,)
            chosen = group[pairs[:, 0]].argsort(stable=True).view(num_groups, -1)[blocks]  # (M, P)
            part = members[blocks], position[pairs[chosen]], labels[chosen]
        else:
            chosen = ((first == wanted) & (second == wanted)).nonzero().squeeze(1)
            chosen = chosen[torch.randperm(len(chosen))]
            count = max(math.ceil(len(chosen) / 256), 1)
            chosen = chosen[: len(chosen) // count * count].view(count, -1)  # (M, P)
            positions = torch.arange(2 * chosen.shape[1]).view(-1, 2).expand(count, -1, 2)
            part = pairs[chosen].flatten(1), positions, labels[chosen]
        if not part[2].numel():
            raise UserError(f"{data_path}: 'pairs' leaves none for the {name} part; add pairs")
        parts.append(part)
    return parts


def main(args: Args) -> None:
    started, device = time.time(), set_up(args)
    data_path = Path(args.data_path or f"runs/{args.env}/{args.dataset}/dataset.npz")
    name = f"reward-{args.run_name}{args.run_name and '-'}alpha{args.alpha:g}-seed{args.seed}.pt"
    path = Path(args.reward_path or data_path.parent / name)
    names = ("observations", "actions", "pairs", "labels")
    data, meta, checksums = load_dataset(data_path, args.env, names, optional=("block", "true_rewards"))
    sources = {"version": VERSION} | {name: checksums[name] for name in ("meta", *data)}
    if is_finished(path, "reward", args, sources):
        return
    if len(data["pairs"]) > args.max_pairs:
        chosen = torch.randperm(len(data["pairs"]))[: args.max_pairs]
        data |= {name: data[name][chosen] for name in ("pairs", "labels")}
    training, test = (tuple(x.to(device) for x in part) for part in split_into_blocks(data, data_path))
    observations, actions = data["observations"][:, :-1].to(device), data["actions"].to(device)
    num_blocks, size = training[0].shape
    together = min(math.ceil(args.batch_size / size), num_blocks)  # blocks in a minibatch
    order = torch.cat([torch.randperm(num_blocks) for _ in range(args.max_epochs)])
    batches = order[: len(order) // together * together].view(-1, together).to(device)
    start = torch.arange(0, together * size, size).repeat_interleave(training[1].shape[1])[:, None].to(device)

    sizes = (observations.shape[-1], actions.shape[2], meta["num_actions"])
    shape = {"sizes": sizes, "input": args.input, "network": args.network, "hidden_dim": args.hidden_dim}
    model = RewardNetwork(**shape).to(device)
    lr = torch.tensor(args.learning_rate, device=device)  # a tensor, so that a CUDA graph reads it anew
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True, capturable=lr.is_cuda)

    def rewards_of(trajectories):
        return model(observations[trajectories], actions[trajectories])

    def update(batch):
        trajectories, pairs, labels = (x[batch].flatten(0, 1) for x in training)
        loss = reward_loss(rewards_of(trajectories), pairs + start, labels, args.alpha, args.variance)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    parts = {"model": model, "optimizer": optimizer}
    every = max(len(batches) // min(args.max_epochs, 50), 1)  # updates between two points of history
    evaluate = lambda _: measure(rewards_of, test, args)  # noqa: E731
    speed, history = train(args, path, sources, parts, update, batches, evaluate, every)
    metrics = {name: curve[-1] for name, curve in history.items()} | {"speed/updates_per_second": speed}
    metrics["losses/training_nll"] = measure(rewards_of, training, args)["losses/nll"]
    metrics["reward/ties"] = int((test[2] == 0).sum())
    with torch.no_grad():
        r_phi = torch.cat([rewards_of(chunk).cpu() for chunk in torch.arange(len(actions)).split(1024)])
    if "true_rewards" in data:
        metrics |= compare_with_truth(r_phi, data["true_rewards"], [x.cpu() for x in test], meta, args)
    print(f"{path}:", *(f"{name} {value:.4f}" for name, value in metrics.items()), sep="\n  ")
    trained = r_phi[training[0].unique().cpu()]
    stats = {"mean": trained.mean().item(), "std": trained.std(correction=0).item()}  # Eq. (4)
    stats["team_returns"] = r_phi.sum(dim=(1, 2))  # (N,)
    save_json(path, args, {**metrics, "history": history}, VERSION, started)
    meta = {"env": args.env, "network": shape, "sources": sources}
    save_checkpoint(path, "reward", args, meta, model.state_dict(), stats, metrics)
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
