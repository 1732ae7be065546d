"""Killed, terminated, out of disk space, two at once: nothing is lost, nothing is mixed up. tests/soak.py kills more often."""

import contextlib
import importlib
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
from conftest import ROOT, same_weights
from corruptions import Bomb
from soak import SMALL, differences, made_up_blocks

import collect_data
import train_bc
import train_reward
import vdn_rlhf

CPU = dict(device="cpu", hidden_dim=16, num_layers=2)


class Forked:
    """Stands in for subprocess.Popen: the script runs in a fork of this process, which has imported all it needs."""

    def __init__(self, command, **options):
        sys.stdout.flush()
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
                sys.stdout.flush()
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
def files(tmp_path_factory) -> dict[str, Path]:
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
    "--batch-size 16 --buffer-size 50 --checkpoint-every 10 --device cpu --hidden-dim 16 --num-layers 2": (),
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
            saved = [torch.load(path, weights_only=True)["metrics"] for path in folder.rglob("*.training.pt")]
            ends = [f" {done}/{done} [" for *_, (done, _) in (phases.values() for phases in saved)]
            between_phases = all(end in printed(folders[0]) for end in ends)  # where all is saved already
            assert training_files() != before or between_phases
            assert not list(folder.rglob("*.partial")) and not list(folder.rglob(".*.lock"))
    assert status(start(f"{command} --resume", folder)) == 0, printed(folder)
    assert printed(folder).count(" goes on after ") >= 2
    assert "Traceback" not in printed(folder)
    assert differences(*folders) == []

    modified = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    assert status(start(f"{command} --resume", folder)) == 0
    assert ": is there already, nothing to do" in printed(folder).splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")} == modified


@pytest.mark.parametrize(
    "command",
    [
        "collect_data --num-trajectories 38400 --data-path dataset.npz --device cpu",
        "evaluate --policy-path random --env spread --nash-gap --device cpu",
    ],
)
def test_terminated_where_nothing_can_be_saved(command, start, tmp_path):
    """While trajectories are collected or best responses trained: gone at once, no half file."""
    process = start(command, tmp_path)
    wait_for(lambda: (tmp_path / "printed.txt").exists() and "%|" in printed(tmp_path), process)
    process.terminate()
    assert status(process) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["printed.txt"]


def test_a_second_process_does_not_write_the_same_file(start, files, tmp_path):
    folder = folder_with(tmp_path / "a", files["dataset.npz"])
    command = f"train_bc {SMALL} --data-path dataset.npz --max-epochs 20"
    first = start(command, folder)
    wait_for((folder / ".bc-seed1.pt.lock").exists, first)
    second = start(f"{command} --num-seeds 2", folder)
    assert status(second) == 2
    problem = "bc-seed1.pt: another process is writing it; wait for it, or choose a --run-name or path"
    assert f"error: {problem}\n" in printed(folder) and "Traceback" not in printed(folder)
    assert status(first) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["bc-seed1.pt", "dataset.npz", "printed.txt"]


def test_what_another_process_makes_is_waited_for_and_used(start, files, tmp_path):
    """As a child of vdn_rlhf.py: seed 1 is made while it waits, so seed 2 alone is left."""
    folder = folder_with(tmp_path / "a", files["dataset.npz"])
    train_bc.lock_outputs([folder / "bc-seed1.pt"])
    command = f"train_bc {SMALL} --data-path dataset.npz --num-seeds 2 --max-epochs 1"
    process = start(command, folder, **{train_bc.WAIT: "1"})
    wait_for(lambda: (folder / "printed.txt").exists() and "bc-seed1.pt: another process" in printed(folder), process)
    args = train_bc.Args(data_path=str(folder / "dataset.npz"), max_epochs=1, device="cpu", hidden_dim=32, num_layers=2)
    args.num_seeds, args.bc_path = 1, str(folder / "other.pt")
    with train_bc.releasing_locks():
        pass
    assert status(process) == 0 and "bc-seed1.pt: epoch 1 of 1" in printed(folder)  # nobody made it after all
    made = (folder / "bc-seed1.pt").stat().st_mtime_ns
    (folder / "bc-seed2.pt").unlink()
    assert status(start(command, folder, **{train_bc.WAIT: "1"})) == 0
    assert "bc-seed1.pt: is there already, nothing to do" in printed(folder)
    assert (folder / "bc-seed1.pt").stat().st_mtime_ns == made and (folder / "bc-seed2.pt").exists()


def test_two_pipelines_at_once_make_the_models_once(start, files, tmp_path):
    folder = folder_with(tmp_path / "a", files["made-up.npz"])
    command = f"vdn_rlhf {SMALL} --env made-up --data-path made-up.npz --imitation-updates 5 --num-updates 20"
    both = [start(f"{command} --beta {beta}", folder) for beta in (1, 10)]
    assert [status(process) for process in both] == [0, 0], printed(folder)
    for model in ("reward-alpha1", "bc"):
        assert printed(folder).count(f"{model}-seed1.pt: epoch ") == 1
        assert printed(folder).count(f"{model}-seed1.pt: is there already") == 1
    sources = [torch.load(folder / f"vdn-beta{b}-alpha1-seed1.pt", weights_only=True)["meta"]["sources"] for b in (1, 10)]
    assert sources[0] == sources[1]
    assert not list(folder.glob(".*"))


def test_two_collections_train_the_experts_once(start, tmp_path):
    command = next(iter(COMMANDS)).replace("--data-path dataset.npz", "")
    both = [start(f"{command} --data-path {name}.npz", tmp_path) for name in "ab"]
    assert [status(process) for process in both] == [0, 0], printed(tmp_path)
    assert printed(tmp_path).count("training expert, rookie, novice of spread") == 1
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert all(np.array_equal(a[key], b[key]) for key in a.files)
    assert sorted(path.name for path in (tmp_path / "spread").iterdir()) == ["expert.pt", "novice.pt", "rookie.pt"]


@pytest.fixture
def stopped(files, tmp_path, monkeypatch):
    """-> the Args of a BC policy whose training was stopped after 10 of 40 updates, and what it left."""
    folder = folder_with(tmp_path / "stopped", files["dataset.npz"])
    args = train_bc.Args(data_path=str(folder / "dataset.npz"), max_epochs=4, checkpoint_every=10, **CPU)
    save_content = train_bc.save_content

    def save_and_die(path, **content):
        save_content(path, **content)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_bc, "save_content", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_bc.main(args)
    monkeypatch.setattr(train_bc, "save_content", save_content)
    path = folder / "bc-seed1.training.pt"
    assert sorted(path.name for path in folder.iterdir()) == [path.name, "dataset.npz"]
    args.resume = True
    return args, path


def test_full_disk_leaves_the_last_good_checkpoint(stopped, files, tmp_path, monkeypatch, capsys):
    args, path = stopped
    good, fsync, calls = path.read_bytes(), os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(train_bc.UserError, match=r"bc-seed1.training.pt: cannot be written \(No space left on device\)$"):
        train_bc.main(args)
    assert calls and path.read_bytes() == good
    assert sorted(path.name for path in path.parent.iterdir()) == [path.name, "dataset.npz"]
    monkeypatch.setattr(os, "fsync", fsync)
    train_bc.main(args)
    assert "bc-seed1.training.pt: imitation goes on after 10 of 40 updates" in capsys.readouterr().out
    other = tmp_path / "undisturbed.pt"
    train_bc.main(train_bc.Args(data_path=str(files["dataset.npz"]), bc_path=str(other), max_epochs=4, **CPU))
    assert same_weights(other, path.with_name("bc-seed1.pt"))
    a, b = (torch.load(p, weights_only=True)["metrics"] for p in (other, path.with_name("bc-seed1.pt")))
    assert {key for key in a if a[key] != b[key]} == {"speed/updates_per_second"}


def test_a_folder_that_cannot_be_written_is_told_before_the_training(files, capsys):
    """Nobody can make files there, root included."""
    args = train_bc.Args(data_path=str(files["dataset.npz"]), bc_path="/proc/bc.pt", **CPU)
    with pytest.raises(train_bc.UserError, match=r"^/proc/bc.pt: cannot be written \([^\n]*\)$"):
        train_bc.main(args)
    assert "imitation" not in capsys.readouterr().err


def test_files_that_vanish_in_mid_run(stopped, monkeypatch, capsys):
    """The folder with dataset and checkpoint, once the training is under way: what is needed is in memory."""
    args, path = stopped
    save_content = train_bc.save_content

    def vanish(path, **content):
        shutil.rmtree(path.parent, ignore_errors=True)
        save_content(path, **content)

    monkeypatch.setattr(train_bc, "save_content", vanish)
    train_bc.main(args)
    assert [path.name for path in path.parent.iterdir()] == ["bc-seed1.pt"]
    with pytest.raises(train_bc.UserError, match=r"dataset.npz: cannot be read \(No such file or directory\); collect_data.py"):
        train_bc.main(args)


def test_what_is_said_and_done_without_a_checkpoint_or_without_resume(stopped, capsys):
    args, path = stopped
    args.resume = False
    train_bc.main(args)
    printed = capsys.readouterr().out
    assert f"{path}: of a run that was stopped; starting anew and writing over it (--resume goes on)\n" in printed
    assert "goes on after" not in printed and not path.exists()
    output = path.with_name("bc-seed1.pt")
    weights = torch.load(output, weights_only=True)["state_dict"]
    args.resume = True
    train_bc.main(args)
    assert capsys.readouterr().out == f"{output}: is there already, nothing to do\n"
    args.learning_rate = 1e-4
    with pytest.raises(train_bc.UserError, match=r"bc-seed1.pt: made with other settings \(--learning-rate is 0.005 there"):
        train_bc.main(args)
    output.unlink()
    args.learning_rate = 5e-3
    train_bc.main(args)
    assert f"{path}: no such file, nothing to resume: starting anew\n" in capsys.readouterr().out
    again = torch.load(output, weights_only=True)["state_dict"]
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_what_a_killed_process_left_is_cleared_away(files, tmp_path):
    folder = folder_with(tmp_path / "a", files["dataset.npz"])
    left = [".bc-seed1.pt.lock", ".bc-seed1.pt.123.partial", ".bc-seed1.training.pt.123.partial"]
    others = [".bc-seed10.pt.1.partial", ".bc-seed1.pt.old.partial"]
    for name in left + others:
        (folder / name).write_text("")
    train_bc.main(train_bc.Args(data_path=str(folder / "dataset.npz"), max_epochs=1, **CPU))
    assert {path.name for path in folder.iterdir()} == {*others, "bc-seed1.pt", "dataset.npz"}


def test_a_checkpoint_of_another_command_dataset_or_device(stopped, monkeypatch):
    args, path = stopped
    good = path.read_bytes()
    for name, value, message in (
        ("hidden_dim", 8, r"made with other settings \(--hidden-dim is 16 there and 8 here\); leave out --resume"),
        ("num_seeds", 2, r"made with other settings \(--num-seeds is 1 there and 2 here\)"),
    ):
        with pytest.raises(train_bc.UserError, match=f"bc-seed1.training.pt: {message}"):
            train_bc.main(train_bc.Args(**vars(args) | {name: value}))
    content = torch.load(path, weights_only=True)
    for name, message in (("dataset", "begun with another dataset"), ("kind of device", "begun with another kind of device")):
        sources = content["meta"]["sources"] | {name: "x"}
        torch.save(content | {"meta": {"sources": sources}}, path)
        with pytest.raises(train_bc.UserError, match=f"bc-seed1.training.pt: {message} than .*; leave out --resume"):
            train_bc.main(args)
    path.write_bytes(good)
    args.checkpoint_every = 7  # when checkpoints are written does not matter
    train_bc.main(args)


def test_damaged_and_crafted_checkpoints(stopped):
    """One line that names the file, nothing executed, nothing written."""
    args, path = stopped
    good = torch.load(path, weights_only=True)
    done, (result,) = good["metrics"]["imitation"]
    parts = good["state_dict"]["imitation"]
    assert done == 10 and set(parts) == {"stack", "best", "optimizer"}
    weight = parts["stack"]["head.weight"]
    moments = parts["optimizer"]

    def metrics(*value):
        return good | {"metrics": {"imitation": list(value)}}

    def state(**changed):
        return good | {"state_dict": {"imitation": parts | changed}}

    def stack(tensor):
        return state(stack=parts["stack"] | {"head.weight": tensor})

    cases = [
        *[metrics(*value) for value in ((), (10,), (-1, [result]), (0, [result]), (41, [result]), (True, [result]), ("x", []))],
        *[metrics(10, value) for value in (None, {}, [], [{}], [result, result], [result | {"nll": "x"}], [result | {"a": 1}])],
        *[good | {"state_dict": value} for value in ({}, {"imitation": {}}, {"imitation": 3}, {"imitation": {"stack": 1}})],
        *[stack(value) for value in (3, weight[..., 1:], weight.double(), weight.to_sparse(), weight[:, :1].expand_as(weight))],
        *[state(optimizer=value) for value in ({}, {0: {}}, moments | {0: {"step": 1}}, moments | {99: moments[0]})],
        state(optimizer=moments | {0: moments[0] | {"exp_avg": weight}}),
        good | {"extra": Bomb()},
        good | {"metrics": {"imitation": 3.0}},
        good | {"kind": "bc"},
        good | {"meta": {"sources": 3}},
        good | {"stats": {"a": "b"}},
    ]
    for case in cases:
        torch.save(case, path)
        content = path.read_bytes()
        with pytest.raises(train_bc.UserError, match=r"bc-seed1.training.pt: ") as error:
            train_bc.main(args)
        assert "\n" not in str(error.value)
        assert path.read_bytes() == content and len(list(path.parent.iterdir())) == 2
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(train_bc.UserError, match=r"bc-seed1.training.pt: damaged, truncated or not a checkpoint"):
        train_bc.main(args)


def test_crafted_checkpoints_of_experts(tmp_path, monkeypatch):
    save_content, path = collect_data.save_content, tmp_path / "spread" / "expert.training.pt"
    args = dict(num_updates=40, num_envs=8, batch_size=8, buffer_size=50, checkpoint_every=20, num_trajectories=256, **CPU)
    args = collect_data.Args(policies_path=str(tmp_path), data_path=str(tmp_path / "dataset.npz"), **args)

    def save_and_die(path, **content):
        save_content(path, **content)
        raise KeyboardInterrupt

    monkeypatch.setattr(collect_data, "save_content", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        collect_data.main(args)
    good, args.resume = torch.load(path, weights_only=True), True
    done, (result,) = good["metrics"]["online VDN"]
    history, checkpoints, generator = result["history"], result["checkpoints"], good["state_dict"]["online VDN"]["generator"]
    assert len(history) == len(checkpoints) > 2
    cases = [dict(history=history[1:], checkpoints=checkpoints), dict(history=[3] * len(history), checkpoints=checkpoints)]
    cases += [dict(history=history, checkpoints=value) for value in ([1] * len(history), [{}] * len(history))]
    contents = [good | {"metrics": {"online VDN": [done, [case]]}} for case in cases]
    contents += [good | {"metrics": {"online VDN": [40, [dict(history=[], checkpoints=[])]]}}]
    state = good["state_dict"]["online VDN"] | {"generator": {"state": torch.zeros_like(generator["state"])}}
    for content in (*contents, good | {"state_dict": {"online VDN": state}}):
        torch.save(content, path)
        with pytest.raises(collect_data.UserError, match=r"expert.training.pt: 'online VDN' is damaged; leave out --resume"):
            collect_data.main(args)
