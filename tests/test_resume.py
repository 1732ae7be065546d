"""Killed, terminated, out of disk space, two at once: nothing is lost and nothing mixed up. tests/soak.py kills at more moments."""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, made_up_arrays, same_weights
from corruptions import Bomb
from soak import SMALL, differences, made_up_blocks, read

import collect_data
import evaluate
import train_bc
import train_reward
import vdn_rlhf

CPU = dict(device="cpu", hidden_dim=16, num_layers=2)


class Forked:
    """Stands in for subprocess.Popen: the script runs in a fork of this process, which has imported all it needs."""

    def __init__(self, command, **options):
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            os.environ |= options.get("env", {})
            status = 1
            try:
                run_script(Path(command[1]).stem, command[2:])
                status = 0
            except SystemExit as exit:
                status = exit.code or 0
            finally:
                os._exit(status)

    def poll(self, options=os.WNOHANG):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        self.poll(0)

    def terminate(self):
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)


def run_script(script: str, words: list[str]) -> None:
    module = importlib.import_module(script)
    module.TEST_EPISODES, module.HISTORY_EPISODES = 64, 32
    sys.argv = [f"{script}.py", *words]
    module.run_command_line(module.main, module.Args, getattr(module, "PRESETS", {}))


def in_process(script: str, words: list[str], folder: Path, environment: dict) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ |= environment
    descriptor = os.open("printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    vdn_rlhf.subprocess.Popen = Forked
    run_script(script, words)


@pytest.fixture(scope="module")
def start():
    """-> start(command, folder): a real process that runs a script, forked from one that has imported everything already."""
    context, before = multiprocessing.get_context("forkserver"), os.environ["PYTHONPATH"]
    os.environ["PYTHONPATH"] = os.pathsep.join([before, str(ROOT), str(ROOT / "tests")])
    context.set_forkserver_preload(["test_resume", "torch._dynamo"])  # which optimizers import
    processes = []

    def start(command: str, folder: Path, **environment):
        script, *words = command.split()
        processes.append(context.Process(target=in_process, args=(script, words, folder, environment)))
        processes[-1].start()
        return processes[-1]

    yield start
    os.environ["PYTHONPATH"] = before
    for process in processes:
        process.kill()


def status(process) -> int:
    process.join(60)
    return process.exitcode


def wait_for(condition, process=None) -> None:
    deadline = time.time() + 60
    while not condition() and (process is None or process.is_alive()):
        assert time.time() < deadline
        time.sleep(0.005)


def printed(folder: Path) -> str:
    return (folder / "printed.txt").read_text()


def folder_with(folder: Path, *files: Path) -> Path:
    folder.mkdir(parents=True)
    for file in files:
        os.link(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, spread_data) -> dict[str, Path]:
    """768 trajectories of spread and models for them."""
    folder = tmp_path_factory.mktemp("files")
    args = dict(data_path=str(folder / "dataset.npz"), device="cpu")
    collect_data.main(collect_data.Args(num_trajectories=768, **args))
    train_reward.main(train_reward.Args(max_epochs=30, **args))
    train_bc.main(train_bc.Args(max_epochs=4, num_modes=3, **args | CPU))
    np.savez(folder / "made-up.npz", **made_up_blocks(10))
    return {path.name: path for path in folder.iterdir()}


COMMANDS = {  # what a stopped and resumed command needs
    "collect_data --policies-path . --num-trajectories 256 --data-path dataset.npz --num-updates 160 --num-envs 16 "
    f"--batch-size 16 --buffer-size 50 --checkpoint-every 10 --device cpu --hidden-dim 16 --num-layers 2": (),
    f"train_reward {SMALL} --data-path dataset.npz --max-epochs 25 --num-seeds 2 --alpha 0 1 --checkpoint-every 2": (
        "dataset.npz",
    ),
    f"train_bc {SMALL} --data-path dataset.npz --max-epochs 8 --num-seeds 2 --checkpoint-every 5": ("dataset.npz",),
    f"vdn_rlhf {SMALL} --data-path dataset.npz --imitation-updates 40 --num-updates 60 --beta 1 10 --checkpoint-every 6": (
        "dataset.npz",
        "reward-alpha1-seed1.pt",
        "bc-seed1.pt",
    ),
    f"vdn_rlhf {SMALL} --env made-up --data-path made-up.npz --imitation-updates 40 --num-updates 60 --num-seeds 2 "
    "--checkpoint-every 6": ("made-up.npz",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_at_random_moments_and_resumed(command, start, files, tmp_path):
    """SIGKILL and SIGTERM shortly after a checkpoint was written, again and again; at the end nothing tells the runs apart."""
    needed = [files[name] for name in COMMANDS[command]]
    folders = [folder_with(tmp_path / name, *needed) for name in ("undisturbed", "stopped")]
    undisturbed = start(command, folders[0])
    assert status(undisturbed) == 0, printed(folders[0])
    rng, folder = random.Random(command), folders[1]

    def training_files():
        return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.training.pt")}

    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        before, process = training_files(), start(f"{command} --resume", folder)
        wait_for(lambda before=before: training_files() != before, process)
        time.sleep(rng.uniform(0, 0.1))
        before = training_files()
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
        assert status(process) in (-9, 143, 0), printed(folder)
        if process.exitcode == 143:
            assert training_files() != before and not list(folder.rglob("*.partial")) and not list(folder.rglob(".*.lock"))
    assert status(start(f"{command} --resume", folder)) == 0, printed(folder)
    assert printed(folder).count(" goes on after ") >= 2
    assert "Traceback" not in printed(folder)
    assert differences(*folders) == []

    modified = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    assert status(start(f"{command} --resume", folder)) == 0
    assert ": is there already, nothing to do" in printed(folder).splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")} == modified
