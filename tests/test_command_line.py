"""What a user types and finds: one command for all stages, presets, finished outputs, scripts copied alone,
mistakes in one line, wandb."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, made_up_arrays

import collect_data
import evaluate
import train_bc
import train_reward
import vdn_rlhf

TRAINERS = [train_reward, train_bc, vdn_rlhf]
FEWER = {  # for stages that vdn_rlhf.py starts
    collect_data: {"num_trajectories": 512},
    train_reward: {"max_epochs": 1, "hidden_dim": 8},
    train_bc: {"num_updates": 20, "hidden_dim": 8},
}


def run(module, *words, main=None) -> None:
    """A script's command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
        module.run_command_line(main or module.main, module.Args, getattr(module, "PRESETS", {}))


def parse(module, *words):
    """The Args of a script's command line."""
    parsed = []
    run(module, *words, main=parsed.append)
    return parsed[0]


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A new working directory. What vdn_rlhf.py starts there is noted, as (module, Args), and runs in this
    process, smaller; everybody plays fewer episodes."""
    started = []

    class Process:
        def __init__(self, words, **_):
            assert words[0] == sys.executable and Path(words[1]).resolve().parent == ROOT
            module = sys.modules[Path(words[1]).stem]
            started.append((module, parse(module, *words[2:])))
            module.main(replace(started[-1][1], **FEWER[module]))

        def wait(self):
            return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", Process)
    play = evaluate.play
    monkeypatch.setattr(evaluate, "play", lambda *words: play(*words[:4], min(words[4], 128), *words[5:]))
    return started


VDN = {"device": "cpu", "hidden_dim": 8, "num_updates": 20}


def test_one_command_makes_what_is_missing_and_keeps_what_is_there(started, capsys, tmp_path):
    vdn_rlhf.main(vdn_rlhf.Args(seed=0, **VDN))
    common = {"seed": 0, "device": "cpu"}
    assert started == [
        (collect_data, collect_data.Args(device="cpu")),
        (train_reward, train_reward.Args(**common)),
        (train_bc, train_bc.Args(**common)),
    ]
    folder, printed = tmp_path / "runs/spread/diversified", capsys.readouterr().out
    commands = [line for line in printed.splitlines() if line.startswith("$ python ")]
    for line, (module, args) in zip(commands, started, strict=True):
        _, _, script, *words = shlex.split(line)
        assert Path(script).resolve() == ROOT / f"{module.__name__}.py" and parse(module, *words) == args
    names = {"dataset", "reward-alpha1-seed0", "bc-seed0", "vdn-beta3-alpha1-seed0"}
    assert {path.stem for path in folder.iterdir()} == names and len(list(folder.iterdir())) == 8
    rows = [Path(name).stem for name in re.findall(r"^\| (\S+) +\| +-[\d.]+ ±", printed, re.MULTILINE)]
    assert rows == ["random", "novice", "rookie", "expert", "pi_ref", "VDN-RLHF"]

    # The closing table's numbers are in the JSON, and evaluate.py finds them again: the same start states.
    path = folder / "vdn-beta3-alpha1-seed0.pt"
    report = json.loads(path.with_suffix(".json").read_text())
    metrics = report["metrics"]
    policies = (str(folder / "bc-seed0.pt"), str(path))
    again = evaluate.main(evaluate.Args(policies=policies, seed=10**6, num_episodes=128, device="cpu"))
    for policy, name in zip(again.values(), ("reference_return", "test_return"), strict=True):
        assert metrics[f"charts/{name}"] == policy["charts/test_return"]
    assert metrics["charts/score"] == pytest.approx(100 * (metrics["charts/test_return"] + 26.46) / 16.43)
    assert -math.log(5) - 2 < metrics["charts/log_pi_ref"] < 0 and len(metrics["history"]["update"]) == 20
    assert report.keys() == {"command", "args", "metrics", "version", "packages", "machine", "seconds"}
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.keys() == {"format", "kind", "args", "meta", "state_dict", "stats", "metrics"}
    assert checkpoint["args"] == report["args"] == vars(vdn_rlhf.Args(seed=0, **VDN))

    before = {path: path.read_bytes() for path in folder.iterdir()}
    vdn_rlhf.main(vdn_rlhf.Args(seed=0, beta=2.0, **VDN))
    vdn_rlhf.main(vdn_rlhf.Args(seed=0, **VDN))
    assert f"{path.relative_to(tmp_path)}: already there, with these settings" in capsys.readouterr().out
    assert len(started) == 3 and (folder / "vdn-beta2-alpha1-seed0.pt").exists()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_every_flag_that_a_sibling_needs_reaches_it(preset, started):
    """Also paths that begin with a dash. --keep asks the reward model of this alpha."""
    data_path = "-x y/dataset.npz"
    collect_data.main(collect_data.Args(data_path=data_path, num_trajectories=512, device="cpu"))
    flags = {"preset": preset, "seed": 3, "resume": True, "device": "cpu", "data_path": data_path}
    by_preset = [module.PRESETS[preset].get("all", {}) for module in TRAINERS]
    few = {"hidden_dim": 8, "num_updates": 5, "alpha": 10.0, "keep": 0.5}
    vdn_rlhf.main(vdn_rlhf.Args(**by_preset[2] | flags | few))
    mark = "paper-" if preset == "paper" else ""
    reward_path = f"-x y/reward-{mark}alpha10-seed3.pt"
    assert started == [
        (train_reward, train_reward.Args(alpha=10.0, **flags | by_preset[0])),
        (train_bc, train_bc.Args(keep=0.5, reward_path=reward_path, **flags | by_preset[1])),
    ]
    beta = by_preset[2].get("beta", 3)
    names = {f"{mark}alpha10", f"{mark}keep0.5", f"{mark}keep0.5-beta{beta:g}-alpha10"}
    made = {re.sub("^[a-z]+-(.*)-seed3$", r"\1", path.stem) for path in Path("-x y").glob("*.pt")}
    assert made == names and Path(reward_path).exists()


def test_a_sibling_that_fails_stops_the_command_with_its_status(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=lambda: 7))
    with pytest.raises(SystemExit) as exit:
        vdn_rlhf.main(vdn_rlhf.Args(device="cpu"))
    assert exit.value.code == 7


@pytest.mark.parametrize("module", TRAINERS)
def test_presets_and_flags_by_hand(module):
    default, paper = parse(module), parse(module, "--preset", "paper")
    assert default == module.Args()
    assert paper == replace(default, preset="paper", **module.PRESETS["paper"]["all"]) != default
    by_hand = parse(module, "--learning-rate", "0.5", "--preset=paper", "--run-name", "mine")
    assert by_hand == replace(paper, learning_rate=0.5, run_name="mine")


@pytest.mark.parametrize(
    ("module", "words", "values"),
    [
        (vdn_rlhf, "--env spread", {"beta": 3.0}),
        (vdn_rlhf, "--env reference", {"beta": 1.0}),
        (vdn_rlhf, "--preset paper --env spread", {"beta": 1.0}),
        (vdn_rlhf, "--env=tag --beta 7", {"beta": 7.0}),
        (vdn_rlhf, "--preset paper --env tag", {"beta": 3.0, "network": "gru", "num_updates": 50_000}),
        (train_reward, "--preset paper --env tag", {"network": "gru", "hidden_dim": 64, "input": "own"}),
        (train_reward, "--preset paper --env reference", {"network": "mlp", "hidden_dim": 64}),
    ],
)
def test_games_have_their_own_defaults(module, words, values):
    args = parse(module, *words.split())
    assert {name: getattr(args, name) for name in values} == values


@pytest.mark.parametrize("module", TRAINERS)
def test_finished_output_is_kept_and_other_settings_are_refused(module, made_up_data, capsys):
    common = {"env": "made-up", "data_path": str(made_up_data), "device": "cpu", "hidden_dim": 8}
    few = [{"max_epochs": 1}, {"num_updates": 5}, {"num_updates": 5}]
    for trainer, flags in zip(TRAINERS, few, strict=True):
        trainer.main(trainer.Args(**common | flags))
    files = {path: path.stat().st_mtime_ns for path in made_up_data.parent.iterdir()}
    capsys.readouterr()
    flags = common | few[TRAINERS.index(module)]
    neutral = {"num_threads": 2, "checkpoint_every": 3, "resume": True, "deterministic": True}
    module.main(module.Args(**flags | neutral))
    torch.use_deterministic_algorithms(False)
    assert re.fullmatch(r"\S+\.pt: already there, with these settings\n", capsys.readouterr().out)
    with pytest.raises(module.UserError) as error:
        module.main(module.Args(**flags | {"hidden_dim": 9, "learning_rate": 0.5}))
    problem = "--hidden-dim 8 there, 9 here" in str(error.value) and "--learning-rate" in str(error.value)
    assert problem and "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in made_up_data.parent.iterdir()} == files
    module.main(module.Args(**flags | {"hidden_dim": 9, "run_name": "wider"}))
    assert len(list(made_up_data.parent.glob("*-wider-*.pt"))) == 1


def test_every_trainer_works_alone_in_an_empty_folder(tmp_path):
    """On files given by path, also of a game that nobody knows, and beside another package that is called
    evaluate; wandb is not touched."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "evaluate.py").write_text("def load(*_): return 'some metric'")
    environment = {**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{foreign}"}
    np.savez(tmp_path / "d.npz", **made_up_arrays())
    flags = "--env made-up --device cpu --hidden-dim 8 --data-path ../d.npz"
    stages = {
        "train_reward": "--max-epochs 1 --reward-path ../r.pt",
        "train_bc": "--num-updates 5 --bc-path ../b.pt",
        "vdn_rlhf": "--num-updates 5 --reward-path ../r.pt --bc-path ../b.pt --vdn-path v.pt",
    }
    for script, more in stages.items():
        folder = tmp_path / script
        folder.mkdir()
        shutil.copy(ROOT / f"{script}.py", folder)
        (folder / "wandb.py").write_text("raise RuntimeError('imported')")
        command = [sys.executable, f"{script}.py", *flags.split(), *more.split()]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        skipped = [line for line in done.stdout.splitlines() if re.match("test returns? skipped: ", line)]
        assert len(skipped) == (script != "train_reward")
    assert {path.name for path in folder.iterdir()} == {"vdn_rlhf.py", "wandb.py", "v.pt", "v.json"}
    done = subprocess.run(command[:2], cwd=folder, env=environment, capture_output=True, text=True)
    problem = "runs/spread/diversified/dataset.npz: no such file; collect_data.py makes it"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {problem}\n")


MISTAKES = [
    *[(vdn_rlhf, words) for words in ("--num-updates 0", "--gamma nan", "--gamma 1.5", "--td-lambda -0.1")],
    *[(vdn_rlhf, words) for words in ("--beta -1", "--alpha inf", "--learning-rate nan", "--batch-size -3")],
    *[(train_bc, words) for words in ("--seed -1", "--seed 9999999999", "--keep 2", "--num-threads 0")],
    *[(train_bc, words) for words in ("--device tpu", "--device cuda:99", "--hidden-dim 0")],
    *[(train_reward, words) for words in ("--max-epochs 0", "--env simple_spread_v3", "--data-path nowhere")],
    *[(vdn_rlhf, f"{words} nowhere") for words in ("--data-path", "--data-path d.npz --reward-path")],
    *[(vdn_rlhf, words) for words in ("--data-path d.npz --bc-path nowhere", "--env simple_spread_v3")],
]


@pytest.mark.parametrize(("module", "words"), MISTAKES)
def test_mistakes_are_one_line_and_status_2(module, words, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("d.npz", "reward-alpha1-seed1.pt"):
        Path(name).touch()
    with pytest.raises(SystemExit) as exit:
        run(module, *words.split())
    printed, (*_, flag, value) = capfd.readouterr().err, words.split()
    assert exit.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert flag in printed or value in printed
    assert sorted(os.listdir()) == ["d.npz", "reward-alpha1-seed1.pt"]
    if flag == "--env":
        assert all(game in printed for game in ("spread-5x4", "tag", "reference"))


@pytest.fixture
def tracked(made_up_data, tmp_path) -> list[str]:
    """The words of a short run of train_bc.py with --track."""
    words = f"--env=made-up --data-path={made_up_data} --bc-path={tmp_path}/bc.pt --device=cpu --hidden-dim=8"
    return [*words.split(), "--num-updates=20", "--checkpoint-every=5", "--track"]


@pytest.mark.parametrize("broken", ["is missing", "does not start"])
def test_tracking_without_a_usable_wandb_is_one_line(broken, tracked, tmp_path, monkeypatch, capsys):
    def init(**_):
        raise RuntimeError("no\nkey\x1b[2J" * 50)

    monkeypatch.setitem(sys.modules, "wandb", None if broken == "is missing" else SimpleNamespace(init=init))
    with pytest.raises(SystemExit) as exit:
        run(train_bc, *tracked)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("bc: "))
    assert exit.value.code == 2 and line.startswith("error: --track: wandb ") and len(line) < 150
    assert line.isprintable() and os.listdir(tmp_path) == ["made-up"]


def test_a_resumed_run_continues_its_wandb_run(tracked, tmp_path, monkeypatch):
    runs, real_save = [], train_bc.save_checkpoint

    def init(id, **_):
        runs.append((id, []))
        return SimpleNamespace(log=lambda metrics, step: runs[-1][1].append((step, *metrics)))

    def stop(path, kind, args, meta, *rest):
        real_save(path, kind, args, meta, *rest)
        if meta.get("update") == 10 and len(runs) == 1:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(train_bc, "save_checkpoint", stop)
    with pytest.raises(SystemExit) as exit:
        run(train_bc, *tracked)
    assert exit.value.code == 130
    run(train_bc, *tracked, "--resume")
    run(train_bc, *tracked, f"--bc-path={tmp_path}/other.pt")
    (first, before), (second, after), (other, _) = runs
    assert first == second != other
    assert before + after == [(step, "bc/nll", "bc/accuracy") for step in range(1, 21)]


def test_wandb_offline(tracked, tmp_path):
    command = [sys.executable, f"{ROOT}/train_bc.py", *tracked]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"bc/nll" in log.read_bytes()
