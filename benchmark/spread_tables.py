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
    print("# simple_spread, diversified data: what `bash benchmark/spread.sh` measured\n")
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, two processes on two CPU cores\n"
    )

    print("Learned policies, alpha 1, beta 1, 4,096 fresh episodes each (`evaluate.py --seed 12345`):\n")
    header("network", "seed", "return, last", "score, last", "return, best", "score, best", "log_pi_ref", "updates per second")
    scores = []
    for network, run_name, seed in (("mlp", "", 1), ("mlp", "", 2), ("mlp", "", 3), ("gru", "-gru", 1)):
        name = f"vdn{run_name}-beta1-alpha1-seed{seed}"
        reports = [Path(f"runs/logs/{name}{suffix}.json") for suffix in ("", "-best")]
        last, best = (json.loads(path.read_text()) if path.exists() else None for path in reports)
        cells = [f"{r[f'charts/{key}']:.2f}" if r else "" for r in (last, best) for key in ("test_return", "score")]
        log = metrics(name)
        row(network, seed, *cells, f"{log['charts/log_pi_ref']:.2f}", f"{log['speed/updates_per_second']:.1f}")
        scores += [last["charts/score"]] if network == "mlp" else []
    deviation = torch.tensor(scores).std().item()
    print(
        f"\nScore of the last MLP checkpoint: {sum(scores) / 3:.1f} ± {deviation:.1f} (standard deviation over three seeds)\n"
    )

    names = ("losses/nll", "reward/accuracy", "reward/standardized_mse", "reward/correlation")
    bayes = ("reward/bayes_nll", "reward/bayes_accuracy")
    print("Reward model by its input, alpha 1, test part:\n")
    header("input", "seed", *names, *bayes)
    for label, prefix in (("joint", "reward"), ("own", "reward-own")):
        for seed in (1, 2, 3):
            m = metrics(f"{prefix}-alpha1-seed{seed}")
            row(label, seed, *(m[name] for name in (*names, *bayes)))

    print("\nReward model by alpha, seed 1, test part; final: the last epoch's weights:\n")
    columns = ("final/nll", "final/accuracy", *names, "losses/training_nll", "losses/smoothness")
    header("alpha", *columns)
    for alpha in ("0", "0.001", "0.01", "0.1", "1", "10", "100", "1000"):
        m = metrics(f"reward-alpha{alpha}-seed1")
        row(alpha, *(m[name] for name in columns))

    print("\nImitation, held-out trajectories and 4,096 episodes:\n")
    header("seed", "bc/nll", "bc/accuracy", "return, sampled", "return, greedy", "best epoch")
    for seed in (1, 2, 3):
        m = metrics(f"bc-seed{seed}")
        returns = [f"{m[f'charts/{key}']:.2f}" for key in ("test_return", "greedy_test_return")]
        row(seed, m["bc/nll"], m["bc/accuracy"], *returns, m["best_epoch"])


if __name__ == "__main__":
    main()
