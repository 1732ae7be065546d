"""How fast every stage is: environment steps, collection, and gradient steps of reward model, BC and VDN with
default settings, a GRU beside the MLP; on CUDA as they are and captured as one graph. The updates are those
that main() of each trainer builds (the rate does not fall), on random data of the size of spread. Writes
benchmark/results/speed-<device>.md; leave the machine alone.

Usage: python benchmark/speed.py --device cpu
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import tyro

import collect_data
import train_bc
import train_reward
import vdn_rlhf
from collect_data import BLOCK_SIZE, ParticleEnv, draw_pairs, make_game, save_file

NUM_BLOCKS, ROUNDS = 40, 5  # of random data: 2,560 trajectories; times that a rate is measured


@dataclass
class Args:
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """what to measure; on cpu one core"""
    seconds: float = 10.0
    """about how long to measure each rate"""
    only: str = ""
    """only rows whose name has this in it"""
    result_path: str = ""
    """where to write, instead of benchmark/results/speed-<device>.md"""


def rates(runs: list, args: Args, unit=1.0) -> list[list[float]]:
    """How often each of `runs` can be called per second, times `unit`: ROUNDS values each, in turns, because
    the clock of a machine changes; a first round warms up."""
    measured, burst = [[] for _ in runs], 100 if args.device == "cuda" else 1
    for _ in range(ROUNDS + 1):
        for run, results in zip(runs, measured, strict=True):
            count, start = 0, time.perf_counter()
            while not count or time.perf_counter() - start < args.seconds / ROUNDS:
                for _ in range(burst):
                    run()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                count += burst
            results.append(unit * count / (time.perf_counter() - start))
    return [results[1:] for results in measured]


def play_episode(name: str, num_envs: int, args: Args):
    """-> a function that plays one; a step is actions in, physics, rewards and observations out."""
    game, generator = make_game(name, args.device), torch.Generator(args.device).manual_seed(1)
    env = ParticleEnv(game, num_envs, args.device)
    shape = (game.horizon, num_envs, game.num_agents)
    actions = torch.randint(game.num_actions, shape, generator=generator, device=args.device)

    def run():
        env.reset(generator)
        for step in range(game.horizon):
            env.step(actions[step])

    return run, num_envs * game.horizon


def trajectories_per_second(folder: Path, args: Args) -> list[float]:
    """Of the diversified mixture in spread, with policies, pairs, labels and writing; two sizes, because what
    it takes to start is not part of the rate."""
    sizes, seconds = (2_560, 10_240), []
    for size in sizes:
        start, path = time.perf_counter(), str(folder / f"{size}.npz")
        collect_data.main(collect_data.Args(num_trajectories=size, device=args.device, data_path=path))
        seconds.append(time.perf_counter() - start)
    return [(sizes[1] - sizes[0]) / (seconds[1] - seconds[0])]


def write_random_data(path: Path) -> None:
    """A dataset of the size of spread, of a game that no script knows, so that nothing is evaluated."""
    rng, N = np.random.default_rng(1), NUM_BLOCKS * BLOCK_SIZE
    np.savez(
        path,
        observations=rng.normal(size=(N, 26, 3, 18)).astype(np.float32),
        actions=rng.integers(5, size=(N, 25, 3), dtype=np.uint8),
        pairs=draw_pairs(N, 10, torch.Generator().manual_seed(1)).numpy().astype(np.int32),
        labels=rng.choice(np.array([-1, 1], np.int8), size=(10 * N, 3)),
        block=(np.arange(N) // BLOCK_SIZE).astype(np.int32),
        meta=np.array(json.dumps({"format": 1, "env": "random-data", "num_actions": 5})),
    )


def updates(script, output: Path, args: Args, **settings) -> dict:
    """Run main() of a script with these flags, for a few updates -> its update, as it is and captured."""
    train, given = script.train, []
    flag = f"{output.stem.split('-')[0]}_path"
    settings |= {"data_path": str(output.parent / "dataset.npz"), flag: str(output)}
    with mock.patch.object(script, "train", lambda *words: given.append(words) or train(*words)):
        script.main(script.Args(env="random-data", device=args.device, **settings))
    _, _, _, _, update, batches, *_ = given[0]
    batch = itertools.cycle(batches)

    def run(update=update):
        update(next(batch))

    if args.device == "cpu":
        return {"": run}
    captured = script.capture(update, batches.device)
    return {", as it is": run, ", captured": lambda: run(captured)}


def describe_machine(device: str) -> str:
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"one core of {models[0] if models else platform.machine()}, {versions}"


def measure(folder: Path, args: Args):
    """-> rows (what, rates, unit), as they are measured."""
    wanted = lambda what: args.only in what  # noqa: E731
    for game, num_envs in itertools.product(("spread", "tag", "reference"), (64, 4096, 65_536)):
        if wanted(what := f"{game}, {num_envs:,} environments"):
            run, steps = play_episode(game, num_envs, args)
            yield what, rates([run], args, steps / 1e6)[0], "million steps/s"
    if wanted("collection of spread"):
        yield "collection of spread", trajectories_per_second(folder, args), "trajectories/s"

    write_random_data(folder / "dataset.npz")
    few = {"num_updates": 20}
    vdn = {f"{name}_path": str(folder / f"{name}.pt") for name in ("reward", "bc")} | few | {"batch_size": 64}
    small = {**vdn, "network": "gru", "hidden_dim": 64, "batch_size": 32}
    trainers = {  # a minibatch of the reward model is a block
        "reward model, 64 trajectories": (train_reward, "reward.pt", {"max_epochs": 1}),
        "BC, 64 trajectories": (train_bc, "bc.pt", few),
        "VDN, mlp, 64 trajectories": (vdn_rlhf, "vdn-mlp.pt", vdn),
        "VDN, gru, 64 trajectories": (vdn_rlhf, "vdn-gru.pt", {**vdn, "network": "gru"}),
        "VDN, gru of 64, 32 trajectories": (vdn_rlhf, "vdn-small.pt", small),
    }
    for what, (script, name, flags) in trainers.items():
        if wanted(what) or script is not vdn_rlhf:  # VDN reads the others
            runs = updates(script, folder / name, args, **flags)
            results = rates(list(runs.values()), args) if wanted(what) else []
            yield from ((what + how, rate, "updates/s") for how, rate in zip(runs, results, strict=False))


def main(args: Args) -> None:
    torch.set_num_threads(1)
    if args.device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    command = f"python benchmark/speed.py --device {args.device} --seconds {args.seconds:g}"
    lines = [
        f"# Speed: {describe_machine(args.device)}",
        "",
        f"`{command}`, on an idle machine. Median and lowest",
    ]
    lines += [f"of {ROUNDS} measurements (of collection: one). An update: a gradient step.", ""]
    lines += ["| | median | lowest | unit |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for what, results, unit in measure(Path(folder), args):
            numbers = (statistics.median(results), min(results))
            cells = [f"{x:,.{0 if x >= 100 else 1 if x >= 10 else 2}f}" for x in numbers]
            lines.append(f"| {' | '.join([what, *cells, unit])} |")
            print(lines[-1], flush=True)
    path = Path(args.result_path or Path(__file__).parent / "results" / f"speed-{args.device}.md")
    save_file(path, "\n".join([*lines, ""]).encode())


if __name__ == "__main__":
    main(tyro.cli(Args))
