"""Markdown tables of the runs that benchmark/reward_model.sh made. Run from the repository root."""

import platform
from pathlib import Path

import torch

FOLDER = Path("runs/spread/diversified")


def metrics(name: str) -> dict:
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)["metrics"]


def row(*cells) -> None:
    print("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def header(*names: str) -> None:
    row(*names)
    row(*["---"] * len(names))


def main() -> None:
    print("# The reward model on simple_spread, diversified data: what `bash benchmark/reward_model.sh` measured\n")
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, two processes on two CPU cores\n"
    )

    names = ("losses/nll", "reward/accuracy", "reward/standardized_mse", "reward/correlation")
    bayes = ("reward/bayes_nll", "reward/bayes_accuracy")
    print("Reward model by its input, alpha 1, test part:\n")
    header("input", "seed", *names, *bayes)
    for label, prefix in (("joint", "reward-joint"), ("own", "reward-own")):
        for seed in (1, 2, 3):
            m = metrics(f"{prefix}-alpha1-seed{seed}")
            row(label, seed, *(m[name] for name in (*names, *bayes)))

    print("\nReward model by alpha, seed 1, test part; final: the last epoch's weights:\n")
    columns = ("final/nll", "final/accuracy", *names, "losses/training_nll", "losses/smoothness")
    header("alpha", *columns)
    for alpha in ("0", "0.001", "0.01", "0.1", "1", "10", "100", "1000"):
        m = metrics(f"reward-joint-alpha{alpha}-seed1")
        row(alpha, *(m[name] for name in columns))


if __name__ == "__main__":
    main()
