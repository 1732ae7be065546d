"""Draw what the paper's Figures 2 and 4 show, learned beside true rewards along one trajectory, its Figure 3,
held-out likelihoods of reward models while they learn, with the scores of policies while they learn, and
scores over beta on data without experts and over the number of labelled pairs. table2.sh, table7.sh,
figure4.sh, no_expert.sh and labels.sh train the models. What is missing stays empty.

Usage: python benchmark/figures.py --data-seed 2 --seed 4        (from the repository root)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

from benchmark import report
from benchmark.report import BETAS, GAMES, LABELS, ROOT, choose, load_results, player, standard, values
from train_reward import RewardNetwork, load_dataset
from vdn_rlhf import build_network, load_checkpoint

PANELS = {  # title of a column of Figure 4: data and alpha of the reward model
    "pure-expert data, alpha 1": ("pure-expert", 1),
    "diversified data, alpha 0": ("diversified", 0),
    "diversified data, alpha 1": ("diversified", 1),
}


@dataclass
class Args:
    data_seed: str = "2"
    """dataset seed"""
    seed: int = 4
    """training seed"""
    folder: str = "benchmark"
    """where to write the figures"""


def standardize(rewards: torch.Tensor) -> torch.Tensor:
    return (rewards - rewards.mean()) / rewards.std().clamp(min=1e-8)


@torch.no_grad()
def draw_rewards(args: Args) -> None:
    """One expert trajectory of the diversified data of every game, mean over agents, both standardised over
    all data."""
    figure, axes = plt.subplots(len(GAMES), len(PANELS), figsize=(11, 7), sharex=True, squeeze=False)
    for row, game in zip(axes, GAMES, strict=True):
        path = Path(f"runs/{game}/diversified-data{args.data_seed}/dataset.npz")
        if not path.exists():  # its panels stay empty
            continue
        names = ("observations", "actions", "true_rewards")
        data, _, _ = load_dataset(path, game, names)
        returns = data["true_rewards"].sum(dim=(1, 2))
        shown = int(returns.argsort()[int(0.9 * len(returns))])  # as good as most experts
        true = standardize(data["true_rewards"])[shown].mean(dim=1)
        for axis, (title, (mixture, alpha)) in zip(row, PANELS.items(), strict=True):
            axis.set_title(f"{game}: {title}", fontsize=9)
            axis.plot(true, color="black", label="true")
            model_path = Path(
                f"runs/{game}/{mixture}-data{args.data_seed}/reward-alpha{alpha}-seed{args.seed}.pt"
            )
            if model_path.exists():
                checkpoint = load_checkpoint(model_path, "reward")
                model = build_network(RewardNetwork, model_path, checkpoint, "cpu")
                some = torch.cat([torch.tensor([shown]), torch.arange(2000)])
                learned = standardize(model(data["observations"][some, :-1], data["actions"][some]))[0]
                axis.plot(learned.mean(dim=1), color="tab:blue", linestyle="--", label="learned")
    axes[0, 0].legend()
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(Path(args.folder) / "rewards.png", dpi=70)


def draw_curves(args: Args) -> None:
    """Of reward models, epoch by epoch, and of policies: mean over training seeds."""
    results = load_results(ROOT / "benchmark/results")
    figure, axes = plt.subplots(2, len(GAMES), figsize=(11, 6), squeeze=False)

    def draw(axis, cell: list[dict], name: str, label: str) -> None:
        curves = [run["metrics"]["history"] for run in cell if name in run["metrics"]["history"]]
        if curves:
            axis.plot(curves[0]["update"], np.mean([curve[name] for curve in curves], axis=0), label=label)

    for top, bottom, game in zip(*axes, GAMES, strict=True):
        for alpha in report.ALPHAS:
            flags = dict(alpha=alpha, preset="default", variance="return")
            cell = choose(results, "reward", game, "diversified", args.data_seed, **flags)
            draw(top, cell, "losses/nll", f"alpha {alpha:g}")
        for mixture in report.MIXTURES:
            cell = choose(results, "vdn", game, mixture, args.data_seed, **standard(game))
            draw(bottom, cell, "charts/score", mixture)
        top.set(title=game)
        bottom.set(xlabel="update")
    axes[0, 0].set_ylabel("reward model: held-out NLL per label")
    axes[1, 0].set_ylabel("VDN-RLHF: score")
    for axis in axes[:, 0]:
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(Path(args.folder) / "curves.png", dpi=70)


def draw_scores(axis, positions, cells: list[list[dict]]) -> None:
    """Mean and standard deviation over training seeds."""
    scores = [values(cell, "charts/score") or [np.nan] for cell in cells]
    deviations = [np.std(x, ddof=1) if len(x) > 1 else 0.0 for x in scores]
    axis.errorbar(positions, [*map(np.mean, scores)], deviations, marker="o", label="VDN-RLHF")


def draw_betas(args: Args) -> None:
    """The zero of the logarithmic axis stands apart."""
    results = load_results(ROOT / "benchmark/results")
    figure, axes = plt.subplots(1, len(GAMES), figsize=(11, 3.2), squeeze=False)
    positions = np.arange(len(BETAS))
    for axis, game in zip(axes[0], GAMES, strict=True):
        cells = [
            choose(results, "vdn", game, "no-expert", args.data_seed, **standard(game, beta=b)) for b in BETAS
        ]
        reference = [score for cell in cells for score in values(cell, "charts/reference_score")]
        draw_scores(axis, positions, cells)
        lines = {
            "expert (not in the data)": float(player(game, "expert")),
            "rookie": float(player(game, "rookie")),
        }
        lines |= {"BC": np.mean(reference or [np.nan]), "random": 0.0}
        for style, (name, height) in zip((":", "--", "-.", "-"), lines.items(), strict=True):
            axis.axhline(height, color="black", linewidth=1, linestyle=style, label=name)
        axis.set_title(game, fontsize=9)
        axis.set_xticks(positions, [f"{beta:g}" for beta in BETAS])
        axis.set_xlabel("beta")
    axes[0, 0].set_ylabel("score")
    axes[0, 0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(Path(args.folder) / "no-expert.png", dpi=70)


def draw_labels(args: Args) -> None:
    results = load_results(ROOT / "benchmark/results")
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, game in zip(axes, ("spread", "reference"), strict=True):
        runs = {int(n): run for name, run in LABELS.items() if (n := name.replace(",", "")).isdigit()}
        cells = [
            choose(results, "vdn", game, mixture, args.data_seed, **standard(game, run_name=name))
            for mixture, name in runs.values()
        ]
        draw_scores(axis, list(runs), cells)
        reference = [score for cell in cells for score in values(cell, "charts/reference_score")]
        axis.axhline(np.mean(reference or [np.nan]), color="black", linewidth=1, label="BC")
        axis.set(title=game, xscale="log", xlim=(70, 600_000), xlabel="labelled pairs")
    axes[0].set_ylabel("score")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(Path(args.folder) / "labels.png", dpi=70)


if __name__ == "__main__":
    args = tyro.cli(Args)
    draw_betas(args)
    draw_labels(args)
    draw_rewards(args)
    draw_curves(args)
