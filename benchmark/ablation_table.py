"""Markdown table of the runs that benchmark/ablations.sh made. Run from the repository root."""

import json
from pathlib import Path

import torch

GAMES, SEEDS = ("spread", "reference", "tag"), (1, 2, 3)
RESULTS = Path("benchmark/results/ablations")
INTRODUCTION = """\
# What each setting gives: what `bash benchmark/ablations.sh` measured

torch 2.13.0 on an Intel Xeon with AMX. Diversified data (dataset seed 1), alpha 1, beta 1 (tag: 3), last network, 4,096
fresh episodes: mean over training seeds (in brackets) ± standard deviation. Each row changes the default by its flags;
behind the slash the score of pi_ref alone, greedy. Command: `python benchmark/oracle.py --env GAME --seed SEED FLAGS`,
with runs/GAME/diversified as FOLDER.
"""


def main() -> None:
    settings = Path("benchmark/ablations.sh").read_text().split("<<'EOF'\n")[1].split("\nEOF")[0].splitlines()
    games = [game for game in GAMES if list(RESULTS.glob(f"{game}-*.json"))]
    print(INTRODUCTION)
    print("| | flags | " + " | ".join(f"{game}: return | score / of pi_ref" for game in games) + " |")
    print("|---|---|" + "---|---|" * len(games))
    for setting in settings:
        name, _, flags = setting.partition(" ")
        cells = []
        for game in games:
            paths = [RESULTS / f"{game}-{name}-{seed}.json" for seed in SEEDS]
            reports = [json.loads(path.read_text()) for path in paths if path.exists()]
            if not reports:
                cells += ["", ""]
                continue
            returns, scores, reference_scores = (
                torch.tensor([report[key] for report in reports])
                for key in ("charts/test_return", "charts/score", "reference_score")
            )
            seeds = ", ".join(str(report["seed"]) for report in reports)
            spread = f" ± {scores.std():.1f}" if len(reports) > 1 else ""
            cells += [f"{returns.mean():.2f}", f"{scores.mean():.1f}{spread} / {reference_scores.mean():.1f} ({seeds})"]
        print(f"| {name} | {f'`{flags}`' if flags else ''} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
