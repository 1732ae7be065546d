"""The rivals and placebos of benchmark/rivals.py do what their names say."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))

import rivals
from conftest import read, rebuild
from test_vdn_rlhf import SMALL, make_models

import train_bc
import vdn_rlhf


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("rivals"), 1000, 5000)


def learn(data_path, path, method, monkeypatch, **flags) -> tuple[vdn_rlhf.VDNPolicy, dict]:
    for name in ("team_rewards", "vdn_loss"):  # main replaces them for good
        monkeypatch.setattr(vdn_rlhf, name, getattr(vdn_rlhf, name))
    flags = SMALL | {"num_updates": 300, "hidden_dim": 32, "alpha": 0.0} | flags
    rivals.main(rivals.Args(data_path=str(data_path), vdn_path=str(path), method=method, **flags))
    checkpoint = read(path)
    return rebuild(vdn_rlhf.VDNPolicy, checkpoint), checkpoint


@pytest.mark.parametrize("method", ["oracle", "cql", "ipl", "zero", "shuffled"])
def test_who_finds_the_best_policy(method, data_path, tmp_path, monkeypatch):
    """Agent i of the made-up game earns by playing action i, one of seven; placebos cannot know."""
    if method == "oracle":  # needs no r_phi
        monkeypatch.setattr(vdn_rlhf.RewardNetwork, "forward", lambda self, o, a: torch.zeros(a.shape))
    policy, checkpoint = learn(data_path, tmp_path / "vdn.pt", method, monkeypatch, beta=0.1)
    observations = torch.randn(200, 9, 4, 5, generator=torch.Generator().manual_seed(9))
    share = (policy(observations)[0].argmax(dim=-1) == torch.arange(4)).float().mean()
    assert share < 0.5 if method in ("zero", "shuffled") else share > 0.9
    assert checkpoint["args"]["run_name"] == method


def test_the_conservative_term_by_hand():
    q = torch.tensor([[[[0.0, 1.0], [2.0, 0.0]]]])  # one episode of one step, two agents, two actions
    inputs = (q, q, torch.tensor([[[0, 0]]]), torch.tensor([[5.0]]), 0.9, 0.8, 0.0)
    gap = math.log(1 + math.e) + math.log(math.exp(2) + 1) - 2
    assert rivals.cql_loss(*inputs).item() == pytest.approx((0 + 2 - 5) ** 2 + gap)


def test_inverse_preference_learning_against_a_slow_loop():
    B, T, A, gamma, beta = 4, 3, 2, 0.9, 0.5
    generator = torch.Generator().manual_seed(0)
    f, target_f, logits = torch.randn(3, B, T, A, 5, generator=generator, dtype=torch.float64)
    actions = torch.randint(5, (B, T, A), generator=generator)
    pairs, labels = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1.0, -1.0], [1.0, 0.0]])
    log_pi = logits.log_softmax(dim=-1)
    rewards = torch.zeros(B, T, dtype=torch.float64)
    for b, t, i in np.ndindex(B, T, A):
        rewards[b, t] += f[b, t, i, actions[b, t, i]]
        if t + 1 < T:  # the soft value of the next step
            terms = [log_pi[b, t + 1, i, a].exp() * (target_f[b, t + 1, i, a] / beta).exp() for a in range(5)]
            rewards[b, t] -= gamma * beta * sum(terms).log()
    returns = rewards.sum(dim=1)
    first, second = (1 / (1 + (returns[j] - returns[i]).exp()) for i, j in pairs.tolist())
    nll = -(0.5 * first.log() + 0.5 * (1 - first).log()) - (0.75 * second.log() + 0.25 * (1 - second).log())
    expected = nll / 2 + rivals.IPL_PENALTY * rewards.square().mean()
    loss = rivals.ipl_loss(f, target_f, log_pi, actions, pairs, labels.double(), gamma, beta)
    assert loss.item() == pytest.approx(expected.item())


def test_filtered_by_true_return_keeps_the_truly_best(data_path, monkeypatch, tmp_path):
    flags = {"env": "made-up", "device": "cpu", "alpha": 0.0, "method": "true-returns"}
    rivals.main(rivals.Args(data_path=str(data_path), **flags))
    path = data_path.with_name("reward-true-returns-alpha0-seed1.pt")
    seen = []
    monkeypatch.setattr(train_bc, "train", lambda *inputs: seen.append(inputs[5]) or (1.0, {}))
    flags = {"data_path": str(data_path), "env": "made-up", "device": "cpu", "keep": 0.1}
    train_bc.main(train_bc.Args(reward_path=str(path), bc_path=str(tmp_path / "bc.pt"), **flags))
    with np.load(data_path) as arrays:
        returns = arrays["true_rewards"].sum(axis=(1, 2))
    assert returns[seen[0].unique()].min() >= np.sort(returns)[-100]
