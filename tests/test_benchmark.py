"""The shell scripts run what they print and name what fails; tables say what the committed JSON files say."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import figures
import report
import rivals

import collect_data
import train_bc
import train_reward
import vdn_rlhf

STAGES = {"dataset": collect_data, "reward": train_reward, "bc": train_bc, "vdn": vdn_rlhf}
RESULTS = report.load_results(ROOT / "benchmark/results")


def run(command: str, folder: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    exports = " ".join(f"export {name}='{value}';" for name, value in environment.items())
    return subprocess.run(["bash", "-c", exports + command], cwd=folder, capture_output=True, text=True)


def test_a_failed_line_fails_the_script_and_is_named_with_its_log(tmp_path):
    (tmp_path / "benchmark").mkdir()
    shutil.copy(ROOT / "benchmark/run.sh", tmp_path / "benchmark")
    lines = "echo one\\necho two >&2; exit 3\\necho 'a b'; touch done\\n"
    done = run(f'printf "{lines}" | bash benchmark/run.sh', tmp_path)
    assert done.returncode != 0
    [failed] = [line for line in done.stderr.splitlines() if "FAILED" in line]
    assert "echo two >&2; exit 3" in failed
    log = tmp_path / re.search(r"see (\S+)\)", failed)[1]
    assert log.read_text() == "two\n"
    assert (tmp_path / "done").exists(), "the other lines still run"
    assert run("echo true | bash benchmark/run.sh", tmp_path).returncode == 0


OTHERS = {"run", "settings", "all", "gpu", "table4"}  # no tables of command lines
SCRIPTS = sorted({path.stem for path in (ROOT / "benchmark").glob("*.sh")} - OTHERS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_printed_commands_have_flags_that_their_scripts_know(name):
    printed = run(f"bash benchmark/{name}.sh --print", SEEDS="4", PRESETS="default paper")
    assert printed.returncode == 0, printed.stderr
    lines = [line.split() for line in printed.stdout.splitlines() if not line.startswith("mkdir")]
    assert lines
    modules = {f"{x.__name__}.py": x for x in STAGES.values()} | {"benchmark/rivals.py": rivals}
    for python, script, *words in lines:
        assert python == "python" and (ROOT / script).exists()
        if script in modules:
            known = {f"--{name.replace('_', '-')}" for name in vars(modules[script].Args())}
            assert {word for word in words if word.startswith("--")} <= known
        for error in re.findall(r"diversified-([a-z-]+)-data", " ".join(words)):
            assert script != "collect_data.py" or f"--{error}" in words
        if name == "rivals" and "no-expert" in words and "vdn_rlhf.py" in script:
            assert words[words.index("--beta") + 1] == f"{report.NO_EXPERT_BETA:g}"


def test_a_small_table_runs_from_nothing_and_again_at_once(tmp_path):
    """rivals.sh for one game and seed at smoke scale; the second time every script skips what is finished."""
    for pattern in ("*.py", "*.md", "benchmark/*.*", "policies/*/*.pt"):
        for path in ROOT.glob(pattern):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    command = f'PATH="{Path(sys.executable).parent}:$PATH" bash benchmark/rivals.sh'
    environment = {"SCALE": "smoke", "GAMES": "spread", "SEEDS": "4", "MIXTURES": "diversified"}
    environment["METHODS"] = "zero ipl"
    done = run(command, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/spread/diversified-data2-smoke"
    made = {path.name for path in folder.glob("*.pt")}
    prefixes = {"reward": ("", "true-returns-"), "bc": ("", "keep0.25-", "true-returns-keep0.25-")}
    prefixes |= {"vdn": ("", "keep0.25-", "zero-", "ipl-")}
    names = {"reward": "alpha1-seed4.pt", "bc": "seed4.pt", "vdn": "beta3-alpha1-seed4.pt"}
    assert made == {f"{kind}-{prefix}{names[kind]}" for kind in names for prefix in prefixes[kind]}
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(command, tmp_path, **environment).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not (tmp_path / "benchmark/results/spread").exists(), "smoke results stay out of the tables"


def made_up_result(seed: int, score: float, reference: float, **changes) -> dict:
    args = {**report.standard("spread"), "seed": seed, **changes}
    metrics = {"charts/score": score, "charts/reference_score": reference}
    place = {"kind": "vdn", "game": "spread", "mixture": "diversified", "data_seed": "2"}
    return {"args": args, "metrics": metrics, "seconds": 1.0, **place}


def test_a_cell_is_made_of_its_own_runs_alone():
    others = ({"beta": 1.0}, {"run_name": "x"}, {"keep": 0.25}, {"preset": "paper", "run_name": "paper"})
    results = [made_up_result(5, 80, 60), made_up_result(4, 90, 70)]
    results += [made_up_result(4, 0, 0, **changes) for changes in others]
    row = report.table_2(results).splitlines()[2]
    std = np.std([80, 90], ddof=1)
    assert row.startswith(f"| spread | diversified | 2 | 65.0 ± {std:.1f} | **85.0 ± {std:.1f}** |")
    assert "| 20.0 ± 0.0 | 35 |" in row, "VDN minus BC of the same run"
    half = stats.t.ppf(0.975, 1) * std / 2**0.5
    assert f"{85 - half:.1f} to {85 + half:.1f}" in row
    assert "missing" in report.table_2(results).splitlines()[3]


@pytest.mark.parametrize("readme", ["README.md", "benchmark/README.md"])
def test_tables_are_those_of_the_committed_results(readme):
    text = (ROOT / readme).read_text()
    for name, content in report.make_sections(RESULTS).items():
        if f"<!-- {name} -->" in text:
            assert f"<!-- {name} -->\n{content}\n<!-- end -->" in text, f"{name}: run benchmark/report.py"


def test_results_are_of_the_present_code_and_name_no_place_of_a_machine():
    for result in RESULTS:
        assert result["version"] == STAGES[result["kind"]].VERSION, result["command"]
        assert set(result) >= {"command", "args", "metrics", "version", "packages", "machine", "seconds"}
        assert not re.search(r'"[^"]*(/home/|/root/|/tmp/|/work/)', json.dumps(result)), result["command"]


def test_the_figures_over_beta_and_labels_show_the_committed_scores(tmp_path):
    figures.draw_betas(figures.Args(folder=str(tmp_path)))
    for axis, row in zip(figures.plt.gcf().axes, report.no_expert(RESULTS).splitlines()[2:], strict=True):
        numbers = [float(cell.strip(" *").split(" ")[0]) for cell in row.split("|")[3:-1]]
        drawn = [*axis.lines[0].get_ydata(), *(line.get_ydata()[0] for line in axis.lines[-4:])]
        assert drawn == pytest.approx([*numbers[2:7], numbers[7], *numbers[:2], 0], abs=0.06)
    figures.draw_labels(figures.Args(folder=str(tmp_path)))
    cells = [row.split("|")[-2].strip(" *") for row in report.labels(RESULTS).splitlines()[2:]]
    numbers = [float(cell.split(" ")[0]) if cell != "missing" else np.nan for cell in cells]
    drawn = [y for axis in figures.plt.gcf().axes for y in axis.lines[0].get_ydata()]
    assert drawn == pytest.approx([*numbers[:6], *numbers[10:16]], abs=0.06, nan_ok=True)
