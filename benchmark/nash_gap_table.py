"""The results of benchmark/nash_gap.sh. Run from the repository root.

python benchmark/nash_gap_table.py                 a Markdown table of benchmark/results/nash_gap/*.json
python benchmark/nash_gap_table.py REPORT RESULT   one of these files, from a report of evaluate.py
"""

import json
import sys
from pathlib import Path

GAMES = ("spread", "reference", "tag")
MIXTURES = ("diversified", "mix-unilateral", "mix-expert", "pure-expert")
ROWS = {"expert": "expert", "rookie": "rookie"}  # ends of file names: what the table calls them
ROWS |= {f"{mixture}-bc": f"BC, greedy, {mixture}" for mixture in MIXTURES}
ROWS |= {f"{mixture}-vdn": f"VDN-RLHF, {mixture}" for mixture in MIXTURES}
HEADER = """# Nash gaps: what `bash benchmark/nash_gap.sh` measured

On CPU. What each agent gains per episode (undiscounted return of 25 steps, its own reward) by the best response found to the
others, who play the policy greedily, and the sum over agents, a lower bound of the Nash gap: mean and 95 % interval over 4,096
fresh episodes (`evaluate.py --nash-gap --seed 12345`). The search starts from the better of the policy and the shipped expert.
The last columns count the agents whose best response found is the expert as it is, and those that learned a better one; the
others gain 0 by playing on as they do. Policies as of `benchmark/table2.sh --scale paper`, training seed 4, dataset seed 2;
those of spread were learned before imitation had layers of 256 instead of 128.

| game | policy | return | gap, at least | of each agent | expert | learned |
|---|---|---|---|---|---|---|"""


def summarize(report_path: str, result_path: str) -> None:
    report = json.loads(Path(report_path).read_text())
    del report["episode_returns"]
    Path(result_path).write_text(json.dumps(report) + "\n")


def with_interval(mean: float, interval: list[float]) -> str:
    return f"{mean:.2f} ± {interval[1] - mean:.2f}"


def main() -> None:
    print(HEADER)
    for game in GAMES:
        for row, title in ROWS.items():
            path = Path(f"benchmark/results/nash_gap/{game}-{row}.json")
            cells = [""] * 5
            if path.exists():
                report = json.loads(path.read_text())
                gains = zip(report["agent_gains"], report["agent_gain_intervals"], strict=True)
                cells = [f"{report['charts/test_return']:.2f}"]
                cells.append(with_interval(report["charts/nash_gap"], report["nash_gap_interval"]))
                cells.append(", ".join(with_interval(*gain) for gain in gains))
                found = [(response["start"], response["updates"] > 0) for response in report["best_responses"]]
                cells += [str(found.count(("expert", False))), str(sum(learned for _, learned in found))]
            print(f"| {game} | {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    summarize(*sys.argv[1:]) if len(sys.argv) > 1 else main()
