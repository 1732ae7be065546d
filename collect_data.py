"""Collect the offline preference dataset of section 6.2: play a mixture of expert, unilateral, rookie and trivial joint
policies (Table 1), draw pairs of trajectories and one Bradley-Terry preference label per pair and agent, and write
`runs/<game>/<dataset>/dataset.npz`. Expert, rookie and novice come from `policies/<game>/`; where there are none they are
trained first by online VDN (Sunehag et al., 2017), rookie and novice being early checkpoints of the expert's run.

Usage: python collect_data.py --env spread --dataset diversified

Logged metrics of the policy training (stdout and, with --track, wandb):
    charts/test_return  mean over agents of the undiscounted greedy return, fresh episodes
    charts/score        the same on the scale random policy = 0, best expert of the paper's authors = 100 (tag: ours)
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
import ctypes
import glob
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
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
# Early checkpoints of the expert's run (section 6.2: early stop), by how far the expert had come from the random policy.
# Rookie trajectories are the rookie's; the deviators of unilateral ones are rookies and novices in turn ("of different
# proficiency level").
EARLY_CHECKPOINTS = {"rookie": 0.4, "novice": 0.2}
EXPERT, UNILATERAL, ROOKIE, TRIVIAL = range(4)  # the values of `behavior` in the dataset
BLOCK_SIZE = 256
HISTORY_EPISODES = 1024  # behind every return measured while policies train
ENVIRONMENTS_AT_ONCE = 3840  # per rollout while collecting; bounds the memory (another value: other random numbers)


@dataclass
class Args:
    env: str = "spread"
    """the game: spread, tag or reference"""
    dataset: str = "diversified"
    """the mixture of Table 1: diversified, mix-unilateral, mix-expert or pure-expert"""
    num_agents: int | None = None
    """agents of spread; 3 where this is not given"""
    num_landmarks: int | None = None
    """landmarks of spread; as many as agents where this is not given"""
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
    """folder of <game>/{expert,rookie,novice}.pt, instead of policies/ beside this script"""
    train_policies: bool = False
    """train expert, rookie and novice even if they exist (half an hour of one core and more)"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""
    track: bool = False
    """log the policy training to wandb"""
    checkpoint_every: int = 3_000
    """updates between two checkpoints, NAME.training.pt beside the output, from which --resume goes on"""
    resume: bool = False
    """go on where a run of the same command was stopped; nothing to do if the output is there"""

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
    """epsilon-greedy exploration falls linearly from 1 to final_epsilon over this many updates; in reference the random
    language is left behind between half and one and a half times as many"""
    final_epsilon: float = 0.05
    """share of uniformly random actions from then on"""
    target_update_rate: float = 0.01
    """the target network moves this share of the way to the online network after every update"""
    max_grad_norm: float = 10.0
    """gradients are clipped to this norm"""


PRESETS = {  # by game
    "default": {
        "reference": dict(td_lambda=0.9, buffer_size=5_000, num_updates=40_000),
        "tag": dict(num_updates=30_000),
    },
}


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


def train_policies(args: Args, game: Game, folder: Path, device: torch.device) -> None:
    """Online VDN with replay; writes expert.pt (the last network) and the EARLY_CHECKPOINTS."""
    generator = torch.Generator(device).manual_seed(args.seed)
    T, A, D = game.horizon, game.num_agents, game.observation_dim
    shape = dict(observation_dim=D, num_agents=A, num_actions=game.num_actions, horizon=T)
    shape |= dict(network=args.network, hidden_dim=args.hidden_dim, num_layers=args.num_layers, num_words=game.num_words)
    online, target = AgentNetwork(**shape).to(device), AgentNetwork(**shape).to(device).requires_grad_(False)
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), lr=args.learning_rate)
    num_rollouts = -(-args.num_updates // args.updates_per_rollout)
    num_updates, eval_every = num_rollouts * args.updates_per_rollout, max(num_rollouts // 200, 1)
    log = start_tracking(args, [f"policies-{game.name}-seed{args.seed}"])

    language = random_language(game, args.seed, device) if game.num_words else None
    env = ParticleEnv(game, args.num_envs, device)
    capacity = max(args.buffer_size, args.num_envs)
    buffer = dict(observations=torch.zeros(capacity, T + 1, A, D, device=device))
    buffer |= dict(actions=torch.zeros(capacity, T, A, dtype=torch.uint8, device=device))
    buffer |= dict(rewards=torch.zeros(capacity, T, device=device))  # of the team: the sum over its agents

    training_file = TrainingFile(folder / "expert.pt", args, policy_args(args), device, {})
    parts = dict(online=online, target=target, optimizer=optimizer, buffer=buffer, generator=generator)
    results = [dict(history=[], checkpoints=[])]  # history: [updates, return] of the checkpoint at the same place
    start = training_file.begin("online VDN", num_updates, parts, results) // args.updates_per_rollout
    history, checkpoints = results[0]["history"], results[0]["checkpoints"]
    fine = len(history) == len(checkpoints) >= (start == num_rollouts) and all(fits(entry, [0, 0.0]) for entry in history)
    if not fine or not all(fits(checkpoint, online.state_dict()) for checkpoint in checkpoints):
        raise UserError(f"{training_file.path}: 'online VDN' is damaged; leave out --resume to start anew")

    progress = tqdm(total=num_rollouts, initial=start, desc=f"online VDN on {game.name}", unit="rollout", mininterval=1)
    for i in range(start, num_rollouts):
        done = i / num_rollouts
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, max(0.02, 2 * (1 - done)))
        explored = min(i * args.updates_per_rollout / args.exploration_updates, 1)
        epsilon = 1 - explored * (1 - args.final_epsilon)

        act, start_observations = make_actor(online, game.num_actions, generator, epsilon=epsilon), env.reset(generator)
        if language is not None:
            language_share = 1.5 - i * args.updates_per_rollout / args.exploration_updates
            hold_share = max(0.1, 1 - done / 0.6)
            act = explore_speech(act, language, game.num_words, language_share, hold_share, generator)
        observations, actions, rewards = rollout(env, act, start_observations)
        slots = torch.arange(i * args.num_envs, (i + 1) * args.num_envs, device=device) % capacity
        buffer["observations"][slots], buffer["actions"][slots] = observations, actions.to(torch.uint8)
        buffer["rewards"][slots] = rewards.sum(-1)
        filled = min((i + 1) * args.num_envs, capacity)

        for _ in range(args.updates_per_rollout):
            batch = torch.randint(filled, (args.batch_size,), generator=generator, device=device)
            episodes = buffer["observations"][batch], buffer["actions"][batch].long(), buffer["rewards"][batch]
            loss = vdn_loss(online, target, *episodes, args.gamma, args.td_lambda)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(online.parameters(), args.max_grad_norm)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), args.target_update_rate)

        updates = (i + 1) * args.updates_per_rollout
        early = i < num_rollouts // 100  # where most changes, rookies and novices come from
        if (i + 1) % (max(eval_every // 10, 1) if early else eval_every) == 0 or i + 1 == num_rollouts:
            if not math.isfinite(loss.item()):
                advice = f"try a smaller --learning-rate than {args.learning_rate:g}"
                raise UserError(f"seed {args.seed}: losses/td_loss is {loss.item()} after {updates} updates; {advice}")
            test_return = mean_return(game, online, HISTORY_EPISODES, args.seed + 1000 + i, device)
            log(0, game.metrics(test_return) | {"losses/td_loss": loss.item()}, updates)
            history.append([updates, test_return])
            checkpoints.append(copy.deepcopy(online.state_dict()))
            progress.set_postfix({"return": f"{test_return:.2f}"})
        progress.update()
        training_file.after_update(updates)

    progress.close()
    save_policies("vdn", args, game, folder, online, shape, history, checkpoints, device)
    training_file.remove()


def save_policies(kind: str, args, game: Game, folder: Path, network, shape: dict, history, checkpoints, device) -> None:
    """Write expert.pt, the last of a run's checkpoints, and the EARLY_CHECKPOINTS; history has [updates, return] of each."""

    def measure(network) -> float:
        return mean_return(game, network, TEST_EPISODES, args.seed + 10**6, device)

    network.load_state_dict(checkpoints[-1])
    low, high = measure(None), measure(network)  # of the random policy, of the expert
    chosen = {"expert": len(history) - 1}
    for name, share in EARLY_CHECKPOINTS.items():
        wanted = low + share * (high - low)
        chosen[name] = min(range(len(history)), key=lambda index: abs(history[index][1] - wanted))
    for name, index in chosen.items():
        network.load_state_dict(checkpoints[index])
        metrics = game.metrics(measure(network)) | {"updates": history[index][0]}
        meta = dict(env=game.name, num_agents=game.num_agents, num_landmarks=game.num_landmarks, network=shape)
        command = " ".join(["python", *sys.argv]) if sys.argv[0].endswith(".py") else "called from Python"
        meta |= dict(command=command, seed=args.seed, torch=str(torch.__version__))
        if game.prey is not None:
            meta["sources"] = {"prey": hash_weights(game.prey, {})}
        history_metrics = {"history": history} if name == "expert" else {}
        save_checkpoint(folder / f"{name}.pt", kind, args, meta, network, {}, metrics | history_metrics)
        value, updates = metrics["charts/test_return"], metrics["updates"]
        print(f"{folder / name}.pt: greedy return {value:.2f} (random policy {low:.2f}), after {updates} updates")


def random_language(game: Game, seed: int, device) -> Callable:
    """-> language(observations (N, A, D)) -> words (N, A): the argmax of a fixed random linear map of what an agent sees, each
    number standardised by random play."""
    generator = torch.Generator(device).manual_seed(seed)
    env = ParticleEnv(game, 1024, device)
    observations = rollout(env, make_actor(None, game.num_actions, generator), env.reset(generator))[0]
    mean, std = observations.mean(dim=(0, 1, 2)), observations.std(dim=(0, 1, 2)).clamp(min=0.1)
    weights = torch.randn(game.observation_dim, game.num_words, generator=generator, device=device)
    return lambda observations: ((observations - mean) / std @ weights).argmax(dim=-1)


def explore_speech(act: Callable, language: Callable, num_words: int, language_share, hold_share, generator) -> Callable:
    """Exploration where actions are moves and words. A word that tells the goal with probability 1/2 instead of 1/3 is worth
    next to nothing, a single word moves the listener by a single step, and so independent random words never become speech.
    Therefore a share of the agents, hold_share, hold each word for ten steps on average: 30 % are uniformly random, of the
    rest a language_share (clipped to 0 .. 1) belongs to a language that already depends on the goal, the others are act's."""
    held = holds = None

    def speaking_act(observations, step):
        nonlocal held, holds
        actions = act(observations, step)

        def draw(share):
            return torch.rand(actions.shape, generator=generator, device=actions.device) < share

        words = torch.where(draw(language_share), language(observations), actions // 5)
        random_words = torch.randint(num_words, actions.shape, generator=generator, device=actions.device)
        words = torch.where(draw(0.3), random_words, words)
        if step == 0:
            held, holds = words, draw(hold_share)
        held = torch.where(draw(0.1), words, held)
        return torch.where(holds, actions % 5 + 5 * held, actions)

    return speaking_act


def play_mixture(args: Args, game: Game, networks: dict, device) -> dict[str, torch.Tensor]:
    """All trajectories of the mixture (Table 1), in random order -> observations, actions, rewards, behavior, deviator.
    `networks` are the expert, the rookie and the novice."""
    generator = torch.Generator(device).manual_seed(args.seed)
    parts = MIXTURES[args.dataset]
    counts = [args.num_trajectories * part // sum(parts) for part in parts]
    counts[EXPERT] += args.num_trajectories - sum(counts)
    turns = torch.arange(max(counts[UNILATERAL], 1), device=device).split(ENVIRONMENTS_AT_ONCE)

    def actor(name: str) -> Callable:
        return make_actor(networks.get(name), game.num_actions, generator, epsilon=args.epsilon)

    chunks = []
    progress = tqdm(total=args.num_trajectories, desc="collecting", unit="trajectory", mininterval=0.5)
    for behavior, count in enumerate(counts):
        for number, start in enumerate(range(0, count, ENVIRONMENTS_AT_ONCE)):
            n = min(ENVIRONMENTS_AT_ONCE, count - start)
            deviator = torch.full((n,), -1, device=device)
            name = {EXPERT: "expert", UNILATERAL: "expert", ROOKIE: "rookie", TRIVIAL: "random"}[behavior]
            act = actor(name)
            if behavior == UNILATERAL:
                deviator = turns[number] % game.num_agents
                novice_deviates = turns[number] // game.num_agents % 2 == 1
                act = let_deviate(act, actor("rookie"), torch.where(novice_deviates, -1, deviator))
                act = let_deviate(act, actor("novice"), torch.where(novice_deviates, deviator, -1))
            env = ParticleEnv(game, n, device)
            observations, actions, rewards = rollout(env, act, env.reset(generator))
            chunks.append((observations, actions.to(torch.uint8), rewards, torch.full_like(deviator, behavior), deviator))
            progress.update(n)
    progress.close()
    order = torch.randperm(args.num_trajectories, generator=generator, device=device)
    names = ("observations", "actions", "true_rewards", "behavior", "deviator")
    return {name: torch.cat(parts)[order] for name, parts in zip(names, zip(*chunks, strict=True), strict=True)}


def let_deviate(act: Callable, deviating_act: Callable, deviator: torch.Tensor) -> Callable:
    """Unilateral policy: in environment n, agent deviator[n] (-1: no agent) follows deviating_act and all others follow act."""

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


def make_policies(args: Args, game: Game, paths: dict[str, Path], device: torch.device) -> None:
    """Train expert, rookie and novice, unless another process has made them while this one waited, or --resume finds them."""
    missing = [path for path in paths.values() if not path.exists()]
    wanted = args.train_policies or (args.resume and training_path(paths["expert"]).exists())
    if not missing and not wanted:
        return
    if missing and len(missing) < len(paths) and not wanted:
        raise UserError(f"{missing[0]}: no such file; --train-policies makes all of them anew, writing over the others")
    if paths["expert"].exists():
        expert = load_checkpoint(paths["expert"], ("vdn", "pathwise"))
        if expert["kind"] == "pathwise":
            raise UserError(f"{paths['expert']}: made by benchmark/train_spread_experts.py; delete it to train by online VDN")
        same = not missing and policy_args(args).items() <= expert["args"].items()
        if same and not left_to_do(args, list(paths), list(paths.values()))[0]:
            return
    print(f"training {', '.join(paths)} of {game.name} for {paths['expert'].parent}", flush=True)
    if game.name.startswith("spread-") and game.num_agents > 3:
        print("with more than 3 agents benchmark/train_spread_experts.py makes better ones in minutes", flush=True)
    train_policies(args, game, paths["expert"].parent, device)


@releasing_locks()
def main(args: Args) -> None:
    if args.dataset not in MIXTURES:
        raise UserError(f"--dataset {args.dataset}: unknown mixture, choose from {', '.join(MIXTURES)}")
    if args.num_trajectories % BLOCK_SIZE:
        raise UserError(f"--num-trajectories {args.num_trajectories}: must be a multiple of the block size {BLOCK_SIZE}")
    device = set_up(args)
    env_name = game_name(args)
    game = make_game(env_name)
    if game is None:
        raise UserError(f"--env {args.env}: unknown game, choose from spread, tag, reference")
    data_path = Path(args.data_path or f"runs/{env_name}/{args.dataset}/dataset.npz")

    folder = Path(args.policies_path or Path(__file__).parent / "policies") / env_name
    paths = {policy: folder / f"{policy}.pt" for policy in ("expert", *EARLY_CHECKPOINTS)}
    lock_outputs([data_path])
    busy = [path for path in (lock_path(paths["expert"]), training_path(paths["expert"])) if path.exists()]
    if args.train_policies or busy or not all(path.exists() for path in paths.values()):
        lock_outputs([paths["expert"]], wait=True)
        make_policies(args, game, paths, device)
    networks, hashes = {}, {}
    for policy, path in paths.items():
        checkpoint = load_checkpoint(path, ("vdn", "pathwise"))
        networks[policy] = network = build_network(AgentNetwork, path, checkpoint, device)
        if checkpoint["meta"].get("env") != env_name:
            raise UserError(f"{path}: 'meta' says it plays {checkpoint['meta'].get('env')}, not {env_name}")
        find_game(path, env_name, (network.num_agents, network.observation_dim, network.num_actions, network.horizon))
        hashes[policy] = hash_weights(network, {})
        if game.prey is not None:
            hashes["prey"] = hash_weights(game.prey, {})
            if checkpoint["meta"].get("sources", {}).get("prey") != hashes["prey"]:
                raise UserError(f"{path}: learned against another prey; --train-policies makes expert, rookie and novice anew")
    if data_path.exists():
        stored = read_meta(data_path)
        check_same_args(data_path, stored, dataset_args(args) | {"env": env_name}, "choose another --data-path or delete it")
        if stored.get("policies") != hashes:
            raise UserError(f"{data_path}: made with other policies; choose another --data-path or delete it")
    if not left_to_do(args, [args], [data_path])[0]:
        return

    data = play_mixture(args, game, networks, device)
    generator = torch.Generator(device).manual_seed(args.seed + 1)
    returns = data["true_rewards"].sum(dim=1)
    pairs = draw_pairs(args.num_trajectories, args.pairs_per_trajectory, generator)
    labels, mean, std = draw_labels(returns, pairs, args.steepness, generator)

    meta = dict(format=FORMAT, num_actions=game.num_actions, horizon=game.horizon, mixture=args.dataset)
    meta |= dataset_args(args) | dict(env=env_name, num_agents=game.num_agents, num_landmarks=game.num_landmarks)
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


def policy_args(args: Args) -> dict:
    """The flags that the training of policies depends on."""
    first = [field.name for field in fields(Args)].index("network")
    names = ["env", "num_agents", "num_landmarks", "seed", *[field.name for field in fields(Args)][first:]]
    return {name: getattr(args, name) for name in names}


def read_meta(path: Path) -> dict:
    """The meta of an existing dataset, before it is written over."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(json.loads(str(file["meta"])))
    except Exception:
        raise UserError(f"{path}: is there but no readable dataset; choose another --data-path or delete it") from None


if __name__ == "__main__":
    run_command_line(main, Args, PRESETS)
