import math

import numpy as np
import pytest
import torch
from conftest import made_up_arrays, same_weights, without

import train_bc
from train_bc import AgentNetwork, Args, bc_loss

SMALL = dict(device="cpu", hidden_dim=32, num_layers=2, max_epochs=3)


def test_loss_of_a_single_mode_against_numbers_worked_by_hand(monkeypatch):
    policy = AgentNetwork(observation_dim=1, num_agents=2, num_actions=2, horizon=1)
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]]).view(1, 1, 2, 2)
    monkeypatch.setattr(policy, "_outputs", lambda *_: (logits, None))
    loss = bc_loss(policy, torch.zeros(1, 1, 2, 1), torch.tensor([[[1, 1]]]), 1.0)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(5)) / 2)


def test_modes_against_a_slow_loop():
    """The policy log sum_z w_z pi_z(a | o) and the likelihood sum_z w_z prod_t pi_z(a_t | o_t), whose gradient the loss has."""
    torch.manual_seed(0)
    policy = AgentNetwork(observation_dim=4, num_agents=2, num_actions=3, horizon=5, hidden_dim=16, num_modes=3).double()
    with torch.no_grad():
        policy.mode_logits.copy_(torch.tensor([0.0, 1.0, -0.5]))
        policy.head.weight *= 10
    observations, actions = torch.randn(4, 5, 2, 4, dtype=torch.float64), torch.randint(3, (4, 5, 2))
    logits = policy._outputs(observations, 0, None)[0].unflatten(-1, (3, 3)).detach().numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)  # (B, T, A, num_modes, num_actions)
    weights = policy.mode_logits.softmax(dim=0).tolist()
    steps, log_joint = policy(observations)[0].exp().tolist(), policy.log_joint(observations, actions)
    log_likelihood = 0.0
    for b in range(4):
        for i in range(2):
            likelihood = np.array(weights)
            for t in range(5):
                mixture = sum(weights[z] * probabilities[b, t, i, z] for z in range(3))
                np.testing.assert_allclose(steps[b][t][i], mixture, rtol=1e-9)
                likelihood *= probabilities[b, t, i, :, actions[b, t, i]]
            np.testing.assert_allclose(log_joint[b, i].tolist(), np.log(likelihood), rtol=1e-9)
            log_likelihood += np.log(likelihood.sum())
    nll = -log_joint.logsumexp(dim=-1).mean() / 5
    assert nll.item() == pytest.approx(-log_likelihood / 40)
    parameters = list(policy.parameters())
    expected = torch.autograd.grad(nll, parameters, retain_graph=True)
    for gradient, wanted in zip(
        torch.autograd.grad(bc_loss(policy, observations, actions, 1.0), parameters), expected, strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


def test_tells_two_players_apart(tmp_path):
    """Half of the agents' trajectories prefer action 1, half action 4, whatever is seen. Step by step that is a coin toss; two
    modes find both players, and a third does no harm."""
    arrays = made_up_arrays(num_trajectories=2000, num_pairs=10)
    rng = np.random.default_rng(1)
    N, T, A = arrays["actions"].shape
    favourite = np.where(rng.random((N, 1, A)) < 0.5, 1, 4)
    arrays["actions"] = np.where(rng.random((N, T, A)) < 0.8, favourite, arrays["actions"]).astype(np.uint8)
    data_path = tmp_path / "dataset.npz"
    np.savez(data_path, **arrays)
    metrics = {}
    for num_modes in (1, 2, 3):
        path = tmp_path / f"{num_modes}.pt"
        args = Args(env="made-up", data_path=str(data_path), bc_path=str(path), num_modes=num_modes, **SMALL)
        args.max_epochs, args.learning_rate = 8, 1e-2
        train_bc.main(args)
        metrics[num_modes] = torch.load(path, weights_only=True)["metrics"]
    p, q = 0.8 + 0.2 / 7, 0.2 / 7
    one_player = -(p * math.log(p) + 6 * q * math.log(q))
    coin_toss = -((p + q) * math.log((p + q) / 2) + 5 * q * math.log(q))
    assert metrics[1]["bc/mode_nll"] == pytest.approx(metrics[1]["bc/nll"], rel=1e-5)
    assert metrics[1]["bc/nll"] == pytest.approx(coin_toss, abs=0.05)
    for num_modes in (2, 3):
        assert metrics[num_modes]["bc/mode_nll"] == pytest.approx(one_player + math.log(2) / T, abs=0.05)


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_one_step_at_a_time_equals_the_whole_sequence(network):
    """Rollouts call the network step by step, training on whole trajectories."""
    policy = AgentNetwork(observation_dim=4, num_agents=3, num_actions=5, horizon=6, network=network, hidden_dim=16)
    observations = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    whole, _ = policy(observations)
    assert whole.shape == (2, 6, 3, 5)
    memory = None
    for step in range(6):
        output, memory = policy(observations[:, step : step + 1], step, memory)
        torch.testing.assert_close(output[:, 0], whole[:, step])


def test_agents_are_told_apart_and_do_not_see_each_other():
    policy = AgentNetwork(observation_dim=4, num_agents=3, num_actions=5, horizon=6, hidden_dim=16)
    observations = torch.ones(1, 6, 3, 4)
    base, _ = policy(observations)
    assert not torch.equal(base[:, :, 0], base[:, :, 1])  # same observation, other id
    assert not torch.equal(base[:, 0], base[:, 1])  # same observation, other step
    observations[:, :, 1] += 1
    changed, _ = policy(observations)
    assert (changed != base).any(dim=3)[0, 0].tolist() == [False, True, False]


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_recovers_a_known_behavior_policy(network, tmp_path):
    """In the made-up game with a behavior that plays action (agent + step) % 7 with probability 1/2, else uniformly."""
    arrays = made_up_arrays(num_trajectories=3000, num_pairs=10)
    rng = np.random.default_rng(1)
    N, T, A = arrays["actions"].shape
    favourite = (np.arange(T)[:, None] + np.arange(A)) % 7
    arrays["actions"] = np.where(rng.random((N, T, A)) < 0.5, favourite, arrays["actions"]).astype(np.uint8)
    data_path, path = tmp_path / "dataset.npz", tmp_path / "bc.pt"
    np.savez(data_path, **arrays)
    args = Args(env="made-up", data_path=str(data_path), bc_path=str(path), **SMALL)
    args.max_epochs, args.learning_rate, args.network, args.hidden_dim = 15, 1e-2, network, 64
    train_bc.main(args)
    checkpoint = torch.load(path, weights_only=True)
    p = 0.5 + 0.5 / 7
    entropy = -(p * math.log(p) + 6 * (0.5 / 7) * math.log(0.5 / 7))
    assert checkpoint["metrics"]["bc/nll"] == pytest.approx(entropy, abs=0.05)
    assert "charts/test_return" not in checkpoint["metrics"]


def test_modes_are_told_apart_slowly(made_up_data, tmp_path, monkeypatch):
    """The sharpness of their posterior grows as the square of the time until a quarter of the updates is done."""
    sharpness, real_loss = [], train_bc.bc_loss
    monkeypatch.setattr(train_bc, "bc_loss", lambda *args: (sharpness.append(args[-1]), real_loss(*args))[1])
    args = Args(
        env="made-up", data_path=str(made_up_data), bc_path=str(tmp_path / "bc.pt"), batch_size=7, **SMALL | {"max_epochs": 5}
    )
    train_bc.main(args)
    n = len(sharpness)  # 54 training trajectories: 7 minibatches of 7 an epoch
    assert n == 35 and [x.item() for x in sharpness] == pytest.approx([min(i / 8.75, 1) ** 2 for i in range(35)])


def test_imitates_spread_better_than_chance(spread_data, tmp_path):
    path = tmp_path / "bc.pt"
    train_bc.main(
        Args(data_path=str(spread_data), bc_path=str(path), **SMALL | dict(hidden_dim=64, max_epochs=10, batch_size=64))
    )
    metrics = torch.load(path, weights_only=True)["metrics"]
    assert metrics["bc/nll"] < 1.5 < math.log(5) and metrics["bc/accuracy"] > 0.35
    assert metrics["charts/test_return"] > -24.5  # random: -26.46
    assert metrics["bc/mode_nll"] == pytest.approx(
        min(nll for _, nll, *_ in metrics["history"])
    )  # the best epoch is what is saved


def test_sees_neither_labels_nor_true_rewards_and_repeats_itself(spread_data, tmp_path):
    stripped = without(spread_data, ("true_rewards", "labels", "pairs", "behavior", "block"), tmp_path / "stripped.npz")
    paths = [tmp_path / f"bc-{i}.pt" for i in range(3)]
    for data_path, path in zip((spread_data, stripped, spread_data), paths, strict=True):
        train_bc.main(Args(data_path=str(data_path), bc_path=str(path), **SMALL))
    assert same_weights(paths[0], paths[1]) and same_weights(paths[0], paths[2])


def test_unknown_game_skips_the_evaluation_and_says_so(made_up_data, tmp_path, capsys):
    train_bc.main(Args(env="made-up", data_path=str(made_up_data), bc_path=str(tmp_path / "bc.pt"), **SMALL))
    assert "evaluation skipped" in capsys.readouterr().out


def test_the_best_epoch_is_saved(made_up_data, tmp_path):
    """54 training trajectories of uniformly random actions: every epoch makes the held-out likelihood worse."""
    path = tmp_path / "bc.pt"
    args = Args(env="made-up", data_path=str(made_up_data), bc_path=str(path), device="cpu", hidden_dim=64, batch_size=8)
    args.learning_rate, args.max_epochs, args.annealing = 1e-2, 10, 0.0
    train_bc.main(args)
    checkpoint = torch.load(path, weights_only=True)
    losses = [nll for _, nll, *_ in checkpoint["metrics"]["history"]]
    best_epoch = 1 + int(np.argmin(losses))
    assert checkpoint["metrics"]["best_epoch"] == best_epoch < len(losses) == 10
    assert checkpoint["metrics"]["bc/mode_nll"] == pytest.approx(min(losses), rel=1e-6)
