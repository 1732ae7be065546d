"""The tables and figures from what run_table.py has measured, beside the paper's numbers: prints the ones that are named, and
writes all of them to benchmark/results/README.md with its plots.

Usage: python benchmark/report.py table2 --scale cpu
       python benchmark/report.py                             (only writes the file)
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))

import matplotlib
import numpy as np
import tyro
from run_cell import PRESETS, ROOT, SCALES, STAGES, Cell, save_file
from run_table import ALPHAS, GAMES, MANY_AGENTS, MIXTURES, STANDARD_BETA, betas, list_cells, reward_cell, standard
from scipy import stats

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path("benchmark/results")
INTRODUCTION = """\
Made by `python benchmark/report.py` from the small files in this folder. A return is the mean over agents of the undiscounted
return of 25 steps, 4,096 fresh episodes with greedy policies. Score: the random policy is 0, the best expert of the paper's
authors 100. In tag 100 is this repository's expert, but in the paper's column its authors' expert against another prey: these
two do not compare. Cells: mean ± standard deviation over training seeds [95 % t interval of the mean]. All policies play the
same start states, whose chance is in no interval: a standard error of 0.3 to 0.6 points of the score, in tag 1.3 to 1.9 (there
the expert has 104.7 on them). Only "pi_ref alone" plays others with every training seed. Interquartile means have a bootstrap
interval that draws seeds anew within each cell; with so few seeds it is too narrow: in simulations of 12 cells with normal
seeds it covered 75 % (2 seeds), 87 % (3) and 89 % (5). Datasets have seed 2; no setting was chosen on them, but for the
numbers of updates of scale cpu (spread, diversified, seed 4). Scales (`SCALES` in `run_cell.py`): paper is the paper's size,
38,400 trajectories and 5 seeds, with all settings of the scripts; cpu has 9,728 trajectories, 3 seeds (Table 2: 5) and fewer
updates. `bash benchmark/table2.sh --scale cpu` and its sisters add what is missing. [Theory](table4.md),
[speed](speed-cpu.md), [Nash gaps](nash_gap.md), [reward model](reward_model.md), [physics](parity.md), [ceiling](ceiling.md).
"""

# The paper's numbers. Its returns are those of 26 steps; on its scale random policies and its authors' best experts have:
PAPER_RANDOM = {"spread": -27.81, "tag": 3.97, "reference": -29.69}
PAPER_EXPERT = {"spread": -10.26, "tag": 42.3, "reference": -10.46}
PAPER_RANDOM |= {"spread-4x5": -40.3, "spread-5x5": -36.8, "spread-6x5": -34.5, "spread-7x5": -32.8}
PAPER_EXPERT |= {"spread-4x5": -27.4, "spread-5x5": -19.2, "spread-6x5": -26.0, "spread-7x5": -25.1}
PAPER_TABLE2 = {  # returns; what the table calls MSE are the deviations of these
    "diversified": {"spread": -21.63, "tag": 28.94, "reference": -19.59},
    "mix-unilateral": {"spread": -20.98, "tag": 32.04, "reference": -20.60},
    "mix-expert": {"spread": -21.11, "tag": 33.01, "reference": -20.38},
    "pure-expert": {"spread": -21.45, "tag": 40.14, "reference": -28.19},
}
PAPER_DEVIATIONS = {
    "diversified": {"spread": 0.51, "tag": 1.04, "reference": 0.55},
    "mix-unilateral": {"spread": 0.56, "tag": 1.12, "reference": 1.15},
    "mix-expert": {"spread": 1.16, "tag": 0.70, "reference": 1.06},
    "pure-expert": {"spread": 1.01, "tag": 0.75, "reference": 0.92},
}
PAPER_TABLE3 = {  # returns by beta, the last with alpha 0
    "spread": {0: -22.56, 0.1: -22.03, 1: -20.82, 10: -20.46, 100: -20.35, "alpha 0": -22.21},
    "tag": {0: 4.11, 0.1: 4.25, 1: 10.96, 10: 28.88, 100: 29.53, "alpha 0": 30.77},
    "reference": {0: -19.69, 0.1: -19.37, 1: -18.89, 10: -18.33, 100: -18.54, "alpha 0": -21.86},
}
PAPER_TABLE6 = {  # team returns of 130 steps over N^2
    "mix-unilateral": (-31.13, -28.26, -26.92, -25.48),
    "pure-expert": (-31.71, -28.80, -27.16, -26.29),
    "random": (-50.83, -36.92, -28.56, -23.62),
}
PAPER_TABLE7 = {  # training NLL by alpha
    "spread": (0.350, 0.345, 0.347, 0.351, 0.361, 0.389, 0.460, 0.603),
    "tag": (0.465, 0.431, 0.440, 0.455, 0.484, 0.531, 0.603, 0.676),
    "reference": (0.358, 0.356, 0.362, 0.374, 0.393, 0.434, 0.508, 0.623),
}
PAPER_RATIOS = {"diversified": "1 : 1 : 1 : 1", "mix-unilateral": "2 : 1 : 0 : 1", "mix-expert": "3 : 0 : 0 : 1"}
PAPER_RATIOS |= {"pure-expert": "4 : 0 : 0 : 0"}


def paper_score(env: str, value: float) -> float:
    return 100 * (value - PAPER_RANDOM[env]) / (PAPER_EXPERT[env] - PAPER_RANDOM[env])


def results_by_seed(cell: Cell, scale: str, preset: str = "default") -> dict[int, dict]:
    """The metrics of a cell, by training seed, as far as they are measured."""
    cells = [Cell(**vars(cell) | dict(scale=scale, preset=preset, seed=seed)) for seed in SCALES[scale].seeds]
    found = {cell.seed: cell.result() for cell in cells}
    return {seed: result["metrics"] for seed, result in found.items() if result is not None}


def results(cell: Cell, scale: str, preset: str = "default") -> list[dict]:
    """The metrics alone, in the order of the seeds."""
    return list(results_by_seed(cell, scale, preset).values())


def half_interval(values: list[float]) -> float:
    """Half of the 95 % t interval of the mean."""
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5


def summary(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds [95 % t interval of the mean]."""
    values = [value for value in values if value is not None]
    if not values:
        return "missing"
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    low, high = (np.mean(values) + sign * half_interval(values) for sign in (-1, 1))
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def interquartile_mean(groups: list[list[float]], num_resamples: int = 2000) -> str:
    """Interquartile mean of the scores of all runs, with a 95 % bootstrap interval that draws seeds anew within each cell
    (Agarwal et al., 2021). As many seeds of each cell as all have, so that each has the same weight."""
    if not groups:
        return "missing"
    generator, num_seeds = np.random.default_rng(0), min(map(len, groups))
    groups = [group[:num_seeds] for group in groups]
    if num_seeds < 2:
        return f"{stats.trim_mean(np.concatenate(groups), 0.25):.1f} (one seed each, hence no interval)"
    draws = [generator.choice(group, (num_resamples, len(group))) for group in groups]
    means = stats.trim_mean(np.concatenate(draws, axis=1), 0.25, axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return f"{stats.trim_mean(np.concatenate(groups), 0.25):.1f} [{low:.1f}, {high:.1f}] ({num_seeds} seeds each)"


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def column(found: list[dict], metric: str | Callable[[dict], float]) -> list:
    return [metrics[metric] if isinstance(metric, str) else metric(metrics) for metrics in found]


def policy_row(found: list[dict], published: float | None) -> list[str]:
    """Number of seeds, return, score, score in the paper, scores of pi_ref and BC."""
    names = ("return", "score", "reference_score", "bc_score")
    returns, scores, reference, bc = (summary(column(found, name), 2 if name == "return" else 1) for name in names)
    return [len(found), returns, f"**{scores}**", "" if published is None else f"{published:.0f}", reference, bc]


POLICY_HEADER = ["seeds", "return", "score", "score in the paper", "pi_ref alone, greedy", "BC, greedy"]


def iqm_lines(rows: dict[str, list[list[dict]]]) -> str:
    """One line for each preset, from the cells that it has."""
    text = ""
    for preset, cells in rows.items():
        groups = [column(found, "score") for found in cells if found]
        text += f"Interquartile mean of the scores, {preset} settings, {len(groups)} of {len(cells)} cells: "
        text += f"{interquartile_mean(groups)}.\n"
    return text


def table1(scale: str) -> str:
    rows = []
    for game in GAMES:
        for mixture in MIXTURES:
            result = Cell("dataset", game, mixture, scale=scale).result()
            if result is None:
                rows.append([game, mixture, PAPER_RATIOS[mixture], *["missing"] * 6])
                continue
            metrics = result["metrics"]
            parts = [metrics[name] for name in ("expert", "unilateral", "rookie", "trivial")]
            cells = [
                f"{p['trajectories']:,}" + ("" if p["mean_return"] is None else f" ({p['mean_return']:.2f})") for p in parts
            ]
            rows.append(
                [game, mixture, PAPER_RATIOS[mixture], *cells, ", ".join(map(str, metrics["deviators"])), metrics["pairs"]]
            )
    text = "Trajectories of each kind, counted in the datasets, and their mean return.\n\n"
    header = ["game", "data", "ratio in the paper", "expert", "unilateral", "rookie", "trivial", "deviations by agent", "pairs"]
    return text + markdown(header, rows)


def table2(scale: str) -> str:
    rows, cells = [], {preset: [] for preset in PRESETS}
    for preset in PRESETS:
        for mixture in MIXTURES:
            for game in GAMES:
                found = results(standard(game, mixture), scale, preset)
                cells[preset].append(found)
                rewards = column(found, "reward")
                errors = [summary(column(rewards, name), 3) for name in ("reward/standardized_mse", "fresh_mse")]
                published = paper_score(game, PAPER_TABLE2[mixture][game])
                rows.append([preset, mixture, game, *policy_row(found, published), *errors])
    text = (
        "Reward MSE: between the standardised predicted and true step rewards, on the test part of the dataset itself and on\n"
    )
    text += (
        "1,024 fresh trajectories of the diversified mixture, the same for all. (The paper's MSE repeats its deviations.)\n\n"
    )
    header = ["settings", "data", "game", *POLICY_HEADER, "reward MSE, own data", "reward MSE, diversified data"]
    text += cpu_warning(scale) + "\n" + markdown(header, rows) + "\n" + iqm_lines(cells)
    return text + learning_curves(scale)


def learning_curves(scale: str) -> str:
    histories = {
        (preset, game, mixture): column(results(standard(game, mixture), scale, preset), "history")
        for preset in PRESETS
        for game in GAMES
        for mixture in MIXTURES
    }
    presets = [preset for preset in PRESETS if any(found for key, found in histories.items() if key[0] == preset)]
    if not presets:
        return ""
    figure, axes = plt.subplots(len(presets), len(GAMES), figsize=(13, 3.3 * len(presets)), squeeze=False)
    for line, preset in zip(axes, presets, strict=True):
        for axis, game in zip(line, GAMES, strict=True):
            for mixture in MIXTURES:
                found = histories[preset, game, mixture]
                if found:
                    updates, returns = np.array(found[0])[:, 0], np.array(found)[:, :, 1]
                    axis.plot(updates, returns.mean(axis=0), label=f"{mixture} ({len(returns)})")
                    axis.fill_between(updates, returns.min(axis=0), returns.max(axis=0), alpha=0.15)
            axis.set(title=f"{game}, {preset} settings", xlabel="updates of VDN", ylabel="test return")
            if axis.lines:
                axis.legend(fontsize=7)
            else:
                axis.set_axis_off()
                axis.set_title(f"{game}, {preset} settings\nmissing")
    title = "Test returns while the policy learns: mean over seeds (their number) and their range; every point has 1,024 start "
    title += "states of its own, the same for all datasets"
    return save(figure, RESULTS / f"learning-curves-{scale}.png", title)


def save(figure, path: Path, title: str) -> str:
    figure.tight_layout()
    save_file(path, lambda file: figure.savefig(file, format="png", dpi=90, metadata={"Software": None}))
    plt.close(figure)
    return f"\n![{title}]({path.name})\n\n{title}.\n"


def table3(scale: str) -> str:
    rows, cells = [], {preset: [] for preset in PRESETS}
    for preset in PRESETS:
        for game in GAMES:
            variants = {beta: standard(game, beta=beta) for beta in betas(game)} | {"alpha 0": standard(game, alpha=0.0)}
            for name, cell in variants.items():
                found = results(cell, scale, preset)
                cells[preset].append(found)
                published = PAPER_TABLE3[game].get(name)
                published = None if published is None else paper_score(game, published)
                label = name if name == "alpha 0" else f"beta {name:g}" + (" (standard)" if name == STANDARD_BETA[game] else "")
                rows.append([preset, game, label, *policy_row(found, published)])
    text = "Diversified data. Rows of alpha 0 have the standard beta (tag: 3, in the paper's row 10), all others alpha 1.\n\n"
    return text + markdown(["settings", "game", "", *POLICY_HEADER], rows) + "\n" + iqm_lines(cells)


PAPER_TABLE5 = [  # name and value in the paper; script and flag here
    ("MSE loss coefficient", "1", "train_reward", "alpha"),
    ("reference log coefficient", "1; section 5.3: tag 3; Table 3: tag 10", "vdn_rlhf", "beta"),
    ("prediction steepness", "5", "collect_data", "steepness"),
    ("trajectories (B.1)", "38400", "collect_data", "num_trajectories"),
    ("pairs per trajectory (B.1)", "10", "collect_data", "pairs_per_trajectory"),
    ("reward model type", "MLP (spread, reference), RNN (tag)", "train_reward", "network"),
    ("its width", "128 (spread), 64 (tag, reference)", "train_reward", "hidden_dim"),
    ("reward model layers", "4", "train_reward", "num_layers"),
    ("reward model epochs", "100", "train_reward", "max_epochs"),
    ("reward model learning rate", "1e-3", "train_reward", "learning_rate"),
    ("IL learning rate", "1e-3", "train_bc", "learning_rate"),
    ("IL epochs", "100", "train_bc", "max_epochs"),
    ("IL batch size", "128", "train_bc", "batch_size"),
    ("VDN learning rate", "1e-3", "vdn_rlhf", "learning_rate"),
    ("VDN epochs", "1e4 (spread, reference), 1e6 (tag); published scripts: tag 5e4", "vdn_rlhf", "num_updates"),
    ("VDN batch size", "64", "vdn_rlhf", "batch_size"),
]


def table5(scale: str) -> str:
    """The paper's settings first, then every other flag in which the preset and the defaults differ."""

    def setting(stage: str, flag: str, preset: str) -> str:
        changes, default = STAGES[stage].PRESETS.get(preset, {}), getattr(STAGES[stage].Args(), flag)
        values = [changes.get(game, {}).get(flag, changes.get("all", {}).get(flag, default)) for game in GAMES]
        return ", ".join(map(str, values)) if len(set(values)) > 1 else str(values[0])

    rows, listed = [], {row[2:] for row in PAPER_TABLE5}
    others = [
        (field.name, "", stage, field.name)
        for stage, module in STAGES.items()
        for field in fields(module.Args)
        if stage != "collect_data" and (stage, field.name) not in listed and field.name not in ("preset", "run_name")
    ]
    for name, published, stage, flag in PAPER_TABLE5 + others:
        paper, default = (setting(stage, flag, preset) for preset in ("paper", "default"))
        if published or paper != default:
            rows.append([name if published else "", published, f"{stage}.py `--{flag.replace('_', '-')}`", paper, default])
    text = "Read from the scripts, but for the second column. The reward minibatch of 256 trajectories is a constant here,\n"
    text += f"episodes have 25 steps (paper: 130 steps of 128 environments). Several values: {', '.join(GAMES)}.\n\n"
    return text + markdown(["", "in the paper", "flag", "`--preset paper`", "default"], rows)


def table6(scale: str) -> str:
    rows, cells = [], {preset: [] for preset in PRESETS}
    for preset in PRESETS:
        for mixture in ("mix-unilateral", "pure-expert"):
            for position, env in enumerate(MANY_AGENTS):
                found = results(standard(env, mixture), scale, preset)
                cells[preset].append(found)
                num_agents = int(env[7])
                published = PAPER_TABLE6[mixture][position] * num_agents / 5  # to one episode, mean over agents
                rows.append([preset, mixture, num_agents, *policy_row(found, paper_score(env, published))])
    for position, env in enumerate(MANY_AGENTS):
        num_agents, low = int(env[7]), STAGES["vdn_rlhf"].make_game(env).low
        published = f"{paper_score(env, PAPER_TABLE6['random'][position] * num_agents / 5):.0f}"
        rows.append(["random policy", "", num_agents, "", f"{low:.2f}", "0", published, "", ""])
    text = "Spread with 5 landmarks, alpha 1, beta 1. The random policy played 20,000 episodes.\n\n"
    return text + markdown(["settings", "data", "agents", *POLICY_HEADER], rows) + "\n" + iqm_lines(cells)


def table7(scale: str) -> str:
    rows = []
    for preset in PRESETS:
        for game in GAMES:
            found = [results(reward_cell(game, alpha=alpha), scale, preset) for alpha in ALPHAS]
            seeds = "-".join(map(str, sorted({len(cell) for cell in found})))
            for part, name in (("training", "losses/training_nll"), ("held out", "losses/nll")):
                rows.append([preset, game, part, seeds, *[summary(column(cell, name), 3) for cell in found]])
    for game in GAMES:
        rows.append(["in the paper", game, "training", "", *[f"{value:.3f}" for value in PAPER_TABLE7[game]]])
    text = "Negative log-likelihood per label (chance: 0.693) on the training and the test part of diversified data, with the\n"
    text += "weights of the epoch that is best on the early-stopping part. Seeds: their numbers over the columns.\n\n"
    return text + markdown(["settings", "game", "part", "seeds", *[f"alpha {alpha:g}" for alpha in ALPHAS]], rows)


def draw_example(axis, found: list[dict], title: str, average: bool) -> None:
    if not found:
        axis.set_axis_off()
        axis.set_title(f"{title}\nmissing", fontsize=9)
        return
    metrics = found[0]
    for name, style in (("true", "-"), ("predicted", "--")):
        values = np.array(metrics["example"][name])  # (T, A)
        values = values.mean(axis=1, keepdims=True) if average else values
        for agent in range(values.shape[1]):
            axis.plot(values[:, agent], style, color=f"C{agent}", label=name if agent == 0 else None)
    axis.set(xlabel="step", ylabel="standardised reward")
    axis.set_title(f"{title}\nspikiness {metrics['spikiness']:.2f} (true rewards: {metrics['true_spikiness']:.2f})", fontsize=9)
    axis.legend(fontsize=7)


def examples(scale: str, path: Path, panels: list[tuple[str, Cell, bool]], title: str) -> str:
    """A figure of the same fresh episode as different reward models see it, the presets one below the other."""
    presets = [preset for preset in PRESETS if any(results(cell, scale, preset) for _, cell, _ in panels)]
    if not presets:
        return ""
    width = len(panels) if len(panels) < 6 else 3
    height = -(-len(panels) // width)
    figure, axes = plt.subplots(len(presets) * height, width, figsize=(4 * width, 2.9 * len(presets) * height), squeeze=False)
    for p, preset in enumerate(presets):
        for i, (name, cell, average) in enumerate(panels):
            axis = axes[p * height + i // width, i % width]
            draw_example(axis, results(cell, scale, preset), f"{name}, {preset} settings", average)
    return save(figure, path, title)


EXAMPLE = "One fresh episode of the expert: true (solid) and predicted (dashed) rewards, colours are agents, both standardised"


def figure2(scale: str) -> str:
    panels = [(f"(a) spread, diversified, alpha {alpha:g}", reward_cell("spread", alpha=alpha), True) for alpha in (0.0, 1.0)]
    panels.append(("(b1) reference, pure-expert, alpha 1", reward_cell("reference", "pure-expert"), False))
    panels.append(("(b2) reference, diversified, alpha 0", reward_cell("reference", alpha=0.0), False))
    panels.append(("(b3) reference, diversified, alpha 1", reward_cell("reference"), False))
    title = f"{EXAMPLE} (a: averaged over agents). Spikiness: mean squared change from step to step over 1,024 trajectories"
    rows = []
    for name, cell, _ in panels:
        for preset in PRESETS:
            found = results(cell, scale, preset)
            values = [[metrics[key] for metrics in found] for key in ("spikiness", "true_spikiness", "reward/correlation")]
            rows.append([name, preset, len(found), *[summary(value, 3) for value in values]])
    header = ["", "settings", "seeds", "spikiness", "of the true rewards", "correlation with the true rewards"]
    return markdown(header, rows) + examples(scale, RESULTS / f"figure2-{scale}.png", panels, title)


def figure3(scale: str) -> str:
    figure, axes = plt.subplots(1, len(PRESETS), figsize=(11, 4), squeeze=False)
    for axis, preset in zip(axes[0], PRESETS, strict=True):
        for alpha in ALPHAS:
            found = results(reward_cell("spread", alpha=alpha), scale, preset)
            if found:
                history = np.array(found[0]["history"])
                axis.plot(history[:, 0], history[:, 1], label=f"alpha {alpha:g}")
        axis.set(title=f"spread, diversified, {preset} settings", xlabel="epoch", ylabel="NLL, early-stopping part")
        if axis.lines:
            axis.legend(fontsize=7)
        else:
            axis.set_axis_off()
            axis.set_title(f"spread, diversified, {preset} settings\nmissing")
    if not any(axis.lines for axis in axes[0]):
        plt.close(figure)
        return "missing\n"
    title = "Reward models over alpha while they learn: likelihood of the early-stopping part after every epoch, one seed. "
    title += "The paper's figure is of the training part, which is in Table 7"
    return save(figure, RESULTS / f"figure3-{scale}.png", title)


def figure4(scale: str) -> str:
    kinds = (("pure-expert", 1.0), ("diversified", 0.0), ("diversified", 1.0))
    panels = [
        (f"{game}, {mixture}, alpha {alpha:g}", reward_cell(game, mixture, alpha=alpha), False)
        for game in GAMES
        for mixture, alpha in kinds
    ]
    return examples(scale, RESULTS / f"figure4-{scale}.png", panels, EXAMPLE) or "missing\n"


def compare(first: list[float], second: list[float], digits: int = 2) -> str:
    """The difference of two means over seeds with its 95 % interval (Welch; Student's t if the second are all zero), and
    whether it is above 0."""
    if len(first) < 2 or len(second) < 2:
        return "not enough seeds"
    difference = np.mean(first) - np.mean(second)
    if np.std(first) + np.std(second) == 0:
        return f"{difference:+.{digits}f}"
    squares = [np.var(values, ddof=1) / len(values) for values in (first, second)]  # of the standard errors
    degrees = sum(squares) ** 2 / sum(x**2 / (len(values) - 1) for x, values in zip(squares, (first, second), strict=True))
    half = stats.t.ppf(0.975, degrees) * sum(squares) ** 0.5
    low, high = difference - half, difference + half
    verdict = "**holds**" if low > 0 else "**does not hold**" if high < 0 else "undecided"
    return f"{verdict}: " + "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(difference, low, high, n=digits)


def compare_deviations(first: list[float], others: list[list[float]]) -> str:
    """Whether the deviation over seeds is below the pooled one of the others: their ratio with the 95 % F interval."""
    if len(first) < 2 or min(map(len, others)) < 2:
        return "not enough seeds"
    degrees = len(first) - 1, sum(len(values) - 1 for values in others)
    pooled = sum(np.var(values, ddof=1) * (len(values) - 1) for values in others) / degrees[1]
    ratio = np.var(first, ddof=1) / max(pooled, 1e-12)
    low, high = (ratio / stats.f.ppf(quantile, *degrees) for quantile in (0.975, 0.025))
    verdict = "**holds**" if high < 1 else "**does not hold**" if low > 1 else "undecided"
    return f"{verdict}: {ratio**0.5:.2f} [{low**0.5:.2f}, {high**0.5:.2f}]"


def score(metrics: dict) -> float:
    return metrics["score"]


def fresh_mse(metrics: dict) -> float:
    """Of the step rewards of fresh diversified data, the last column of Table 2."""
    return metrics["reward"]["fresh_mse"] if "reward" in metrics else metrics["fresh_mse"]


def own_mse(metrics: dict) -> float:
    """Of the step rewards of the dataset's own test part."""
    return metrics["reward"]["reward/standardized_mse"]


def published_table2(first: str, second: str):
    return lambda game: paper_score(game, PAPER_TABLE2[first][game]) - paper_score(game, PAPER_TABLE2[second][game])


def published_table3(variant):
    """The standard settings (there beta 10 for tag) minus that variant."""
    standard_beta = {"spread": 1, "tag": 10, "reference": 1}
    return lambda game: (
        paper_score(game, PAPER_TABLE3[game][standard_beta[game]]) - paper_score(game, PAPER_TABLE3[game][variant])
    )


def published_table7(alpha: float):
    """Alpha 0 minus that alpha."""
    return lambda game: PAPER_TABLE7[game][0] - PAPER_TABLE7[game][ALPHAS.index(alpha)]


@dataclass
class Claim:
    """A difference of means over seeds that is above 0 where the paper's words are right."""

    text: str
    metric: Callable[[dict], float]
    first: Callable[[str], Cell]  # of a game
    second: Callable[[str], Cell]
    published: Callable[[str], float] | None = None  # that difference in the paper's own table
    games: tuple[str, ...] = GAMES
    digits: int = 2


def compare_datasets(text: str, first: str, second: str, metric=score, published=None) -> Claim:
    cells = (lambda game: standard(game, first)), (lambda game: standard(game, second))
    return Claim(text, metric, *cells, published, digits=2 if metric is score else 3)


def compare_betas(text: str, beta: float) -> Claim:
    text += f": score, standard beta minus beta {beta:g}"
    return Claim(text, score, standard, lambda game: standard(game, beta=beta), published_table3(beta))


def compare_alphas(text: str, metric, alpha: float = 1.0, published=None) -> Claim:
    """Of reward models, without smoothness minus with that alpha."""
    cells = (lambda game: reward_cell(game, alpha=0.0)), (lambda game: reward_cell(game, alpha=alpha))
    return Claim(text, metric, *cells, published, digits=4)


def judge(claim: Claim, game: str, scale: str, preset: str) -> str:
    """Whether a claim holds in a game, in words and numbers. On the same dataset runs with the same seed have the same parts of
    it, the same initial weights, the same BC policy and over beta the same reward model: these are compared in pairs."""
    cells = claim.first(game), claim.second(game)
    first, second = (
        {seed: claim.metric(metrics) for seed, metrics in results_by_seed(cell, scale, preset).items()} for cell in cells
    )
    if cells[0].dataset == cells[1].dataset:
        differences = [value - second[seed] for seed, value in first.items() if seed in second]
        return compare(differences, [0.0] * len(differences), claim.digits)
    return compare([*first.values()], [*second.values()], claim.digits)


NEIGHBOURS = (  # of Table 1, by what the first or the second has and the other lacks
    ("trivial data", "pure-expert", "mix-expert"),
    ("unilateral data", "mix-expert", "mix-unilateral"),
    ("diversity", "mix-unilateral", "diversified"),
)
CLAIMS = [
    *[
        compare_datasets(
            f"{what} helps reward learning (6.2): reward MSE on {data}, {first} minus {second}", first, second, mse
        )
        for what, first, second in NEIGHBOURS
        for data, mse in (("diversified data", fresh_mse), ("own data", own_mse))
    ],
    *[
        compare_datasets(
            f"{what} helps the policy (6.2): score, {more} minus {less}", more, less, score, published_table2(more, less)
        )
        for what, less, more in NEIGHBOURS
    ],
    compare_betas("beta can be too small (6.4)", 0.0),
    compare_betas("beta can be too large (6.4)", 100.0),
    compare_betas("the standard beta is better than 10 (6.4: 1 is near optimal)", 10.0),
    Claim(
        "tag needs a stronger KL term (6.4): score, beta 3 minus beta 1",
        *(score, standard, lambda game: standard(game, beta=1.0), None, ("tag",)),
    ),
    Claim(
        "the smoothness term helps the policy (6.3): score, alpha 1 minus alpha 0",
        *(score, standard, lambda game: standard(game, alpha=0.0), published_table3("alpha 0")),
    ),
    compare_alphas("it brings rewards nearer to the true ones (Figures 2 and 4): reward MSE, alpha 0 minus alpha 1", fresh_mse),
    compare_alphas("it makes rewards smoother (6.3): spikiness, alpha 0 minus alpha 1", lambda m: m["spikiness"]),
    compare_alphas("it helps on held-out pairs (B.4): held-out NLL, alpha 0 minus alpha 1", lambda m: m["losses/nll"]),
    *[
        compare_alphas(
            f"in some cases it lowers the training loss (6.3): training NLL, alpha 0 minus alpha {alpha:g}",
            *(lambda m: m["losses/training_nll"], alpha, published_table7(alpha)),
        )
        for alpha in (0.001, 1.0)
    ],
]


def claims(scale: str) -> str:
    rows = []
    for claim in CLAIMS:
        for preset in PRESETS:
            verdicts = [judge(claim, game, scale, preset) if game in claim.games else "" for game in GAMES]
            rows.append([claim.text if preset == PRESETS[0] else "", preset, *verdicts])
        if claim.published is not None:
            published = [f"{claim.published(game):+.3g}" if game in claim.games else "" for game in GAMES]
            rows.append(["", "in the paper's table", *published])
    text = "diversity lowers variance (6.2): deviation of the score, diversified data over the others pooled (holds below 1)"
    for preset in PRESETS:
        scores = [[column(results(standard(game, mixture), scale, preset), score) for mixture in MIXTURES] for game in GAMES]
        verdicts = [compare_deviations(by_mixture[0], by_mixture[1:]) for by_mixture in scores]
        rows.append([text if preset == PRESETS[0] else "", preset, *verdicts])
    pooled = [np.mean([PAPER_DEVIATIONS[mixture][game] ** 2 for mixture in MIXTURES[1:]]) ** 0.5 for game in GAMES]
    published = [PAPER_DEVIATIONS["diversified"][game] / deviation for game, deviation in zip(GAMES, pooled, strict=True)]
    rows.append(["", "in the paper's table", *[f"{ratio:.2f}" for ratio in published]])
    for mixture in ("mix-unilateral", "pure-expert"):
        text = (
            f"with 7 agents the policy does worse than random play (Table 6): score of random play, 0, minus its own, {mixture}"
        )
        for preset in PRESETS:
            scores = column(results(standard("spread-7x5", mixture), scale, preset), score)
            rows.append([text if preset == PRESETS[0] else "", preset, compare([0.0] * len(scores), scores), "", ""])
        published = -paper_score("spread-7x5", PAPER_TABLE6[mixture][3] * 7 / 5)
        rows.append(["", "in the paper's table", f"{published:+.3g}", "", ""])
    introduction = """\
Differences of means over training seeds with their 95 % intervals: in pairs of the same seed where both cells have the same
dataset, else Welch's. A claim holds where the interval is above 0 and does not where it is below; else the seeds do not
decide. One in twenty intervals misses by chance, and none contains the chance of the dataset, of which each mixture has one,
nor that of the test episodes. Reward MSE: the last two columns of Table 2. On diversified data the diversified reward model is
at home and the others are abroad; on its own data each has a test of its own difficulty. Where the paper has the same
difference in a table, it stands below (its NLL as it is, its returns as scores; its standard beta in tag is 10): some of its
claims are not in its own numbers.
"""
    return introduction + cpu_warning(scale) + "\n" + markdown(["claim", "settings", *GAMES], rows)


def cpu_warning(scale: str) -> str:
    """What `--scale cpu` leaves of the two presets."""
    if scale != "cpu":
        return ""
    kept = {preset: [fraction_of_work(preset, stage, game) for stage, game in WORK] for preset in PRESETS}
    words = "; ".join(f"{preset} {', '.join(f'{100 * value:.0f} %' for value in kept[preset])}" for preset in PRESETS)
    return f"""\
The two settings are not to be compared with each other at this scale, which leaves more of the defaults' work than of the
paper's. Of all gradient steps of the reward model, of BC, and of VDN in spread and tag, it has: {words}.
"""


WORK = [("train_reward", "spread"), ("train_bc", "spread"), ("vdn_rlhf", "spread"), ("vdn_rlhf", "tag")]


def fraction_of_work(preset: str, stage: str, game: str) -> float:
    """Gradient steps of the stage at scale cpu over those at scale paper."""
    size = "num_updates" if stage == "vdn_rlhf" else "max_epochs"
    steps = []
    for scale in ("cpu", "paper"):
        value = getattr(standard(game, preset=preset, scale=scale).args(stage), size)
        steps.append(value * (SCALES[scale].num_trajectories if size == "max_epochs" else 1))
    return steps[0] / steps[1]


SECTIONS = {
    "table1": ("Table 1: the datasets", table1),
    "table2": ("Table 2: the datasets' coverage", table2),
    "table3": ("Table 3: beta and alpha", table3),
    "table5": ("Table 5: settings", table5),
    "table6": ("Table 6: number of agents", table6),
    "table7": ("Table 7: likelihood over alpha", table7),
    "figure2": ("Figure 2: what the smoothness term does to the rewards", figure2),
    "figure3": ("Figure 3: training curves over alpha", figure3),
    "figure4": ("Figure 4: learned rewards in all games", figure4),
    "claims": ("Which of the paper's claims hold here", claims),
}


def machines(name: str, scale: str) -> str:
    found = [cell.result() for cell in list_cells(name, scale)] if name != "claims" else []
    return "; ".join(sorted({f"{r['machine']}, torch {r['torch']}" for r in found if r is not None}))


def num_measured(name: str, scale: str) -> tuple[int, int]:
    names = ("table2", "table3", "table6", "table7") if name == "claims" else (name,)
    cells = {cell for name in names for cell in list_cells(name, scale)}
    return sum(cell.result_path.exists() for cell in cells), len(cells)


def write_report() -> None:
    """benchmark/results/README.md: every section for every scale that has results."""
    lines = [f"# Results\n\n{INTRODUCTION}"]
    for name, (title, make) in SECTIONS.items():
        for scale in ("paper", "cpu"):
            measured, total = num_measured(name, scale)
            if name == "table5" and scale == "paper":
                lines += [f"## {title}\n", make(scale)]
            elif measured:
                lines += [f"## {title} (scale {scale}: {measured} of {total} runs)\n", make(scale)]
                lines += [f"Machine: {machines(name, scale)}.\n" if name != "claims" else ""]
    save_file(RESULTS / "README.md", lambda file: file.write("\n".join(lines).encode()))


@dataclass
class Args:
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """table1, table2, ..., figure4, claims, or all: what to print"""
    scale: str = "cpu"
    """smoke, cpu or paper"""


def main(args: Args) -> int:
    os.chdir(ROOT)
    names = tuple(SECTIONS) if args.names == ("all",) else args.names
    if args.scale not in SCALES or not set(names) <= set(SECTIONS):
        choices = f"choose from {', '.join(SECTIONS)}; {', '.join(SCALES)}"
        print(f"error: {' '.join([*names, '--scale', args.scale])}: {choices}", file=sys.stderr)
        return 2
    for name in names:
        title, make = SECTIONS[name]
        print(f"{title} (scale {args.scale})\n\n{make(args.scale)}")
    if args.scale != "smoke":
        write_report()
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
