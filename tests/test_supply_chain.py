"""What the code imports is what requirements.txt pins, scripts run when copied alone, and nothing reaches for
the network."""

import ast
import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = {"torch", "numpy", "tyro", "tqdm"}
INSIDE_FUNCTIONS = {"wandb", "mpe2", "pettingzoo"}  # where a flag asks for it
BENCHMARK = {"matplotlib", "PIL", "scipy"}
FOLDERS = {".": set(), "benchmark": BENCHMARK, "tests": BENCHMARK | {"pytest", "hypothesis"}}
DISTRIBUTIONS = {"PIL": "pillow"}  # of packages that are imported by another name than they are installed by
NOT_IMPORTED = {"ruff", "pytest-xdist", "pygame-ce"}  # the linter; tests on two cores; mpe2 imports pygame
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
SCRIPTS = [path.stem for path in FILES if len(path.parts) == 1]


def imports(path: Path, top_level_only=False) -> set[str]:
    """Third-party packages that a file imports."""
    tree = ast.parse((ROOT / path).read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {file.stem for file in FILES} - {"benchmark"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_are_listed_and_there(path):
    assert imports(path) <= SCRIPT | INSIDE_FUNCTIONS | FOLDERS[str(path.parent)]
    for name in imports(path):
        importlib.import_module(name)
    if len(path.parts) == 1:  # a script that is copied alone starts with these
        assert imports(path, top_level_only=True) <= SCRIPT


def test_requirements_pin_what_is_imported_and_nothing_else():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)+", line) for line in lines), lines
    pinned = [line.split("==")[0] for line in lines]
    imported = {DISTRIBUTIONS.get(name, name) for path in FILES for name in imports(path)}
    assert sorted(pinned) == sorted(imported | NOT_IMPORTED)


def run_alone(folder: Path, script: str, flags: str) -> subprocess.CompletedProcess:
    """A copy of a script in an otherwise empty folder, with the progress bars switched off."""
    shutil.copy(ROOT / f"{script}.py", folder)
    command, silent = [sys.executable, f"{script}.py", *flags.split()], {**os.environ, "TQDM_DISABLE": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=silent, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script_alone_describes_every_flag(script, tmp_path):
    done = run_alone(tmp_path, script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    (args,) = (node for node in tree.body if getattr(node, "name", "") == "Args")
    for flag, text in zip(args.body[::2], args.body[1::2], strict=True):
        assert isinstance(flag, ast.AnnAssign) and isinstance(text.value.value, str)
        assert re.search(rf"--{flag.target.id.replace('_', '-')}\b", done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == [f"{script}.py"]


def test_environments_play_alone(tmp_path):
    """On files given by path; what is not there is one line."""
    policies = ROOT / "policies"
    words = f"--num-trajectories 256 --device cpu --policies-path {policies}"
    done = run_alone(tmp_path, "collect_data", f"{words}/spread --env spread")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/spread/diversified/dataset.npz").exists()
    done = run_alone(tmp_path, "evaluate", "--policies random --env spread --num-episodes 1")
    assert done.returncode == 0, done.stderr
    assert "| random |" in done.stdout and done.stderr == ""
    done = run_alone(tmp_path, "collect_data", f"{words}/tag --env tag")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "policies/tag/prey.pt: no such file; tag needs the policy of its prey" in done.stderr


def blocked(function, *arguments) -> bool:
    try:
        function(*arguments)
    except RuntimeError as error:
        return str(error).startswith("blocked: ")
    return False


def test_the_network_is_blocked_but_for_this_machine():
    far, near = ("192.0.2.1", 53), ("127.0.0.1", 9)
    with socket.socket() as server, socket.create_server(("127.0.0.1", 0)) as listening:
        assert blocked(server.connect, far) and blocked(server.connect_ex, far)
        with socket.socket() as client:
            client.connect(listening.getsockname())
    with socket.socket(type=socket.SOCK_DGRAM) as datagram:
        assert blocked(datagram.sendto, b"x", far) and blocked(datagram.sendmsg, [b"x"], [], 0, far)
        datagram.sendto(b"x", near)
    assert blocked(socket.getaddrinfo, "example.org", 80) and blocked(socket.gethostbyname, "example.org")
    socket.getaddrinfo("localhost", 80)


def test_the_network_is_blocked_in_processes_that_tests_start(tmp_path):
    code = "import socket; socket.create_connection(('192.0.2.1', 80))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "blocked: socket.getaddrinfo 192.0.2.1" in done.stderr
