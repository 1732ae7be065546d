"""Every shipped policy in both backends of evaluate.py, 2,000 episodes from the same start states with the same random draws:
the batched environment has to give the returns of the mpe2 package, episode by episode.

Usage: python benchmark/parity.py        (from the repository root; writes benchmark/results/parity.md; about 10 minutes)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import evaluate

EPISODES = 2000
RESULT = Path("benchmark/results/parity.md")


def episode_returns(path: Path, backend: str) -> list[float]:
    return evaluate.main(evaluate.Args(str(path), num_episodes=EPISODES, backend=backend))["episode_returns"]


def main() -> None:
    lines = [
        f"Greedy returns of {EPISODES:,} paired episodes in the batched environment and in mpe2. Made by",
        "`python benchmark/parity.py`.",
        "",
        "| policy | mean return, torch | mean return, mpe2 | largest difference of an episode | differing episodes |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(Path("policies").glob("*/*.pt")):
        if path.stem == "prey":  # plays in all three of tag
            continue
        ours, theirs = (torch.tensor(episode_returns(path, backend), dtype=torch.float64) for backend in ("torch", "mpe2"))
        gap = (ours - theirs).abs()
        cells = f"{ours.mean():.3f} | {theirs.mean():.3f} | {gap.max():.1e} | {(gap > 1e-4).sum()}"
        lines.append(f"| {path.parent.name}/{path.stem} | {cells} |")
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
