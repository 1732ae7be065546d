"""Eq. (1) and (2), which trajectories teach and which are held out, and what the reward model learns."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import made_up_arrays, read, rebuild, same_weights, without

import train_reward
from train_reward import Args, RewardNetwork, load_dataset, reward_loss, split_into_blocks

ARRAYS = ("observations", "actions", "pairs", "labels")


def learn(data_path, path, **flags) -> dict:
    """Train a small model -> its checkpoint."""
    small = {"device": "cpu", "hidden_dim": 32, "max_epochs": 2}
    train_reward.main(Args(data_path=str(data_path), reward_path=str(path), **small | flags))
    return read(path)


@pytest.mark.parametrize(("variance", "divisor"), [("return", 1.25), ("step", 0.75)])
def test_loss_against_numbers_worked_by_hand(variance, divisor):
    # Two trajectories, three steps, two agents. Returns: agent 0: 3 and 1, agent 1: 0 and 2.
    rewards = [[[1.0, 0.0], [2.0, 1.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]]
    pairs, labels = torch.tensor([[0, 1]]), torch.tensor([[1.0, 1.0]])
    loss, nll, smoothness, accuracy = reward_loss(torch.tensor(rewards), pairs, labels, 0.5, variance)
    by_hand = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))  # summed over agents, Eq. (1)
    assert nll.item() == pytest.approx(by_hand / 2)
    # L_MSE: (1 + 4) + (1 + 4) and (1 + 0) + (4 + 4), in the mean 9.5.
    # Variance of the returns 3, 0, 1, 2: 1.25, of the twelve steps: 1 - 0.5 ** 2.
    assert smoothness.item() == pytest.approx(9.5 / divisor)
    assert loss.item() == pytest.approx(by_hand + 0.5 * 9.5 / divisor)
    assert accuracy.item() == 0.5


@pytest.mark.parametrize("team", [False, True])
def test_loss_against_a_slow_loop(team):
    """With labels of 0, whose target is 1/2; one label for the team is about the mean over agents."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 5, 3, generator=generator, dtype=torch.float64)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [5, 0]])
    labels = torch.tensor([[1, 0, -1], [0, 1, 1], [-1, -1, 0], [1, -1, 1]])[:, : 1 if team else 3].double()
    nll, hits = [], []
    for (first, second), row in zip(pairs.tolist(), labels.tolist(), strict=True):
        difference = [(rewards[first, :, i].sum() - rewards[second, :, i].sum()).item() for i in range(3)]
        difference = [sum(difference) / 3] if team else difference
        for x, y in zip(difference, row, strict=True):
            p = 1 / (1 + math.exp(-x))
            nll.append(-(1 + y) / 2 * math.log(p) - (1 - y) / 2 * math.log(1 - p))
            if y:
                hits.append(x * y > 0)
    loss, mean_nll, _, accuracy = reward_loss(rewards, pairs, labels, alpha=0.0)
    assert loss.item() == pytest.approx(sum(nll) / 4) and mean_nll.item() == pytest.approx(np.mean(nll))
    assert accuracy.item() == pytest.approx(np.mean(hits))


TIES = [([1, 1, -1, 1], 3.5 / 4), ([-1, -1, 1, 1], 1.5 / 4), ([0, 0, 0, 1], 1.0), ([1, 0, 1, 0], 0.25)]


@pytest.mark.parametrize(("labels", "accuracy"), TIES)
def test_ties_of_the_model_count_half_and_labels_of_zero_not_at_all(labels, accuracy):
    rewards, pairs = torch.tensor([[[1.0]], [[1.0]], [[3.0]]]), torch.tensor([[0, 1], [2, 0], [0, 2], [2, 1]])
    labels = torch.tensor([labels, [0] * 4]).float().view(2, 4, 1)
    assert reward_loss(rewards, pairs, labels[0], 0.0)[3].item() == accuracy
    blocks = torch.zeros(2, 3), pairs.expand(2, 4, 2), labels  # the second is all ties
    assert train_reward.measure(lambda _: rewards, blocks, Args())["reward/accuracy"] == accuracy


@pytest.mark.parametrize(("variance", "scale"), [("return", 0.01), ("return", 10.0), ("step", 0.01)])
def test_the_divisor_has_no_gradient_and_is_bounded_below(variance, scale):
    rewards = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scaled, pairs = rewards * scale, torch.tensor([[0, 1], [2, 3]])
    smoothness = reward_loss(scaled, pairs, torch.ones(2, 2), 1.0, variance)[2]
    l_mse = (scaled[:, 1:] - scaled[:, :-1]).square().sum(dim=(1, 2)).mean()
    divisor = scaled.detach().var(correction=0)
    if variance == "return":
        divisor = scaled.detach().sum(dim=1).var(correction=0).clamp(min=1)
        assert (divisor == 1) == (scale == 0.01)
    (expected,) = torch.autograd.grad(l_mse / divisor, rewards, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(smoothness, rewards)[0], expected)


def two_sizes_of_blocks() -> dict:
    """The made-up game in 15 blocks of 4 and 15 of 6 trajectories, with any integers as their names."""
    sizes, rng = [4] * 15 + [6] * 15, np.random.default_rng(0)
    starts = np.cumsum([0, *sizes[:-1]])
    pairs = [start + rng.permutation(size)[:2] for start, size in [*zip(starts, sizes, strict=True)] * 5]
    block = np.repeat(rng.permutation(30) * 10 - 20, sizes)
    return made_up_arrays(sum(sizes), len(pairs)) | {"pairs": np.array(pairs), "block": block}


@pytest.mark.parametrize("case", ["blocks", "blocks of two sizes", "no blocks"])
def test_no_trajectory_stands_in_both_parts(case, spread_data, tmp_path, capsys):
    path, env = spread_data, "spread"
    if case == "blocks of two sizes":
        path, env = tmp_path / "dataset.npz", "made-up"
        np.savez(path, **two_sizes_of_blocks())
    data = load_dataset(path, env, ARRAYS, () if case == "no blocks" else ("block",))[0]
    torch.manual_seed(1)
    parts = split_into_blocks(data, path)
    # Every block holds true pairs with their labels, however it stores them, and no pair twice.
    rows, seen = [], []
    for trajectories, pairs, labels in parts:
        used = torch.stack([batch[positions] for batch, positions in zip(trajectories, pairs, strict=True)])
        seen.append(set(trajectories.flatten().tolist()))
        for pair, label in zip(used.flatten(0, 1).tolist(), labels.flatten(0, 1).int().tolist(), strict=True):
            rows.append((*pair, *label))
    assert not seen[0] & seen[1]
    pairs, labels = data["pairs"].tolist(), data["labels"].tolist()
    table = Counter((*pair, *label) for pair, label in zip(pairs, labels, strict=True))
    assert Counter(rows) <= table
    left_out = len(pairs) - len(rows)
    if case == "blocks":
        assert left_out == 0 and parts[0][1].shape == (36, 640, 2) and parts[1][1].shape == (4, 640, 2)
    elif case == "blocks of two sizes":
        assert left_out < 2 and len(data["block"][sorted(seen[1])].unique()) == 3
    else:
        dropped = int(capsys.readouterr().out.split(f" of {len(pairs)} pairs")[0])
        assert 0 <= left_out - dropped < sum(len(batches) for batches, _, _ in parts)  # one size for all
        assert 0.1 < dropped / len(pairs) < 0.26  # 1 - 0.9 ** 2 - 0.1 ** 2 = 0.18


@pytest.mark.parametrize(("batch_size", "updates"), [(1, 36), (64, 36), (256, 9), (10_000, 1)])
def test_a_minibatch_is_whole_blocks(batch_size, updates, spread_data, tmp_path, monkeypatch):
    """With their own pairs: before anything is learned, their mean is that over the training part."""
    seen = []

    def recorded(rewards, *rest):
        outputs = reward_loss(rewards, *rest)
        if rewards.requires_grad:
            seen.append(outputs[1].item())
        return outputs

    monkeypatch.setattr("train_reward.reward_loss", recorded)
    flags = {"learning_rate": 0.0, "max_epochs": 1, "batch_size": batch_size}
    metrics = learn(spread_data, tmp_path / "reward.pt", **flags)["metrics"]
    assert len(seen) == updates
    assert np.mean(seen) == pytest.approx(metrics["losses/training_nll"], abs=1e-6)


def test_learns_from_at_most_so_many_pairs(spread_data, tmp_path, monkeypatch):
    """Drawn at random, with their labels; blocks stay whole: trained on or held out."""
    seen, split = [], split_into_blocks
    monkeypatch.setattr(train_reward, "split_into_blocks", lambda *x: seen.append(x[0]) or split(*x))
    learn(spread_data, tmp_path / "reward.pt", max_pairs=300, max_epochs=1)
    with np.load(spread_data) as arrays:
        table, drawn = (np.hstack([x["pairs"], x["labels"]]).tolist() for x in (arrays, seen[0]))
    assert len(drawn) == 300 and Counter(map(tuple, drawn)) <= Counter(map(tuple, table))
    assert len(seen[0]["block"][seen[0]["pairs"][:, 0]].unique()) > 30  # of 40


@pytest.mark.parametrize("network", ["mlp", "gru"])
@pytest.mark.parametrize(("input", "agents"), [("joint", (0, 1, 2)), ("own", (1,))])
def test_what_the_model_sees(input, agents, network):
    """The present, or by a GRU also the past, of its own trajectory."""
    torch.manual_seed(0)
    model = RewardNetwork((4, 3, 5), input, network, hidden_dim=16)
    observations, actions = torch.randn(2, 6, 3, 4), torch.randint(5, (2, 6, 3))
    base = model(observations, actions)
    assert base.shape == (2, 6, 3)
    other_observations, other_actions = observations.clone(), actions.clone()
    other_observations[0, 2, 1] += 1
    other_actions[0, 4, 2] = (other_actions[0, 4, 2] + 1) % 5
    by_observation = (model(other_observations, actions) != base).nonzero().tolist()
    by_action = (model(observations, other_actions) != base).nonzero().tolist()
    recurrent = network == "gru"
    assert by_observation == [[0, t, i] for t in range(2, 6 if recurrent else 3) for i in agents]
    assert by_action == [[0, t, 2] for t in range(4, 6 if recurrent else 5)]


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_learns_the_reward_of_a_game_that_nobody_knows(network, tmp_path):
    """And the checkpoint says of it what can be measured again from its weights."""
    data_path, path = tmp_path / "dataset.npz", tmp_path / "reward.pt"
    np.savez(data_path, **made_up_arrays(num_trajectories=1000, num_pairs=5000))
    # alpha 0, because this game's rewards jump from step to step.
    flags = {"env": "made-up", "alpha": 0.0, "network": network, "max_epochs": 6, "learning_rate": 1e-2}
    checkpoint = learn(data_path, path, **flags)
    metrics, stats = checkpoint["metrics"], checkpoint["stats"]
    assert metrics["losses/nll"] < 0.4 and metrics["reward/accuracy"] > 0.75  # chance: 0.693 and 0.5
    assert metrics["reward/correlation"] > (0.9 if network == "mlp" else 0.5)  # a GRU pays later, too
    assert "reward/bayes_nll" not in metrics and metrics["reward/ties"] == 0  # meta tells no steepness

    data = load_dataset(data_path, "made-up", ARRAYS, ("true_rewards",))[0]
    torch.manual_seed(1)
    training, test = split_into_blocks(data, data_path)
    model = rebuild(RewardNetwork, checkpoint)
    r_phi = model(data["observations"][:, :-1], data["actions"]).detach()
    torch.testing.assert_close(stats["team_returns"], r_phi.sum(dim=(1, 2)))
    of_training, of_test = r_phi[training[0].unique()], r_phi[test[0].unique()]
    assert stats["mean"] == pytest.approx(of_training.mean().item(), rel=1e-4, abs=1e-5)
    assert stats["std"] == pytest.approx(of_training.std(correction=0).item(), rel=1e-4)
    truth = data["true_rewards"][test[0].unique()]
    correlation = np.corrcoef(of_test.flatten(), truth.flatten())[0, 1]
    assert metrics["reward/correlation"] == pytest.approx(correlation, abs=1e-3)
    for name, part in (("losses/training_nll", training), ("losses/nll", test)):
        returns = r_phi.sum(dim=1)[part[0]]  # (M, B, A)
        pairs = [x[positions].unbind(dim=1) for x, positions in zip(returns, part[1], strict=True)]
        logits = part[2] * torch.stack([first - second for first, second in pairs])
        assert metrics[name] == pytest.approx(torch.log1p(torch.exp(-logits)).mean().item(), rel=1e-3)
    assert metrics["reward/accuracy"] == pytest.approx((logits > 0).float().mean().item(), abs=1e-3)


def test_true_rewards_change_no_bit_and_equal_commands_give_equal_results(spread_data, tmp_path):
    stripped = without(spread_data, ("true_rewards", "behavior"), tmp_path / "stripped.npz")
    made = []
    for name, data_path in (("with", spread_data), ("again", spread_data), ("without", stripped)):
        checkpoint = learn(data_path, tmp_path / f"{name}.pt")
        returns = checkpoint["stats"].pop("team_returns").tolist()
        made.append({**checkpoint["metrics"], **checkpoint["stats"], "returns": returns})
        made[-1].pop("speed/updates_per_second")
        assert same_weights(tmp_path / f"{name}.pt", tmp_path / "with.pt")
    with_truth, again, without_truth = made
    assert with_truth == again and without_truth.items() <= with_truth.items()
    diagnostics = {f"reward/{name}" for name in ("correlation", "bayes_nll", "bayes_accuracy")}
    assert with_truth.keys() - without_truth.keys() == diagnostics
    # The truth drew the labels: 2,560 pairs of 3 agents are enough to see that nothing predicts them better.
    assert with_truth["reward/bayes_nll"] < with_truth["losses/nll"] < math.log(2)
    assert with_truth["reward/bayes_accuracy"] > with_truth["reward/accuracy"] > 0.55


def test_smoothness_flattens_the_reward_and_the_printed_variance_makes_it_collapse(spread_data, tmp_path):
    """Deviation 1: with --variance step the penalty holds the outputs where they start, at nothing."""
    settings = [{"alpha": 0.0}, {"alpha": 100.0}, {"variance": "step"}]
    results = [learn(spread_data, tmp_path / f"{i}.pt", max_epochs=4, **s) for i, s in enumerate(settings)]
    rough, smooth, collapsed = (result["metrics"] for result in results)
    assert smooth["losses/smoothness"] < 0.5 * rough["losses/smoothness"]
    assert collapsed["losses/nll"] == pytest.approx(math.log(2), abs=2e-3)
    assert rough["losses/nll"] < math.log(2) - 0.05
    assert results[2]["stats"]["std"] < 0.1 * results[0]["stats"]["std"]


def test_one_label_for_the_team_and_pairs_that_are_sorted_by_preference(tmp_path):
    """As tools for human labels write them: (M, 1), and the preferred trajectory always first."""
    arrays = made_up_arrays(1000, 6000)
    returns = arrays["true_rewards"].sum(axis=(1, 2))
    first, second = arrays["pairs"].T
    better, worse = np.where(returns[first] > returns[second], (first, second), (second, first))
    labels = (returns[better] > returns[worse]).astype(np.int8)[:, None]  # 0: equally good
    data_path = tmp_path / "dataset.npz"
    np.savez(data_path, **arrays | {"pairs": np.stack([better, worse], axis=1), "labels": labels})
    flags = {"env": "made-up", "alpha": 0.0, "input": "own", "max_epochs": 6, "learning_rate": 1e-2}
    metrics = learn(data_path, tmp_path / "reward.pt", **flags)["metrics"]
    assert metrics["reward/accuracy"] > 0.75 and metrics["reward/correlation"] > 0.7
