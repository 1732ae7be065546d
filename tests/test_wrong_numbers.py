"""Losses that are not finite, models at chance, data without any variance: told with what to try, or harmless. And equal
numbers from equal commands."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import made_up_arrays, same_weights
from soak import differences, made_up_blocks

import collect_data
import evaluate
import train_bc
import train_reward
import vdn_rlhf

SMALL = dict(device="cpu", hidden_dim=16, num_layers=2)
MADE_UP = dict(env="made-up", **SMALL)


def spoil(monkeypatch, module, name: str, good_updates: int) -> None:
    """From then on a loss is NaN in training."""
    real, calls = getattr(module, name), []

    def spoiled(*args):
        result = real(*args)
        losses = result[0] if isinstance(result, tuple) else result
        calls.extend([1] * losses.requires_grad)
        bad = losses * (math.nan if len(calls) > good_updates else 1.0)
        return (bad, *result[1:]) if isinstance(result, tuple) else bad

    monkeypatch.setattr(module, name, spoiled)


def write(folder, **changes):
    path = folder / "dataset.npz"
    np.savez(path, **made_up_blocks(10) | changes)
    return str(path)


def read(path) -> dict:
    return torch.load(path, weights_only=True)


def test_a_loss_that_is_not_finite_stops_the_training_and_the_best_epoch_stays(tmp_path, monkeypatch):
    common = dict(data_path=write(tmp_path), max_epochs=20, **MADE_UP)
    for module, name, metric, file, per_epoch in (
        (train_reward, "reward_loss", "losses/loss", "reward-alpha1-seed1", 8),
        (train_bc, "bc_loss", "bc/mode_nll", "bc-seed1", 5),
    ):
        spoil(monkeypatch, module, name, 3 * per_epoch + 2)
        which = "seed 1, alpha 1" if module is train_reward else "seed 1"
        problem = rf"^{which}: {metric} is nan after {4 * per_epoch} updates; try a smaller --learning-rate than 0.003; "
        with pytest.raises(module.UserError, match=problem) as error:
            module.main(module.Args(learning_rate=3e-3, **common))
        assert str(error.value).endswith(f"the best so far is {tmp_path / file}-best.pt")
        best = read(tmp_path / f"{file}-best.pt")
        assert 1 <= best["metrics"]["best_epoch"] <= 3 and len(best["metrics"]["history"]) == 4
        assert all(torch.isfinite(tensor).all() for tensor in best["state_dict"].values())
        assert not (tmp_path / f"{file}.pt").exists()


@pytest.fixture
def models(tmp_path) -> dict:
    """Paths of a dataset of spread and small models for it."""
    data_path = str(tmp_path / "dataset.npz")
    collect_data.main(collect_data.Args(num_trajectories=1280, data_path=data_path, device="cpu"))
    paths = dict(reward_path=str(tmp_path / "reward.pt"), bc_path=str(tmp_path / "bc.pt"))
    train_reward.main(
        train_reward.Args(data_path=data_path, reward_path=paths["reward_path"], max_epochs=12, **SMALL | {"hidden_dim": 64})
    )
    train_bc.main(train_bc.Args(data_path=data_path, bc_path=paths["bc_path"], max_epochs=1, num_modes=2, **SMALL))
    return dict(data_path=data_path, **paths)


def test_vdn_whose_loss_is_not_finite_keeps_the_best_policy(models, tmp_path, monkeypatch):
    spoil(monkeypatch, vdn_rlhf, "vdn_loss", 9)
    args = vdn_rlhf.Args(num_updates=40, imitation_updates=10, beta=(1.0, 10.0), **models, **SMALL)
    problem = r"^seed 1, alpha 1, beta 1: losses/td_loss is nan after 10 updates; try a smaller --learning-rate than 0.01; "
    with pytest.raises(vdn_rlhf.UserError, match=problem + r"the best .*beta1-.*-best.pt \(2 of 2 runs went wrong\)$"):
        vdn_rlhf.main(args)
    for beta in (1, 10):
        best = read(tmp_path / f"vdn-beta{beta}-alpha1-seed1-best.pt")
        returns = [entry["charts/test_return"] for entry in best["metrics"]["history"]]
        assert len(returns) == 4 and best["metrics"]["charts/test_return"] == max(returns)
        assert not (tmp_path / f"vdn-beta{beta}-alpha1-seed1.pt").exists()
    monkeypatch.undo()
    args = vdn_rlhf.Args(num_updates=10, imitation_updates=10, imitation_learning_rate=1e30, **models, **SMALL)
    args.run_name = "other"
    with pytest.raises(vdn_rlhf.UserError, match=r"beta 1: the imitation loss of pi_ref is nan after 10 updates; try"):
        vdn_rlhf.main(args)


def test_one_run_of_a_stack_goes_wrong_and_the_other_is_as_if_alone(tmp_path):
    common = dict(data_path=write(tmp_path), max_epochs=8, learning_rate=1e-2, **MADE_UP)
    with pytest.raises(train_reward.UserError, match=r"^seed 1, alpha 1e\+39: losses/loss is (nan|inf) after \d+ updates"):
        train_reward.main(train_reward.Args(alpha=(0.0, 1e39), **common))
    train_reward.main(train_reward.Args(alpha=0.0, reward_path=str(tmp_path / "alone.pt"), **common))
    stacked, alone = (read(tmp_path / name)["state_dict"] for name in ("reward-alpha0-seed1.pt", "alone.pt"))
    for name, tensor in stacked.items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-4)
    assert not (tmp_path / "reward-alpha1e+39-seed1.pt").exists()


def test_online_training_whose_loss_is_not_finite(tmp_path):
    args = collect_data.Args(policies_path=str(tmp_path), data_path=str(tmp_path / "dataset.npz"), num_updates=40, num_envs=8)
    args.batch_size, args.learning_rate, args.device, args.hidden_dim = 8, 1e30, "cpu", 8
    with pytest.raises(collect_data.UserError, match=r"^seed 1: losses/td_loss is nan after \d+ updates; try a smaller"):
        collect_data.main(args)
    assert not list(tmp_path.rglob("*.npz")) and not (tmp_path / "spread" / "expert.pt").exists()


def test_labels_that_tell_nothing(tmp_path):
    """At chance: one line with the value and what to try, and no reward model where vdn_rlhf.py would find it."""
    rng = np.random.default_rng(3)
    labels = made_up_blocks(10)["labels"]
    for name, useless in (("random", rng.choice([-1, 1], labels.shape)), ("one sign", np.ones_like(labels))):
        path = write(tmp_path, labels=useless)
        with pytest.raises(train_reward.UserError, match=r"^seed 1, alpha 1: losses/nll is 0\.[67]\d+ on held-out") as error:
            train_reward.main(train_reward.Args(data_path=path, max_epochs=2, **MADE_UP))
        assert "no better than chance (0.6931); try more pairs" in str(error.value)
        assert ("where all labels are +1" in str(error.value)) == (name == "one sign")
        assert not (tmp_path / "reward-alpha1-seed1.pt").exists() and (tmp_path / "reward-alpha1-seed1-best.pt").exists()
        (tmp_path / "reward-alpha1-seed1.training.pt").unlink()


def test_pairs_that_are_sorted_by_preference(tmp_path):
    """All labels are +1, as where a tool writes the preferred trajectory first: the same model as from mixed labels."""
    arrays = made_up_blocks(10)
    single = {name: arrays[name][:, :, :1] for name in ("observations", "actions", "true_rewards")}  # of one agent
    meta = json.dumps(json.loads(str(arrays["meta"])) | {"num_agents": 1})
    mixed = arrays["labels"][:, :1]
    pairs = np.where(mixed < 0, arrays["pairs"][:, ::-1], arrays["pairs"])
    nll = []
    for labels, ordered in ((mixed, arrays["pairs"]), (np.ones_like(mixed), pairs)):
        path = write(tmp_path, **single, meta=np.array(meta), labels=labels, pairs=ordered)
        train_reward.main(train_reward.Args(data_path=path, max_epochs=12, alpha=0.0, learning_rate=1e-2, **MADE_UP))
        nll.append(read(tmp_path / "reward-alpha0-seed1.pt")["metrics"]["losses/nll"])
        (tmp_path / "reward-alpha0-seed1.pt").unlink()
    assert nll[0] == pytest.approx(nll[1], abs=0.01) and nll[0] < 0.65


def test_trajectories_that_are_all_equal(tmp_path):
    """No reward explains any label: at chance. Imitation, and VDN with a reward from elsewhere, do not divide by zero."""
    arrays = made_up_blocks(10)
    names = ("observations", "actions", "true_rewards")
    equal = {name: np.repeat(arrays[name][:1], len(arrays[name]), axis=0) for name in names}
    other = tmp_path / "other"
    other.mkdir()
    train_reward.main(train_reward.Args(data_path=write(other), max_epochs=4, **MADE_UP))
    data_path = write(tmp_path, **equal)
    with pytest.raises(train_reward.UserError, match=r"losses/nll is 0\.6931 on held-out pairs: no better than chance"):
        train_reward.main(train_reward.Args(data_path=data_path, max_epochs=2, **MADE_UP))
    train_bc.main(train_bc.Args(data_path=data_path, max_epochs=2, **MADE_UP))
    constant = other / "constant.pt"
    torch.save(read(other / "reward-alpha1-seed1.pt") | {"stats": {"mean": 0.5, "std": 0.0}}, constant)
    for reward_path in (other / "reward-alpha1-seed1.pt", constant):
        vdn = dict(reward_path=str(reward_path), vdn_path=str(tmp_path / f"vdn-{reward_path.stem}.pt"))
        vdn_rlhf.main(vdn_rlhf.Args(data_path=data_path, num_updates=20, imitation_updates=20, **vdn, **MADE_UP))
        assert math.isfinite(read(vdn["vdn_path"])["metrics"]["losses/td_loss"])
    returns, pairs, generator = torch.full((256, 3), 7.0), torch.randint(256, (500, 2)), torch.Generator().manual_seed(0)
    labels, _, std = collect_data.draw_labels(returns, pairs, 5.0, generator)  # what cannot be told apart is a coin toss
    assert std.tolist() == [0.0] * 3 and labels.float().mean().abs() < 0.1


def test_a_single_trajectory(tmp_path):
    arrays, path = made_up_arrays(), tmp_path / "one.npz"
    one = {name: arrays[name][:1] for name in ("observations", "actions", "true_rewards")} | {"meta": arrays["meta"]}
    np.savez(path, **one, pairs=np.array([[0, 1]]), labels=np.ones((1, 4), int))
    with pytest.raises(train_reward.UserError, match=r"one.npz: 'pairs' has indices outside 0 .. 0"):
        train_reward.main(train_reward.Args(data_path=str(path), **MADE_UP))
    with pytest.raises(train_bc.UserError, match=r"one.npz: 'actions' has 1 trajectory; at least 2 are needed"):
        train_bc.main(train_bc.Args(data_path=str(path), **MADE_UP))
    two = {name: arrays[name][:2] for name in ("observations", "actions", "true_rewards")} | {"meta": arrays["meta"]}
    np.savez(tmp_path / "two.npz", **two, pairs=np.array([[0, 1]]), labels=np.ones((1, 4), int))
    with pytest.raises(train_reward.UserError, match=r"two.npz: 'pairs' leaves none for the training part"):
        train_reward.main(train_reward.Args(data_path=str(tmp_path / "two.npz"), **MADE_UP))
    train_bc.main(train_bc.Args(data_path=str(tmp_path / "two.npz"), bc_path=str(tmp_path / "bc.pt"), max_epochs=1, **MADE_UP))
    train_reward.main(train_reward.Args(data_path=write(tmp_path), reward_path=str(tmp_path / "r.pt"), max_epochs=4, **MADE_UP))
    models = dict(reward_path=str(tmp_path / "r.pt"), bc_path=str(tmp_path / "bc.pt"), vdn_path=str(tmp_path / "vdn.pt"))
    vdn_rlhf.main(vdn_rlhf.Args(data_path=str(path), num_updates=10, imitation_updates=10, **models, **MADE_UP))
    assert math.isfinite(read(tmp_path / "vdn.pt")["metrics"]["losses/td_loss"])


def test_the_same_command_twice(tmp_path, monkeypatch):
    """Every stage: bit-equal tensors and metrics, timings aside; on CUDA see test_cuda.py."""
    reports = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        files = dict(data_path="dataset.npz", device="cpu")
        online = dict(policies_path=".", num_updates=40, num_envs=8, batch_size=8, hidden_dim=16, num_layers=2)
        collect_data.main(collect_data.Args(num_trajectories=1280, **files))
        collect_data.main(collect_data.Args(num_trajectories=256, data_path="other.npz", device="cpu", **online))
        train_reward.main(train_reward.Args(max_epochs=8, hidden_dim=64, num_seeds=2, **files))
        train_bc.main(train_bc.Args(max_epochs=1, hidden_dim=16, num_seeds=2, **files))
        few = dict(num_updates=20, imitation_updates=20, hidden_dim=16)
        vdn_rlhf.main(vdn_rlhf.Args(beta=(1.0, 10.0), **few, **files))
        policy = "vdn-beta10-alpha1-seed1.pt"
        reports.append(evaluate.main(evaluate.Args(policy, num_episodes=64, device="cpu")))
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert same_weights(tmp_path / "a" / policy, tmp_path / "b" / policy)
    assert json.dumps(reports[0]) == json.dumps(reports[1])
