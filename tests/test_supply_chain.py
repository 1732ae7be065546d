"""What the code imports is what the README lists and requirements.txt pins, and nothing reaches for the network."""

import ast
import importlib
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# README, Packages.
SCRIPT = {"torch", "numpy", "tyro", "tqdm"}
INSIDE_FUNCTIONS = {"wandb"}  # where a flag asks for it
EVALUATE = {"mpe2", "pettingzoo", "matplotlib", "PIL", "scipy"}
TESTS = {"pytest", "hypothesis"}
DISTRIBUTIONS = {"PIL": "pillow"}  # of packages that are imported by another name than they are installed by
NOT_IMPORTED = {"ruff", "pytest-xdist", "pygame-ce"}  # the linter; runs tests on two cores; mpe2 imports pygame
FILES = sorted(path.relative_to(ROOT) for folder in (".", "benchmark", "tests") for path in (ROOT / folder).glob("*.py"))


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
    allowed = SCRIPT | INSIDE_FUNCTIONS
    if path.name == "evaluate.py" or len(path.parts) > 1:
        allowed = allowed | EVALUATE
    if path.parts[0] == "tests":
        allowed = allowed | TESTS
    assert imports(path) <= allowed
    for name in imports(path):
        importlib.import_module(name)
    if len(path.parts) == 1:  # a script that is copied alone starts with these
        assert imports(path, top_level_only=True) <= SCRIPT


def test_requirements_pin_what_is_imported_and_nothing_else():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)+", line) for line in lines), lines
    pinned = [line.split("==")[0] for line in lines]
    imported = {DISTRIBUTIONS.get(name, name) for path in FILES for name in imports(path)}
    assert sorted(pinned) == sorted(imported | NOT_IMPORTED)


def test_licence():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) ")


def blocked(function, *arguments) -> bool:
    try:
        function(*arguments)
    except RuntimeError as error:
        return str(error).startswith("blocked: ")
    return False


def test_the_network_is_blocked_but_for_this_machine():
    with socket.socket() as server, socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
        assert blocked(server.connect, ("192.0.2.1", 80)) and blocked(server.connect_ex, ("192.0.2.1", 80))
        client.connect(listening.getsockname())
    with socket.socket(type=socket.SOCK_DGRAM) as datagram:
        assert blocked(datagram.sendto, b"x", ("192.0.2.1", 53)) and blocked(datagram.sendmsg, [b"x"], [], 0, ("192.0.2.1", 53))
        datagram.sendto(b"x", ("127.0.0.1", 9))
    assert blocked(socket.getaddrinfo, "example.org", 80) and blocked(socket.gethostbyname, "example.org")
    socket.getaddrinfo("localhost", 80)


def test_the_network_is_blocked_in_processes_that_tests_start(tmp_path):
    code = "import socket; socket.create_connection(('192.0.2.1', 80))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "blocked: socket.getaddrinfo 192.0.2.1" in done.stderr
