"""Markdown tables of the runs that benchmark/spread.sh made. Run from the repository root."""

import json
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
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}\n")

    print("Policy, diversified data, alpha 1, beta 1, 4,096 fresh episodes each (`evaluate.py --seed 12345`):\n")
    header("seed", "return, last", "score, last", "return, best", "score, best", "log_pi_ref", "updates per second")
    scores = []
    for seed in (1, 2, 3):
        last, best = (json.loads(Path(f"runs/logs/vdn-seed{seed}{suffix}.json").read_text()) for suffix in ("", "-best"))
        log = metrics(f"vdn-beta1-alpha1-seed{seed}")
        cells = [f"{report[f'charts/{key}']:.2f}" for report in (last, best) for key in ("test_return", "score")]
        row(seed, *cells, f"{log['charts/log_pi_ref']:.2f}", f"{log['speed/updates_per_second']:.1f}")
        scores.append(last["charts/score"])
    spread = torch.tensor(scores).std().item()
    print(f"\nScore of the last checkpoint: {sum(scores) / 3:.1f} ± {spread:.1f} (standard deviation over seeds)\n")

    names = ("losses/nll", "reward/accuracy", "reward/standardized_mse", "reward/correlation")
    bayes = ("reward/bayes_nll", "reward/bayes_accuracy")
    print("Reward model by its input, alpha 1, test part:\n")
    header("input", "seed", *names, *bayes)
    for label, prefix in (("joint", "reward"), ("own", "reward-own")):
        for seed in (1, 2, 3):
            m = metrics(f"{prefix}-alpha1-seed{seed}")
            row(label, seed, *(m[name] for name in (*names, *bayes)))

    print("\nReward model by alpha, seed 1, test part; final: the last epoch's weights:\n")
    header("alpha", "final nll", *names, "losses/training_nll", "losses/smoothness")
    for alpha in ("0", "0.001", "0.01", "0.1", "1", "10", "100", "1000"):
        m = metrics(f"reward-alpha{alpha}-seed1")
        row(alpha, m["losses/last_nll"], *(m[name] for name in (*names, "losses/training_nll", "losses/smoothness")))

    m = [metrics(f"bc-seed{seed}") for seed in (1, 2, 3)]
    print("\nImitation, held-out trajectories and 4,096 episodes:\n")
    header("seed", "bc/nll", "bc/accuracy", "return, sampled", "return, greedy", "best epoch")
    for seed, x in enumerate(m, 1):
        returns = [f"{x[f'charts/{key}']:.2f}" for key in ("test_return", "greedy_test_return")]
        row(seed, x["bc/nll"], x["bc/accuracy"], *returns, x["best_epoch"])


if __name__ == "__main__":
    main()
