"""Train a team policy offline from preferences: Algorithm 1 of the paper with VDN as the MARL oracle. The step reward of the
team is Eq. (3), sum_i [r_std,i + beta * (log pi_ref(a_i | o_i) + log |A_i|)], from a learned reward (reward.pt, Eq. 4) and a
reference policy made from bc.pt; Q_tot = sum_i Q_i is fitted to it on the observations and actions of a dataset.npz. Labels
and true rewards are never read. The environment serves for reports alone. Writes vdn-*.pt, the last policy, and
vdn-*-best.pt, the one with the best test return, which no offline method could pick: quote the last.

Usage: python vdn_rlhf.py --env spread --beta 1        (makes the dataset, reward model and BC policy if they are missing)

Logged metrics (stdout, `metrics` in the file and, with --track, wandb):
    charts/test_return   mean over agents of the undiscounted greedy return, fresh episodes
    charts/score         the same on the scale random policy = 0, best expert of the paper's authors = 100 (tag: ours)
    charts/reference_return   the return of pi_ref alone, every agent playing its most probable action
    charts/log_pi_ref    mean log-probability under pi_ref of the actions chosen in these episodes; uniform: -log |A_i|
    losses/td_loss       mean squared TD error of the last minibatch

Deviations from the paper (README has the whole table):
1. The Q-network is an MLP that sees the time step, not a GRU: as good in a third of the time (`--network gru
   --no-time-input`).
2. pi_ref imitates the trajectories reweighted as the KL-regularized objective asks for (`trajectory_weights`), not as they
   are (`--imitation-updates 0`, and `--num-modes 1` in train_bc.py).
3. The KL term is a fixed part of the Q-values (`RegularizedPolicy`); the network learns the rest (`--no-known-kl`).
4. Q(lambda) with off-policy corrections instead of one-step targets (`--td-lambda 0`; `--no-off-policy`: TD(lambda)), and a
   learning rate that falls along a cosine from 1e-2.
5. The published code clips the KL term to -10 .. 1 per step (`--kl-clip`) and adds 1 to the standardised reward; the paper
   does neither, nor does this script.
6. The game ends after step T, as in section 3: no bootstrap past it, and no observation after it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import glob
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partialmethod
from itertools import islice
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
    """folder in runs/<game>/; collect_data.py makes diversified, mix-unilateral, mix-expert and pure-expert"""
    num_agents: int | None = None
    """agents of spread; 3 where this is not given"""
    num_landmarks: int | None = None
    """landmarks of spread; as many as agents where this is not given"""
    beta: float | tuple[float, ...] = 1.0
    """weight of the KL term, Eq. (3); several: a run for each of them"""
    alpha: float = 1.0
    """smoothness weight of the reward model to use, Eq. (1)"""
    seed: int = 1
    """fixes everything; also picks the reward model and BC policy of that seed"""
    num_seeds: int = 1
    """train the seeds seed, seed + 1, ... at once, so many; a file for each run"""
    preset: str = "default"
    """default, or paper: the values of the paper's Table 5"""
    run_name: str = ""
    """marks the file name of a run with other settings: vdn-<run name>-beta1-alpha1-seed1.pt"""
    data_path: str = ""
    """dataset, instead of runs/<game>/<dataset>/dataset.npz"""
    reward_path: str = ""
    """reward model, instead of reward-alpha1-seed1.pt beside the dataset"""
    bc_path: str = ""
    """reference policy, instead of bc-seed1.pt beside the dataset"""
    vdn_path: str = ""
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
    """updates between two checkpoints, NAME.training.pt beside the output, from which --resume goes on"""
    resume: bool = False
    """go on where a run of the same command was stopped; nothing to do if the output is there"""

    network: str = "mlp"
    """Q-network: mlp or gru (paper: gru)"""
    hidden_dim: int = 128
    """width of every hidden layer"""
    num_layers: int = 3
    """hidden layers of the mlp (the gru always has one layer before and one after the recurrence)"""
    time_input: bool = True
    """the Q-network sees the time step too (--preset paper: no)"""
    learning_rate: float = 1e-2
    """of Adam; falls to zero along a cosine (paper: 1e-3)"""
    gamma: float = 0.9
    """discount"""
    td_lambda: float = 0.8
    """lambda of TD(lambda); 0: one-step targets"""
    kl_clip: bool = False
    """clip the KL term of each agent and step to -10 .. 1, as the published code does"""
    off_policy: bool = True
    """take what the behavior loses by not acting greedily out of the TD(lambda) targets"""
    known_kl: bool = True
    """the KL term is a fixed part of the Q-values, and the network learns the rest (paper: it learns all)"""
    imitation_updates: int = 6_000
    """gradient steps of the reference policy on trajectories reweighted by what their modes earn; 0: pi_ref is the BC policy"""
    imitation_learning_rate: float = 5e-3
    """of these steps; falls to zero along a cosine"""
    num_updates: int = 4_000
    """gradient steps"""
    batch_size: int = 64
    """trajectories per gradient step"""
    target_update_rate: float = 0.01
    """the target network moves this share of the way to the online network after every update"""
    max_grad_norm: float = 10.0
    """gradients are clipped to this norm"""
    bf16: bool = True
    """hidden layers multiply in bfloat16 in training, where the device has instructions for it"""
    compile: bool | None = None
    """True, False: fuse the loss into few kernels with torch.compile; by default on CUDA"""
    cudagraphs: bool | None = None
    """True, False: record an update as a CUDA graph and replay it; by default on CUDA"""


PRESETS = {  # by game
    "default": {"tag": dict(beta=3.0)},  # section 5.3
    "paper": {  # Table 5; a DQN has one-step targets; the paper names no gamma, 0.9 is that of the JaxMARL code it builds on
        "all": {
            **dict(run_name="paper", network="gru", hidden_dim=64, time_input=False),
            **dict(learning_rate=1e-3, gamma=0.9, td_lambda=0.0, num_updates=10_000),
            **dict(imitation_updates=0, known_kl=False, bf16=False),
        },
        "tag": dict(beta=3.0, num_updates=50_000),  # of the published scripts; Table 5 says 1,000,000
    },
}
HISTORY_EPISODES = 1024  # behind every return measured while the policy is learned


# --- shared block: command_line ---
# Origin: collect_data.py. Mistakes a user can mend, presets, device and seeds, tracking.
class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit status 2."""


TERMINATION = {"requested": False, "deferred": False}  # by SIGTERM; deferred: a training saves first


def on_sigterm(*_) -> None:
    """Exit status 143, at once or, where it is deferred, after the present update."""
    TERMINATION["requested"] = True
    if not TERMINATION["deferred"]:
        sys.exit(143)


def run_command_line(main: Callable, args_class: type, presets: dict[str, dict[str, dict]]) -> None:
    """Parse sys.argv into args_class and call main. `--preset NAME --env GAME` replaces defaults by presets[NAME]["all"] and
    presets[NAME][GAME]; a flag given by hand wins over them."""
    signal.signal(signal.SIGTERM, on_sigterm)
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
        numbers = value if isinstance(value, tuple) else (value,)
        low = 0 if name in ("seed", "imitation_updates") else 1
        if name in choices and value not in choices[name]:
            raise UserError(f"{flag}: unknown, choose {' or '.join(choices[name])}")
        if type(value) is int and not low <= value < 2**31:
            raise UserError(f"{flag}: must be at least {low} and below 2^31")
        if any(type(number) is float and not 0 <= number < float("inf") for number in numbers):
            raise UserError(f"{flag}: must be a finite number and not negative")
        if (
            name in ("learning_rate", "imitation_learning_rate", "prey_learning_rate", "max_grad_norm", "touch_depth")
            and value == 0
        ):
            raise UserError(f"{flag}: must be above 0")
        shares = ("gamma", "td_lambda", "gae_lambda", "epsilon", "final_epsilon", "target_update_rate", "feedback", "annealing")
        if name in shares and value > 1:
            raise UserError(f"{flag}: must be at most 1")
    if getattr(args, "cudagraphs", None) and not torch.cuda.is_available():
        raise UserError("--cudagraphs True: there is no CUDA device")
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)  # what is left of impossible actions: CPUs take six times as long for such small numbers
    keep_freed_memory()
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


def keep_freed_memory() -> None:
    """Have the C library hold on to freed memory. By default it returns large blocks to the system, and getting them anew costs
    a fifth of the time of an update on CPU. Does nothing where that library is not glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for parameter, value in ((-1, 2**31 - 1), (-2, 2**26), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)


def start_tracking(args, names: list[str]) -> Callable[[int, dict, int], None]:
    """-> log(s, metrics, step), s being the run's place in `names`; with several, its name goes before those of its metrics.
    Without --track it does nothing and wandb is not imported."""
    if not args.track:
        return lambda s, metrics, step: None
    try:
        import wandb

        run = wandb.init(project="marlhf", name=names[0], config=vars(args), reinit="finish_previous")
    except Exception as error:
        raise UserError(f"--track: wandb does not start ({type(error).__name__}: {str(error).splitlines()[0]})") from None
    prefixes = [f"{name}/" if len(names) > 1 else "" for name in names]
    return lambda s, metrics, step: run.log({prefixes[s] + name: value for name, value in metrics.items()}, step=step)


# --- end shared block ---


# --- shared block: mixed_precision ---
# Origin: train_reward.py.
def use_bfloat16(wanted: bool, device: torch.device) -> bool:
    """Whether the hidden layers multiply in bfloat16 in training: where it is wanted and the device has instructions for it.
    The last layers, losses and targets stay in float32."""
    if device.type == "cuda":
        return wanted and torch.cuda.is_bf16_supported()
    return wanted and bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))


# --- end shared block ---


# --- shared block: runs ---
# Origin: train_reward.py. Several runs trained as one: networks, minibatches and losses have a leading dimension S, and each
# run gets what it would get alone.
def list_runs(args, varied: str = "") -> list:
    """The runs that a command asks for, each as the Args of a command of its own: every one of --num-seeds seeds with every
    value of the flag `varied`, which may have several."""
    values = getattr(args, varied) if varied else None
    values = values if isinstance(values, tuple) else (values,)
    if not values or len(set(values)) < len(values):
        raise UserError(f"--{varied} {' '.join(map(str, values))}: every value once, and at least one")
    changes = [{varied: value} for value in values] if varied else [{}]
    seeds = range(args.seed, args.seed + args.num_seeds)
    return [replace(args, seed=seed, num_seeds=1, **change) for seed in seeds for change in changes]


def output_path(run, named: str, folder: Path, kind: str, values: str, num_runs: int) -> Path:
    """Where a run writes: folder/KIND[-RUN NAME]VALUES-seedSEED.pt, or the file that the user names for a single run."""
    if named and num_runs > 1:
        raise UserError(f"{named}: names one file, but this command makes {num_runs}; leave the path out")
    run_name = f"-{run.run_name}" if run.run_name else ""
    return Path(named or folder / f"{kind}{run_name}{values}-seed{run.seed}.pt")


def stack_networks(network_class: type, shape: dict, runs: list, device) -> nn.Module:
    """A network of that shape for each run, from its seed, as one whose parameters have a leading dimension S."""
    networks = []
    for run in runs:
        torch.manual_seed(run.seed)
        networks.append(network_class(**shape))
    for name, parameter in networks[0].named_parameters():
        parameter.data = torch.stack([parameter.data, *(network.get_parameter(name).data for network in networks[1:])])
    return networks[0].to(device)


def unstack(stack: nn.Module, s: int) -> dict[str, torch.Tensor]:
    """The weights of run s, as the state_dict of a network by itself."""
    return {name: tensor[s].clone() for name, tensor in stack.state_dict().items()}


def keep_run(best: nn.Module, stack: nn.Module, s: int) -> None:
    """Copy the weights of run s from one stack to another."""
    with torch.no_grad():
        for kept, parameter in zip(best.parameters(), stack.parameters(), strict=True):
            kept[s] = parameter[s]


def problem_of(run, name: str, loss: float, num_updates: int, flag="learning_rate") -> str:
    """What to tell about a loss that is not finite."""
    if math.isfinite(loss):
        return ""
    which = [f"{varied} {getattr(run, varied):g}" for varied in ("seed", "alpha", "beta") if hasattr(run, varied)]
    advice = f"try a smaller --{flag.replace('_', '-')} than {getattr(run, flag):g}"
    return f"{', '.join(which)}: {name} is {loss} after {num_updates} updates; {advice}"


def best_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}-best.pt")


def stop_at_problems(results: list[dict], paths: list[Path]) -> None:
    """Raise what went wrong in training, now that all that went well is written."""
    problems = [(result["problem"], best_path(path)) for result, path in zip(results, paths, strict=True) if result["problem"]]
    for problem, path in problems[:1]:
        kept = f"; the best so far is {path}" if path.exists() else ""
        count = f" ({len(problems)} of {len(results)} runs went wrong)" if len(results) > 1 else ""
        raise UserError(problem + kept + count)


def make_optimizer(stack: nn.Module, learning_rate: float, device: torch.device) -> torch.optim.Adam:
    cuda = device.type == "cuda"  # where everything that changes has to stand in a tensor, for CUDA graphs
    rate = torch.tensor(learning_rate, device=device) if cuda else learning_rate
    return torch.optim.Adam(stack.parameters(), lr=rate, fused=True, capturable=cuda)


def follow_cosine(optimizer: torch.optim.Adam, learning_rate: float, done: float) -> None:
    """The learning rate when that share of all updates is done: it falls to zero along half a cosine."""
    for group in optimizer.param_groups:
        rate = 0.5 * learning_rate * (1 + math.cos(math.pi * done))
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate


def take_step(losses: torch.Tensor, optimizer: torch.optim.Adam, max_grad_norm: float = float("inf")) -> None:
    """One step of every run down its own loss, losses (S,); each run's gradient is clipped to that norm."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    losses.sum().backward()
    if max_grad_norm < float("inf"):
        squares = torch.stack([parameter.grad.flatten(1).square().sum(dim=1) for parameter in parameters])
        scale = (max_grad_norm / (squares.sum(dim=0).sqrt() + 1e-6)).clamp(max=1)  # (S,)
        for parameter in parameters:
            parameter.grad.mul_(scale.view(-1, *[1] * (parameter.dim() - 1)))
    optimizer.step()


def accelerate(compute_losses: Callable, step: Callable, args, device: torch.device) -> Callable:
    """-> update(*inputs), which is step(compute_losses(*inputs)) as fast as the device allows, and returns the losses (S,).

    With --compile, compute_losses and its gradient become fused kernels. With --cudagraphs, all that the fourth call
    launches is recorded and replayed from then on; inputs are copied to where that call's stood, and whatever else `step`
    changes or compute_losses reads must stay where it is. What fails goes on without, after one line of warning."""
    on_cuda = device.type == "cuda"
    eager_losses = compute_losses
    use_graph = on_cuda and args.cudagraphs is not False
    if on_cuda if args.compile is None else args.compile:
        compute_losses = torch.compile(compute_losses, dynamic=False)
    calls, graph, static_inputs, static_losses = 0, None, (), None

    def run(*inputs):
        losses = compute_losses(*inputs)
        step(losses)
        return losses.detach()

    def warn(what: str, error: Exception) -> None:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        tqdm.write(f"warning: {what} failed, going on without it ({reason})", file=sys.stderr)

    def update(*inputs):
        nonlocal calls, compute_losses, use_graph, graph, static_inputs, static_losses
        calls += 1
        if calls == 1:
            try:
                return run(*inputs)
            except Exception as error:
                if compute_losses is eager_losses:
                    raise
                warn("--compile", error)
                compute_losses = eager_losses
        if use_graph and calls <= 3:  # warm up on the side, as recording asks for
            with on_side_stream():
                return run(*inputs)
        if use_graph and graph is None:
            try:
                static_inputs, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    static_losses = run(*static_inputs)
            except Exception as error:
                use_graph, graph = False, None
                warn("--cudagraphs", error)
        if graph is None:
            return run(*inputs)
        for static, x in zip(static_inputs, inputs, strict=True):
            static.copy_(x)
        graph.replay()
        return static_losses

    return update


@contextlib.contextmanager
def on_side_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


# --- end shared block ---


# --- shared block: checkpoint ---
# Origin: collect_data.py. Files that are written whole or not at all, and read without executing anything.
FORMAT = 1
# Flags that may differ between the command that made a file and the one that reuses it or writes it anew. What stands in
# the files that paths name is compared by its hash.
NEUTRAL_ARGS = {"device", "num_threads", "track", "deterministic", "data_path", "reward_path", "bc_path", "vdn_path"}
NEUTRAL_ARGS |= {"policies_path", "prey_path", "compile", "cudagraphs", "checkpoint_every", "resume"}
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


# --- shared block: resume ---
# Origin: collect_data.py. A process that is killed loses nothing, and two that run at once do not mix their files.
LOCKS: dict[Path, int] = {}  # descriptors of the lock files, by the outputs that this process is making
WAIT = "WAIT_FOR_OUTPUTS"  # in the environment of scripts that vdn_rlhf.py starts


def lock_outputs(paths: list[Path], wait: bool = False) -> None:
    """See to it that nobody else writes `paths` until main ends. Where another process is writing one: UserError, or patience
    where that is wanted. Everybody locks in the same order, so that no two processes wait for each other."""
    for path in sorted(paths):
        LOCKS[path] = open_lock(path, wait or WAIT in os.environ)
        remove_partial(path)


def open_lock(path: Path, wait: bool) -> int:
    """Lock `.NAME.lock` beside the output `path`; the system unlocks it when this process ends, however it does."""
    told = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock_path(path), os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(lock_path(path))):
                return descriptor
        except FileNotFoundError:  # whoever had it has just removed it
            pass
        except BlockingIOError:
            if not wait:
                os.close(descriptor)
                raise UserError(f"{path}: another process is writing it; wait for it, or choose a --run-name or path") from None
            if not told:
                print(f"{path}: another process is writing it, waiting for it", flush=True)
            told = True
            time.sleep(0.2)
        except (OSError, ImportError):  # a file system, or Windows, without locks
            return descriptor
        os.close(descriptor)


@contextlib.contextmanager
def releasing_locks():
    """Decorates main, which thereby gives back what it locks."""
    try:
        yield
    finally:
        while LOCKS:
            path, descriptor = LOCKS.popitem()
            with contextlib.suppress(OSError):
                lock_path(path).unlink()
            os.close(descriptor)


def remove_partial(path: Path) -> None:
    """What save_file left of a file when its process was killed."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.partial"):
        partial.unlink(missing_ok=True)


def left_to_do(args, runs: list, paths: list[Path]) -> tuple[list, list[Path]]:
    """The runs that are still to be made and their outputs: not those that are there, if --resume finds all of them or another
    process made them while this one was waiting. `paths` that are there are known to be of these settings."""
    there = [path for path in paths if path.exists()]
    if WAIT not in os.environ and not (args.resume and there == paths and not training_path(paths[0]).exists()):
        there = []
    for path in there:
        print(f"{path}: is there already, nothing to do", flush=True)
    left = [(run, path) for run, path in zip(runs, paths, strict=True) if path not in there]
    return [run for run, _ in left], [path for _, path in left]


def lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def training_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.training.pt")


class TrainingFile:
    """The state of a training, from which --resume goes on as if nothing had happened: NAME.training.pt beside its first output
    NAME.pt, written every --checkpoint-every updates, after every phase and on SIGTERM. Without an output nothing is kept."""

    def __init__(self, output: Path | None = None, args=None, settings=None, device=None, sources=None):
        """settings {flag: value} and sources {name: hash} have to be the same where --resume goes on."""
        self.path, self.phases, self.saved, self.last_done = output and training_path(output), {}, None, 0
        if output is None:
            return
        remove_partial(self.path)
        settings = {name: str(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        sources = sources | {"kind of device": device.type}
        self.every = args.checkpoint_every
        self.content = dict(kind="training", args=settings, meta=dict(sources=sources), stats={})
        if args.resume and self.path.exists():
            self.saved, advice = load_checkpoint(self.path, ("training",)), "leave out --resume to start anew"
            check_same_args(self.path, self.saved["args"], settings, advice)
            for name, value in sources.items():
                if self.saved["meta"].get("sources", {}).get(name) != value:
                    raise UserError(f"{self.path}: begun with another {name} than {value}; {advice}")
        elif args.resume:
            print(f"{self.path}: no such file, nothing to resume: starting anew", flush=True)
        elif self.path.exists():
            print(f"{self.path}: of a run that was stopped; starting anew and writing over it (--resume goes on)", flush=True)

    def begin(self, phase: str, num_updates: int, parts: dict, results: list[dict]) -> int:
        """Put the parts (networks, optimizers, generators, dicts of tensors) and results (of runs: numbers, lists, dicts) of a
        phase into the state that was saved -> number of updates done then. They change in place from now on, and SIGTERM
        waits for `after_update`."""
        self.phases[phase] = self.phase = dict(done=0, num_updates=num_updates, parts=parts, results=results)
        if self.saved is not None and phase in self.saved["metrics"]:
            try:
                done, saved = self.saved["metrics"][phase]
                state = self.saved["state_dict"][phase]
                if type(done) is not int or not 0 < done <= num_updates or not fits(saved, results):
                    raise ValueError
                for name, part in parts.items():
                    load_training_state(part, state[name])
                for result, values in zip(results, saved, strict=True):
                    result.update(values)
            except Exception:  # whatever it is that the file holds
                raise UserError(f"{self.path}: '{phase}' is damaged; leave out --resume to start anew") from None
            self.phase["done"] = done
            print(f"{self.path}: {phase} goes on after {done} of {num_updates} updates", flush=True)
        self.last_done = self.phase["done"]
        TERMINATION["deferred"] = self.path is not None and self.last_done < num_updates
        return self.last_done

    def after_update(self, done: int) -> bool:
        """To be called when an update and what belongs to it are done -> whether the phase ends, because it was the last one or
        all runs have problems. Saves where that is due; after a SIGTERM the process ends here."""
        hopeless = bool(self.phase["results"]) and all(result.get("problem") for result in self.phase["results"])
        self.phase["done"], last = done, hopeless or done == self.phase["num_updates"]
        if self.path is not None and (last or TERMINATION["requested"] or done - self.last_done >= self.every):
            state_dict = {
                name: {part: training_state(value) for part, value in phase["parts"].items()}
                for name, phase in self.phases.items()
            }
            metrics = {name: [phase["done"], phase["results"]] for name, phase in self.phases.items()}
            save_content(self.path, **self.content, state_dict=state_dict, metrics=metrics)
            self.last_done = done
        if TERMINATION["requested"]:
            sys.exit(143)
        TERMINATION["deferred"] = TERMINATION["deferred"] and not last
        return last

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def training_state(part) -> dict:
    """What a network, an optimizer (Adam), a random number generator or a dict of tensors consists of."""
    if isinstance(part, torch.Generator):
        return {"state": part.get_state()}
    if isinstance(part, torch.optim.Optimizer):
        parameters = part.param_groups[0]["params"]
        empty = {i: dict(step=torch.zeros(()), exp_avg=p.data, exp_avg_sq=p.data) for i, p in enumerate(parameters)}
        return part.state_dict()["state"] or empty  # before the first step: of these shapes
    return part.state_dict() if isinstance(part, nn.Module) else part


def load_training_state(part, state: dict) -> None:
    """Raises whatever it may where `state` is not of this part."""
    if not fits(state, training_state(part)):
        raise ValueError
    if isinstance(part, torch.Generator):
        part.set_state(state["state"])
    elif isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(part.state_dict() | {"state": state})
    elif isinstance(part, nn.Module):
        part.load_state_dict(state)
    else:
        for name, tensor in part.items():
            tensor.copy_(state[name])


def fits(value, like) -> bool:
    """Whether what a file holds has the types, keys and shapes of `like`; what lists of numbers hold is not looked at."""
    if isinstance(like, torch.Tensor):
        same = isinstance(value, torch.Tensor) and (value.dtype, value.shape) == (like.dtype, like.shape)
        return same and value.stride() == like.stride()
    if isinstance(like, dict):
        return isinstance(value, dict) and value.keys() == like.keys() and all(fits(value[key], like[key]) for key in like)
    if isinstance(like, list) and like:
        return isinstance(value, list) and len(value) == len(like) and all(map(fits, value, like))
    return type(value) is type(like)


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


# --- shared block: layers ---
# Origin: vdn_rlhf.py. Layers of one network or of a stack: S networks of one shape that are trained at once. The parameters
# of a stack have a leading dimension S, and so has whatever goes in and comes out.
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out); in a stack all of them have the leading dimension S."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    if len(weight) == 1:
        return F.linear(x.squeeze(0), weight.squeeze(0), None if bias is None else bias.squeeze(0)).unsqueeze(0)
    if x.device.type == "cpu":  # here a product for each run is faster than one for all
        biases = [None] * len(weight) if bias is None else bias
        return torch.stack([F.linear(*run) for run in zip(x, weight, biases, strict=True)])
    rows = x.flatten(1, -2)
    outputs = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
    return outputs.view(*x.shape[:-1], -1)


def gru(x: torch.Tensor, layer: nn.GRU, memory: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence of nn.GRU, with the parameters of `layer`. x (*S, B, T, A, H) -> (*S, B, T, A, H) and the state after the
    last step, which the next call takes as `memory`. Every agent of every episode is a sequence of its own."""
    runs, (B, _, A, _) = x.shape[:-4], x.shape[-4:]
    weight, bias = layer.weight_hh_l0, layer.bias_hh_l0
    H = weight.shape[-1]
    gates = linear(x, layer.weight_ih_l0.roll(H, -2), layer.bias_ih_l0.roll(H, -1)).to(weight.dtype)  # r, z, n -> n, r, z
    if not runs:
        gates, weight, bias = gates[None], weight[None], bias[None]
    gates = gates.permute(2, 0, 1, 3, 4).flatten(2, 3)  # (T, S, B * A, 3 * H)
    if memory is None:
        memory = gates.new_zeros(gates.shape[1], B * A, H)
    states = GRURecurrence.apply(gates.contiguous(), memory, weight, bias)  # (T, S, B * A, H)
    outputs = states.unflatten(2, (B, A)).permute(1, 2, 0, 3, 4)
    return outputs if runs else outputs.squeeze(0), states[-1]


class GRURecurrence(torch.autograd.Function):
    """h_t = (1 - z) * n + z * h_{t-1} with r, z = sigmoid(x_rz + g_rz), n = tanh(x_n + r * g_n) and g = h_{t-1} W^T + b, the
    equations of nn.GRU. The gradient is written out, because autograd's takes several small operations a step for each
    of these; nn.GRU itself has no stacks."""

    @staticmethod
    def forward(ctx, x, memory, weight, bias):
        """x (T, S, M, 3 * H): what the inputs add to the gates n, r, z; memory (S, M, H) -> states (T, S, M, H)."""
        T, S, M, H = *x.shape[:3], memory.shape[-1]
        h, g, rz, n = (x.new_empty(steps, S, M, width) for steps, width in ((T + 1, H), (T, 3 * H), (T, 2 * H), (T, H)))
        h[0] = memory
        (x_n, x_rz), (g_rz, g_n), (r, z) = x.split((H, 2 * H), dim=-1), g.split((2 * H, H), dim=-1), rz.split(H, dim=-1)
        steps = zip(*(part.unbind() for part in (h[:-1], h[1:], x_n, x_rz, g, g_rz, g_n, rz, r, z, n)), strict=True)
        with torch.autocast(x.device.type, enabled=False):
            for h_t, h_next, x_n_t, x_rz_t, g_t, g_rz_t, g_n_t, rz_t, r_t, z_t, n_t in steps:
                torch.baddbmm(bias[:, None], h_t, weight.mT, out=g_t)
                torch.add(x_rz_t, g_rz_t, out=rz_t).sigmoid_()
                torch.addcmul(x_n_t, r_t, g_n_t, out=n_t).tanh_()
                torch.lerp(n_t, h_t, z_t, out=h_next)
        ctx.save_for_backward(weight, h, g, rz, n)
        return h[1:]

    @staticmethod
    def backward(ctx, d_states):
        weight, h, g, rz, n = ctx.saved_tensors
        T, S, M, H = n.shape
        (r, z), g_n = rz.split(H, dim=-1), g[..., 2 * H :]
        # What a change of h_t means for x_n, r, z and g_n: known for all steps at once, but for d h_t itself. The first three
        # are the gradient of x, the last three that of g.
        d_gates = n.new_empty(T, S, M, 4, H)
        d_n, d_r, d_z, d_g_n = d_gates.unbind(dim=-2)
        torch.mul(1 - z, 1 - n * n, out=d_n)
        torch.mul(d_n, r, out=d_g_n)
        torch.mul(d_g_n, g_n, out=d_r).mul_(1 - r)
        torch.mul(h[:-1] - n, z * (1 - z), out=d_z)
        d_x, d_g = d_gates[..., :3, :].flatten(-2), d_gates[..., 1:, :].flatten(-2)
        d_h = d_states[-1]
        steps = list(zip(*(part.unbind() for part in (d_gates, d_g, z)), strict=True))
        for t in reversed(range(T)):
            d_gates_t, d_g_t, z_t = steps[t]
            d_gates_t.mul_(d_h[:, :, None])
            d_h = torch.addcmul(d_states[t - 1], d_h, z_t) if t > 0 else d_h * z_t
            d_h.baddbmm_(d_g_t, weight)
        d_g = d_g.transpose(0, 1).flatten(1, 2)  # (S, T * M, 3 * H)
        d_weight = d_g.mT @ h[:-1].transpose(0, 1).flatten(1, 2)
        return d_x, d_h, d_weight, d_g.sum(dim=1)


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
        """observations (B, T, A, D), actions (B, T, A) -> rewards (B, T, A); in a stack all with a leading dimension S."""
        A = observations.shape[-2]
        if self.input == "joint":  # (B, T, 1, A * D): embedded once, added to every agent
            observations = observations.flatten(-2)[..., None, :]
        ids = torch.eye(A, device=observations.device).expand(*actions.shape, A)
        chosen = F.one_hot(actions.long(), self.num_actions).to(observations.dtype)
        x = linear(observations, self.observation_embedding.weight, self.observation_embedding.bias)
        x = x + linear(torch.cat([ids, chosen], dim=-1), self.action_embedding.weight, None)
        x = F.relu(x)  # (B, T, A, H)
        if self.network == "gru":
            x, _ = gru(x, self.body, None)
        else:
            for layer in self.body[::2]:
                x = F.relu(linear(x, layer.weight, layer.bias))
        with torch.autocast(x.device.type, enabled=False):  # the last layer in full precision
            return linear(x.to(self.head.weight.dtype), self.head.weight, self.head.bias).squeeze(-1)


# --- end shared block ---


# --- shared block: particle_env ---
# Origin: collect_data.py. The multi-agent particle environments (package mpe2), N of them at once. Inside, tensors keep
# the environments last, e.g. positions (A, 2, N), because elementwise work on long rows is fastest; observations,
# actions and rewards come and go with the environments first. A game is a table of constants and a reward function.
@dataclass(frozen=True)
class Game:
    """Constants of one game. The bodies are the A agents and, in tag, the prey after them; tuples have one entry per body.
    Returns low and high fix the scale of the score."""

    name: str
    num_agents: int
    num_landmarks: int
    num_actions: int
    observation_dim: int
    observe: Callable[[ParticleEnv], torch.Tensor]
    """(A, D, N) from the environment as it is"""
    reward: Callable[[ParticleEnv], torch.Tensor]
    """(A, N) from the environment as it is after a step"""
    body_sizes: tuple[float, ...]
    """radii; minus infinity: touches nothing"""
    accelerations: tuple[float, ...]
    max_speeds: tuple[float, ...]
    """infinite: no limit"""
    landmark_size: float = -float("inf")
    """landmarks push bodies away within this radius; minus infinity: they do not touch"""
    landmark_range: float = 1.0
    """landmarks start in +- this, bodies in +-1"""
    num_words: int = 0
    """an action is also one of so many words to the partner: action % 5 moves, action // 5 speaks"""
    prey: nn.Module | None = None
    """moves the last body, by sampling from the softmax of its outputs"""
    low: float = float("nan")
    """mean return of the random policy: score 0"""
    high: float = float("nan")
    """mean return of the paper's authors' best expert (tag: of the expert shipped here): score 100"""
    horizon: int = 25

    def metrics(self, test_return: float) -> dict[str, float]:
        """Return and score; no score where low and high were never measured, in spread with counts that the paper lacks."""
        score = 100 * (test_return - self.low) / (self.high - self.low)
        return {"charts/test_return": test_return} | ({} if math.isnan(score) else {"charts/score": score})


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


SPREAD_SCORES = {  # (agents, landmarks): returns of the random policy and of the authors' best expert
    **{(3, 3): (-26.46, -10.03), (4, 5): (-38.65, -26.58), (5, 5): (-35.34, -18.73)},
    **{(6, 5): (-33.08, -25.03), (7, 5): (-31.32, -24.16)},
}


def spread(num_agents: int, num_landmarks: int) -> Game:
    """simple_spread_v3, where MPE2 has as many landmarks as agents."""
    A, L, infinity = num_agents, num_landmarks, float("inf")
    low, high = SPREAD_SCORES.get((A, L), (float("nan"), float("nan")))
    return Game(
        **dict(name="spread" if (A, L) == (3, 3) else f"spread-{A}x{L}", num_agents=A, num_landmarks=L, num_actions=5),
        **dict(observation_dim=4 + 2 * L + 4 * (A - 1), observe=spread_observation, reward=spread_reward),
        **dict(body_sizes=(0.15,) * A, accelerations=(5.0,) * A, max_speeds=(infinity,) * A, low=low, high=high),
    )


def reference_observation(env: ParticleEnv) -> torch.Tensor:
    """Own velocity, landmarks relative to it, the colour of the landmark that the partner is to reach, the partner's word."""
    colors = 0.25 + 0.5 * F.one_hot(env.goals, 3).transpose(1, 2)  # (A, 3, N)
    return torch.cat([env.velocities, env.relative[:, :3].flatten(1, 2), colors, env.words.flip(0)], dim=1)


def reference_reward(env: ParticleEnv) -> torch.Tensor:
    """0.5 * (-distance of the partner to its goal, which only the agent sees) + 0.5 * (mean of that over both agents)."""
    distances = env.distances[:, :3].flip(0).gather(1, env.goals[:, None]).squeeze(1)  # (A, N)
    return -0.5 * distances - 0.5 * distances.mean(dim=0)


def reference() -> Game:
    """simple_reference_v3: two agents tell each other with one of ten words per step which of three landmarks to reach."""
    infinity = float("inf")
    return Game(
        **dict(name="reference", num_agents=2, num_landmarks=3, num_actions=50, num_words=10, observation_dim=21),
        **dict(observe=reference_observation, reward=reference_reward, body_sizes=(-infinity,) * 2),
        **dict(accelerations=(5.0,) * 2, max_speeds=(infinity,) * 2, low=-28.34, high=-10.36),
    )


def tag_observation(env: ParticleEnv) -> torch.Tensor:
    """Own velocity and position, landmarks and other bodies relative to it, the velocity of the prey."""
    own = torch.cat([env.velocities, env.positions, env.relative.flatten(1, 2)], dim=1)[:3]
    return torch.cat([own, env.velocities[3:].expand(3, -1, -1)], dim=1)


def prey_observation(env: ParticleEnv) -> torch.Tensor:
    """The prey's own velocity and position, landmarks and adversaries relative to it -> (1, 14, N)."""
    return torch.cat([env.velocities[3], env.positions[3], env.relative[3].flatten(0, 1)])[None]


def tag_reward(env: ParticleEnv) -> torch.Tensor:
    """10 for every adversary that touches the prey, for each of them."""
    L = env.game.num_landmarks
    touches = env.distances[3, L:] < env.contact_distances[3, L:]  # (A, N)
    return 10.0 * touches.sum(dim=0).expand(3, -1)


def tag(prey: nn.Module | None) -> Game:
    """simple_tag_v3 as a game of its three adversaries. Without a prey policy `step` takes the prey's actions too."""
    return Game(
        **dict(name="tag", num_agents=3, num_landmarks=2, num_actions=5, observation_dim=16, prey=prey),
        **dict(observe=tag_observation, reward=tag_reward, landmark_size=0.2, landmark_range=0.9),
        **dict(body_sizes=(0.075,) * 3 + (0.05,), accelerations=(3.0,) * 3 + (4.0,), max_speeds=(1.0,) * 3 + (1.3,)),
        **dict(low=0.69, high=16.05),  # against policies/tag/prey.pt
    )


def load_prey() -> nn.Module:
    """The policy that all tag results here are against, made by benchmark/train_prey.py."""
    path = Path(__file__).parent / "policies" / "tag" / "prey.pt"
    if not path.exists():
        raise UserError(f"{path}: no such file; tag needs the policy of its prey, copy the file there from the repository")
    prey = build_network(AgentNetwork, path, load_checkpoint(path, ("prey",)), "cpu")
    if (prey.observation_dim, prey.num_agents, prey.num_actions) != (14, 1, 5):
        raise UserError(f"{path}: 'meta' has other sizes than the prey's 14 observations and 5 actions")
    return prey


def make_game(name: str) -> Game | None:
    """The game with that name (spread-5x4: 5 agents, 4 landmarks); None for a name that is no game of this project."""
    if name == "spread":
        return spread(3, 3)
    if sizes := re.fullmatch(r"spread-([1-9]\d*)x([1-9]\d*)", name):
        return spread(int(sizes[1]), int(sizes[2]))
    return reference() if name == "reference" else tag(load_prey()) if name == "tag" else None


def find_game(path: Path | str, name: str, shape: tuple[int, int, int, int]) -> Game | None:
    """The game a file says it is of, None if this project does not know it. Raises UserError where the file's numbers of
    agents, observations, actions and steps are not the game's."""
    game = make_game(name)
    if game is not None:
        expected = (game.num_agents, game.observation_dim, game.num_actions, game.horizon)
        if shape != expected:
            raise UserError(f"{path}: (agents, observation size, actions, steps) are {shape} but {name} has {expected}")
    return game


class ParticleEnv:
    """N copies of a game, stepped together. All of them last `game.horizon` steps, so there is no done flag.

    Equal to mpe2 within rounding (tests/test_particle_env.py): a position moves with the old velocity, then the velocity
    is damped, then the force of action and contacts is added.
    """

    dt, damping, contact_force, contact_margin = 0.1, 0.25, 100.0, 1e-3  # mpe2/_mpe_utils/core.py; masses are 1

    def __init__(self, game: Game, num_envs: int, device="cpu", dtype=torch.float32):
        bodies, L = len(game.body_sizes), game.num_landmarks
        self.game, self.num_envs, self.device, self.dtype = game, num_envs, torch.device(device), dtype
        options = dict(device=device, dtype=dtype)
        others = [[j for j in range(bodies) if j != i] for i in range(bodies)]
        # What body i observes and touches, in MPE2's order: all landmarks, then the other bodies.
        self.observed = torch.tensor([[*range(bodies, bodies + L), *others[i]] for i in range(bodies)], device=device)
        sizes = torch.tensor([*game.body_sizes, *[game.landmark_size] * L], **options)
        self.contact_distances = (sizes[:bodies, None] + sizes[self.observed])[..., None]  # (bodies, L + bodies - 1, 1)
        self.first_contact = L if game.landmark_size < 0 else 0  # skips the landmarks where nothing touches them
        self.has_contacts = max(game.body_sizes) > 0
        self.accelerations = torch.tensor(game.accelerations, **options)[:, None]  # (bodies, 1)
        self.max_speeds = torch.tensor(game.max_speeds, **options)[:, None]  # (bodies, 1)
        self.moves = torch.tensor([[0, -1, 1, 0, 0], [0, 0, 0, -1, 1]], **options)  # (x and y, action)
        if game.prey is not None:
            game.prey.to(device)
        self._wake_prey(None)

    def reset(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """New random start states -> observations (N, A, D). A prey draws its actions from the same generator."""
        game, bodies = self.game, len(self.game.body_sizes)
        shape = (self.num_envs, bodies + game.num_landmarks, 2)
        uniform = 2 * torch.rand(shape, generator=generator, device=self.device, dtype=self.dtype) - 1
        positions, landmarks, goals = uniform[:, :bodies], uniform[:, bodies:] * game.landmark_range, None
        if game.num_words:
            shape = (self.num_envs, game.num_agents)
            goals = torch.randint(game.num_landmarks, shape, generator=generator, device=self.device)
        self._wake_prey(generator)
        return self.set_state(positions, torch.zeros_like(positions), landmarks, goals)

    def set_state(self, positions, velocities, landmarks, goals=None) -> torch.Tensor:
        """Start from positions and velocities (N, bodies, 2), landmarks (N, L, 2) and, in reference, the landmarks (N, A) to
        which the agents are to send their partners -> observations (N, A, D)."""
        self.positions, self.velocities, self.landmarks = (
            x.to(self.device, self.dtype).permute(1, 2, 0).contiguous() for x in (positions, velocities, landmarks)
        )
        if self.game.num_words:
            self.goals = goals.to(self.device).T.contiguous()  # (A, N)
            self.words = self.positions.new_zeros(self.game.num_agents, self.game.num_words, self.num_envs)
        self._measure()
        return self.game.observe(self).permute(2, 0, 1).contiguous()

    def state(self) -> list[torch.Tensor]:
        """What set_state takes."""
        state = [x.permute(2, 0, 1) for x in (self.positions, self.velocities, self.landmarks)]
        return [*state, self.goals.T] if self.game.num_words else state

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """actions (N, A) in 0 .. num_actions - 1 -> observations (N, A, D), rewards (N, A)."""
        if self.game.prey is not None:
            actions = torch.cat([actions, self.act_prey(prey_observation(self).permute(2, 0, 1).float(), 0)], dim=1)
        if self.game.num_words:
            self.words = F.one_hot(actions.T // 5, self.game.num_words).transpose(1, 2).to(self.dtype)  # (A, words, N)
            actions = actions % 5
        force = (self.moves[:, actions.T] * self.accelerations).transpose(0, 1)  # (bodies, 2, N)
        if self.has_contacts:
            force = force - self._contact_forces()
        self._move(force)
        return self.game.observe(self).permute(2, 0, 1).contiguous(), self.game.reward(self).T

    def _move(self, force: torch.Tensor) -> None:
        self.positions = self.positions + self.velocities * self.dt
        self.velocities = self.velocities * (1 - self.damping) + force * self.dt
        if min(self.game.max_speeds) < float("inf"):
            x, y = self.velocities.unbind(dim=1)
            speeds = (x * x + y * y).sqrt()  # (bodies, N)
            self.velocities = self.velocities * (self.max_speeds / speeds).clamp(max=1)[:, None]
        self._measure()

    def _contact_forces(self) -> torch.Tensor:
        """Towards what is touched, (bodies, 2, N): a softplus of the overlap, written so that neither exp overflows nor its
        slow subnormal range is reached (beyond 80 it adds less than 1e-34)."""
        first = self.first_contact
        distances = self.distances[:, first:]  # (bodies, landmarks and bodies it can touch, N)
        overlap = (self.contact_distances[:, first:] - distances) / self.contact_margin
        softplus = overlap.clamp(min=0) + torch.log1p(torch.exp(-overlap.abs().clamp(max=80)))
        push = self.contact_force * self.contact_margin * softplus / distances
        return (self.relative[:, first:] * push[:, :, None]).sum(dim=1)

    def _measure(self) -> None:
        """Where every body sees landmarks and other bodies, and how far they are."""
        entities = torch.cat([self.positions, self.landmarks])  # (bodies + L, 2, N)
        self.relative = entities[self.observed] - self.positions[:, None]  # (bodies, L + bodies - 1, 2, N)
        x, y = self.relative.unbind(dim=2)
        self.distances = (x * x + y * y).sqrt()  # (bodies, L + bodies - 1, N)

    def _wake_prey(self, generator) -> None:
        if self.game.prey is not None:
            self.act_prey = make_actor(self.game.prey, 5, generator, sample=True)


# --- end shared block ---


# --- shared block: agent_network ---
# Origin: vdn_rlhf.py. The network of every policy in this project: Q-values of VDN, action logits of imitation learning.
class AgentNetwork(nn.Module):
    """One network for all agents, told apart by a one-hot id. With an MLP its policy is Markov in observation and step, like
    pi_h(a_i | o_i) of the time-inhomogeneous game of section 3; with a GRU it reads the observations so far.

    With num_modes > 1 it is a mixture of policies: its output is log pi(a | o_i) = log sum_z w_z pi_z(a | o_i)."""

    def __init__(
        self,
        observation_dim,
        num_agents,
        num_actions,
        horizon,
        network="mlp",
        hidden_dim=128,
        num_layers=3,
        time_input=True,
        num_words=0,
        num_modes=1,
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
        num_outputs = num_words + num_actions // num_words if num_words else num_actions
        self.head = nn.Linear(hidden_dim, num_modes * num_outputs)
        if num_modes > 1:
            self.mode_logits = nn.Parameter(torch.zeros(num_modes))  # w is their softmax
        self.network, self.observation_dim, self.num_agents = network, observation_dim, num_agents
        self.num_actions, self.horizon, self.time_input = num_actions, horizon, time_input
        self.num_words, self.num_modes = num_words, num_modes

    def forward(self, observations, first_step=0, memory=None):
        """observations (B, T, A, D) of the steps first_step, first_step + 1, ... -> outputs (B, T, A, num_actions), memory. In
        a stack everything has a leading dimension S.

        `memory` is the GRU's state after the steps before first_step, None at the start of an episode."""
        if self.num_modes == 1:
            return self._outputs(observations, first_step, memory)
        outputs, memory = self._outputs(observations, first_step, memory)
        log_probs = outputs.unflatten(-1, (self.num_modes, self.num_actions)).log_softmax(dim=-1)  # (B, T, A, num_modes, ...)
        log_weights = self.mode_logits.log_softmax(dim=-1)[..., None, None, None, :, None]
        return (log_probs + log_weights).logsumexp(dim=-2), memory

    def log_joint(self, observations, actions):
        """log p(z, tau_i) of whole trajectories, but for what the game adds to it: log w_z + sum_t log pi_z(a_i,t | o_i,t),
        (B, A, num_modes), from observations (B, T, A, D) and actions (B, T, A); in a stack with a leading dimension S."""
        outputs, _ = self._outputs(observations, 0, None)
        log_probs = log_prob(outputs.unflatten(-1, (self.num_modes, self.num_actions)), actions[..., None]).sum(dim=-3)
        return log_probs if self.num_modes == 1 else log_probs + self.mode_logits.log_softmax(dim=-1)[..., None, None, :]

    def _outputs(self, observations, first_step, memory):
        *_, T, A, _ = observations.shape
        ids = torch.eye(A, device=observations.device).expand(*observations.shape[:-1], A)
        x = torch.cat([observations, ids], dim=-1)
        if self.time_input:
            steps = torch.arange(first_step, first_step + T, device=observations.device) / self.horizon
            x = torch.cat([x, steps[:, None, None].expand(*x.shape[:-1], 1)], dim=-1)
        if self.network == "mlp":
            for layer in self.body[::2]:
                x = F.relu(linear(x, layer.weight, layer.bias))
        else:
            x = F.relu(linear(x, self.embedding[0].weight, self.embedding[0].bias))
            x, memory = gru(x, self.body, memory)
        with torch.autocast(x.device.type, enabled=False):  # the last layer in full precision
            outputs = linear(x.to(self.head.weight.dtype), self.head.weight, self.head.bias)
        if self.num_words:  # the sum of one value per word and one per move (action = 5 * word + move in reference)
            words, moves = outputs[..., : self.num_words, None], outputs[..., None, self.num_words :]
            outputs = (words + moves).flatten(-2)
        return outputs, memory


def log_prob(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Log-probability of actions under logits (..., num_actions); the leading dimensions broadcast."""
    log_probs = logits.log_softmax(dim=-1)
    index = actions.long()[..., None].expand(*logits.shape[:-1], 1)
    return log_probs.gather(-1, index).squeeze(-1)


# --- end shared block ---


# --- shared block: regularized_policy ---
# Origin: vdn_rlhf.py. What it learns.
class RegularizedPolicy(nn.Module):
    """Q-values that know their own regularization: Q_i(o_i, a) = beta * (log pi_ref(a | o_i) + log |A_i|) + f_i(o_i, a).

    The first term is the KL part of the step reward of Eq. (3), which is known for every action; only the rest, f, is
    learned. A network that learns all of Q never sees that term for the actions the dataset lacks."""

    def __init__(self, values, reference, beta: float, kl_clip: bool):
        """values (f) and reference (pi_ref): two AgentNetworks, or dicts of what AgentNetwork takes."""
        super().__init__()
        self.values = AgentNetwork(**values) if isinstance(values, dict) else values
        self.reference = AgentNetwork(**reference) if isinstance(reference, dict) else reference
        self.beta, self.kl_clip = float(beta), bool(kl_clip)
        for name in ("observation_dim", "num_agents", "num_actions", "horizon"):
            setattr(self, name, getattr(self.values, name))
            if getattr(self.values, name) != getattr(self.reference, name):
                raise ValueError(f"values and reference differ in {name}")
        if not math.isfinite(self.beta):
            raise ValueError(f"beta is {beta}")

    def forward(self, observations, first_step=0, memory=None):
        """As AgentNetwork: observations (B, T, A, D) -> Q-values (B, T, A, num_actions), memory of both networks."""
        memory = memory or (None, None)
        values, values_memory = self.values(observations, first_step, memory[0])
        logits, reference_memory = self.reference(observations, first_step, memory[1])
        return values + kl_rewards(logits, self.beta, self.kl_clip), (values_memory, reference_memory)


def kl_rewards(logits: torch.Tensor, beta: float, kl_clip: bool) -> torch.Tensor:
    """beta * (log pi_ref(a | o_i) + log |A_i|) of Eq. (3) for every action; logits (..., num_actions) are those of pi_ref.

    Eq. (3) has -log(pi_w / pi_ref); a greedy Q-policy has no density, so pi_w is 1 / |A_i| (section 5.3)."""
    rewards = beta * (logits.log_softmax(dim=-1) + math.log(logits.shape[-1]))
    return rewards.clamp(-10, 1) if kl_clip else rewards


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
def td_lambda_targets(rewards, values, baselines, gamma: float, td_lambda: float) -> torch.Tensor:
    """Targets G_t = r_t + gamma * (V_{t+1} + lambda * (G_{t+1} - B_{t+1})), all (..., T), with V_T = B_T = G_T = 0: the game
    ends after step T, so nothing is bootstrapped past it.

    With baselines B = V this is TD(lambda), G_t = r_t + gamma * ((1 - lambda) * V_{t+1} + lambda * G_{t+1}), which charges
    an action with the later mistakes of the behavior. With B_t = Q_t(a_t) these are taken out again: Q(lambda) with
    off-policy corrections (Harutyunyan et al., 2016).

    Unrolled, G_t = sum over k >= t of (gamma * lambda)^(k - t) * (r_k + gamma * (V_{k+1} - lambda * B_{k+1}))."""
    steps = torch.arange(rewards.shape[-1], device=rewards.device)
    lag = steps[:, None] - steps[None, :]  # (k, t)
    decay = torch.where(lag >= 0, (gamma * td_lambda) ** lag.clamp(min=0).to(rewards.dtype), 0)
    bootstrap = F.pad((values - td_lambda * baselines)[..., 1:], (0, 1))
    return ((rewards + gamma * bootstrap)[..., None] * decay).sum(dim=-2)  # no matrix product: in full precision


def vdn_loss(
    online, target, observations, actions, rewards, gamma: float, td_lambda: float, off_policy=False, known_values=0.0
) -> torch.Tensor:
    """Mean squared TD error of Q_tot = sum_i Q_i over whole episodes. observations (B, T + 1, A, D), actions (B, T, A),
    team rewards (B, T). Double Q-learning: the online network chooses the next action, the target network values it. With a
    leading dimension S, for stacks, the result is (S,).

    known_values (B, T, A, num_actions) are a part of the Q-values that the networks need not learn. off_policy: correct
    the targets for actions of the behavior that are not greedy."""
    observations = observations[..., :-1, :, :]  # what is seen after the last step is never needed
    q_values = online(observations)[0] + known_values  # (B, T, A, num_actions)
    q_chosen = q_values.gather(-1, actions[..., None]).squeeze(-1).sum(dim=-1)  # (B, T)
    with torch.no_grad():
        target_q_values = target(observations)[0] + known_values
        greedy = q_values.argmax(dim=-1, keepdim=True)
        values = target_q_values.gather(-1, greedy).squeeze(-1).sum(dim=-1)  # (B, T): V_0 .. V_{T-1}
        chosen_values = target_q_values.gather(-1, actions[..., None]).squeeze(-1).sum(dim=-1)  # (B, T)
        baselines = chosen_values if off_policy else values
        targets = td_lambda_targets(rewards, values, baselines, gamma, td_lambda)
    return (q_chosen - targets).square().mean(dim=(-2, -1))


# --- end shared block ---


@torch.no_grad()
def standardized_rewards(reward_model, reward_stats: dict, observations, actions) -> torch.Tensor:
    """r_std of Eq. (4). observations (B, T + 1, A, D), actions (B, T, A) -> (B, T, A)."""
    r_phi = reward_model(observations[:, :-1], actions)
    return (r_phi - reward_stats["mean"]) / max(reward_stats["std"], 1e-8)


@torch.no_grad()
def trajectory_weights(bc_policy: AgentNetwork, observations, actions, team_returns, beta: float) -> torch.Tensor:
    """How much more often than the behavior pi_ref is to play as in each trajectory, (N, A) up to a factor.

    Over policies that draw a mode z before the first step, max E[R] - beta * KL(pi || behavior) has the optimum p(z)
    proportional to w_z exp(E[R | z] / beta). R is the learned return of the team: r_std summed over agents and steps, (N,).
    Every agent is taken for itself, whatever the modes of the others; its own is known up to the posterior p(z | tau_i)."""
    chunks = zip(observations.split(1024), actions.split(1024), strict=True)
    posterior = torch.cat([bc_policy.log_joint(o[:, :-1], a).softmax(dim=-1) for o, a in chunks])  # (N, A, num_modes)
    total = posterior.sum(dim=(0, 1))
    mode_returns = (posterior * team_returns[:, None, None]).sum(dim=(0, 1)) / total.clamp(min=1e-8)
    for share, mode_return in zip((total / total.sum()).tolist(), mode_returns.tolist(), strict=True):
        print(f"mode of the behavior: {share:6.1%} of the trajectories, mean learned return of the team {mode_return:.2f}")
    mode_returns = mode_returns.where(total > 0.01 * total.sum(), -torch.inf)  # of too few trajectories to know
    return (posterior * ((mode_returns - mode_returns.max()).double() / beta).exp().float()).sum(dim=-1)


def make_reference_policies(
    runs: list[Args], bc_policies: list, shape: dict, observations, actions, team_returns, generators: list, training_file=None
) -> list[AgentNetwork]:
    """pi_ref of every run: imitation of the reweighted trajectories by a network of that shape, but with one mode. Without
    modes, or without a KL term that says how much to trust them, it is the BC policy. team_returns (S, N)."""
    args, device, references, training_file = runs[0], observations.device, list(bc_policies), training_file or TrainingFile()
    chosen = [s for s, run in enumerate(runs) if bc_policies[s].num_modes > 1 and run.beta > 0 and run.imitation_updates > 0]
    for s in set(range(len(runs))) - set(chosen):
        reason = "it has one mode" if bc_policies[s].num_modes == 1 else "no reweighting asked for"
        print(f"pi_ref of seed {runs[s].seed}, beta {runs[s].beta:g} is the BC policy: {reason}")
    if not chosen:
        return references
    weights = [trajectory_weights(bc_policies[s], observations, actions, team_returns[s], runs[s].beta) for s in chosen]
    weights = torch.stack(weights)  # (S, N, A)
    # An episode is drawn by the sum over its agents. On the CPU, because CUDA adds in an order of its own.
    cumulative = weights.sum(dim=2).double().cpu().cumsum(dim=1)  # (S, N)
    draws = (args.imitation_updates * args.batch_size,)
    uniform = torch.stack([torch.rand(draws, dtype=torch.float64, generator=generators[s]) for s in chosen])
    batches = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=len(observations) - 1)
    batches = batches.view(len(chosen), -1, args.batch_size).transpose(0, 1).to(device)  # (updates, S, B)

    shape = shape | {"num_modes": 1}
    stack = stack_networks(AgentNetwork, shape, [runs[s] for s in chosen], device)
    optimizer = make_optimizer(stack, args.imitation_learning_rate, device)
    run_index, bf16 = torch.arange(len(chosen), device=device)[:, None], use_bfloat16(args.bf16, device)

    def compute_losses(batch):  # (S, B)
        weight = weights[run_index, batch]  # (S, B, A)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            logits, _ = stack(observations[batch][..., :-1, :, :])
        nll = -log_prob(logits, actions[batch]).mean(dim=-2)  # (S, B, A)
        return (nll * weight / weight.sum(dim=-1, keepdim=True)).sum(dim=-1).mean(dim=-1)

    update = accelerate(compute_losses, lambda losses: take_step(losses, optimizer, 1.0), args, device)
    num_updates = len(batches)
    begun = training_file.begin("imitation", num_updates, dict(stack=stack, optimizer=optimizer), [])
    progress = tqdm(total=num_updates, initial=begun, desc="imitation, reweighted", unit="update", mininterval=1)
    for i, batch in islice(enumerate(batches, 1), begun, None):
        follow_cosine(optimizer, args.imitation_learning_rate, (i - 1) / num_updates)
        losses = update(batch)
        progress.update()
        for s, loss in zip(chosen, losses.tolist(), strict=True) if i == num_updates else ():
            if problem := problem_of(runs[s], "the imitation loss of pi_ref", loss, i, "imitation_learning_rate"):
                raise UserError(problem)
        training_file.after_update(i)
    progress.close()
    for position, s in enumerate(chosen):
        references[s] = AgentNetwork(**shape).to(device).requires_grad_(False)
        references[s].load_state_dict(unstack(stack, position))
    return references


def evaluate(game: Game, online, reference_policy, seed: int, device) -> dict[str, float]:
    """Greedy return on fresh episodes, and how probable the actions played are under the reference policy."""
    generator = torch.Generator(device).manual_seed(seed)
    env = ParticleEnv(game, HISTORY_EPISODES, device)
    act = make_actor(online, game.num_actions, generator)
    observations, actions, rewards = rollout(env, act, env.reset(generator))
    with torch.no_grad():
        logits, _ = reference_policy(observations[:, :-1])
    test_return = rewards.sum(dim=1).mean().item()
    return game.metrics(test_return) | {"charts/log_pi_ref": log_prob(logits, actions).mean().item()}


def learn_policies(
    runs: list[Args], game, shape: dict, observations, actions, rewards, references, generators, log, training_file=None
) -> list[dict]:
    """Offline VDN with Q-networks of that shape, one for each run, for its rewards (S, N, T): sum_i r_std,i. -> the policy of
    every run, the one with the best test return (None for a game that cannot be played), metrics, and what went wrong."""
    args, device, actions, training_file = runs[0], observations.device, actions.long(), training_file or TrainingFile()
    chunks = tqdm(observations.split(1024), desc="reference policies", unit="chunk", mininterval=1)
    kl = [
        [kl_rewards(pi_ref(chunk[:, :-1])[0], run.beta, run.kl_clip) for pi_ref, run in zip(references, runs, strict=True)]
        for chunk in chunks
    ]
    kl = torch.stack([torch.cat(parts) for parts in zip(*kl, strict=True)])  # (S, N, T, A, num_actions)
    batches = [torch.randint(len(actions), (args.num_updates, args.batch_size), generator=g) for g in generators]
    batches = torch.stack(batches, dim=1).to(device)  # (updates, S, B)
    run_index, bf16 = torch.arange(len(runs), device=device)[:, None], use_bfloat16(args.bf16, device)

    online, target = (stack_networks(AgentNetwork, shape, runs, device) for _ in range(2))
    target.requires_grad_(False)
    optimizer = make_optimizer(online, args.learning_rate, device)

    def compute_losses(batch):  # (S, B)
        kl_terms, chosen = kl[run_index, batch], actions[batch]  # (S, B, T, A, num_actions), (S, B, T, A)
        team_rewards = rewards[run_index, batch] + kl_terms.gather(-1, chosen[..., None]).sum(dim=(-1, -2))  # Eq. (3)
        episodes, known = (observations[batch], chosen, team_rewards), kl_terms if args.known_kl else 0.0
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            return vdn_loss(online, target, *episodes, args.gamma, args.td_lambda, args.off_policy, known)

    def step(losses):
        take_step(losses, optimizer, args.max_grad_norm)
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), args.target_update_rate)

    def make_policy(stack: nn.Module, s: int) -> nn.Module:
        values = AgentNetwork(**shape).to(device).requires_grad_(False)
        values.load_state_dict(unstack(stack, s))
        return RegularizedPolicy(values, references[s], runs[s].beta, args.kl_clip) if args.known_kl else values

    update = accelerate(compute_losses, step, args, device)
    best = copy.deepcopy(online).requires_grad_(False)  # of every run the weights with the best test return
    names = ["losses/td_loss"] if game is None else ["losses/td_loss", *game.metrics(0.0), "charts/log_pi_ref"]
    metrics = dict.fromkeys(names, math.nan)
    results = [dict(best_return=-float("inf"), metrics=metrics, history=[], problem="") for _ in runs]
    parts = dict(online=online, target=target, best=best, optimizer=optimizer)
    begun = training_file.begin("VDN", args.num_updates, parts, results)
    eval_every = max(args.num_updates // 20, 1)
    values = ", ".join(f"{run.beta:g}" for run in runs if run.seed == args.seed)
    progress = tqdm(total=args.num_updates, initial=begun, desc=f"offline VDN, beta {values}", unit="update", mininterval=1)
    start, evaluation_time = time.time(), 0.0
    for i, batch in islice(enumerate(batches, 1), begun, None):
        follow_cosine(optimizer, args.learning_rate, (i - 1) / args.num_updates)
        losses = update(batch)
        progress.update()
        if i % eval_every == 0 or i == args.num_updates:
            losses, evaluation_start = losses.tolist(), time.time()
            for s, (run, result) in enumerate(zip(runs, results, strict=True)):
                result["problem"] = result["problem"] or problem_of(run, "losses/td_loss", losses[s], i)
                if result["problem"]:
                    continue
                metrics = {"losses/td_loss": losses[s]}
                if game is not None:
                    metrics |= evaluate(game, make_policy(online, s), references[s], run.seed + i, device)
                    progress.set_postfix({"return": f"{metrics['charts/test_return']:.2f}"})
                    if metrics["charts/test_return"] > result["best_return"]:
                        result["best_return"] = metrics["charts/test_return"]
                        keep_run(best, online, s)
                log(s, metrics, i)
                result["history"].append({"update": i, **metrics})
                result["metrics"] = metrics
            evaluation_time += time.time() - evaluation_start
        if training_file.after_update(i):
            break
    progress.close()
    speed = len(runs) * (args.num_updates - begun) / max(time.time() - start - evaluation_time, 1e-9)
    for s, (run, result) in enumerate(zip(runs, results, strict=True)):
        result["policy"] = None if result["problem"] else make_policy(online, s)
        result["best_policy"] = make_policy(best, s) if result["best_return"] > -float("inf") else None
        result["metrics"] = result["metrics"] | {"speed/updates_per_second": speed}
        if game is not None:
            reference_return = mean_return(game, references[s], TEST_EPISODES, run.seed + 10**6, device)
            result["metrics"]["charts/reference_return"] = reference_return
        log(s, result["metrics"], args.num_updates)
    return results


def make_missing(files: list[tuple[Path, bool, str, dict]]) -> None:
    """Have sibling scripts make, side by side, those of the files (path, named by the user, script, flags) that are missing at
    their default paths; they wait for what another process is making. A path that the user named must exist."""
    commands, processes = [], []
    for path, named, script, flags in files:
        sibling = Path(__file__).with_name(script)
        if path.exists():
            continue
        if named or not sibling.exists():
            raise UserError(f"{path}: no such file; {script} makes it" + ("" if named else ", which is not beside this script"))
        words = [os.path.relpath(sibling)]
        for flag, value in flags.items():
            if value is True:
                words.append(f"--{flag}")
            elif value is not False and value not in ("", None):
                words += [f"--{flag}", str(value)]
        commands.append(words)
    for words in commands:
        print("$", shlex.join(["python", *words]), flush=True)
    try:
        for position, words in enumerate(commands):  # their progress bars stand one below the other
            environment = os.environ | {"TQDM_POSITION": str(position), WAIT: "1"}
            processes.append(subprocess.Popen([sys.executable, *words], env=environment))
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.1)
        for words, process in zip(commands, processes, strict=True):
            if process.poll() and process.returncode < 0:
                raise UserError(f"{words[0]}: killed by signal {-process.returncode}")
            if process.poll():
                sys.exit(process.returncode)
    finally:
        for process in processes:  # they save what they have
            process.terminate()
        for process in processes:
            process.wait()


def load_model(
    path: Path, named: str, kind: str, network_class: type, args: Args, dataset: dict, device
) -> tuple[dict, nn.Module]:
    """The reward model or BC policy, if it is of the dataset's game and of the settings that this command asks for.
    `dataset` has its path, its hash and the sizes that the model must have."""
    checkpoint = load_checkpoint(path, (kind,))
    meta, advice = checkpoint["meta"], f"name another --{kind}-path or delete it"
    wanted = {"alpha": args.alpha} if kind == "reward" else {}
    if named:  # made elsewhere: what matters is that it fits; alpha goes into the name of what is written
        wanted = {name: value for name, value in wanted.items() if name in checkpoint["args"]}
    else:
        wanted |= dict(env=args.env, seed=args.seed, preset=args.preset)
        if meta.get("sources") != {"dataset": dataset["hash"]}:
            raise UserError(f"{path}: made from another dataset than {dataset['path']}; {advice}")
    check_same_args(path, checkpoint["args"], wanted, advice)
    network = build_network(network_class, path, checkpoint, device)
    found = {"env": meta.get("env"), "horizon": meta.get("horizon", meta["network"].get("horizon"))}
    found |= {name: meta["network"].get(name) for name in ("observation_dim", "num_agents", "num_actions")}
    wrong = [f"{name} {found[name]}" for name, value in dataset["sizes"].items() if found[name] != value]
    if wrong:
        expected = ", ".join(f"{name} {value}" for name, value in dataset["sizes"].items())
        raise UserError(f"{path}: 'meta' has {', '.join(wrong)}, but {dataset['path']} has {expected}")
    return checkpoint, network


def load_models(args: Args, seeds, reward_paths: list, bc_paths: list, dataset: dict, device) -> dict[int, dict]:
    """By seed: the reward model with its stats and metrics, the BC policy with its shape, and the hashes of the sources."""
    models = {}
    for seed, reward_path, bc_path in zip(seeds, reward_paths, bc_paths, strict=True):
        wanted = replace(args, seed=seed)
        checkpoint, reward_model = load_model(reward_path, args.reward_path, "reward", RewardNetwork, wanted, dataset, device)
        bc_checkpoint, bc_policy = load_model(bc_path, args.bc_path, "bc", AgentNetwork, wanted, dataset, device)
        stats, bc_shape = checkpoint["stats"], bc_checkpoint["meta"]["network"]
        if not all(isinstance(stats.get(name), float) and math.isfinite(stats[name]) for name in ("mean", "std")):
            raise UserError(f"{reward_path}: 'stats' has no finite 'mean' and 'std'; train it again")
        sources = {"dataset": dataset["hash"], "reward": hash_weights(reward_model, stats)}
        sources["bc"] = hash_weights(bc_policy, bc_checkpoint["stats"])
        models[seed] = dict(reward_model=reward_model, reward_stats=stats, reward_metrics=checkpoint["metrics"])
        models[seed] |= dict(bc_policy=bc_policy, bc_shape=bc_shape, sources=sources)
        if bc_shape != models[args.seed]["bc_shape"]:
            raise UserError(f"{bc_path}: its network has another shape than that of {bc_paths[0]}; leave out --num-seeds")
    return models


def load_shipped_policies(game: Game | None, device) -> dict[str, nn.Module]:
    """Novice, rookie and expert of the closing table, as far as they stand beside this script."""
    networks = {}
    for name in ("novice", "rookie", "expert") if game is not None else ():
        path = Path(__file__).parent / "policies" / game.name / f"{name}.pt"
        if path.exists():
            network = build_network(AgentNetwork, path, load_checkpoint(path, ("vdn", "pathwise")), device)
            find_game(path, game.name, (network.num_agents, network.observation_dim, network.num_actions, network.horizon))
            networks[name] = network
    return networks


def measure(game: Game, runs: list[Args], models: dict, references: list, results: list, shipped, device) -> dict[str, list]:
    """What the closing table needs: returns by policy, one for every seed; a single one for the random policy and those shipped
    (rank 0 has them). All are on the same TEST_EPISODES start states, but for those of other seeds."""
    policies, first_seed = {}, runs[0].seed
    if shipped is not None:
        policies["random"] = [(None, False, first_seed)]
    for seed, model in models.items():
        for name, sample in (("BC, greedy", False), ("BC, sampled", True)):
            policies.setdefault(name, []).append((model["bc_policy"], sample, seed))
    for run, reference, result in zip(runs, references, results, strict=True):
        beta = f", beta {run.beta:g}" if len(runs) > len(models) else ""
        learned = {"pi_ref, greedy": reference, "VDN-RLHF, last": result["policy"], "VDN-RLHF, best": result["best_policy"]}
        for name, network in learned.items():
            policies.setdefault(name + beta, []).append((network, False, run.seed))
    policies |= {name: [(network, False, first_seed)] for name, network in (shipped or {}).items()}
    progress = tqdm(policies.items(), desc="test episodes", unit="policy")
    return {name: [mean_return(game, n, TEST_EPISODES, seed + 10**6, device, s) for n, s, seed in p] for name, p in progress}


def print_table(game: Game, rows: dict[str, list[float]], reward_metrics: list[dict]) -> None:
    """The closing table, from the returns of each policy over the training seeds."""
    print(f"\nMean over agents of the undiscounted return of {game.horizon} steps, {TEST_EPISODES:,} fresh episodes.")
    print("Score: the random policy is 0, the best expert of the paper's authors 100 (tag: ours).")
    print("" if len(reward_metrics) == 1 else f"Mean ± standard deviation over {len(reward_metrics)} training seeds.\n")

    def cell(values: list[float], digits: int) -> str:
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    width = 22 if len(reward_metrics) == 1 else 34
    print(f"| {'policy':{width}s} | {'return':>14s} | {'score':>12s} |\n|{'-' * (width + 2)}|{'-' * 15}:|{'-' * 13}:|")
    for name, values in rows.items():
        scores = [game.metrics(value).get("charts/score") for value in values]
        print(f"| {name:{width}s} | {cell(values, 2):>14s} | {'' if None in scores else cell(scores, 1):>12s} |")
    if all("reward/accuracy" in metrics for metrics in reward_metrics):
        bayes = [metrics["reward/bayes_accuracy"] for metrics in reward_metrics if "reward/bayes_accuracy" in metrics]
        best = f" (the true return reaches {np.mean(bayes):.3f})" if bayes else ""
        accuracy = np.mean([metrics["reward/accuracy"] for metrics in reward_metrics])
        print(f"\nReward model on held-out pairs: accuracy {accuracy:.3f}{best}")


def share_out(args: Args) -> tuple[int, int]:
    """Under torchrun every process trains its share of the seeds, on a GPU of its own where there is one; the first process
    makes the dataset and reports for all. -> rank and number of processes: 0 and 1 without torchrun."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if args.num_seeds < world_size:
            raise UserError(f"--num-seeds {args.num_seeds}: fewer than the {world_size} processes that torchrun started")
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        seeds = np.array_split(np.arange(args.seed, args.seed + args.num_seeds), world_size)[rank].tolist()
        args.seed, args.num_seeds = seeds[0], len(seeds)
        if args.device == "auto" and torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        if rank > 0:  # silent, and so are the scripts that it starts
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            os.environ["TQDM_DISABLE"], tqdm.__init__ = "1", partialmethod(tqdm.__init__, disable=True)
    return rank, world_size


@releasing_locks()
def main(args: Args) -> None:
    rank, world_size = share_out(args)
    device = set_up(args)
    runs = list_runs(args, "beta")
    seeds = range(args.seed, args.seed + args.num_seeds)
    preset = "" if args.preset == "default" else f"-{args.preset}"
    env_name = game_name(args)
    folder = Path(args.data_path).parent if args.data_path else Path(f"runs/{env_name}/{args.dataset}")
    data_path = Path(args.data_path or folder / "dataset.npz")
    reward_paths = [Path(args.reward_path or folder / f"reward{preset}-alpha{args.alpha:g}-seed{seed}.pt") for seed in seeds]
    bc_paths = [Path(args.bc_path or folder / f"bc{preset}-seed{seed}.pt") for seed in seeds]
    paths = [output_path(r, args.vdn_path, folder, "vdn", f"-beta{r.beta:g}-alpha{r.alpha:g}", len(runs)) for r in runs]
    best_paths = [best_path(path) for path in paths]
    for run, *both in zip(runs, paths, best_paths, strict=True):  # mistakes that can be told now are not told after minutes
        for path in both:
            check_replaceable(path, "vdn", run, {})

    common = {"env": args.env, "num-agents": args.num_agents, "num-landmarks": args.num_landmarks, "dataset": args.dataset}
    machine = {"device": args.device, "num-threads": args.num_threads, "deterministic": args.deterministic, "track": args.track}
    machine |= {"resume": args.resume}
    machine |= {"checkpoint-every": args.checkpoint_every} if args.checkpoint_every != Args.checkpoint_every else {}
    if rank == 0:
        make_missing([(data_path, bool(args.data_path), "collect_data.py", common | machine)])
    if world_size > 1:
        torch.distributed.barrier()
    lock_outputs([*paths, *best_paths])
    common |= {"preset": preset[1:], "data-path": args.data_path, "no-bf16": not args.bf16 and args.preset == "default"}
    machine |= {"compile": args.compile, "cudagraphs": args.cudagraphs}
    jobs = []
    for model_paths, named, script, flags in (
        (reward_paths, args.reward_path, "train_reward.py", {"alpha": args.alpha}),
        (bc_paths, args.bc_path, "train_bc.py", {}),
    ):
        missing = [(path, seed) for path, seed in zip(model_paths, seeds, strict=True) if not path.exists()]
        if missing:
            first, last = missing[0][1], missing[-1][1]
            flags = {"seed": first, "num-seeds": last - first + 1 if last > first else None} | flags
            jobs.append((missing[0][0], bool(named), script, common | flags | machine))
    make_missing(jobs)

    data, meta = load_dataset(data_path, env_name, ("observations", "actions"))
    observations, actions = data["observations"].to(device), data["actions"].to(device)
    _, T, A = actions.shape
    D, num_actions = observations.shape[-1], meta["num_actions"]
    game = find_game(data_path, env_name, (A, D, num_actions, T))
    sizes = dict(env=env_name, horizon=T, observation_dim=D, num_agents=A, num_actions=num_actions)
    dataset = dict(path=data_path, hash=meta["hash"], sizes=sizes)
    models = load_models(args, seeds, reward_paths, bc_paths, dataset, device)
    for run, *both in zip(runs, paths, best_paths, strict=True):
        for path in both:
            check_replaceable(path, "vdn", run, models[run.seed]["sources"])
    left = [left_to_do(args, runs, paths)[0]] * world_size
    if world_size > 1:  # no process leaves before the others
        torch.distributed.all_gather_object(left, left[0])
    if not any(left):
        return
    sources = {f"{name} of seed {seed}": digest for seed, m in models.items() for name, digest in m["sources"].items()}
    training_file = TrainingFile(paths[0], args, vars(args), device, sources)
    shipped = load_shipped_policies(game, device)
    log = start_tracking(args, [path.stem for path in paths])

    # The learned rewards never change: computed once for the whole dataset, (seeds, N, T), of the team.
    rewards = []
    chunks = list(zip(observations.split(1024), actions.split(1024), strict=True))
    for chunk in tqdm(chunks, desc="learned rewards", unit="chunk", mininterval=1):
        r_std = [standardized_rewards(m["reward_model"], m["reward_stats"], *chunk).sum(dim=-1) for m in models.values()]
        rewards.append(torch.stack(r_std))
    rewards = torch.cat(rewards, dim=1)[[run.seed - args.seed for run in runs]]  # (S, N, T)

    generators = [torch.Generator().manual_seed(run.seed) for run in runs]
    bc_policies = [models[run.seed]["bc_policy"] for run in runs]
    reference_shape = models[args.seed]["bc_shape"]
    references = make_reference_policies(
        runs, bc_policies, reference_shape, observations, actions, rewards.sum(dim=-1), generators, training_file
    )
    shape = dict(observation_dim=D, num_agents=A, num_actions=num_actions, horizon=T)
    shape |= dict(network=args.network, hidden_dim=args.hidden_dim, num_layers=args.num_layers, time_input=args.time_input)
    learned_from = (observations, actions, rewards, references)
    results = learn_policies(runs, game, shape, *learned_from, generators, log, training_file)

    for run, path, reference, result in zip(runs, paths, references, results, strict=True):
        known = dict(values=shape, reference=reference_shape | {"num_modes": reference.num_modes})
        known |= dict(beta=run.beta, kl_clip=run.kl_clip)
        policy_meta = dict(env=env_name, sources=models[run.seed]["sources"], network=known if run.known_kl else shape)
        metrics = result["metrics"] | {"history": result["history"]}
        if result["best_policy"] is not None:
            best_metrics = {"charts/test_return": result["best_return"], "history": result["history"]}
            save_checkpoint(best_path(path), "vdn", run, policy_meta, result["best_policy"], {}, best_metrics)
        if not result["problem"]:
            save_checkpoint(path, "vdn", run, policy_meta, result["policy"], {}, metrics)
            speed = metrics["speed/updates_per_second"]
            print(f"{path}: losses/td_loss {metrics['losses/td_loss']:.3f}, {speed:.1f} updates per second")
    stop_at_problems(results, paths)
    if game is None:
        print(f"{env_name} is no game of this script: evaluation skipped")

    rows, reward_metrics = {}, [model["reward_metrics"] for model in models.values()]
    if game is not None:
        rows = measure(game, runs, models, references, results, shipped if rank == 0 else None, device)
    if world_size > 1:
        parts = [None] * world_size if rank == 0 else None
        torch.distributed.gather_object((rows, reward_metrics), parts)
        for other_rows, other_metrics in parts[1:] if rank == 0 else ():
            rows |= {name: rows[name] + values for name, values in other_rows.items()}
            reward_metrics += other_metrics
        torch.distributed.destroy_process_group()
    if game is not None and rank == 0:
        print_table(game, rows, reward_metrics)
    training_file.remove()


if __name__ == "__main__":
    run_command_line(main, Args, PRESETS)
