"""The table: its numbers, its start states, both backends, and where it is written."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluate
from evaluate import Args

EXPERT = str(ROOT / "policies/spread/expert.pt")


@pytest.fixture
def learned(tmp_path) -> str:
    """What vdn_rlhf.py writes: untrained values beside an untrained pi_ref, both GRUs."""
    shape = {"sizes": (18, 3, 5, 25), "network": "gru", "hidden_dim": 8}
    network = {"values": shape, "reference": shape, "beta": 1.0}
    weights = evaluate.VDNPolicy(**network).state_dict()
    meta = {"env": "spread", "network": network}
    evaluate.save_checkpoint(tmp_path / "vdn.pt", "vdn", Args(()), meta, weights, {}, {})
    return str(tmp_path / "vdn.pt")


BACKENDS = [("spread/expert", False), ("spread-7x5/rookie", False), ("tag/expert", True)]
BACKENDS += [("tag/novice", False), ("reference/expert", False), ("reference/rookie", True)]


@pytest.mark.parametrize(("policy", "sample"), BACKENDS)
def test_both_backends_give_the_same_returns_episode_by_episode(policy, sample, learned, monkeypatch):
    monkeypatch.setattr(evaluate, "EPISODES_AT_ONCE", 16)
    path = str(ROOT / f"policies/{policy}.pt")
    names = (path, "random", learned) if policy == "spread/expert" else (path, "random")
    args = Args(names, num_episodes=20, sample=sample, device="cpu")
    report = evaluate.main(args)
    args.backend = "mpe2"
    for name, row in evaluate.main(args).items():
        difference = np.subtract(row["episode_returns"], report[name]["episode_returns"])
        assert np.abs(difference).max() < 1e-6
    assert np.std(report[path]["episode_returns"]) > 1


@pytest.mark.parametrize("sample", [False, True])
def test_policies_play_the_same_start_states(sample, learned, monkeypatch):
    """However many random numbers a policy draws, also in later chunks of episodes."""
    starts, rollout = [], evaluate.rollout

    def record(env, act, observations):
        starts.append(observations)
        return rollout(env, act, observations)

    monkeypatch.setattr(evaluate, "rollout", record)
    monkeypatch.setattr(evaluate, "EPISODES_AT_ONCE", 8)
    names = ("random", EXPERT, learned)
    evaluate.main(Args(names, num_episodes=20, sample=sample, device="cpu"))
    assert [len(x) for x in starts] == [8, 8, 4] * 3
    random, expert, vdn = (torch.cat(starts[i : i + 3]) for i in (0, 3, 6))
    assert torch.equal(random, expert) and torch.equal(random, vdn)
    assert len({x.numpy().tobytes() for x in random}) == 20
    starts.clear()
    evaluate.main(Args(names[:1], env="spread", num_episodes=20, seed=2, device="cpu"))
    assert not torch.isin(torch.cat(starts)[:, 0, 2], random[:, 0, 2]).any()


# Mean returns of the random policy, of 20,000 episodes measured elsewhere, standard error up to 0.06.
RANDOM = {"spread": -26.46, "reference": -28.34, "spread-4x5": -38.65, "spread-5x5": -35.34}
RANDOM |= {"spread-6x5": -33.08, "spread-7x5": -31.32}


@pytest.mark.parametrize("env", RANDOM)
def test_random_policy_returns_what_was_measured_and_scores_zero(env):
    row = evaluate.main(Args(("random",), env=env, device="cpu"))["random"]
    error = 3 * (row["standard_error"] ** 2 + 0.06**2) ** 0.5
    assert row["charts/test_return"] == pytest.approx(RANDOM[env], abs=error)
    assert row["charts/score"] == pytest.approx(0, abs=4)


def test_table_and_report(learned, tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    names = ("random", EXPERT, learned)
    report = evaluate.main(Args(names, num_episodes=300, json_path=str(path), device="cpu"))
    assert json.loads(path.read_text()) == report and tuple(report) == names
    assert list(path.parent.iterdir()) == [path]
    table = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| ")]
    assert rows[0] == ["policy", "return", "score"] and len(rows) == 4
    for name, row in zip(names, rows[1:], strict=True):
        numbers = report[name]
        returns = np.array(numbers["episode_returns"])
        score = 100 * (returns.mean() + 26.46) / (26.46 - 10.03)
        assert len(returns) == 300 and numbers["charts/test_return"] == pytest.approx(returns.mean())
        assert numbers["standard_error"] == pytest.approx(returns.std() / 300**0.5)
        assert np.mean(numbers["agent_returns"]) == pytest.approx(returns.mean())
        assert numbers["charts/score"] == pytest.approx(score)
        assert row == [name, f"{returns.mean():.2f} ± {numbers['standard_error']:.2f}", f"{score:.1f}"]


def test_counts_without_a_scale_have_no_score(capsys):
    report = evaluate.main(Args(("random",), env="spread-2x2", num_episodes=64, device="cpu"))
    assert "charts/score" not in report["random"] and report["random"]["charts/test_return"] < 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("|        |")


def test_same_seed_same_returns_and_samples_are_worse_than_the_best_action():
    greedy, again, sampled = (
        evaluate.main(Args((EXPERT,), num_episodes=200, sample=sample, device="cpu"))[EXPERT]
        for sample in (False, False, True)
    )
    assert greedy == again and greedy["charts/test_return"] > sampled["charts/test_return"]


class Fixed(torch.nn.Module):
    def forward(self, observations, first_step=0, memory=None):
        assert (memory is None) == (first_step == 0)  # nothing is carried over an episode's end
        return torch.tensor([0.0, 1.0, 2.0]).expand(*observations.shape[:3], 3), first_step


SHARES = [({}, [0, 0, 1]), ({"epsilon": 0.3}, [0.1, 0.1, 0.8]), ({"sample": True}, [0.090, 0.245, 0.665])]
SHARES += [({"sample": True, "epsilon": 1.0}, [1 / 3, 1 / 3, 1 / 3])]


@pytest.mark.parametrize(("flags", "shares"), SHARES)
def test_actors_are_greedy_or_follow_the_softmax_or_explore(flags, shares):
    act = evaluate.make_actor(Fixed(), 3, torch.Generator().manual_seed(0), **flags)
    for step in (0, 1, 2, 0):
        actions = act(torch.zeros(20_000, 2, 4), step)
        measured = torch.bincount(actions.flatten(), minlength=3) / actions.numel()
        torch.testing.assert_close(measured, torch.tensor(shares), atol=0.01, rtol=0, check_dtype=False)


def test_report_to_a_device_is_written_through_it():
    """No file may replace /dev/null; here it is a terminal, to see what comes out."""
    reader, terminal = os.openpty()
    path = os.ttyname(terminal)
    report = evaluate.main(Args((EXPERT,), num_episodes=2, json_path=path, device="cpu"))
    assert json.loads(os.read(reader, 100_000)) == report and Path(path).is_char_device()


OTHER = "policies/reference/expert.pt"
MISTAKES = [
    ([EXPERT, str(ROOT / OTHER)], f"{OTHER}: plays 'reference', not 'spread'; one table is of one game"),
    (["random", EXPERT, "--env", "tag"], "policies/spread/expert.pt: plays 'spread', not 'tag'"),
    (["random"], "--env is missing: name the game, or a policy file that plays it"),
    (["random", "--env", "chess"], "--env 'chess': unknown, choose spread, "),
    (["no.pt"], "no.pt: no vdn or bc or expert checkpoint (FileNotFoundError"),
    ([str(ROOT / "policies/tag/prey.pt")], "prey.pt: no vdn or bc or expert checkpoint (ValueError"),
    ([str(ROOT / "README.md")], "README.md: no vdn or bc or expert checkpoint (BadZipFile"),
    ([EXPERT, "--num-episodes", "0"], "--num-episodes 0: must be from 1"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_one_line_and_status_2(words, message, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "play", None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--policies", *words])
    with pytest.raises(SystemExit) as exit:
        evaluate.run_command_line(evaluate.main, Args, {})
    printed = capsys.readouterr().err
    assert exit.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert message in printed


def test_mpe2_backend_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpe2", None)
    problem = r"--backend mpe2 needs the package mpe2 .*; pip install mpe2"
    with pytest.raises(evaluate.UserError, match=problem):
        evaluate.main(Args((EXPERT,), num_episodes=1, backend="mpe2", device="cpu"))
