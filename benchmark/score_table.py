"""The results of benchmark/scores.sh. Run from the repository root.

python benchmark/score_table.py                                    a Markdown table of benchmark/results/scores/*.json
python benchmark/score_table.py VDN.pt VDN.json BC.json RESULT     one of these files, from a policy file and two reports
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from vdn_rlhf import make_game

GAMES, SEEDS = ("spread", "reference", "tag"), range(4, 9)
PAPER = {  # scores of the paper's Table 2: its returns on the scale of the authors' random policy and expert in its own units
    "diversified": (35, 53, 65),
    "mix-unilateral": (39, 47, 73),
    "mix-expert": (38, 48, 76),
    "pure-expert": (36, 8, 94),
}


def summarize(vdn_path: str, report_path: str, bc_report_path: str, result_path: str) -> None:
    checkpoint = torch.load(vdn_path, weights_only=True)
    report, bc_report = (json.loads(Path(path).read_text()) for path in (report_path, bc_report_path))
    reference_report = make_game(report["env"]).metrics(checkpoint["metrics"]["charts/reference_return"])
    result = {name: checkpoint["args"][name] for name in ("env", "dataset", "seed", "alpha", "beta")}
    result |= {"return": report["charts/test_return"], "score": report["charts/score"], "bc_score": bc_report["charts/score"]}
    result |= {"reference_score": reference_report["charts/score"], "torch": torch.__version__}
    Path(result_path).write_text(json.dumps(result) + "\n")


def mean_and_deviation(results: list[dict], key: str) -> str:
    values, digits = torch.tensor([result[key] for result in results]), 2 if key == "return" else 1
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    print("# Scores of the default settings: what `bash benchmark/scores.sh` measured\n")
    print("On CPU. Dataset seed 2, training seeds 4 to 8, alpha 1, beta 1 (tag: 3), last checkpoint, 4,096 fresh episodes for")
    print(
        "every policy (`evaluate.py --seed 12345`; pi_ref: other start states); mean ± standard deviation over training seeds."
    )
    print("In the last three columns the scores of pi_ref and of the BC policy, greedy, and of the paper's Table 2.\n")
    print("| game | data | seeds | return | score | lowest | pi_ref | BC | paper |\n|---|---|---|---|---|---|---|---|---|")
    for mixture, published in PAPER.items():
        for game, paper in zip(GAMES, published, strict=True):
            paths = [Path(f"benchmark/results/scores/{game}-{mixture}-{seed}.json") for seed in SEEDS]
            results = [json.loads(path.read_text()) for path in paths if path.exists()]
            cells = [""] * 5
            if results:
                cells = [mean_and_deviation(results, key) for key in ("return", "score", "reference_score", "bc_score")]
                cells.insert(2, f"{min(result['score'] for result in results):.1f}")
            print(f"| {game} | {mixture} | {len(results)} | {' | '.join(cells)} | {paper} |")


if __name__ == "__main__":
    summarize(*sys.argv[1:]) if len(sys.argv) > 1 else main()
