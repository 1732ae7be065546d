"""Play any policy file of this project (vdn-*.pt, bc-*.pt, policies/*/*.pt) for a number of episodes and report its return.
Two backends start from the same states: `torch`, the batched environment of this project, and `mpe2`, the real package.

Usage: python evaluate.py --policy-path policies/spread/expert.pt --num-episodes 1000 --backend mpe2

Reported (text on stdout, JSON with --json-path):
    charts/test_return  mean over agents and episodes of the undiscounted return of one episode
    charts/score        the same on the scale random policy = 0, best expert of the paper's authors = 100 (tag: ours)
    standard_error      of charts/test_return, over episodes
    agent_returns       mean return of each agent
    episode_returns     of every episode, mean over its agents

With --gif also a picture in motion: the same episodes as played by the random policy, by the BC policy that a learned policy
was trained with (bc*.pt beside it), by the policy itself and by the shipped expert, side by side and drawn by the real package.

With --nash-gap also how far the policy is from a Nash equilibrium. Nash-Gap(pi) (section 3) is the sum over agents of what
agent i gains if it alone plays a best response to the others. For each agent one is trained by double DQN in the batched
environment, on the agent's own reward and with its own observation, starting from the better of the policy itself and the
shipped expert of the game (policies/<game>/expert.pt beside this script, where there is one). Candidates are these two and
checkpoints along the training, each deviating from its start policy only where that promises more than one of several margins.
On one set of episodes the one is chosen whose gain has the highest lower end of its 95 % interval (the highest mean would be
the luckiest of many), on another it is measured, with and without the deviation on every start state. A gain that turns out
negative there stays negative; the policy itself, chosen where no candidate is surely better, gains exactly 0. Up to their
intervals all of these are lower bounds, because a search can miss the best response:
    charts/nash_gap       the sum of agent_gains
    nash_gap_interval     its 95 % confidence interval over episodes
    agent_gains           mean gain of each agent, undiscounted, of one episode
    agent_gain_intervals  the same for each agent
    best_responses        of each agent: what the one chosen starts from (policy or expert), the updates behind it (0: just
                          that), its margin in units of reward, and its gain in the episodes that it was chosen on
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
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
    policy_path: str
    """a policy file, or the word random"""
    env: str = ""
    """the game; taken from the policy file where this is empty"""
    num_agents: int | None = None
    """agents of spread; 3 where this is not given"""
    num_landmarks: int | None = None
    """landmarks of spread; as many as agents where this is not given"""
    num_episodes: int = 4096
    """episodes to play"""
    backend: str = "torch"
    """torch (batched) or mpe2 (the real package, about 100 times slower)"""
    sample: bool = False
    """sample actions from the softmax of the outputs (for BC policies) instead of playing the best one"""
    nash_gap: bool = False
    """also train a best response of each agent and report what it gains: a lower bound of the Nash gap"""
    num_updates: int = 2_000
    """gradient steps of the best responses of --nash-gap"""
    seed: int = 1
    """fixes start states and sampled actions, the same ones for both backends"""
    json_path: str = ""
    """also write the report there"""
    gif: str = ""
    """also draw a few episodes there (NAME.gif), beside the same ones of the random policy, BC and the shipped expert"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ...; physics run in float64, as mpe2's do"""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""


EPISODES_AT_ONCE = 128  # in both backends, because a network's rounding depends on the size of its batch

GIF_EPISODES, PANEL_SIZE, LABEL_SIZE = 3, 220, 24  # of --gif; sizes in pixels

# Best responses of --nash-gap. The unit of margins is the standard deviation of what exploring changes in an agent's return.
GAMMA, TD_LAMBDA, EPSILON, LEARNING_RATE, MARGIN = 0.95, 0.8, 0.1, 3e-3, 0.02
NUM_ENVS, UPDATES_PER_ROLLOUT, BATCH_SIZE, BUFFER_SIZE = 128, 8, 64, 8192  # in episodes
NUM_CHECKPOINTS, CANDIDATE_MARGINS, CHOICE_EPISODES = 4, (0.0, 0.02, 0.05, 0.1, 0.2), 1024


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


def make_mpe2_env(game: Game):
    """The package's environment of a game, as a parallel environment of PettingZoo."""
    try:
        from mpe2 import simple_reference_v3, simple_tag_v3  # imported here, because they start pygame
        from mpe2._mpe_utils.core import Landmark
        from mpe2._mpe_utils.simple_env import SimpleEnv
        from mpe2.simple_spread import simple_spread
        from pettingzoo.utils.conversions import aec_to_parallel
    except ImportError as error:
        raise UserError(f"--backend mpe2 and --gif need the package mpe2 ({error}); pip install mpe2") from None

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
    """The package's environments behind the interface of ParticleEnv, so that `rollout` plays both."""

    def __init__(self, game: Game, num_envs: int, device, generator=None):
        self.game, self.device, self.envs = game, device, [make_mpe2_env(game) for _ in range(num_envs)]
        if game.prey is not None:
            self.act_prey = make_actor(game.prey.to(device), 5, generator, sample=True)

    def set_state(self, positions, velocities, landmarks, goals=None) -> torch.Tensor:
        for n, env in enumerate(self.envs):
            env.reset(seed=0)
            world = env.unwrapped.world
            position, velocity, landmark = (x[n].double().cpu().numpy() for x in (positions, velocities, landmarks))
            for i, agent in enumerate(world.agents):
                agent.state.p_pos, agent.state.p_vel = position[i].copy(), velocity[i].copy()
                if goals is not None:
                    agent.goal_b = world.landmarks[goals[n, i]]
                    agent.goal_a.color = agent.goal_b.color  # the partner is drawn in the colour of its goal
            for i, entity in enumerate(world.landmarks):
                entity.state.p_pos = landmark[i].copy()
        return self._observe()

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.game.prey is not None:
            actions = torch.cat(
                [actions, self.act_prey(self._stack([[env.unwrapped.observe("agent_0")] for env in self.envs]), 0)], 1
            )
        rewards = []
        for env, joint_action in zip(self.envs, actions.tolist(), strict=True):
            reward = env.step(dict(zip(env.possible_agents, joint_action, strict=True)))[1]
            rewards.append([reward[name] for name in env.possible_agents[: self.game.num_agents]])
        return self._observe(), self._stack(rewards)

    def _observe(self) -> torch.Tensor:
        names = self.envs[0].possible_agents[: self.game.num_agents]
        return self._stack([[env.unwrapped.observe(name) for name in names] for env in self.envs])

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
            state = env.state()
            env = Mpe2Env(game, num_envs, device, generator)
            observations = env.set_state(*state)
        act = make_actor(network, game.num_actions, generator, args.sample)
        returns.append(rollout(env, act, observations)[2].sum(dim=1))
        progress.update(num_envs)
    progress.close()
    return torch.cat(returns)


def paired_actor(network, num_actions: int, num_copies: int, generator, sample: bool) -> Callable:
    """-> act(observations (num_copies * M, A, D), step) -> actions (num_copies * M, A), the outputs behind them. As make_actor,
    but every copy of the M environments has the same draws, so that copies differ only by what is done differently in them."""
    memory = None

    def act(observations, step):
        nonlocal memory
        if network is None:
            outputs = observations.new_zeros(*observations.shape[:2], num_actions)
        else:
            outputs, memory = network(observations[:, None], step, memory if step > 0 else None)
            outputs = outputs[:, 0]
        if not sample:
            return outputs.argmax(dim=-1), outputs
        shape = (len(outputs) // num_copies, *outputs.shape[1:])
        gumbel = -torch.empty(shape, device=outputs.device).exponential_(generator=generator).log()
        return (outputs + gumbel.repeat(num_copies, 1, 1)).argmax(dim=-1), outputs  # a draw from their softmax

    return act


def own(x: torch.Tensor, num_agents: int) -> torch.Tensor:
    """What concerns agent i in the i-th copies: x (2 * A * M, A, ...) -> a view (2, M, A, ...) of it."""
    return x.unflatten(0, (2, num_agents, -1)).diagonal(dim1=1, dim2=3).movedim(-1, 2)


@torch.no_grad()
def play_pairs(game: Game, policies: list, respond: Callable, baseline, num_envs: int, generator, sample, dtype=torch.float32):
    """Episodes from M = num_envs start states, 2 A times each: in copy i agent i plays respond(inputs, known_actions, step), in
    copy A + i the action of policies[baseline[i]], and all others follow policies[0], which is None for random play. Start
    states and draws are the same in all copies.

    -> inputs (M, T, A, F), known actions (M, T, A, K), actions (M, T, A) of the agents that respond, and how much more each
    earns in each step than in its other copy (M, T, A). The inputs of agent i are its observation and, of each of the K
    policies, its action as one-hot and its outputs, standardised."""
    A, device = game.num_agents, generator.device
    start, env = ParticleEnv(game, num_envs, device, dtype), ParticleEnv(game, 2 * A * num_envs, device, dtype)
    start.reset(generator)
    observations = env.set_state(*(x.repeat(2 * A, *[1] * (x.dim() - 1)) for x in start.state()))
    if game.prey is not None:
        act_prey = paired_actor(game.prey, 5, 2 * A, generator, sample=True)
        env.act_prey = lambda observations, step: act_prey(observations, step)[0]
    act_policy = paired_actor(policies[0], game.num_actions, 2 * A, generator, sample or policies[0] is None)
    act_others = [paired_actor(policy, game.num_actions, 2, generator, sample=False) for policy in policies[1:]]
    agents, steps = torch.arange(A, device=device), []

    def act(observations, step):
        actions, outputs = act_policy(observations, step)
        seen, played = own(observations, A), own(actions, A)  # (2, M, A, ...)
        known = [(played.clone(), own(outputs, A))]
        for act_other in act_others:
            known.append(tuple(x.unflatten(0, (2, num_envs)) for x in act_other(seen.flatten(0, 1), step)))
        known_actions = torch.stack([x for x, _ in known], dim=-1)
        features = [(F.one_hot(x, game.num_actions), F.layer_norm(y, y.shape[-1:])) for x, y in known]
        inputs = torch.cat([seen, *(x for pair in features for x in pair)], dim=-1)
        played[0] = respond(inputs[0], known_actions[0], step)  # writes into actions
        played[1] = known_actions[1][..., agents, baseline]
        steps.append((inputs[0], known_actions[0], played[0]))
        return actions

    rewards = own(rollout(env, act, observations)[2].transpose(1, 2), A)  # (2, M, A, T)
    return *(torch.stack(x, dim=1) for x in zip(*steps, strict=True)), (rewards[0] - rewards[1]).transpose(1, 2)


def with_margin(q_values: torch.Tensor, base_actions: torch.Tensor, margin: float) -> torch.Tensor:
    """The greedy actions where they are better than the base actions by more than the margin, elsewhere these."""
    best, greedy = q_values.max(dim=-1)
    base_values = q_values.gather(-1, base_actions[..., None]).squeeze(-1)
    return torch.where(best - base_values > margin, greedy, base_actions)


def double_dqn_targets(rewards, q_values, target_q_values, actions, base_actions) -> torch.Tensor:
    """Q(lambda) with off-policy corrections (Harutyunyan et al., 2016), every agent by itself, (B, T, A): G_t = r_t + gamma *
    (V_{t+1} + lambda * (G_{t+1} - Q_{t+1}(a_{t+1}))), and the reward alone in the last step, after which the game ends. Double
    Q-learning: the online network chooses the action of V (with MARGIN), the target network values it."""
    chosen = with_margin(q_values, base_actions, MARGIN)
    values, baselines = (target_q_values.gather(-1, a[..., None]).squeeze(-1) for a in (chosen, actions))  # (B, T, A)
    targets = [rewards[:, -1]]
    for t in reversed(range(rewards.shape[1] - 1)):
        targets.append(rewards[:, t] + GAMMA * (values[:, t + 1] + TD_LAMBDA * (targets[-1] - baselines[:, t + 1])))
    return torch.stack(targets[::-1], dim=1)


def greedy_response(q_network, start: torch.Tensor, margin: float) -> Callable:
    """For play_pairs: agent i deviates from what policies[start[i]] does where the Q-network promises more than the margin."""
    agents = torch.arange(len(start), device=start.device)

    def respond(inputs, known_actions, step):
        return with_margin(q_network(inputs[:, None], step)[0][:, 0], known_actions[..., agents, start], margin)

    return respond


def measure_gains(game: Game, policies: list, respond: Callable, num_episodes: int, seed: int, device, sample, title=""):
    """What each agent gains in each of so many episodes when it alone plays respond, not policies[0], (num_episodes, A)."""
    generator, gains = torch.Generator(device).manual_seed(seed), []
    baseline = torch.zeros(game.num_agents, dtype=torch.long, device=device)
    starts = range(0, num_episodes, EPISODES_AT_ONCE)
    for start in tqdm(starts, desc=title, unit="batch", mininterval=1, disable=not title):
        size = min(EPISODES_AT_ONCE, num_episodes - start)
        gains.append(play_pairs(game, policies, respond, baseline, size, generator, sample, torch.float64)[-1].sum(dim=1))
    return torch.cat(gains)


def train_best_responses(game: Game, policies: list, args: Args, device) -> tuple[Callable, list[dict]]:
    """Double DQN with replay, for all agents at once -> the best responses chosen, for play_pairs, and a report on each.

    Every agent starts from the play of whichever of the policies earns it most against policies[0]. Learned is not the return
    but the gain on top of that: rewards are differences to the episode from the same start state and with the same draws in
    which the agent only plays its start policy. What is subtracted does not depend on the agent's deviations, so the best
    response is the same, and where nobody deviates all values are zero instead of the noise of whole returns."""
    generator, A = torch.Generator(device).manual_seed(args.seed + 2 * 10**6), game.num_agents
    inputs_dim = game.observation_dim + 2 * game.num_actions * len(policies)
    online = AgentNetwork(inputs_dim, A, game.num_actions, game.horizon, num_words=game.num_words).to(device)
    for parameter in online.head.parameters():  # all values zero: with a margin this is the start policy itself
        nn.init.zeros_(parameter)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.Adam(online.parameters(), lr=LEARNING_RATE)
    agents, candidates, choice_gains = torch.arange(A, device=device), [], []

    def add_candidate(updates, q_network, start, margin):
        candidates.append((updates, q_network, start, margin))
        respond, seed = greedy_response(q_network, start, margin), args.seed + 10**6
        choice_gains.append(measure_gains(game, policies, respond, CHOICE_EPISODES, seed, device, args.sample))

    def choose() -> tuple[torch.Tensor, torch.Tensor]:  # indices of candidates (A,), mean gains (candidates, A)
        gains = torch.stack(choice_gains)  # (candidates, episodes, A)
        means = gains.mean(dim=1)
        return (means - 1.96 * gains.std(dim=1) / CHOICE_EPISODES**0.5).argmax(dim=0), means

    def explore(inputs, known_actions, step):
        actions = greedy_response(online, start, MARGIN)(inputs, known_actions, step)
        random_actions = torch.randint(game.num_actions, actions.shape, generator=generator, device=device)
        if game.num_words:  # another move, another word, both or none
            new_move, new_word = torch.rand((2, *actions.shape), generator=generator, device=device) < 0.5
            moves = torch.where(new_move, random_actions, actions) % 5
            random_actions = moves + 5 * (torch.where(new_word, random_actions, actions) // 5)
        deviates = torch.rand(actions.shape, generator=generator, device=device) < EPSILON
        return torch.where(deviates, random_actions, actions)

    bf16 = use_bfloat16(True, device)
    for index in range(len(policies)):
        add_candidate(0, target, torch.full_like(agents, index), math.inf)
    start, buffer, scale = choose()[0], None, None
    num_rollouts = -(-args.num_updates // UPDATES_PER_ROLLOUT)
    checkpoints = {num_rollouts * (i + 1) // NUM_CHECKPOINTS for i in range(NUM_CHECKPOINTS)}
    for i in tqdm(range(1, num_rollouts + 1), desc=f"best responses on {game.name}", unit="rollout", mininterval=1):
        episodes = play_pairs(game, policies, explore, start, NUM_ENVS, generator, args.sample)
        if buffer is None:
            gains = episodes[-1].sum(dim=1)
            scale = torch.where(gains.std() > 0, gains.std(), 1.0)
            buffer = [x.new_zeros(BUFFER_SIZE, *x.shape[1:]) for x in episodes]
        slots = torch.arange((i - 1) * NUM_ENVS, i * NUM_ENVS, device=device) % BUFFER_SIZE
        for stored, new in zip(buffer, episodes, strict=True):
            stored[slots] = new
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, 2 * (1 - (i - 1) / num_rollouts))
        for _ in range(UPDATES_PER_ROLLOUT):
            batch = torch.randint(min(i * NUM_ENVS, BUFFER_SIZE), (BATCH_SIZE,), generator=generator, device=device)
            inputs, known_actions, actions, rewards = (x[batch] for x in buffer)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                q_values, target_q_values = online(inputs)[0], target(inputs)[0]
            with torch.no_grad():
                base_actions = known_actions[..., agents, start]
                targets = double_dqn_targets(rewards / scale, q_values, target_q_values, actions, base_actions)
            loss = F.mse_loss(q_values.gather(-1, actions[..., None]).squeeze(-1), targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(online.parameters(), 10.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 0.01)
        if i in checkpoints:
            frozen = copy.deepcopy(online).requires_grad_(False)
            for margin in CANDIDATE_MARGINS:
                add_candidate(i * UPDATES_PER_ROLLOUT, frozen, start, margin)

    best, means = choose()
    reports, responses = [], []
    for agent, index in enumerate(best.tolist()):
        updates, q_network, starts, margin = candidates[index]
        responses.append(greedy_response(q_network, starts, margin))
        name = ("policy", "expert")[starts[agent]]
        margin = (margin * scale).item() if updates else None  # in units of reward
        reports.append(dict(start=name, updates=updates, margin=margin, choice_gain=means[index, agent].item()))

    def respond(inputs, known_actions, step):
        return torch.stack([response(inputs, known_actions, step)[:, i] for i, response in enumerate(responses)], dim=1)

    return respond, reports


def mean_and_interval(gains: torch.Tensor) -> tuple[float, list[float] | None]:
    """The mean over episodes and its 95 % confidence interval (normal approximation); none from a single episode."""
    mean, count = gains.mean().item(), len(gains)
    margin = 1.96 * gains.std().item() / count**0.5 if count > 1 else None
    return mean, None if margin is None else [mean - margin, mean + margin]


def with_interval(mean: float, interval: list[float] | None) -> str:
    return f"{mean:.3f}" + (f" +- {interval[1] - mean:.3f}" if interval else "")


def nash_gap(game: Game, network, args: Args, device) -> dict:
    """The part of the report that --nash-gap adds."""
    policies, path = [network], Path(__file__).parent / "policies" / game.name / "expert.pt"
    if path.exists():
        policies.append(build_network(AgentNetwork, path, load_checkpoint(path, ("vdn", "pathwise")), device))
    respond, best_responses = train_best_responses(game, policies, args, device)
    options = dict(sample=args.sample, title=f"gains on {game.name}")
    gains = measure_gains(game, policies, respond, args.num_episodes, args.seed, device, **options)  # (N, A)
    gap, gap_interval = mean_and_interval(gains.sum(dim=1))
    agent_gains, agent_gain_intervals = zip(*map(mean_and_interval, gains.T), strict=True)
    report = {"charts/nash_gap": gap, "nash_gap_interval": gap_interval}
    report |= dict(agent_gains=list(agent_gains), agent_gain_intervals=list(agent_gain_intervals))
    return report | dict(best_responses=best_responses, num_updates=args.num_updates)


def gif_policies(game: Game, network, checkpoint: dict | None, args: Args, device) -> dict[str, nn.Module | None]:
    """Name -> policy of each panel of --gif, the policy itself (None and no checkpoint: random) among them."""
    policies, path = {"random": None}, Path(args.policy_path)
    if checkpoint is not None:
        bc_hash = checkpoint["meta"].get("sources", {}).get("bc")
        for bc_path in sorted(path.parent.glob("bc*.pt")) if bc_hash else []:
            bc_checkpoint = load_checkpoint(bc_path, ("bc",))
            bc_policy = build_network(AgentNetwork, bc_path, bc_checkpoint, device)
            if hash_weights(bc_policy, bc_checkpoint["stats"]) == bc_hash:
                policies["BC"] = bc_policy
        if bc_hash and "BC" not in policies:
            print(f"{args.gif}: no BC, because {path} was trained with none of {path.parent / 'bc*.pt'}")
        policies["VDN-RLHF" if bc_hash else "BC" if checkpoint["kind"] == "bc" else path.stem[:16]] = network
    path = Path(__file__).parent / "policies" / game.name / "expert.pt"
    if path.exists():
        policies.setdefault("expert", build_network(AgentNetwork, path, load_checkpoint(path, ("vdn", "pathwise")), device))
    else:
        print(f"{args.gif}: no expert, because {path} does not exist")
    return policies


def record(game: Game, network, args: Args, device) -> tuple[list, torch.Tensor]:
    """GIF_EPISODES episodes in the package, the first that `play` would play of so many -> copies of its worlds, T + 1 lists of
    E, and the return so far, mean over agents, (E, T + 1)."""
    generator = torch.Generator(device).manual_seed(args.seed)
    start, worlds = ParticleEnv(game, GIF_EPISODES, device, torch.float64), []
    start.reset(generator)
    env = Mpe2Env(game, GIF_EPISODES, device, generator)
    act_policy = make_actor(network, game.num_actions, generator, args.sample)

    def act(observations, step):
        worlds.append([copy.deepcopy(x.unwrapped.world) for x in env.envs])
        return act_policy(observations, step)

    rewards = rollout(env, act, env.set_state(*start.state()))[2].mean(dim=2)  # (E, T)
    return [*worlds, [x.unwrapped.world for x in env.envs]], F.pad(rewards.cumsum(dim=1), (1, 0))


def draw_world(renderer, world, camera: float) -> np.ndarray:
    """The package's picture, (700, 700, 3), of the square from -camera to camera and a ninth around it. By itself it zooms in
    every frame to what is outermost; that is now a landmark of no size in the square's corner."""
    corner = copy.deepcopy(world.landmarks[0])
    corner.size, corner.state.p_pos = 0.0, np.full(2, camera)
    for agent in world.agents:
        agent.size = agent.size if agent.silent else 0.1  # those that speak would look like landmarks
    world.agents = sorted(world.entities, key=lambda x: -x.size)  # in the order in which they are drawn
    world.landmarks, renderer.world, renderer.original_cam_range = [corner], world, 1.0  # 1: discs to scale
    return renderer.render()


def save_gif(game: Game, policies: dict, args: Args, device) -> None:
    """Draw the same episodes of all policies {name: network} side by side into the file args.gif."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise UserError(f"--gif needs the package pillow ({error}); pip install pillow") from None
    recordings, episodes = [record(game, network, args, device) for network in policies.values()], range(GIF_EPISODES)
    bodies = [[x for worlds, _ in recordings for step in worlds for x in step[e].entities] for e in episodes]
    cameras = [max(abs(x.state.p_pos).max() + max(x.size, 0.1) for x in bodies[e]) for e in episodes]
    renderer, font = make_mpe2_env(game).unwrapped, ImageFont.load_default(15)
    renderer.render_mode, renderer.game_font.size, renderer.game_font.strong = "rgb_array", 32, True

    def draw_frame(episode: int, step: int):
        frame = Image.new("RGB", (len(policies) * PANEL_SIZE, LABEL_SIZE + PANEL_SIZE), "white")
        draw = ImageDraw.Draw(frame)
        for i, (name, (worlds, returns)) in enumerate(zip(policies, recordings, strict=True)):
            picture = Image.fromarray(draw_world(renderer, worlds[step][episode], cameras[episode]))
            frame.paste(picture.resize((PANEL_SIZE, PANEL_SIZE)), (i * PANEL_SIZE, LABEL_SIZE))
            center, text = ((i + 0.5) * PANEL_SIZE, LABEL_SIZE / 2), f"{name}, return {returns[episode, step]:.1f}"
            draw.text(center, text, fill="black", font=font, anchor="mm")
            draw.line((i * PANEL_SIZE, 0, i * PANEL_SIZE, frame.height), fill="lightgray")
        return frame

    def write(file):
        moments = [(episode, step) for episode in episodes for step in range(game.horizon + 1)]
        frames = [draw_frame(*x) for x in tqdm(moments, desc=f"{game.name} as GIF", unit="frame", mininterval=1)]
        some = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[:: game.horizon]]))
        palette = some.quantize(64, Image.Quantize.MAXCOVERAGE)  # one for all frames, or colours would flicker
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        durations = [1500 if step == game.horizon else 100 for _, step in moments]  # ms
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)

    save_file(args.gif, write)


def main(args: Args) -> dict:
    device = set_up(args)
    if args.gif and Path(args.gif).suffix.lower() != ".gif":
        raise UserError(f"--gif {args.gif}: the name must end in .gif")
    if args.nash_gap and args.backend == "mpe2":
        raise UserError("--nash-gap --backend mpe2: best responses learn in the batched environment; leave --backend out")
    network, checkpoint, env = None, None, game_name(args)
    if args.policy_path != "random":
        checkpoint = load_checkpoint(args.policy_path, ("vdn", "bc", "pathwise"))
        regularized = isinstance(checkpoint["meta"].get("network"), dict) and "reference" in checkpoint["meta"]["network"]
        network_class = RegularizedPolicy if regularized else AgentNetwork
        network = build_network(network_class, args.policy_path, checkpoint, device)
        wanted, env = env, checkpoint["meta"].get("env")
        if args.env and wanted != env:
            raise UserError(f"{args.policy_path}: 'meta' says it plays {env!r}, not {wanted}")
    game = make_game(str(env))
    if game is None:
        source = "--env" if network is None else f"{args.policy_path}: 'meta' has the game"
        raise UserError(f"{source} {env or 'is missing'}: choose from spread, tag, reference")
    if network is not None:
        sizes = (network.num_agents, network.observation_dim, network.num_actions, network.horizon)
        find_game(args.policy_path, env, sizes)
    if args.gif:  # before the episodes of the report, so that its mistakes are told at once
        save_gif(game, gif_policies(game, network, checkpoint, args, device), args, device)

    returns = play(game, network, args, device)  # (N, A)
    episode_returns = returns.mean(dim=1)
    test_return = episode_returns.mean().item()
    report = dict(policy=args.policy_path, env=env, backend=args.backend, num_episodes=args.num_episodes, seed=args.seed)
    report |= {"sample": args.sample} | game.metrics(test_return)
    report["standard_error"] = episode_returns.std().item() / len(episode_returns) ** 0.5 if len(episode_returns) > 1 else None
    report |= {"agent_returns": returns.mean(dim=0).tolist(), "episode_returns": episode_returns.tolist()}
    error = "" if report["standard_error"] is None else f" +- {report['standard_error']:.2f}"
    print(f"{args.policy_path} on {env}, {args.num_episodes} episodes in {args.backend}:")
    print(
        f"  charts/test_return {test_return:.2f}{error} (mean over agents of the undiscounted return of {game.horizon} steps)"
    )
    if "charts/score" in report:
        score = report["charts/score"]
        print(f"  charts/score       {score:.1f} (random policy 0, best expert of the paper's authors 100; tag: ours)")
    print(f"  agent_returns      {'  '.join(f'{value:.2f}' for value in report['agent_returns'])}")
    if args.nash_gap:
        report |= nash_gap(game, network, args, device)
        gap = with_interval(report["charts/nash_gap"], report["nash_gap_interval"])
        print(f"  charts/nash_gap    {gap} (sum of agent_gains: what each gains by the best response found; 95 % interval)")
        gains = zip(report["agent_gains"], report["agent_gain_intervals"], strict=True)
        print(f"  agent_gains        {'  '.join(with_interval(*gain) for gain in gains)}")
    if args.json_path:
        save_file(args.json_path, lambda file: file.write(json.dumps(report, indent=1).encode()))
    return report


if __name__ == "__main__":
    run_command_line(main, Args, presets={})
