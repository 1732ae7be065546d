"""Scripts as a user runs them: alone in a folder, one after another, with presets and tracking."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, made_up_arrays

import collect_data
import train_bc
import train_reward
import vdn_rlhf

SCRIPTS = ("collect_data", "train_reward", "train_bc", "vdn_rlhf", "evaluate")
TINY = "--hidden-dim 16 --num-layers 2 --device cpu"


def run(folder: Path, script: str, flags: str, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, f"{script}.py", *flags.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def alone(folder: Path, script: str) -> Path:
    """An empty folder with a copy of one script."""
    (folder / script).mkdir()
    shutil.copy(ROOT / f"{script}.py", folder / script)
    return folder / script


def test_each_script_runs_alone_in_an_empty_folder(tmp_path):
    policies = ROOT / "policies"
    done = run(
        alone(tmp_path, "collect_data"), "collect_data", f"--policies-path {policies} --num-trajectories 1280 --device cpu"
    )
    assert done.returncode == 0, done.stderr
    data = tmp_path / "collect_data/runs/spread/diversified/dataset.npz"
    reward, bc, vdn, report = (tmp_path / name for name in ("reward.pt", "bc.pt", "vdn.pt", "report.json"))
    models, few = f"--reward-path {reward} --bc-path {bc} --vdn-path {vdn}", "--num-updates 40 --imitation-updates 20"
    flags = {
        "train_reward": f"--data-path {data} --reward-path {reward} --max-epochs 20 --learning-rate 1e-2 {TINY}",
        "train_bc": f"--data-path {data} --bc-path {bc} --max-epochs 2 {TINY}",
        "vdn_rlhf": f"--data-path {data} {models} {few} {TINY}",
        "evaluate": f"--policy-path {vdn} --num-episodes 64 --json-path {report} --device cpu",
    }
    for script, words in flags.items():
        done = run(alone(tmp_path, script), script, words)
        assert done.returncode == 0, done.stderr
    assert all(path.exists() for path in (reward, bc, vdn, report))
    # A game that no script knows, again alone.
    made_up = tmp_path / "made-up.npz"
    np.savez(made_up, **made_up_arrays(num_trajectories=400, num_pairs=8000))
    reward, bc, vdn = (tmp_path / f"made-up-{name}.pt" for name in ("reward", "bc", "vdn"))
    common = f"--env made-up --data-path {made_up} {TINY}"
    flags = {
        "train_reward": f"{common} --reward-path {reward} --max-epochs 10 --learning-rate 1e-2",
        "train_bc": f"{common} --bc-path {bc} --max-epochs 1",
        "vdn_rlhf": f"{common} --reward-path {reward} --bc-path {bc} --vdn-path {vdn} --num-updates 10 --imitation-updates 10",
    }
    for script, words in flags.items():
        done = run(tmp_path / script, script, words)
        assert done.returncode == 0, done.stderr
        assert script == "train_reward" or "evaluation skipped" in done.stdout
    # Alone, without --reward-path: one line, no attempt to run what is not there.
    done = run(tmp_path / "vdn_rlhf", "vdn_rlhf", f"--data-path {data} --seed 7")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "reward-alpha1-seed7.pt: no such file" in done.stderr and "not beside this script" in done.stderr


def test_what_is_missing_is_made_and_reused(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "runs/spread/diversified"
    monkeypatch.chdir(tmp_path)
    collect_data.main(collect_data.Args(num_trajectories=768, device="cpu"))
    vdn_rlhf.main(vdn_rlhf.Args(seed=0, num_updates=20, imitation_updates=10, hidden_dim=16, device="cpu"))
    printed = capfd.readouterr().out
    commands = [line for line in printed.splitlines() if line.startswith("$ python ")]
    assert len(commands) == 2  # the dataset is there
    assert "train_reward.py --env spread --dataset diversified --seed 0 --alpha 1.0" in commands[0]
    assert "train_bc.py --env spread --dataset diversified --seed 0" in commands[1]
    names = ["bc-seed0", "dataset", "reward-alpha1-seed0", "vdn-beta1-alpha1-seed0", "vdn-beta1-alpha1-seed0-best"]
    assert sorted(path.stem for path in folder.iterdir()) == names

    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    vdn_rlhf.main(vdn_rlhf.Args(seed=0, beta=2.0, num_updates=20, imitation_updates=10, hidden_dim=16, device="cpu"))
    assert "$ python" not in capfd.readouterr().out
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert (folder / "vdn-beta2-alpha1-seed0.pt").exists()

    with pytest.raises(vdn_rlhf.UserError, match=r"--num-updates is 20 there and 21 here.*--run-name"):
        vdn_rlhf.main(vdn_rlhf.Args(seed=0, num_updates=21, imitation_updates=10, hidden_dim=16, device="cpu"))
    vdn_rlhf.main(vdn_rlhf.Args(seed=0, num_updates=21, imitation_updates=10, hidden_dim=16, run_name="longer", device="cpu"))
    assert (folder / "vdn-longer-beta1-alpha1-seed0.pt").exists()
    (folder / "reward-alpha1-seed0.pt").rename(folder / "reward-alpha2-seed0.pt")
    with pytest.raises(vdn_rlhf.UserError, match=r"reward-alpha2-seed0.pt: .*--alpha is 1.0 there and 2.0 here"):
        vdn_rlhf.main(vdn_rlhf.Args(seed=0, alpha=2.0, num_updates=20, imitation_updates=10, hidden_dim=16, device="cpu"))

    # A reward model named by the user: its alpha must be the command's, and another one may not take over the first one's file.
    named = dict(seed=0, alpha=2.0, num_updates=20, imitation_updates=10, hidden_dim=16, device="cpu")
    with pytest.raises(vdn_rlhf.UserError, match=r"--alpha is 1.0 there and 2.0 here"):
        vdn_rlhf.main(vdn_rlhf.Args(reward_path=str(folder / "reward-alpha2-seed0.pt"), **named))
    other = folder / "other.pt"
    train_reward.main(train_reward.Args(reward_path=str(other), max_epochs=1, hidden_dim=8, device="cpu"))
    with pytest.raises(vdn_rlhf.UserError, match=r"vdn-beta1-alpha1-seed0.pt: made from another reward"):
        vdn_rlhf.main(vdn_rlhf.Args(reward_path=str(other), **named | dict(alpha=1.0)))


def stubs(folder: Path, spread_data: Path, **lines: str) -> None:
    """vdn_rlhf.py beside a dataset and siblings that train nothing."""
    shutil.copy(ROOT / "vdn_rlhf.py", folder)
    (folder / "runs/spread/diversified").mkdir(parents=True, exist_ok=True)
    shutil.copy(spread_data, folder / "runs/spread/diversified")
    for name, code in lines.items():
        pid = f"open('{name}.tmp', 'w').write(str(os.getpid()))\nos.rename('{name}.tmp', '{name}.pid')\n"
        setup, _, code = code.rpartition("# then\n")
        (folder / f"{name}.py").write_text(f"import os, signal, sys, time\n{setup}{pid}{code}\n")


def alive(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("death", "status", "message"),
    [("sys.exit(7)", 7, ""), ("os.kill(os.getpid(), signal.SIGKILL)", 2, "error: train_bc.py: killed by signal 9\n")],
)
def test_a_model_that_fails_stops_the_other(death, status, message, spread_data, tmp_path):
    failing = f"while not os.path.exists('train_reward.pid'): time.sleep(0.05)\n{death}"
    stubs(tmp_path, spread_data, train_reward="time.sleep(600)", train_bc=failing)
    done = run(tmp_path, "vdn_rlhf", "--device cpu")
    assert done.returncode == status and done.stderr == message
    assert not alive(tmp_path / "train_reward.pid")


def test_a_terminated_pipeline_takes_its_children_along(spread_data, tmp_path):
    """They have the time to save what they have; that they may be resumed, too, is passed on to them."""
    code = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), save('{0}.saved')))\n# then\ntime.sleep(600)"
    code = "def save(name):\n    open(name, 'w').write(' '.join(sys.argv))\n    sys.exit(143)\n" + code
    stubs(tmp_path, spread_data, **{name: code.format(name) for name in ("train_reward", "train_bc")})
    words = [sys.executable, "vdn_rlhf.py", "--device", "cpu", "--resume", "--checkpoint-every", "7"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL)
    paths, deadline = [tmp_path / f"{name}.pid" for name in ("train_reward", "train_bc")], time.time() + 60
    while not all(path.exists() for path in paths) and time.time() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert not any(alive(path) for path in paths)
    for path in paths:
        assert "--resume --checkpoint-every 7" in path.with_suffix(".saved").read_text()


def test_models_of_another_dataset_are_not_reused(spread_data, tmp_path):
    path = tmp_path / "bc-seed1.pt"
    shutil.copy(spread_data, tmp_path / "dataset.npz")
    args = dict(data_path=str(tmp_path / "dataset.npz"), max_epochs=1, hidden_dim=8, device="cpu")
    train_bc.main(train_bc.Args(**args))
    train_bc.main(train_bc.Args(**args))  # the same command may run again
    content = path.read_bytes()
    other = tmp_path / "dataset.npz"
    other.unlink()
    collect_data.main(collect_data.Args(num_trajectories=512, seed=5, data_path=str(other), device="cpu"))
    with pytest.raises(train_bc.UserError, match=r"bc-seed1.pt: made from another dataset"):
        train_bc.main(train_bc.Args(**args))
    assert path.read_bytes() == content
    with pytest.raises(collect_data.UserError, match=r"--num-trajectories is 512 there and 256 here"):
        collect_data.main(collect_data.Args(num_trajectories=256, seed=5, data_path=str(other), device="cpu"))


@pytest.mark.parametrize("module", [train_reward, train_bc, vdn_rlhf])
def test_preset_paper_and_flags_by_hand(module, monkeypatch):
    parsed = []
    for words in ([], ["--preset", "paper"], ["--learning-rate", "0.5", "--preset=paper", "--run-name", "mine"]):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        module.run_command_line(parsed.append, module.Args, module.PRESETS)
    default, paper, by_hand = map(vars, parsed)
    assert default == vars(module.Args())
    assert paper == default | module.PRESETS["paper"]["all"] | {"preset": "paper"} != default
    assert by_hand == paper | {"learning_rate": 0.5, "run_name": "mine"}


def test_every_game_has_its_defaults(monkeypatch, capsys):
    """They show in --help, and a flag given by hand wins over them."""
    parsed = []
    for words in (["--env", "tag"], ["--env=tag", "--beta", "7"], ["--env", "tag", "--preset", "paper"], ["--env", "spread"]):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        vdn_rlhf.run_command_line(parsed.append, vdn_rlhf.Args, vdn_rlhf.PRESETS)
    assert [args.beta for args in parsed] == [3.0, 7.0, 3.0, 1.0]
    assert parsed[2].num_updates == 50_000
    monkeypatch.setattr(sys, "argv", ["script.py", "--env", "tag", "--help"])
    with pytest.raises(SystemExit):
        vdn_rlhf.run_command_line(parsed.append, vdn_rlhf.Args, vdn_rlhf.PRESETS)
    assert re.search(r"--beta FLOAT[^-]*default: 3\.0", capsys.readouterr().out)


def test_mistakes_on_the_command_line_exit_2_with_one_line(monkeypatch, capsys):
    cases = [(collect_data, words.split()) for words in ("--env sprad", "--dataset diverse", "--num-trajectories 100")]
    cases += [(collect_data, words.split()) for words in ("--num-agents 0", "--num-landmarks -1")]
    cases += [(train_bc, ["--preset", "papre"]), (vdn_rlhf, ["--network", "transformer"])]
    for module, words in cases:
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        with pytest.raises(SystemExit) as exit:
            module.run_command_line(module.main, module.Args, module.PRESETS)
        printed = capsys.readouterr()
        assert exit.value.code == 2
        assert printed.err.count("\n") == 1 and " ".join(words) in printed.err


OUT_OF_RANGE = [("beta", -1.0), ("gamma", float("nan")), ("gamma", 1.5), ("num_updates", 0), ("batch_size", -3), ("seed", -1)]
OUT_OF_RANGE += [("seed", 2**64), ("learning_rate", 0.0), ("max_grad_norm", float("inf"))]


@pytest.mark.parametrize("name, value", OUT_OF_RANGE)
def test_numbers_out_of_range(name, value):
    with pytest.raises(vdn_rlhf.UserError, match=f"--{name.replace('_', '-')} {value}"):
        vdn_rlhf.main(vdn_rlhf.Args(**{name: value}))


@pytest.mark.parametrize("name, value", [("device", "tpu"), ("device", "cuda:99"), ("device", "meta"), ("network", "lstm")])
def test_unknown_device_or_network(name, value, spread_data, tmp_path):
    with pytest.raises(train_bc.UserError, match=f"--{name} {value}"):
        train_bc.main(train_bc.Args(data_path=str(spread_data), bc_path=str(tmp_path / "bc.pt"), **{name: value}))


def test_tracking_is_off_by_default_and_works_offline(made_up_data, tmp_path):
    flags = f"--env made-up --data-path {made_up_data} --max-epochs 1 {TINY}"
    shutil.copy(ROOT / "train_bc.py", tmp_path)
    (tmp_path / "wandb.py").write_text("raise RuntimeError('imported')")  # shadows the package
    done = run(tmp_path, "train_bc", flags + f" --bc-path {tmp_path}/a.pt")
    assert done.returncode == 0, done.stderr
    (tmp_path / "wandb.py").unlink()
    done = run(tmp_path, "train_bc", flags + f" --bc-path {tmp_path}/b.pt --track", WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"bc/nll" in log.read_bytes()
    (tmp_path / "wandb.py").write_text("raise RuntimeError('broken')")
    done = run(tmp_path, "train_bc", flags + f" --bc-path {tmp_path}/c.pt --track")
    assert done.returncode == 2 and done.stderr == "error: --track: wandb does not start (RuntimeError: broken)\n"


def test_same_flags_have_the_same_words_and_help_everywhere():
    """A flag that two scripts share is described alike, and every flag has a description."""
    described = {}
    for script in SCRIPTS:
        (args,) = (n for n in ast.parse((ROOT / f"{script}.py").read_text()).body if getattr(n, "name", "") == "Args")
        for flag, text in zip(args.body[::2], args.body[1::2], strict=True):
            assert isinstance(flag, ast.AnnAssign) and isinstance(text.value.value, str)
            described.setdefault(flag.target.id, {})[script] = text.value.value
    for flag in ("num_threads", "deterministic", "hidden_dim", "max_grad_norm", "preset", "num_seeds", "compile"):
        assert len(set(described[flag].values())) == 1, described[flag]


def test_checkpoints_hold_their_settings_and_metrics(spread_data, tmp_path):
    path = tmp_path / "bc.pt"
    args = train_bc.Args(data_path=str(spread_data), bc_path=str(path), max_epochs=1, hidden_dim=8, device="cpu")
    train_bc.main(args)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.keys() == {"format", "kind", "args", "meta", "state_dict", "stats", "metrics"}
    assert checkpoint["args"] == vars(args) and checkpoint["kind"] == "bc" and checkpoint["meta"]["env"] == "spread"
