"""Imitation: the likelihood, what it learns of a known player, and which trajectories --keep imitates."""

import inspect
import json
import math
from functools import partialmethod

import numpy as np
import pytest
import torch
from conftest import made_up_arrays, read, rebuild, same_weights, without
from tqdm import tqdm

import train_bc
import train_reward
from train_bc import AgentNetwork, Args, bc_loss

SMALL = {"env": "made-up", "device": "cpu", "hidden_dim": 16}


def learn(data_path, path="", **flags) -> dict:
    train_bc.main(Args(data_path=str(data_path), bc_path=str(path), **SMALL | {"num_updates": 20} | flags))
    return read(path) if path else {}


def test_loss_against_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 2, 4, generator=generator, dtype=torch.float64)
    actions = torch.randint(4, (3, 5, 2), generator=generator, dtype=torch.uint8)
    total = 0.0
    for b, t, i in np.ndindex(3, 5, 2):
        weights = [math.exp(x) for x in logits[b, t, i].tolist()]
        total -= math.log(weights[actions[b, t, i]] / sum(weights))
    assert bc_loss(logits, actions).item() == pytest.approx(total / 30)


def test_learns_a_known_player(tmp_path):
    """Which plays action i + 1 in the first half of an episode where its first observation is positive, else
    action 0; and any action in one of five steps."""
    rng, arrays = np.random.default_rng(1), made_up_arrays(400)
    N, T, A = arrays["actions"].shape
    positive, early = arrays["observations"][:, :-1, :, 0] > 0, np.arange(T)[:, None] < 4
    intended = np.where(positive & early, np.arange(A) + 1, 0)  # (N, T, A)
    random = rng.random((N, T, A)) < 0.2
    arrays["actions"] = np.where(random, arrays["actions"], intended).astype(np.uint8)
    np.savez(tmp_path / "dataset.npz", **arrays)
    checkpoint = learn(tmp_path / "dataset.npz", tmp_path / "bc.pt", hidden_dim=32, num_updates=300)
    p = 0.8 + 0.2 / 7  # of the intended action
    entropy = -p * math.log(p) - 6 * (0.2 / 7) * math.log(0.2 / 7)
    assert entropy - 0.1 < checkpoint["metrics"]["bc/nll"] < entropy + 0.2
    assert checkpoint["metrics"]["bc/accuracy"] == pytest.approx(p, abs=0.06)
    policy = rebuild(AgentNetwork, checkpoint)
    observations = torch.randn(200, T, A, 5, generator=torch.Generator().manual_seed(2))
    early = torch.arange(T)[:, None] < 4
    intended = torch.where((observations[..., 0] > 0) & early, torch.arange(A) + 1, 0)
    probabilities = policy(observations)[0].softmax(dim=-1).gather(-1, intended[..., None])
    assert probabilities[observations[..., 0].abs() > 0.2].mean().item() == pytest.approx(p, abs=0.08)


@pytest.fixture
def reward_path(made_up_data):
    """A reward model of the made-up game, at its default path."""
    train_reward.main(train_reward.Args(data_path=str(made_up_data), max_epochs=2, **SMALL))
    return made_up_data.with_name("reward-alpha1-seed1.pt")


def test_keep_imitates_the_highest_learned_returns_only(reward_path, made_up_data, monkeypatch):
    """Its quarter is all that the minibatches and the held-out part hold, and no trajectory is in both."""
    seen, real = {}, train_bc.train

    def train(*words):
        bound = inspect.signature(real).bind(*words).arguments
        seen["training"] = set(bound["batches"].flatten().tolist())
        evaluate = inspect.unwrap(bound["evaluate"])
        seen["held_out"] = set(inspect.getclosurevars(evaluate).nonlocals["held_out"].tolist())
        return real(*words)

    monkeypatch.setattr(train_bc, "train", train)
    for keep, name in ((1.0, "bc-seed1.pt"), (0.25, "bc-keep0.25-seed1.pt")):
        learn(made_up_data, keep=keep)
        returns = read(reward_path)["stats"]["team_returns"].tolist()
        best = sorted(range(60), key=lambda n: -returns[n])[: int(60 * keep)]
        assert seen["training"] | seen["held_out"] == set(best)
        assert not seen["training"] & seen["held_out"] and len(seen["held_out"]) == len(best) // 10
        assert made_up_data.with_name(name).exists()
    assert not same_weights(made_up_data.with_name("bc-seed1.pt"), made_up_data.with_name(name))


@pytest.mark.parametrize("changed", ["observations", "labels"])
def test_keep_refuses_the_reward_model_of_another_dataset(changed, reward_path, made_up_data):
    """Labels too: who relabels a dataset wants the trajectories that the new labels like."""
    arrays = made_up_arrays()
    arrays[changed] = -arrays[changed]
    np.savez(made_up_data, **arrays)
    with pytest.raises(train_bc.UserError, match=f"{reward_path.name}: made with other settings .*{changed}"):
        learn(made_up_data, keep=0.25)


@pytest.mark.parametrize(("count", "enough"), [(1, False), (2, True)])
def test_few_trajectories(count, enough, tmp_path):
    """One is held out; a minibatch may be larger than what is left. The log starts after an update."""
    arrays = made_up_arrays()
    few = {name: arrays[name][:count] for name in ("observations", "actions")} | {"meta": arrays["meta"]}
    np.savez(tmp_path / "dataset.npz", **few)
    if not enough:
        with pytest.raises(train_bc.UserError, match=r"dataset.npz: 1 trajectories to imitate; it takes 2"):
            learn(tmp_path / "dataset.npz", tmp_path / "bc.pt")
        return
    learn(tmp_path / "dataset.npz", tmp_path / "bc.pt", num_updates=50)
    history = json.loads((tmp_path / "bc.json").read_text())["metrics"]["history"]
    assert history["update"] == list(range(2, 51, 2)) and len(history["bc/nll"]) == 25


def test_equal_results_with_and_without_labels_and_progress_bar(made_up_data, tmp_path, monkeypatch):
    stripped = without(made_up_data, ("pairs", "labels", "true_rewards"), tmp_path / "stripped.npz")
    metrics = []
    for name, data_path in (("a", made_up_data), ("b", made_up_data), ("c", stripped)):
        metrics.append(learn(data_path, tmp_path / f"{name}.pt")["metrics"])
        metrics[-1].pop("speed/updates_per_second")
        monkeypatch.setattr(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))
    assert metrics[0] == metrics[1] == metrics[2]
    assert all(same_weights(tmp_path / "a.pt", tmp_path / f"{name}.pt") for name in "bc")
