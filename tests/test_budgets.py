"""How long the files may become, so that all of them can be read."""

import ast
import subprocess

import pytest
from conftest import ROOT

LINES = {"vdn_rlhf.py": 650, "train_reward.py": 520, "train_bc.py": 450, "collect_data.py": 720}
LINES |= {"evaluate.py": 760, "README.md": 220, "benchmark/*.py benchmark/*.sh": 3000, "tests/**/*.py": 3850}
ALONE = {"benchmark/label.py": 200, "benchmark/label.html": 180}  # not among the others of its folder


def count_lines(patterns: str) -> int:
    paths = {path for pattern in patterns.split() for path in ROOT.glob(pattern)}
    if patterns not in ALONE:
        paths -= {ROOT / name for name in ALONE}
    assert paths
    return sum(path.read_text().count("\n") for path in paths)


@pytest.mark.parametrize(("patterns", "budget"), (LINES | ALONE).items())
def test_lines(patterns, budget):
    assert count_lines(patterns) <= budget


def test_readme_is_one_page():
    assert (ROOT / "README.md").stat().st_size <= 18 * 1024


def test_repository_is_small():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git, or a copy without its repository")
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    assert sum(path.lstat().st_size for path in files if path.exists()) < 20_000_000


@pytest.mark.parametrize("equation", ["Eq. (3)", "Eq. (4)"])
def test_equations_stand_near_the_top_of_vdn_rlhf(equation):
    """Inside a function, not in the docstring of the file, which mentions them too."""
    text = (ROOT / "vdn_rlhf.py").read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    inside = {line for node in functions for line in range(node.lineno, node.end_lineno + 1)}
    mentions = [n for n, line in enumerate(text.splitlines(), 1) if equation in line and n in inside]
    assert mentions and mentions[0] < 250
