"""A run that was killed and resumed equals one that was not; a stopped one says nothing but its status."""

import functools
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, made_up_arrays

import train_bc
import train_reward
import vdn_rlhf

COMMON = {"env": "made-up", "device": "cpu", "hidden_dim": 8, "checkpoint_every": 10}
RUNS = {  # output, flags; each of 50 updates or more
    train_reward: ("reward-alpha1-seed1.pt", {"max_epochs": 25}),
    train_bc: ("bc-seed1.pt", {"num_updates": 50, "batch_size": 4}),
    vdn_rlhf: ("vdn-beta3-alpha1-seed1.pt", {"num_updates": 50, "batch_size": 4}),
}
# The script as it is, but the process kills itself where it would write its fourth checkpoint, so that the
# updates since the third are lost.
KILLED = """
import os, signal, sys, {module} as script
def save(path, kind, args, meta, *rest, save_checkpoint=script.save_checkpoint):
    if meta.get("update") == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    save_checkpoint(path, kind, args, meta, *rest)
script.save_checkpoint = save
script.run_command_line(script.main, script.Args, script.PRESETS)
"""


def words(module, folder, **changes) -> list[str]:
    flags = {"data_path": folder / "dataset.npz"} | COMMON | RUNS[module][1] | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def train(module, folder, **changes) -> None:
    flags = {"data_path": str(folder / "dataset.npz")} | COMMON | RUNS[module][1] | changes
    module.main(module.Args(**flags))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the outputs of all three, never stopped."""
    folder = tmp_path_factory.mktemp("finished")
    np.savez(folder / "dataset.npz", **made_up_arrays())
    for module in RUNS:
        train(module, folder)
    return folder


def content(path) -> list:
    """All that a run makes, timings aside."""
    checkpoint = torch.load(path, weights_only=True)
    report = json.loads(path.with_suffix(".json").read_text())
    for metrics in (report["metrics"], checkpoint["metrics"]):
        metrics.pop("speed/updates_per_second")
    tensors = checkpoint["state_dict"] | {"returns": checkpoint["stats"].pop("team_returns", torch.zeros(1))}
    lists = {name: tensor.tolist() for name, tensor in tensors.items()}
    return [lists, report["metrics"], checkpoint["metrics"], checkpoint["stats"], checkpoint["meta"]]


@pytest.mark.parametrize("module", RUNS, ids=lambda module: module.__name__)
def test_killed_and_resumed_equals_never_stopped(module, finished, tmp_path, monkeypatch):
    folder, output = shutil.copytree(finished, tmp_path / "killed"), RUNS[module][0]
    training_path = (folder / output).with_suffix(".training.pt")
    for path in folder.glob(output.replace(".pt", ".*")):
        path.unlink()
    command = [sys.executable, "-c", KILLED.format(module=module.__name__), *words(module, folder)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert torch.load(training_path, weights_only=True)["meta"]["update"] == 20
    assert not (folder / output).exists()

    problem = f"{training_path.name}: made with other settings .*--learning-rate .* there, 0.5 "
    with pytest.raises(module.UserError, match=problem):
        train(module, folder, resume=True, learning_rate=0.5)
    updates, real_train = [], module.train

    def counted(*words):
        bound = inspect.signature(real_train).bind(*words)
        update = bound.arguments["update"]
        bound.arguments["update"] = lambda batch: updates.append(1) or update(batch)
        return real_train(*bound.args)

    monkeypatch.setattr(module, "train", counted)
    train(module, folder, resume=True)
    assert content(folder / output) == content(finished / output)
    assert len(updates) == content(finished / output)[1]["update"] - 20  # it went on, it did not begin again
    assert sorted(os.listdir(folder)) == sorted(os.listdir(finished))  # no training file is left


def test_ctrl_c_ends_with_status_130(finished, tmp_path):
    """Also where the tests run in the background, whose processes inherit that SIGINT is ignored."""
    shutil.copy(finished / "dataset.npz", tmp_path)
    training_path = tmp_path / "bc-seed1.training.pt"
    command = [sys.executable, ROOT / "train_bc.py", *words(train_bc, tmp_path, num_updates=10**5)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, preexec_fn=restore, **pipes)
    deadline = time.time() + 60
    while not training_path.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert printed[0] == "" and "Traceback" not in printed[1] and "error" not in printed[1]
    assert torch.load(training_path, weights_only=True)["kind"] == "training"
