"""Turn the scripts' own JSON files into tables. Copies the results of finished runs
(runs/<game>/<dataset>/*.json, none of smoke scale) to benchmark/results/, which is in git, and writes the
tables of all that is there between the markers of benchmark/README.md and README.md. What is missing stands
as missing.

Usage: python benchmark/report.py
"""

import itertools
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import tyro
from scipy import stats

import vdn_rlhf

ROOT = Path(__file__).parent.parent
GAMES = ("spread", "tag", "reference")
MANY_AGENTS = ("spread-4x5", "spread-5x5", "spread-6x5", "spread-7x5")
MIXTURES = ("diversified", "mix-unilateral", "mix-expert", "pure-expert")
NO_EXPERT_BETA = 0.0  # chosen on dataset seed 1; settings.sh has both
BETAS = (0.0, 0.03, 0.1, 0.3, 1.0)  # of no_expert.sh
ALPHAS = (0.0, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
# The paper's results as scores, its authors' expert = 100, random = 0 (tag: against their prey).
PAPER_TABLE_2 = {
    "diversified": (35, 65, 53),
    "mix-unilateral": (39, 73, 47),
    "mix-expert": (38, 76, 48),
    "pure-expert": (36, 94, 8),
}
PAPER_TABLE_7 = {
    "spread": (0.350, 0.345, 0.347, 0.351, 0.361, 0.389, 0.460, 0.603),
    "tag": (0.465, 0.431, 0.440, 0.455, 0.484, 0.531, 0.603, 0.676),
    "reference": (0.358, 0.356, 0.362, 0.374, 0.393, 0.434, 0.508, 0.623),
}


@dataclass
class Args:
    runs_path: str = "runs"
    """folder with the results of finished runs"""


def collect_results(runs: Path, results: Path) -> None:
    """Copy NAME.json of every finished run. A run is finished when its NAME.pt or NAME.npz is there, too."""
    for path in sorted(runs.glob("*/*/*.json")):
        finished = path.with_suffix(".pt").exists() or path.with_suffix(".npz").exists()
        if finished and "smoke" not in path.parent.name:
            target = results / path.relative_to(runs)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def load_results(results: Path) -> list[dict]:
    """Every result with its game, mixture, dataset seed and kind (collect, reward, bc or vdn), which its path
    tells."""
    loaded = []
    for path in sorted(results.glob("*/*/*.json")):
        mixture, _, data_seed = path.parent.name.partition("-data")
        kind = re.match(r"(dataset|reward|bc|vdn)", path.name)
        if kind:
            result = json.loads(path.read_text())
            place = {"game": path.parent.parent.name, "mixture": mixture, "data_seed": data_seed or "1"}
            loaded.append({**result, **place, "kind": kind[1]})
    return loaded


def choose(results: list[dict], kind: str, game: str, mixture: str, data_seed="2", **args) -> list[dict]:
    """The results of one cell by training seed: with these args, and for what is not among them no run
    name."""
    wanted = {"run_name": "", **args}
    cell = [
        result
        for result in results
        if [result[key] for key in ("kind", "game", "mixture", "data_seed")]
        == [kind, game, mixture, data_seed]
        and all(result["args"].get(name, "") == value for name, value in wanted.items())
    ]
    return sorted(cell, key=lambda result: result["args"]["seed"])


def standard(game: str, preset="default", mixture="diversified", **changes) -> dict:
    """Flags of the standard run of a game."""
    presets = vdn_rlhf.PRESETS[preset]
    beta = {"beta": vdn_rlhf.Args.beta, **presets.get("all", {}), **presets.get(game, {})}["beta"]
    if mixture == "no-expert" and preset == "default":
        beta = NO_EXPERT_BETA
    flags = {"beta": beta, "alpha": 1.0, "keep": 1.0, "preset": preset}
    return {**flags, "run_name": "paper" if preset == "paper" else "", **changes}


def player(game: str, name: str) -> str:
    """Score of a shipped policy."""
    checkpoint = torch.load(ROOT / f"policies/{game}/{name}.pt", weights_only=True)
    return f"{checkpoint['metrics']['charts/score']:.1f}"


def values(cell: list[dict], name: str) -> list[float]:
    return [result["metrics"][name] for result in cell if result["metrics"].get(name) is not None]


def mean_and_std(numbers: list[float], digits=1) -> str:
    """mean ± standard deviation over training seeds; missing where there is no run."""
    if not numbers:
        return "missing"
    spread = f" ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{spread}"


def t_interval(numbers: list[float]) -> str:
    """95 % t interval of the mean over training seeds."""
    if len(numbers) < 2:
        return ""
    half = stats.t.ppf(0.975, len(numbers) - 1) * np.std(numbers, ddof=1) / len(numbers) ** 0.5
    return f"{np.mean(numbers) - half:.1f} to {np.mean(numbers) + half:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def bold_best(cells: list[str]) -> list[str]:
    """Make the highest of a row bold, whoever it is."""
    means = [float(cell.split(" ")[0]) if cell[:1] in "-0123456789" and cell else -np.inf for cell in cells]
    best = max(means)
    return [
        f"**{cell}**" if mean == best > -np.inf else cell for cell, mean in zip(cells, means, strict=True)
    ]


def table_1(results: list[dict]) -> str:
    rows = []
    for game in GAMES:
        for mixture in (*MIXTURES, "no-expert", "trivial"):
            for cell in choose(results, "dataset", game, mixture):
                parts = [
                    cell["metrics"].get(f"return/{name}")
                    for name in ("expert", "unilateral", "rookie", "trivial")
                ]
                rows.append([game, mixture, *("" if part is None else f"{part:.2f}" for part in parts)])
    return table(["game", "data", "expert", "unilateral", "rookie", "trivial"], rows)


def table_2(results: list[dict], preset="default") -> str:
    head = ["game", "data", "seeds", "BC = pi_ref", "VDN-RLHF", "95 % interval", "difference", "paper"]
    rows = []
    for game in GAMES:
        for mixture in MIXTURES:
            cell = choose(results, "vdn", game, mixture, **standard(game, preset))
            ours, theirs = values(cell, "charts/score"), values(cell, "charts/reference_score")
            difference = mean_and_std([a - b for a, b in zip(ours, theirs, strict=True)])
            paper = str(PAPER_TABLE_2[mixture][GAMES.index(game)])
            best = bold_best([mean_and_std(theirs), mean_and_std(ours)])
            rows.append([game, mixture, len(cell), *best, t_interval(ours), difference, paper])
    return table(head, rows)


RIVALS = {  # row of the rivals' table: kind of run, and what differs from the standard one
    "BC = pi_ref": ("bc", {}),
    "filtered BC": ("bc", {"keep": 0.25}),
    "filtered BC, by true return": ("bc", {"keep": 0.25, "run_name": "true-returns"}),
    "VDN-RLHF": ("vdn", {}),
    "VDN-RLHF on filtered BC": ("vdn", {"keep": 0.25}),
    "VDN, zero rewards": ("vdn", {"run_name": "zero"}),
    "VDN, shuffled rewards": ("vdn", {"run_name": "shuffled"}),
    "VDN, true rewards": ("vdn", {"run_name": "oracle"}),
    "VDN, CQL for the KL term": ("vdn", {"run_name": "cql", "beta": 0.0}),
    "inverse preference learning": ("vdn", {"run_name": "ipl"}),
    "VDN-RLHF, paper's settings": ("vdn", {"preset": "paper", "run_name": "paper"}),
}


def rivals(results: list[dict]) -> str:
    """Everybody beside everybody; the best learner of a column is bold."""
    head, columns = ["score"], []
    for mixture, best in (("diversified", "expert"), ("no-expert", "rookie")):
        for game in GAMES:
            cells = []
            for kind, changes in RIVALS.values():
                flags = standard(game, mixture=mixture, **changes)
                if kind == "bc":  # has neither beta nor alpha
                    del flags["beta"], flags["alpha"]
                cell = choose(results, kind, game, mixture, **flags)
                cells.append(mean_and_std(values(cell, "charts/score")))
            plain = choose(results, "vdn", game, mixture, **standard(game, mixture=mixture))
            seeds = " ".join(str(result["args"]["seed"]) for result in plain) or "none"
            head.append(f"{game}, {mixture}")
            oracle = list(RIVALS).index("VDN, true rewards")  # sees what no learner sees: never bold
            truth, cells[oracle] = cells[oracle], ""
            cells = bold_best(cells)
            cells[oracle] = truth
            columns.append([seeds, player(game, best), *cells])
    names = ["training seeds", "best player of the data", *RIVALS]
    return table(head, [list(row) for row in zip(names, *columns, strict=True)])


def no_expert(results: list[dict]) -> str:
    rows = []
    for game in GAMES:
        runs = {
            beta: choose(results, "vdn", game, "no-expert", **standard(game, beta=beta)) for beta in BETAS
        }
        reference = {
            result["args"]["seed"]: result["metrics"]["charts/reference_score"]
            for cell in runs.values()
            for result in cell
        }
        cells = [player(game, "rookie"), mean_and_std(list(reference.values()))]
        cells += [mean_and_std(values(cell, "charts/score")) for cell in runs.values()]
        seeds = [len(cell) for cell in runs.values()]
        rows.append([game, min(seeds), *bold_best(cells), player(game, "expert")])
    head = ["game", "seeds at least", "rookie", "BC = pi_ref", *(f"beta {beta:g}" for beta in BETAS)]
    return table([*head, "expert, not in the data"], rows)


LABELS = {f"{n:,}": ("diversified", f"pairs{n}") for n in (100, 300, 1000, 3000, 10_000)}
LABELS |= {"384,000": ("diversified", ""), "10 % flipped": ("diversified-mistakes", "")}
LABELS |= {"ties below 0.1": ("diversified-ties", ""), "myopia 0.9": ("diversified-myopia", "")}
LABELS |= {"one for the team": ("diversified-team-labels", "")}


def labels(results: list[dict]) -> str:
    rows = []
    for game in ("spread", "reference"):
        for pairs, (mixture, name) in LABELS.items():
            reward = choose(results, "reward", game, mixture, alpha=1.0, preset="default", run_name=name)
            cell = choose(results, "vdn", game, mixture, **standard(game, run_name=name))
            seeds = {result["args"]["seed"] for result in cell}
            reward = [result for result in reward if result["args"]["seed"] in seeds]
            quality = [mean_and_std(values(reward, f"reward/{x}"), 2) for x in ("accuracy", "correlation")]
            scores = [mean_and_std(values(cell, f"charts/{x}")) for x in ("reference_score", "score")]
            rows.append([game, pairs, len(cell), *quality, *bold_best(scores)])
    head = ["game", "labelled pairs", "seeds", "reward/accuracy", "reward/correlation"]
    return table([*head, "BC = pi_ref", "VDN-RLHF"], rows)


ABLATION = {  # column: run name and changes of the standard flags; ablation.sh has the others
    "paper": dict(preset="paper", run_name="paper"),
    "+ joint reward": dict(preset="paper", run_name="joint-reward"),
    "+ MLP with time": dict(preset="paper", run_name="mlp"),
    "+ known KL": dict(preset="paper", run_name="known-kl"),
    "+ soft values": dict(preset="paper", run_name="soft-values"),
    "+ lambda 0.8": dict(preset="paper", run_name="lambda"),
    "+ lr 5e-3": dict(preset="paper", run_name="rate"),
    "default": {},
    "default, Eq. (1) as printed": dict(run_name="step"),
}


def ablation(results: list[dict]) -> str:
    rows = []
    for game in GAMES:
        cells = [
            choose(results, "vdn", game, "diversified", **standard(game, **x)) for x in ABLATION.values()
        ]
        for name, key in (("VDN-RLHF", "charts/score"), ("BC = pi_ref", "charts/reference_score")):
            scores = [mean_and_std(values(cell, key)) for cell in cells]
            rows.append([game, name, *(bold_best(scores) if name == "VDN-RLHF" else scores)])
    return table(["game", "", *ABLATION], rows)


def table_3(results: list[dict]) -> str:
    rows = []
    betas = (0.0, 0.1, 1.0, 3.0, 10.0, 100.0)
    for game, mixture in itertools.product(GAMES, MIXTURES):
        cells = [choose(results, "vdn", game, mixture, **standard(game, beta=beta)) for beta in betas]
        cells.append(choose(results, "vdn", game, mixture, **standard(game, alpha=0.0)))
        if mixture == "diversified" or sum(map(bool, cells)) > 1:
            plain = choose(results, "vdn", game, mixture, **standard(game))
            scores = [
                values(plain, "charts/reference_score"),
                *(values(cell, "charts/score") for cell in cells),
            ]
            rows.append([game, mixture, *bold_best([*map(mean_and_std, scores)])])
    return table(["game", "data", "BC = pi_ref", *(f"beta {beta:g}" for beta in betas), "alpha 0"], rows)


def table_6(results: list[dict]) -> str:
    rows = []
    for game in MANY_AGENTS:
        for mixture in ("mix-unilateral", "pure-expert"):
            cell = choose(results, "vdn", game, mixture, **standard(game))
            scores = [mean_and_std(values(cell, name)) for name in ("charts/reference_score", "charts/score")]
            rows.append([game, mixture, len(cell), *bold_best(scores)])
    return table(["game", "data", "seeds", "BC = pi_ref", "VDN-RLHF"], rows)


def table_7(results: list[dict]) -> str:
    head = ["game", "", *(f"alpha {alpha:g}" for alpha in ALPHAS), "alpha 1, Eq. (1) as printed"]
    rows = []
    for game in GAMES:
        cells = [
            choose(results, "reward", game, "diversified", alpha=alpha, variance="return") for alpha in ALPHAS
        ]
        cells.append(choose(results, "reward", game, "diversified", variance="step", run_name="step"))
        for name in ("losses/training_nll", "losses/nll", "reward/accuracy", "reward/correlation"):
            rows.append([game, name, *(mean_and_std(values(cell, name), 3) for cell in cells)])
        rows.append([game, "paper, training nll", *PAPER_TABLE_7[game], ""])
    return table(head, rows)


def write_sections(path: Path, sections: dict[str, str]) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end -->` in a Markdown file."""
    text = path.read_text()
    for name, content in sections.items():
        pattern = rf"<!-- {re.escape(name)} -->\n.*?<!-- end -->"
        text = re.sub(pattern, lambda _: f"<!-- {name} -->\n{content}\n<!-- end -->", text, flags=re.DOTALL)  # noqa: B023
    path.write_text(text)


def make_sections(results: list[dict]) -> dict[str, str]:
    return {
        "rivals": rivals(results),
        "no-expert": no_expert(results),
        "labels": labels(results),
        "ablation": ablation(results),
        "table-1": table_1(results),
        "table-2": table_2(results),
        "table-2-paper": table_2(results, "paper"),
        "table-3": table_3(results),
        "table-6": table_6(results),
        "table-7": table_7(results),
    }


def main(args: Args) -> None:
    collect_results(ROOT / args.runs_path, ROOT / "benchmark/results")
    results = load_results(ROOT / "benchmark/results")
    sections = make_sections(results)
    for readme in ("README.md", "benchmark/README.md"):
        write_sections(ROOT / readme, sections)
    hours = sum(result["seconds"] for result in results) / 3600
    print(f"{len(results)} results of {hours:.1f} hours -> README.md, benchmark/README.md", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args))
