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
import ctypes
import glob
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """folder in runs/<game>/"""
    num_agents: int | None = None
    """agents of spread; 3 where this is not given"""
    num_landmarks: int | None = None
    """landmarks of spread; as many as agents where this is not given"""
    alpha: float | tuple[float, ...] = 1.0
    """weight of the smoothness term, Eq. (1); several: a run for each of them"""
    seed: int = 1
    """fixes everything"""
    num_seeds: int = 1
    """train the seeds seed, seed + 1, ... at once, so many; a file for each run"""
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
    checkpoint_every: int = 1_000
    """updates between two checkpoints, NAME.training.pt beside the output, from which --resume goes on"""
    resume: bool = False
    """go on where a run of the same command was stopped; nothing to do if the output is there"""

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
    bf16: bool = True
    """hidden layers multiply in bfloat16 in training, where the device has instructions for it"""
    compile: bool | None = None
    """True, False: fuse the loss into few kernels with torch.compile; by default on CUDA"""
    cudagraphs: bool | None = None
    """True, False: record an update as a CUDA graph and replay it; by default on CUDA"""


PRESETS = {  # by game
    "default": {},
    "paper": {  # Table 5
        "all": dict(run_name="paper", input="own", learning_rate=1e-3, max_epochs=100, bf16=False),
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


def reward_loss(rewards, pairs, labels, alpha) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. (1) and (2) for one minibatch. rewards (B, T, A) of its trajectories, pairs (P, 2) indices into them,
    labels (P, A) in +-1 -> loss, negative log-likelihood per label, L_MSE over the variance (deviation 1). For stacks all of
    them have a leading dimension S, alpha too."""
    returns = rewards.sum(dim=-2)  # (B, A)
    difference = return_difference(returns, pairs)  # (P, A)
    nll = -F.logsigmoid(labels * difference)
    l_mse = (rewards[..., 1:, :] - rewards[..., :-1, :]).square().sum(dim=(-2, -1)).mean(dim=-1)  # Eq. (2)
    # Deviation: Eq. (1) divides by Var_D(r_phi) of the steps, under which the model collapses to a constant.
    smoothness = l_mse / returns.var(dim=(-2, -1), correction=0).detach().clamp(min=1)
    return nll.sum(dim=-1).mean(dim=-1) + alpha * smoothness, nll.mean(dim=(-2, -1)), smoothness


def return_difference(returns: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """returns (..., B, A), pairs (..., P, 2) -> by how much the first of each pair earned more, (..., P, A)."""
    first, second = (returns.take_along_dim(index[..., None], dim=-2) for index in pairs.unbind(dim=-1))
    return first - second


def split_into_minibatches(data: dict, generator) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Training, early-stopping and test part (80/10/10), no trajectory in two of them. Each is M minibatches of equal size:
    trajectories (M, B), pairs (M, P, 2) as positions among a minibatch's trajectories, labels (M, P, A). M = 0 where too
    little is left.

    With blocks of equal size, a minibatch is a block. Otherwise a minibatch is up to MINIBATCH_PAIRS pairs with their
    trajectories. Parts are whole blocks; without any, the trajectories are split, and pairs that cross the split are
    dropped."""
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

    sizes, counts = (torch.bincount(index, minlength=num_groups) for index in (group, group[pairs[:, 0]]))
    if "block" in data and (sizes == sizes[0]).all() and (counts == counts[0]).all():
        members = torch.argsort(group, stable=True).view(num_groups, -1)  # (groups, B)
        position = torch.empty(num_trajectories, dtype=torch.long)
        position[members] = torch.arange(members.shape[1]).expand_as(members)
        chosen = torch.argsort(group[pairs[:, 0]], stable=True).view(num_groups, -1)  # (groups, P)
        minibatches = (members, position[pairs[chosen]], labels[chosen])
        return [tuple(x[part_of_group == p] for x in minibatches) for p in range(3)]
    parts = []
    for p in range(3):
        chosen = (part_of_pair == p).nonzero().squeeze(1)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        count = -(-len(chosen) // MINIBATCH_PAIRS)
        size = len(chosen) // max(count, 1)
        chosen = chosen[: count * size].view(count, size)
        local = torch.arange(2 * size).view(size, 2).expand(count, size, 2)
        parts.append((pairs[chosen].flatten(1), local, labels[chosen]))
    return parts


def stack_parts(parts: list, data_path: Path, device) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What split_into_minibatches gives for each run -> the same three parts with a leading dimension S, on the device."""
    for name, minibatches in zip(("training", "early-stopping", "test"), parts[0], strict=True):
        if not minibatches[2].numel():
            raise UserError(f"{data_path}: 'pairs' leaves none for the {name} part; more trajectories or pairs are needed")
    if any(a[0].shape != b[0].shape for part in parts for a, b in zip(part, parts[0], strict=True)):
        raise UserError(f"{data_path}: its minibatches differ in number or size from seed to seed; leave out --num-seeds")
    return [tuple(torch.stack(tensors).to(device) for tensors in zip(*part, strict=True)) for part in zip(*parts, strict=True)]


@torch.no_grad()
def evaluate(model, data: dict, minibatches: tuple, alpha: float) -> dict[str, float]:
    """Eq. (1) and its terms and the accuracy, means over all minibatches, (M, ...) each."""
    totals = 0.0
    for trajectories, pairs, labels in zip(*minibatches, strict=True):
        rewards = model(data["observations"][trajectories, :-1], data["actions"][trajectories])
        loss, nll, smoothness = reward_loss(rewards, pairs, labels, alpha)
        accuracy = 0.5 + 0.5 * (labels * return_difference(rewards.sum(dim=1), pairs)).sign().mean()
        totals += torch.stack([loss, nll, smoothness, accuracy])
    names = ("losses/loss", "losses/nll", "losses/smoothness", "reward/accuracy")
    return dict(zip(names, (totals / len(minibatches[0])).tolist(), strict=True))


@torch.no_grad()
def predict(model, data: dict, trajectories: torch.Tensor) -> torch.Tensor:
    """r_phi of many trajectories, (len(trajectories), T, A)."""
    chunks = tqdm(trajectories.split(1024), desc="predicted rewards", unit="chunk", mininterval=1)
    return torch.cat([model(data["observations"][chunk, :-1], data["actions"][chunk]) for chunk in chunks])


def compare_with_truth(model, data: dict, minibatches: tuple, meta: dict) -> dict[str, float]:
    """Diagnostics on the test part: predicted against true step rewards, and what the true returns, which drew the labels,
    would reach as a model (only where the meta tells how the labels were drawn)."""
    trajectories = minibatches[0].unique()
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
        trajectories, pairs, labels = (x.cpu() for x in minibatches)
        returns = data["true_rewards"][trajectories].double().sum(dim=-2)  # (M, B, A)
        logits = labels * steepness * return_difference((returns - mean) / std.clamp(min=1e-8), pairs)
        metrics["reward/bayes_nll"] = -F.logsigmoid(logits).mean().item()
        metrics["reward/bayes_accuracy"] = 0.5 + 0.5 * logits.sign().mean().item()
    return metrics


def learn_rewards(
    runs: list[Args], shape: dict, data: dict, parts: list, generators: list, log, training_file: TrainingFile | None = None
) -> list[dict]:
    """Reward models of that shape, one for each run, on its own split of the data -> their best epochs: weights, epoch and
    number of updates per second, the final weights, a history of [epoch, nll, smoothness, accuracy], and what went wrong."""
    args, device, training_file = runs[0], parts[0][0].device, training_file or TrainingFile()
    training, validation, _ = parts
    num_minibatches = training[0].shape[1]
    num_updates = args.max_epochs * num_minibatches
    stack, model = stack_networks(RewardNetwork, shape, runs, device), RewardNetwork(**shape).to(device)
    optimizer = make_optimizer(stack, args.learning_rate, device)
    alphas = torch.tensor([run.alpha for run in runs], device=device)
    run_index, bf16 = torch.arange(len(runs), device=device), use_bfloat16(args.bf16, device)

    def compute_losses(minibatch):  # (S,): the number of each run's minibatch
        trajectories, pairs, labels = (x[run_index, minibatch] for x in training)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            rewards = stack(data["observations"][trajectories][..., :-1, :, :], data["actions"][trajectories])
        return reward_loss(rewards, pairs, labels, alphas)[0]

    def draw_minibatches():
        for _ in range(args.max_epochs):
            orders = [torch.randperm(num_minibatches, generator=generator) for generator in generators]
            yield from torch.stack(orders, dim=1).to(device)

    update = accelerate(compute_losses, lambda losses: take_step(losses, optimizer), args, device)
    best = copy.deepcopy(stack).requires_grad_(False)  # of every run the epoch with the lowest loss
    results = [dict(loss=float("inf"), nll=float("inf"), epoch=0, history=[], problem="") for _ in runs]
    begun = training_file.begin("reward model", num_updates, dict(stack=stack, best=best, optimizer=optimizer), results)
    values = ", ".join(f"{alpha:g}" for alpha in dict.fromkeys(alphas.tolist()))
    progress = tqdm(total=num_updates, initial=begun, desc=f"reward model, alpha {values}", unit="update", mininterval=1)
    start, evaluation_time = time.time(), 0.0
    for i, minibatch in islice(enumerate(draw_minibatches(), 1), begun, None):
        follow_cosine(optimizer, args.learning_rate, (i - 1) / num_updates)
        update(minibatch)
        progress.update()
        if i % num_minibatches == 0:
            if device.type == "cuda":
                torch.cuda.synchronize()
            epoch, evaluation_start = i // num_minibatches, time.time()
            for s, (run, result) in enumerate(zip(runs, results, strict=True)):
                model.load_state_dict(unstack(stack, s))
                metrics = evaluate(model, data, [x[s] for x in validation], run.alpha)
                log(s, {f"validation/{name}": value for name, value in metrics.items()}, i)
                loss, nll = metrics["losses/loss"], metrics["losses/nll"]  # Eq. (1) and its likelihood, early-stopping part
                result["history"].append([epoch, nll, metrics["losses/smoothness"], metrics["reward/accuracy"]])
                result["problem"] = result["problem"] or problem_of(run, "losses/loss", loss, i)
                if loss < result["loss"]:
                    result |= dict(loss=loss, nll=nll, epoch=epoch)
                    keep_run(best, stack, s)
            progress.set_postfix(nll=f"{nll:.4f}", accuracy=f"{metrics['reward/accuracy']:.3f}")
            evaluation_time += time.time() - evaluation_start
        if training_file.after_update(i):
            break
    progress.close()
    speed = len(runs) * (num_updates - begun) / max(time.time() - start - evaluation_time, 1e-9)
    for s, result in enumerate(results):
        result |= dict(weights=unstack(best, s), final_weights=unstack(stack, s), speed=speed)
    return results


def report(run: Args, path: Path, model: RewardNetwork, shape: dict, data: dict, parts: list, result: dict, meta: dict) -> dict:
    """Measure what a run learned, write it and print it. `parts` are the run's own. -> metrics

    A model that ended badly or is no better than chance goes to another file, where only those find it who look for it."""
    training, _, test = parts
    model.load_state_dict(result["final_weights"])
    final = evaluate(model, data, test, run.alpha)
    model.load_state_dict(result["weights"])
    metrics = evaluate(model, data, test, run.alpha)
    metrics["losses/training_nll"] = evaluate(model, data, training, run.alpha)["losses/nll"]
    metrics |= {"final/nll": final["losses/nll"], "final/accuracy": final["reward/accuracy"]}
    metrics |= {"best_epoch": result["epoch"], "speed/updates_per_second": result["speed"]}
    if "true_rewards" in data:
        metrics |= compare_with_truth(model, data, test, meta)
    predicted = predict(model, data, training[0].unique())
    stats = {"mean": predicted.mean().item(), "std": predicted.std(correction=0).item()}  # Eq. (4), over the training part

    horizon = data["actions"].shape[1]
    meta = dict(env=meta["env"], horizon=horizon, sources={"dataset": meta["hash"]}, network=shape)
    held_out = (result["nll"] + metrics["losses/nll"]) / 2  # early-stopping and test part: one alone may have few pairs
    if held_out > math.log(2) - 1e-6 and not result["problem"]:
        one_sign = "" if len(labels := training[2].unique()) > 1 else f", where all labels are {labels.item():+.0f}"
        which = f"seed {run.seed}, alpha {run.alpha:g}: losses/nll is {held_out:.4f} on held-out pairs{one_sign}"
        advice = "try more pairs, more --max-epochs, another --learning-rate or a smaller --alpha"
        result["problem"] = f"{which}: no better than chance ({math.log(2):.4f}); {advice}"
    path = best_path(path) if result["problem"] else path
    save_checkpoint(path, "reward", run, meta, model, stats, metrics | {"history": result["history"]})
    print(f"{path}: epoch {result['epoch']} of {len(result['history'])}")
    for name, value in metrics.items():
        print(f"  {name:28s} {value:.4f}")
    return metrics


@releasing_locks()
def main(args: Args) -> None:
    device = set_up(args)
    runs = list_runs(args, "alpha")
    env_name = game_name(args)
    data_path = Path(args.data_path or f"runs/{env_name}/{args.dataset}/dataset.npz")
    paths = [output_path(run, args.reward_path, data_path.parent, "reward", f"-alpha{run.alpha:g}", len(runs)) for run in runs]
    data, meta = load_dataset(data_path, env_name, ("observations", "actions", "pairs", "labels"), ("block", "true_rewards"))
    lock_outputs(paths)
    for run, path in zip(runs, paths, strict=True):
        check_replaceable(path, "reward", run, {"dataset": meta["hash"]})
    runs, paths = left_to_do(args, runs, paths)
    if not runs:
        return
    training_file = TrainingFile(paths[0], args, vars(args), device, {"dataset": meta["hash"]})
    log = start_tracking(args, [path.stem for path in paths])

    generators = [torch.Generator().manual_seed(run.seed) for run in runs]
    parts = stack_parts([split_into_minibatches(data, generator) for generator in generators], data_path, device)
    data["observations"], data["actions"] = data["observations"].to(device), data["actions"].to(device)
    if "true_rewards" not in data:
        print(f"{data_path} has no true_rewards: reward error and correlation skipped")

    shape = dict(observation_dim=data["observations"].shape[-1], num_agents=data["actions"].shape[2])
    shape |= dict(num_actions=meta["num_actions"], input=args.input, network=args.network)
    shape |= dict(hidden_dim=args.hidden_dim, num_layers=args.num_layers)
    results = learn_rewards(runs, shape, data, parts, generators, log, training_file)
    model = RewardNetwork(**shape).to(device)
    for s, (run, path, result) in enumerate(zip(runs, paths, results, strict=True)):
        if result["epoch"] > 0:
            metrics = report(run, path, model, shape, data, [[x[s] for x in part] for part in parts], result, meta)
            log(s, metrics, args.max_epochs * parts[0][0].shape[1])
    stop_at_problems(results, paths)
    training_file.remove()


if __name__ == "__main__":
    run_command_line(main, Args, PRESETS)
