"""Kill every training script at random moments, resume it, and compare what it leaves with what an undisturbed run leaves: all
tensors and metrics (timings aside) bit-equal, and no other files. tests/test_resume.py does the same with fewer kills.

python tests/soak.py --kills 20 --seed 1   writes benchmark/results/soak.md
"""

import argparse
import io
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from conftest import ROOT, made_up_arrays

SMALL = "--device cpu --hidden-dim 32 --num-layers 2"
POLICIES = (
    "collect_data.py --policies-path . --num-trajectories 512 --data-path dataset.npz --num-updates 160 --num-envs 16"
    f" --batch-size 16 --buffer-size 200 --checkpoint-every 10 {SMALL}"
)
CASES = {  # name: what must be there, the command
    "collect_data.py, which trains experts": ((), POLICIES),
    "train_reward.py": (
        ("dataset.npz",),
        f"train_reward.py {SMALL} --data-path dataset.npz --max-epochs 12 --checkpoint-every 5",
    ),
    "train_reward.py, 2 seeds x 2 alphas": (
        ("dataset.npz",),
        f"train_reward.py {SMALL} --data-path dataset.npz --max-epochs 6 --checkpoint-every 5 --num-seeds 2 --alpha 0 1",
    ),
    "train_bc.py": (("dataset.npz",), f"train_bc.py {SMALL} --data-path dataset.npz --max-epochs 5 --checkpoint-every 20"),
    "train_bc.py, 2 seeds": (
        ("dataset.npz",),
        f"train_bc.py {SMALL} --data-path dataset.npz --max-epochs 3 --checkpoint-every 20 --num-seeds 2",
    ),
    "vdn_rlhf.py": (
        ("dataset.npz", "reward-alpha1-seed1.pt", "bc-seed1.pt"),
        f"vdn_rlhf.py {SMALL} --data-path dataset.npz --imitation-updates 100 --num-updates 200 --checkpoint-every 20",
    ),
    "vdn_rlhf.py, 2 seeds x 2 betas, makes its models, unknown game": (
        ("made-up.npz",),
        f"vdn_rlhf.py {SMALL} --env made-up --data-path made-up.npz --imitation-updates 80 --num-updates 200"
        " --checkpoint-every 20 --num-seeds 2 --beta 1 10",
    ),
}


def prepare(folder: Path, needed: tuple, sources: Path) -> Path:
    """A new folder that holds the files `needed`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in needed:
        os.link(sources / name, folder / name)
    return folder


def made_up_blocks(num_blocks: int) -> dict[str, np.ndarray]:
    """The made-up game with 400 pairs in every block of 40 trajectories, so that runs can be stacked."""
    B, rng = num_blocks, np.random.default_rng(0)
    arrays = made_up_arrays(num_trajectories=40 * B)
    first, other = rng.integers(40, size=400 * B), rng.integers(1, 40, size=400 * B)
    pairs = np.repeat(np.arange(B), 400)[:, None] * 40 + np.stack([first, (first + other) % 40], axis=1)
    returns = (arrays["true_rewards"].sum(axis=1) + rng.uniform(0, 1e-3, (40 * B, 4)))[pairs]  # (pairs, 2, agents)
    labels = np.where(returns[:, 0] > returns[:, 1], 1, -1)
    return arrays | dict(pairs=pairs, labels=labels, block=np.arange(40 * B) // 40)


def start(words: list[str], folder: Path) -> subprocess.Popen:
    """A script with its children as a process group of its own; what it prints is added to printed.txt."""
    with open(folder / "printed.txt", "ab") as printed:
        command = [sys.executable, ROOT / words[0], *words[1:]]
        return subprocess.Popen(command, cwd=folder, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)


def finish(words: list[str], folder: Path) -> float:
    """Run to the end -> seconds."""
    begin = time.time()
    status = start(words, folder).wait()
    assert status == 0, f"status {status}: {' '.join(words)}\n{(folder / 'printed.txt').read_text()[-2000:]}"
    return time.time() - begin


def read(path: Path) -> dict:
    """What a file holds but for timings, the command and --resume."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {key: torch.from_numpy(file[key]) if key != "meta" else json.loads(str(file[key])) for key in file.files}
    content = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    content["metrics"] = {key: value for key, value in content["metrics"].items() if not key.startswith("speed/")}
    content["meta"].pop("command", None)
    content["args"].pop("resume", None)
    return content


def is_same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    return a == b


def differences(a: Path, b: Path) -> list[str]:
    """Files that stand in one folder only, or hold something else."""
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (a, b)]
    wrong = [f"{name} is in one folder only" for name in sorted(names[0] ^ names[1])]
    checked = [name for name in sorted(names[0] & names[1]) if name.endswith((".pt", ".npz"))]
    assert checked
    return wrong + [f"{name} differs" for name in checked if not is_same(read(a / name), read(b / name))]


def soak(name: str, num_kills: int, sources: Path, work: Path, rng: random.Random) -> tuple[int, int, int, list[str]]:
    """-> kills, resumptions in the middle of a training, finished runs, differences."""
    needed, words = CASES[name][0], CASES[name][1].split()
    seconds = finish(words, prepare(work / "undisturbed", needed, sources))
    kills = resumed = finished = 0
    wrong, folder, done = [], prepare(work / "killed", needed, sources), False
    while not done:
        process = start([*words, "--resume"], folder)
        try:
            status = process.wait(timeout=rng.uniform(0, seconds) if kills < num_kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        printed = (folder / "printed.txt").read_text()
        assert status == 0, f"{name}: status {status}\n{printed[-2000:]}"
        finished, resumed, done = finished + 1, resumed + printed.count(" goes on after "), kills >= num_kills
        wrong += differences(work / "undisturbed", folder)
        folder = prepare(folder, needed, sources)
    return kills, resumed, finished, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    lines = [
        f"# Killed and resumed: what `python tests/soak.py --kills {args.kills} --seed {args.seed}` found",
        "",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, CPU. SIGKILL to the process and",
        "its children at moments that are uniform over the time of an undisturbed run, from its start, when Python imports, to",
        "its end; each time the same command with `--resume` follows. A run that came to its end is compared with the",
        "undisturbed one, and the next begins, until all kills are spent.",
        "",
        "| command | kills | goes on in mid-training | runs that ended | files that differ or are left over |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        sources, rng = prepare(Path(folder) / "sources", (), Path()), random.Random(args.seed)
        finish(f"collect_data.py --num-trajectories 2560 --data-path dataset.npz {SMALL}".split(), sources)
        np.savez(sources / "made-up.npz", **made_up_blocks(20))
        for script in ("train_reward.py", "train_bc.py"):
            finish(f"{script} --max-epochs 4 --data-path dataset.npz {SMALL}".split(), sources)
        for name in CASES:
            kills, resumed, finished, wrong = soak(name, args.kills, sources, Path(folder) / "work", rng)
            lines.append(f"| {name} | {kills} | {resumed} | {finished} | {'; '.join(wrong) or 'none'} |")
            print(lines[-1], flush=True)
    (ROOT / "benchmark" / "results" / "soak.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
