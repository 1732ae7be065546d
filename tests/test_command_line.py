"""Scripts as a user runs them: alone in a folder, one after another, with presets and tracking."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import collect_data
import train_bc
import train_reward
import vdn_rlhf

SCRIPTS = ("collect_data", "train_reward", "train_bc", "vdn_rlhf", "evaluate")
TINY = "--hidden-dim 16 --num-layers 2 --device cpu"


def run(folder: Path, script: str, flags: str, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, f"{script}.py", *flags.split()]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean | environment)


def alone(folder: Path, script: str) -> Path:
    """An empty folder with a copy of one script."""
    (folder / script).mkdir()
    shutil.copy(ROOT / f"{script}.py", folder / script)
    return folder / script


def test_each_script_runs_alone_in_an_empty_folder(tmp_path):
    policies = ROOT / "policies"
    done = run(
        alone(tmp_path, "collect_data"), "collect_data", f"--policies-path {policies} --num-trajectories 2560 --device cpu"
    )
    assert done.returncode == 0, done.stderr
    data = tmp_path / "collect_data/runs/spread/diversified/dataset.npz"
    reward, bc, vdn, report = (tmp_path / name for name in ("reward.pt", "bc.pt", "vdn.pt", "report.json"))
    flags = {
        "train_reward": f"--data-path {data} --reward-path {reward} --max-epochs 2 {TINY}",
        "train_bc": f"--data-path {data} --bc-path {bc} --max-epochs 2 {TINY}",
        "vdn_rlhf": f"--data-path {data} --reward-path {reward} --bc-path {bc} --vdn-path {vdn} --num-updates 40 {TINY}",
        "evaluate": f"--policy-path {vdn} --num-episodes 64 --json-path {report} --device cpu",
    }
    for script, words in flags.items():
        done = run(alone(tmp_path, script), script, words)
        assert done.returncode == 0, done.stderr
    assert all(path.exists() for path in (reward, bc, vdn, report))
    # Alone, without --reward-path: one line, no attempt to run what is not there.
    done = run(tmp_path / "vdn_rlhf", "vdn_rlhf", f"--data-path {data} --seed 7")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "reward-alpha1-seed7.pt: no such file" in done.stderr and "not beside this script" in done.stderr


def test_what_is_missing_is_made_and_reused(spread_data, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "runs/spread/diversified"
    folder.mkdir(parents=True)
    shutil.copy(spread_data, folder)
    monkeypatch.chdir(tmp_path)
    args = vdn_rlhf.Args(num_updates=20, hidden_dim=16, device="cpu")
    vdn_rlhf.main(args)
    printed = capfd.readouterr().out
    assert "$ python train_reward.py --env spread --dataset diversified --seed 1 --alpha 1" in printed
    assert "$ python train_bc.py --env spread --dataset diversified --seed 1" in printed
    assert "$ python collect_data.py" not in printed
    names = ["bc-seed1", "dataset", "reward-alpha1-seed1", "vdn-beta1-alpha1-seed1", "vdn-beta1-alpha1-seed1-best"]
    assert sorted(path.stem for path in folder.iterdir()) == names

    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    vdn_rlhf.main(vdn_rlhf.Args(beta=2.0, num_updates=20, hidden_dim=16, device="cpu"))
    assert "$ python" not in capfd.readouterr().out
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert (folder / "vdn-beta2-alpha1-seed1.pt").exists()

    with pytest.raises(vdn_rlhf.UserError, match=r"--num-updates is 20 there and 21 here.*--run-name"):
        vdn_rlhf.main(vdn_rlhf.Args(num_updates=21, hidden_dim=16, device="cpu"))
    vdn_rlhf.main(vdn_rlhf.Args(num_updates=21, hidden_dim=16, run_name="longer", device="cpu"))
    assert (folder / "vdn-longer-beta1-alpha1-seed1.pt").exists()
    (folder / "reward-alpha1-seed1.pt").rename(folder / "reward-alpha2-seed1.pt")
    with pytest.raises(vdn_rlhf.UserError, match=r"reward-alpha2-seed1.pt: .*--alpha is 1.0 there and 2.0 here"):
        vdn_rlhf.main(vdn_rlhf.Args(alpha=2.0, num_updates=20, hidden_dim=16, device="cpu"))


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
    assert paper == default | module.PRESETS["paper"] | {"preset": "paper"} != default
    assert by_hand == paper | {"learning_rate": 0.5, "run_name": "mine"}


def test_mistakes_on_the_command_line_exit_2_with_one_line(monkeypatch, capsys):
    for words in (["--preset", "papre"], ["--env", "sprad"], ["--dataset", "diverse"], ["--num-trajectories", "100"]):
        monkeypatch.setattr(sys, "argv", ["collect_data.py", *words])
        with pytest.raises(SystemExit) as exit:
            collect_data.run_command_line(collect_data.main, collect_data.Args, {})
        printed = capsys.readouterr()
        assert exit.value.code == 2
        assert printed.err.count("\n") == 1 and " ".join(words) in printed.err


@pytest.mark.parametrize(
    "flags", [{"beta": -1.0}, {"gamma": float("nan")}, {"gamma": 1.5}, {"num_updates": 0}, {"batch_size": -3}]
)
def test_numbers_out_of_range(flags):
    (name,) = flags
    with pytest.raises(vdn_rlhf.UserError, match=f"--{name.replace('_', '-')}"):
        vdn_rlhf.main(vdn_rlhf.Args(**flags))


@pytest.mark.parametrize("flags", [{"device": "tpu"}, {"device": "cuda:99"}, {"network": "transformer"}])
def test_unknown_device_or_network(flags, spread_data, tmp_path):
    (value,) = flags.values()
    with pytest.raises(train_bc.UserError, match=value):
        train_bc.main(train_bc.Args(data_path=str(spread_data), bc_path=str(tmp_path / "bc.pt"), **flags))


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


def test_same_flags_have_the_same_words_and_help_everywhere():
    """A flag that two scripts share is described alike, and every flag has a description."""
    described = {}
    for script in SCRIPTS:
        (args,) = (n for n in ast.parse((ROOT / f"{script}.py").read_text()).body if getattr(n, "name", "") == "Args")
        for flag, text in zip(args.body[::2], args.body[1::2], strict=True):
            assert isinstance(flag, ast.AnnAssign) and isinstance(text.value.value, str)
            described.setdefault(flag.target.id, {})[script] = text.value.value
    for flag in ("num_threads", "deterministic", "hidden_dim", "max_grad_norm", "preset", "patience"):
        assert len(set(described[flag].values())) == 1, described[flag]


def test_checkpoints_hold_their_settings_and_metrics(spread_data, tmp_path):
    path = tmp_path / "bc.pt"
    args = train_bc.Args(data_path=str(spread_data), bc_path=str(path), max_epochs=1, hidden_dim=8, device="cpu")
    train_bc.main(args)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.keys() == {"format", "kind", "args", "meta", "state_dict", "stats", "metrics"}
    assert checkpoint["args"] == vars(args) and checkpoint["kind"] == "bc" and checkpoint["meta"]["env"] == "spread"
