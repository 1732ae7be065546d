"""How fast every stage is: environment steps, collection, and gradient steps of reward model, BC and VDN with
default settings, a GRU beside the MLP. The trainers run as their own main() does, on random data of the size
of spread (speed does not depend on the numbers), and report the rate themselves. Writes
benchmark/results/speed-<device>.md; leave the machine alone meanwhile.

Usage: python benchmark/speed.py --device cpu
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import tyro

import collect_data
import train_bc
import train_reward
import vdn_rlhf
from collect_data import BLOCK_SIZE, ParticleEnv, draw_pairs, make_game, save_file

NUM_BLOCKS = 10  # of random data: 2,560 trajectories


@dataclass
class Args:
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """what to measure; on cpu one thread"""
    seconds: float = 10.0
    """about how long to measure each rate"""
    result_path: str = ""
    """where to write, instead of benchmark/results/speed-<device>.md"""


def steps_per_second(name: str, num_envs: int, args: Args) -> float:
    """A step is actions in, physics, rewards and observations out."""
    game, generator = make_game(name, args.device), torch.Generator(args.device).manual_seed(1)
    env = ParticleEnv(game, num_envs, args.device)
    shape = (game.horizon, num_envs, game.num_agents)
    actions = torch.randint(game.num_actions, shape, generator=generator, device=args.device)
    episodes, start = -1, time.perf_counter()  # the first episode warms up
    while episodes < 1 or time.perf_counter() - start < args.seconds:
        env.reset(generator)
        for step in range(game.horizon):
            env.step(actions[step])
        if args.device == "cuda":
            torch.cuda.synchronize()
        episodes += 1
        start = time.perf_counter() if episodes == 0 else start
    return num_envs * game.horizon * episodes / (time.perf_counter() - start)


def trajectories_per_second(folder: Path, args: Args) -> float:
    """Of the diversified mixture in spread, with policies, pairs, labels and writing; two sizes, because what
    it takes to start is not part of the rate."""
    seconds = []
    sizes = (BLOCK_SIZE * 10, BLOCK_SIZE * 40)
    for size in sizes:
        start, path = time.perf_counter(), str(folder / f"{size}.npz")
        collect_data.main(collect_data.Args(num_trajectories=size, device=args.device, data_path=path))
        seconds.append(time.perf_counter() - start)
    return (sizes[1] - sizes[0]) / (seconds[1] - seconds[0])


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


def updates_per_second(script, output: Path, args: Args, **settings) -> float:
    """Run the main() of a script with these flags and read the rate that it reports beside its output."""
    folder = output.parent
    paths = {"data_path": str(folder / "dataset.npz"), f"{output.stem.split('-')[0]}_path": str(output)}
    script.main(script.Args(env="random-data", device=args.device, **paths, **settings))
    return json.loads(output.with_suffix(".json").read_text())["metrics"]["speed/updates_per_second"]


def describe_machine(device: str) -> str:
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"one thread of {models[0] if models else platform.machine()}, {versions}"


def measure(folder: Path, args: Args):
    """-> rows (what, rate, unit), as they are measured."""
    for game in ("spread", "tag", "reference"):
        for num_envs in (64, 4096, 65_536):
            rate = steps_per_second(game, num_envs, args) / 1e6
            yield f"{game}, {num_envs:,} environments", rate, "million steps/s"
    yield "collection of spread", trajectories_per_second(folder, args), "trajectories/s"

    write_random_data(folder / "dataset.npz")
    updates = max(int(args.seconds * (1000 if args.device == "cuda" else 50)), 10)  # a guess of the rate
    models = {"reward_path": str(folder / "reward.pt"), "bc_path": str(folder / "bc.pt")}  # what VDN reads
    epochs = max(updates // (3 * NUM_BLOCKS), 1)  # a minibatch is a block, of 256 trajectories
    rate = updates_per_second(train_reward, folder / "reward.pt", args, max_epochs=epochs)
    yield "reward model, 256 trajectories", rate, "updates/s"
    rate = updates_per_second(train_bc, folder / "bc.pt", args, num_updates=updates)
    yield "BC, 64 trajectories", rate, "updates/s"
    for network in ("mlp", "gru"):
        flags = {**models, "num_updates": updates, "network": network}
        rate = updates_per_second(vdn_rlhf, folder / f"vdn-{network}.pt", args, **flags)
        yield f"VDN, {network}, 64 trajectories", rate, "updates/s"


def main(args: Args) -> None:
    torch.set_num_threads(1)
    lines = [
        f"# Speed: {describe_machine(args.device)}",
        "",
        f"`python benchmark/speed.py --device {args.device}`, default settings. An update: a gradient step.",
        "",
        "| | rate | unit |",
        "|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for what, rate, unit in measure(Path(folder), args):
            lines.append(f"| {what} | {rate:,.{0 if rate >= 100 else 1 if rate >= 10 else 2}f} | {unit} |")
            print(lines[-1], flush=True)
    path = Path(args.result_path or Path(__file__).parent / "results" / f"speed-{args.device}.md")
    save_file(path, "\n".join([*lines, ""]).encode())


if __name__ == "__main__":
    main(tyro.cli(Args))
