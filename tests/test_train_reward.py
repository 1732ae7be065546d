import json
import math

import numpy as np
import pytest
import torch
from conftest import made_up_arrays, same_weights, without

import train_reward
from train_reward import Args, RewardNetwork, load_dataset, reward_loss, split_into_minibatches

SMALL = dict(device="cpu", hidden_dim=32, num_layers=2, max_epochs=3, learning_rate=3e-3)


def read(path) -> dict:
    return torch.load(path, weights_only=True)


def test_loss_against_numbers_worked_by_hand():
    # Two trajectories, three steps, two agents. Returns: agent 0: 3 and 1, agent 1: 0 and 2.
    rewards = torch.tensor([[[1.0, 0.0], [2.0, 1.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    pairs, labels = torch.tensor([[0, 1]]), torch.tensor([[1.0, 1.0]])
    loss, nll, smoothness = reward_loss(rewards, pairs, labels, alpha=0.5)
    by_hand = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))  # summed over agents, Eq. (1)
    assert nll.item() == pytest.approx(by_hand / 2)
    # L_MSE: trajectory 0: (1 + 4) + (1 + 4), trajectory 1: (1 + 0) + (4 + 4); mean 9.5. Var of returns 3, 0, 1, 2: 1.25.
    assert smoothness.item() == pytest.approx(9.5 / 1.25)
    assert loss.item() == pytest.approx(by_hand + 0.5 * 9.5 / 1.25)


def test_the_variance_is_detached_and_bounded_below():
    rewards = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pairs, labels = torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    for scale in (0.01, 10.0):
        scaled = rewards * scale
        _, _, smoothness = reward_loss(scaled, pairs, labels, 1.0)
        (gradient,) = torch.autograd.grad(smoothness, rewards, retain_graph=True)
        l_mse = (scaled[:, 1:] - scaled[:, :-1]).square().sum(dim=(1, 2)).mean()
        variance = scaled.sum(dim=1).var(correction=0).item()
        (expected,) = torch.autograd.grad(l_mse / max(variance, 1.0), rewards)
        torch.testing.assert_close(gradient, expected)
    assert variance > 1  # the second scale divided by it, the first by 1


@pytest.mark.parametrize("blocks", [True, False])
def test_no_trajectory_stands_in_two_parts(blocks, spread_data, capsys):
    data, _ = load_dataset(spread_data, "spread", ("observations", "actions", "pairs", "labels"), ("block",) if blocks else ())
    parts = split_into_minibatches(data, torch.Generator().manual_seed(0))
    seen = [set(trajectories.flatten().tolist()) for trajectories, _, _ in parts]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    kept = sum(pairs.shape[0] * pairs.shape[1] for _, pairs, _ in parts)
    if blocks:
        assert [len(pairs) for _, pairs, _ in parts] == [8, 1, 1] and kept == len(data["pairs"])
    else:
        dropped = int(capsys.readouterr().out.split(f" of {len(data['pairs'])} pairs")[0].split()[-1])
        left_out = len(data["pairs"]) - dropped - kept  # so that minibatches are of one size
        assert 0 <= left_out < sum(len(pairs) for _, pairs, _ in parts)
        assert 0.25 < dropped / len(data["pairs"]) < 0.45  # 1 - 0.8^2 - 0.1^2 - 0.1^2 = 0.34
    # Every minibatch holds true pairs with their labels, no matter how it is stored.
    table = {(*pair, *label) for pair, label in zip(data["pairs"].tolist(), data["labels"].tolist(), strict=True)}
    trajectories, pairs, labels = (x[0] for x in parts[0])
    assert {(*p, *y) for p, y in zip(trajectories[pairs].tolist(), labels.int().tolist(), strict=True)} <= table


@pytest.mark.parametrize("input", ["joint", "own"])
def test_what_the_model_sees(input):
    model = RewardNetwork(observation_dim=4, num_agents=3, num_actions=5, input=input, hidden_dim=16)
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(2, 6, 3, 4, generator=generator)
    actions = torch.randint(5, (2, 6, 3), generator=generator)
    base = model(observations, actions)
    assert base.shape == (2, 6, 3)
    changed_observations, changed_actions = observations.clone(), actions.clone()
    changed_observations[:, 2, 1] += 1
    changed_actions[:, 4, 2] = (changed_actions[:, 4, 2] + 1) % 5
    by_observation = (model(changed_observations, actions) != base).any(dim=0)  # (T, A)
    by_action = (model(observations, changed_actions) != base).any(dim=0)
    assert by_observation.nonzero().tolist() == ([[2, 0], [2, 1], [2, 2]] if input == "joint" else [[2, 1]])
    assert by_action.nonzero().tolist() == [[4, 2]]


def test_gru_reads_only_the_past():
    model = RewardNetwork(observation_dim=4, num_agents=2, num_actions=5, network="gru", hidden_dim=16)
    observations, actions = torch.randn(1, 6, 2, 4), torch.zeros(1, 6, 2)
    changed = observations.clone()
    changed[:, 3] += 1
    differs = (model(changed, actions) != model(observations, actions)).any(dim=2)[0]
    assert differs.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_learns_the_reward_and_reports_test_figures(network, spread_data, tmp_path):
    path = tmp_path / "reward.pt"
    args = Args(data_path=str(spread_data), reward_path=str(path), **SMALL | dict(network=network, max_epochs=12))
    train_reward.main(args)
    checkpoint = read(path)
    metrics = checkpoint["metrics"]
    assert metrics["losses/nll"] < 0.55 and metrics["reward/accuracy"] > 0.72  # chance: 0.693 and 0.5
    assert metrics["reward/correlation"] > 0.5
    assert metrics["reward/bayes_nll"] < metrics["losses/nll"] and metrics["reward/bayes_accuracy"] > metrics["reward/accuracy"]
    # Both sides standardised: MSE = 2 - 2 * correlation.
    assert metrics["reward/standardized_mse"] == pytest.approx(2 - 2 * metrics["reward/correlation"], abs=1e-4)

    # stats hold mean and standard deviation of r_phi over the training part, test figures come from the third part.
    names = ("observations", "actions", "pairs", "labels")
    data, _ = load_dataset(spread_data, "spread", names, ("block", "true_rewards"))
    training, _, test = split_into_minibatches(data, torch.Generator().manual_seed(args.seed))
    model = train_reward.build_network(RewardNetwork, path, checkpoint, "cpu")
    predicted = model(data["observations"][:, :-1], data["actions"])
    in_training = training[0].flatten()
    assert checkpoint["stats"]["mean"] == pytest.approx(predicted[in_training].mean().item(), abs=1e-4)
    assert checkpoint["stats"]["std"] == pytest.approx(predicted[in_training].std().item(), rel=1e-3)
    trajectories, pairs, labels = (x[0] for x in test)
    returns = predicted[trajectories].sum(dim=1)
    logits = labels * (returns[pairs[:, 0]] - returns[pairs[:, 1]])
    assert metrics["losses/nll"] == pytest.approx(torch.log1p(torch.exp(-logits)).mean().item(), rel=1e-3)
    assert metrics["reward/accuracy"] == pytest.approx((logits > 0).float().mean().item(), abs=1e-3)
    correlation = np.corrcoef(predicted[trajectories].flatten(), data["true_rewards"][trajectories].flatten())[0, 1]
    assert metrics["reward/correlation"] == pytest.approx(correlation, abs=1e-3)


def test_true_rewards_change_nothing(spread_data, tmp_path):
    stripped = without(spread_data, ("true_rewards",), tmp_path / "stripped.npz")
    paths = [tmp_path / "with.pt", tmp_path / "without.pt", tmp_path / "again.pt"]
    for data_path, path in zip((spread_data, stripped, spread_data), paths, strict=True):
        train_reward.main(Args(data_path=str(data_path), reward_path=str(path), **SMALL))
    assert same_weights(paths[0], paths[1])
    a, b, again = ({k: v for k, v in read(p)["metrics"].items() if not k.startswith("speed/")} for p in paths)
    assert a == again  # the same command twice: the same metrics too
    assert {k: v for k, v in a.items() if k in b} == b and "reward/correlation" not in b


def test_smoothness_weight_flattens_the_reward(spread_data, tmp_path):
    smoothness = []
    for alpha in (0.0, 10.0):
        path = tmp_path / f"reward-{alpha:g}.pt"
        train_reward.main(Args(alpha=alpha, data_path=str(spread_data), reward_path=str(path), **SMALL))
        smoothness.append(read(path)["metrics"]["losses/smoothness"])
    assert smoothness[1] < 0.5 * smoothness[0]


def test_unknown_game_without_blocks(made_up_data, tmp_path):
    path = tmp_path / "reward.pt"
    np.savez(made_up_data, **made_up_arrays(num_trajectories=400, num_pairs=8000))
    # alpha 0, because this game's rewards jump from step to step.
    args = Args(env="made-up", alpha=0.0, data_path=str(made_up_data), reward_path=str(path), **SMALL | dict(max_epochs=20))
    train_reward.main(args)
    metrics = read(path)["metrics"]
    assert metrics["losses/nll"] < 0.3 and metrics["reward/accuracy"] > 0.85
    assert metrics["reward/correlation"] > 0.9  # the action alone decides, so the step rewards can be told exactly
    assert "reward/bayes_nll" not in metrics  # the meta does not say how the labels were drawn


def test_the_best_epoch_is_saved(made_up_data, tmp_path):
    """40 training trajectories, 8 to stop early: the model overfits, so the best epoch is not the last one."""
    path = tmp_path / "reward.pt"
    args = Args(env="made-up", alpha=0.0, data_path=str(made_up_data), reward_path=str(path), device="cpu", hidden_dim=64)
    args.learning_rate, args.max_epochs = 1e-2, 20
    train_reward.main(args)
    checkpoint = read(path)
    history, best_epoch = checkpoint["metrics"]["history"], checkpoint["metrics"]["best_epoch"]
    losses = [nll for _, nll, *_ in history]  # alpha is 0: the loss is the likelihood
    assert best_epoch == 1 + int(np.argmin(losses)) < len(history) == 20
    data, _ = load_dataset(made_up_data, "made-up", ("observations", "actions", "pairs", "labels"))
    _, validation, _ = split_into_minibatches(data, torch.Generator().manual_seed(args.seed))
    model = train_reward.build_network(RewardNetwork, path, checkpoint, "cpu")
    assert train_reward.evaluate(model, data, validation, 0.0)["losses/nll"] == pytest.approx(min(losses), rel=1e-5)
    assert checkpoint["metrics"]["final/nll"] != checkpoint["metrics"]["losses/nll"]


@pytest.mark.parametrize("meta", [{"return_mean": None}, {"return_std": [1.0]}, {"steepness": "five"}])
def test_odd_label_statistics_only_skip_the_bayes_figures(meta, made_up_data, tmp_path, capsys):
    arrays = made_up_arrays(num_trajectories=120, num_pairs=800)
    known = dict(return_mean=[1.0] * 4, return_std=[1.0] * 4, steepness=5.0)
    arrays["meta"] = np.array(json.dumps(json.loads(str(arrays["meta"])) | known | meta))
    np.savez(made_up_data, **arrays)
    train_reward.main(Args(env="made-up", data_path=str(made_up_data), reward_path=str(tmp_path / "reward.pt"), **SMALL))
    assert "Bayes likelihood and accuracy skipped" in capsys.readouterr().out


def test_a_tie_counts_half(made_up_data, tmp_path):
    """In tag many trajectories have no touch at all: true returns that are equal tell nothing, and count as a coin toss."""
    arrays = made_up_arrays(num_trajectories=120, num_pairs=800)
    known = dict(return_mean=[0.0] * 4, return_std=[1.0] * 4, steepness=5.0)
    arrays["meta"] = np.array(json.dumps(json.loads(str(arrays["meta"])) | known))
    np.savez(made_up_data, **arrays | {"true_rewards": np.zeros_like(arrays["true_rewards"])})
    path = tmp_path / "reward.pt"
    train_reward.main(Args(env="made-up", data_path=str(made_up_data), reward_path=str(path), **SMALL))
    metrics = read(path)["metrics"]
    assert metrics["reward/bayes_accuracy"] == 0.5 and metrics["reward/bayes_nll"] == pytest.approx(np.log(2))
