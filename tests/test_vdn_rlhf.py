import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made_up_arrays, same_weights, without

import evaluate
import train_bc
import train_reward
import vdn_rlhf
from vdn_rlhf import (
    AgentNetwork,
    Args,
    RegularizedPolicy,
    RewardNetwork,
    kl_rewards,
    standardized_rewards,
    td_lambda_targets,
    vdn_loss,
)

SMALL = dict(device="cpu", hidden_dim=32, num_layers=2)
MODELS = {"reward": "reward-alpha1-seed1", "bc": "bc-seed1"}


@pytest.fixture(scope="session")
def spread_models(spread_data) -> Path:
    """Small reward model and BC policy beside the spread dataset, at their default paths."""
    train_reward.main(train_reward.Args(data_path=str(spread_data), max_epochs=4, learning_rate=3e-3, **SMALL))
    train_bc.main(train_bc.Args(data_path=str(spread_data), max_epochs=4, **SMALL))
    return spread_data


def slow_td_lambda(rewards, values, baselines, gamma, td_lambda):
    """The definition, one episode and one step at a time."""
    targets = np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        G = V = B = 0.0  # after the last step
        for t in reversed(range(rewards.shape[1])):
            G = rewards[b, t] + gamma * (V + td_lambda * (G - B))
            V, B, targets[b, t] = values[b, t], baselines[b, t], G
    return targets


@pytest.mark.parametrize("gamma, td_lambda", [(0.97, 0.8), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_targets_against_a_slow_loop(gamma, td_lambda):
    rng = np.random.default_rng(0)
    rewards, values, baselines = rng.normal(size=(3, 4, 7))
    fast = td_lambda_targets(*map(torch.from_numpy, (rewards, values, baselines)), gamma, td_lambda)
    np.testing.assert_allclose(fast.numpy(), slow_td_lambda(rewards, values, baselines, gamma, td_lambda), atol=1e-12)


def test_off_policy_correction_removes_the_mistakes_of_the_behavior():
    """Exact values of a chain in which every step pays 1 for action 1 and 0 for action 0: whatever the behavior does, the
    corrected targets are the optimal Q-values of its actions, those of TD(lambda) are not."""
    gamma, T = 0.9, 6
    values = torch.tensor([[sum(gamma**k for k in range(T - t)) for t in range(T)]])  # V_t: pays 1 from t on
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]])
    q_values = rewards + gamma * torch.nn.functional.pad(values[:, 1:], (0, 1))
    for td_lambda in (0.5, 1.0):
        torch.testing.assert_close(td_lambda_targets(rewards, values, q_values, gamma, td_lambda), q_values)
        assert (td_lambda_targets(rewards, values, values, gamma, td_lambda) < q_values - 0.1).any()


@pytest.mark.parametrize("network, off_policy", [("mlp", False), ("gru", False), ("mlp", True)])
def test_loss_against_a_slow_double_q_loop(network, off_policy):
    torch.manual_seed(0)
    online = AgentNetwork(4, 3, 5, 6, network, hidden_dim=16, num_layers=2).double()
    target = AgentNetwork(4, 3, 5, 6, network, hidden_dim=16, num_layers=2).double()
    observations, rewards = torch.randn(2, 7, 3, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    actions = torch.randint(5, (2, 6, 3))
    known = torch.randn(2, 6, 3, 5, dtype=torch.float64) if off_policy else torch.zeros(2, 6, 3, 5)
    loss = vdn_loss(online, target, observations, actions, rewards, 0.9, 0.6, off_policy, known)

    errors = []
    for b in range(2):
        both = (net(observations[b : b + 1, :-1])[0][0].detach() + known[b] for net in (online, target))
        q, target_q = (x.numpy() for x in both)  # (T, A, U)
        values = np.array([[sum(target_q[t, i, q[t, i].argmax()] for i in range(3)) for t in range(6)]])
        chosen = np.array([[sum(target_q[t, i, actions[b, t, i]] for i in range(3)) for t in range(6)]])
        targets = slow_td_lambda(rewards[b : b + 1].numpy(), values, chosen if off_policy else values, 0.9, 0.6)[0]
        errors += [sum(q[t, i, actions[b, t, i]] for i in range(3)) - targets[t] for t in range(6)]
    assert loss.item() == pytest.approx(np.square(errors).mean(), rel=1e-6)

    loss.backward()
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all(parameter.grad is not None for parameter in online.parameters())


def test_team_reward_is_equation_3():
    torch.manual_seed(0)
    reward_model, reference = RewardNetwork(4, 2, 3, hidden_dim=8), AgentNetwork(4, 2, 3, 5, hidden_dim=8)
    observations, actions = torch.randn(1, 6, 2, 4), torch.randint(3, (1, 5, 2))
    with torch.no_grad():
        reference.head.weight *= 40  # so sharp that the clip acts on both sides
    stats = {"mean": 0.3, "std": 2.0}
    r_std = standardized_rewards(reward_model, stats, observations, actions)
    r_phi = reward_model(observations[:, :-1], actions)[0].tolist()
    pi_ref = reference(observations[:, :-1])[0][0].softmax(dim=-1).tolist()
    for beta, clip in ((0.0, False), (2.0, False), (2.0, True)):
        kl = kl_rewards(reference(observations[:, :-1])[0], beta, clip)
        rewards = (r_std + kl.gather(-1, actions[..., None]).squeeze(-1)).sum(dim=-1)
        for t in range(5):
            expected = 0.0
            for i in range(2):
                kl_term = beta * (math.log(pi_ref[t][i][int(actions[0, t, i])]) - math.log(1 / 3))  # pi_w = 1 / |A_i|
                expected += (r_phi[t][i] - 0.3) / 2.0 + (max(-10, min(1, kl_term)) if clip else kl_term)
            assert rewards[0, t].item() == pytest.approx(expected, abs=1e-4)


def test_regularized_policy_adds_the_kl_term_to_what_is_learned():
    torch.manual_seed(0)
    shape = dict(observation_dim=4, num_agents=2, num_actions=3, horizon=5, hidden_dim=8)
    for network in ("mlp", "gru"):
        policy = RegularizedPolicy(shape | {"network": network}, shape | {"num_modes": 2}, beta=2.0, kl_clip=False)
        observations, memory = torch.randn(3, 5, 2, 4), None
        pi_ref = policy.reference(observations)[0].softmax(dim=-1)
        expected = policy.values(observations)[0] + 2 * (pi_ref * 3).log()
        torch.testing.assert_close(policy(observations)[0], expected)
        for step in range(5):
            output, memory = policy(observations[:, step : step + 1], step, memory)
            torch.testing.assert_close(output[:, 0], expected[:, step])


def two_players(share=0.8) -> AgentNetwork:
    """A BC policy with two modes: with probability `share` a player of action 0, else one of action 1."""
    bc_policy = AgentNetwork(2, 1, 2, 4, hidden_dim=8, num_modes=2)
    with torch.no_grad():
        bc_policy.head.weight.zero_()
        bc_policy.head.bias.copy_(torch.tensor([5.0, -5.0, -5.0, 5.0]))
        bc_policy.mode_logits.copy_(torch.tensor([share, 1 - share]).log())
    return bc_policy.requires_grad_(False)


def test_trajectories_are_weighted_by_what_their_modes_earn():
    """The player of action 0 earns 1 on average, the other 3: the optimum multiplies their odds by exp(2 / beta)."""
    actions = torch.tensor([0, 0, 0, 0, 1]).view(5, 1, 1).expand(5, 4, 1)
    returns = torch.tensor([0.5, 1.5, 1.0, 1.0, 3.0])
    for beta in (0.5, 2.0):
        weights = vdn_rlhf.trajectory_weights(two_players(), torch.zeros(5, 5, 1, 2), actions, returns, beta)
        torch.testing.assert_close(weights / weights[4], torch.tensor([[math.exp(-2 / beta)]] * 4 + [[1.0]]), rtol=1e-4, atol=0)


def test_every_agent_is_weighted_by_its_own_mode():
    """Agent 1 always plays as player 0, agent 0 too in half of the trajectories, which earn 1; where it plays as player 1 the
    team earns 3. A third player that earns 100 was seen once: too rarely to be followed."""
    bc_policy = AgentNetwork(2, 2, 3, 4, hidden_dim=8, num_modes=3).requires_grad_(False)
    bc_policy.head.weight.zero_()
    bc_policy.head.bias.copy_(10 * torch.eye(3).flatten())  # player z plays action z
    actions = torch.tensor([[0, 0]] * 150 + [[1, 0]] * 150 + [[2, 2]])
    returns = torch.tensor([1.0] * 150 + [3.0] * 150 + [100.0])
    actions = actions[:, None].expand(301, 4, 2)
    weights = vdn_rlhf.trajectory_weights(bc_policy, torch.zeros(301, 5, 2, 2), actions, returns, beta=2.0)
    low = math.exp(((1 + 1 + 3) / 3 - 3) / 2)
    expected = torch.tensor([[low, low]] * 150 + [[1.0, low]] * 150 + [[0.0, 0.0]])
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-3)


def test_reference_imitates_the_trajectories_by_their_weights():
    """beta 1000: the data as they are, four in five of action 0. beta 0.1: only the player that earns more."""
    actions = (torch.arange(100) % 5 == 0).long().view(100, 1, 1).expand(100, 4, 1)
    returns = 1 + 2 * actions[:, 0, 0].float()
    shape = dict(observation_dim=2, num_agents=1, num_actions=2, horizon=4, hidden_dim=8, num_modes=2)
    for beta, probability in ((1000.0, 0.2), (0.1, 1.0)):
        torch.manual_seed(0)
        args, generator = Args(beta=beta, imitation_updates=300), torch.Generator().manual_seed(0)
        observations = torch.zeros(100, 5, 1, 2)
        data = (shape, observations, actions, returns[None], [generator])
        (reference,) = vdn_rlhf.make_reference_policies([args], [two_players()], *data)
        assert reference.num_modes == 1
        assert reference(observations[:1, :-1])[0].softmax(dim=-1)[0, 0, 0, 1].item() == pytest.approx(probability, abs=0.05)
    args.imitation_updates, bc_policy = 0, two_players()
    assert vdn_rlhf.make_reference_policies([args], [bc_policy], *data) == [bc_policy]


def test_labels_and_true_rewards_change_nothing(spread_models, tmp_path):
    keys = ("true_rewards", "labels", "pairs", "behavior", "deviator", "block")
    stripped = without(spread_models, keys, tmp_path / "stripped.npz")
    paths = [tmp_path / "with.pt", tmp_path / "without.pt", tmp_path / "again.pt"]
    models = {f"{name}_path": str(spread_models.parent / f"{file}.pt") for name, file in MODELS.items()}
    for data_path, path in zip((spread_models, stripped, spread_models), paths, strict=True):
        vdn_rlhf.main(
            Args(data_path=str(data_path), vdn_path=str(path), num_updates=30, imitation_updates=30, **models, **SMALL)
        )
    assert same_weights(paths[0], paths[1]) and same_weights(paths[0], paths[2])
    a, b, c = (torch.load(path, weights_only=True)["metrics"] for path in paths)
    assert a["history"] == b["history"] == c["history"]


def test_reference_imitates_each_agent_where_it_has_weight(monkeypatch):
    """Agent 0 is to be imitated in the first trajectory only, agent 1 in the second only, nobody in the third."""
    monkeypatch.setattr(vdn_rlhf, "trajectory_weights", lambda *_: torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]]))
    actions = torch.tensor([[0, 1], [1, 2], [1, 0]])[:, None].expand(3, 4, 2)
    shape, observations = dict(observation_dim=2, num_agents=2, num_actions=3, horizon=4, hidden_dim=8), torch.zeros(3, 5, 2, 2)
    args, generator = Args(imitation_updates=200, imitation_learning_rate=0.05), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    bc_policy = AgentNetwork(**shape, num_modes=2)
    data = (shape, observations, actions, torch.zeros(1, 3), [generator])
    (reference,) = vdn_rlhf.make_reference_policies([args], [bc_policy], *data)
    probabilities = reference(observations[:1, :-1])[0].softmax(dim=-1)[0]  # (T, A, num_actions)
    assert (probabilities[:, 0, 0] > 0.9).all() and (probabilities[:, 1, 2] > 0.9).all()


@pytest.mark.parametrize("known_kl", [True, False])
def test_the_loss_gets_equation_3(known_kl, spread_models, tmp_path, monkeypatch):
    """Rewards with the KL term of the actions taken; the same term for all actions where it is known, else nothing."""
    calls, real_loss = [], vdn_rlhf.vdn_loss
    monkeypatch.setattr(vdn_rlhf, "vdn_loss", lambda *args: (calls.append(args), real_loss(*args))[1])
    args = Args(data_path=str(spread_models), vdn_path=str(tmp_path / "vdn.pt"), num_updates=1, imitation_updates=0, **SMALL)
    args.beta, args.known_kl = 2.0, known_kl
    vdn_rlhf.main(args)
    _, _, observations, actions, rewards, gamma, td_lambda, off_policy, known = calls[0]
    observations, actions, rewards = observations[0], actions[0], rewards[0]  # a stack of one run
    paths = {name: spread_models.parent / f"{file}.pt" for name, file in MODELS.items()}
    checkpoints = {name: vdn_rlhf.load_checkpoint(path, (name,)) for name, path in paths.items()}
    reward_model = vdn_rlhf.build_network(RewardNetwork, paths["reward"], checkpoints["reward"], "cpu")
    reference = vdn_rlhf.build_network(AgentNetwork, paths["bc"], checkpoints["bc"], "cpu")
    log_pi_ref = reference(observations[:, :-1])[0].log_softmax(dim=-1)
    kl = 2 * (log_pi_ref + math.log(5))
    expected = standardized_rewards(reward_model, checkpoints["reward"]["stats"], observations, actions).sum(dim=-1)
    expected += sum(kl[:, :, i].gather(-1, actions[:, :, i : i + 1]).squeeze(-1) for i in range(3))
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-3)
    assert (gamma, td_lambda, off_policy) == (0.9, 0.8, True)
    if known_kl:
        torch.testing.assert_close(known[0], kl, rtol=1e-4, atol=1e-3)
    else:
        assert known == 0


def test_bfloat16_stays_out_of_outputs_and_targets():
    torch.manual_seed(0)
    network, other = AgentNetwork(4, 3, 5, 6), AgentNetwork(4, 3, 5, 6)
    observations, actions, rewards = torch.randn(8, 7, 3, 4), torch.randint(5, (8, 6, 3)), 10 * torch.randn(8, 6)
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            targets = td_lambda_targets(rewards, rewards, 0.5 * rewards, 0.9, 0.8)
            losses.append(vdn_loss(network, other, observations, actions, rewards, 0.9, 0.8))
            assert network(observations)[0].dtype == targets.dtype == losses[-1].dtype == torch.float32
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.01) and losses[0].item() != losses[1].item()
    assert not any(vdn_rlhf.use_bfloat16(False, torch.device(device)) for device in ("cpu", "cuda"))


def test_updates_follow_the_schedule_and_the_target_follows_the_online_network(spread_models, tmp_path, monkeypatch):
    """The first and last learning rates of Adam, and the target before each loss against its definition."""
    rates, targets, onlines = [], [], []
    real_loss, real_step = vdn_rlhf.vdn_loss, torch.optim.Adam.step

    def loss(online, target, *rest):
        targets.append(target.head.weight.clone())
        onlines.append(online.head.weight.detach().clone())
        return real_loss(online, target, *rest)

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return real_step(self, *args, **kwargs)

    monkeypatch.setattr(vdn_rlhf, "vdn_loss", loss)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    args = Args(
        data_path=str(spread_models),
        vdn_path=str(tmp_path / "vdn.pt"),
        num_updates=20,
        imitation_updates=0,
        learning_rate=0.02,
        **SMALL,
    )
    vdn_rlhf.main(args)
    expected = [0.01 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    assert rates == pytest.approx(expected)
    torch.testing.assert_close(targets[0], onlines[0])
    for i in range(19):
        rate = args.target_update_rate
        torch.testing.assert_close(targets[i + 1], (1 - rate) * targets[i] + rate * onlines[i + 1])


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_spread_end_to_end(network, spread_models, tmp_path, capsys):
    """300 updates on 2,560 trajectories already beat the random policy by far; last and best are kept apart."""
    path = tmp_path / "vdn.pt"
    args = Args(data_path=str(spread_models), vdn_path=str(path), network=network, num_updates=300, learning_rate=3e-3)
    args.device, args.hidden_dim, args.imitation_updates = "cpu", 64, 100
    vdn_rlhf.main(args)
    last, best = (torch.load(p, weights_only=True) for p in (path, tmp_path / "vdn-best.pt"))
    returns = [entry["charts/test_return"] for entry in last["metrics"]["history"]]
    assert len(returns) == 20
    assert last["metrics"]["charts/test_return"] == returns[-1]
    assert best["metrics"]["charts/test_return"] == max(returns)
    assert returns[-1] > -24.5  # random: -26.46
    assert -3 < last["metrics"]["charts/log_pi_ref"] < 0
    assert last["kind"] == "vdn" and last["args"]["network"] == network
    policy = vdn_rlhf.build_network(RegularizedPolicy, path, last, "cpu")  # the whole policy stands in the file
    again = vdn_rlhf.evaluate(vdn_rlhf.make_game("spread"), policy, policy.reference, args.seed + 300, "cpu")
    assert again["charts/test_return"] == returns[-1]
    report = evaluate.main(evaluate.Args(policy_path=str(path), num_episodes=1024, device="cpu"))
    assert report["charts/test_return"] == pytest.approx(returns[-1], abs=2.0)
    printed = capsys.readouterr().out
    for row in ("random", "rookie", "BC, greedy", "BC, sampled", "VDN-RLHF, last", "VDN-RLHF, best", "expert"):
        assert f"| {row} " in printed
    assert "accuracy 0." in printed


def test_preset_paper_finds_its_own_models(spread_data, tmp_path):
    """All three stages with the paper's settings, fewer passes; the models of the default settings are left aside."""
    data_path = tmp_path / "dataset.npz"
    data_path.write_bytes(spread_data.read_bytes())
    common = dict(preset="paper", data_path=str(data_path), device="cpu")
    train_reward.main(train_reward.Args(**common, **train_reward.PRESETS["paper"]["all"] | dict(max_epochs=1)))
    train_bc.main(train_bc.Args(**common, **train_bc.PRESETS["paper"]["all"] | dict(max_epochs=1)))
    vdn_rlhf.main(Args(**common, **vdn_rlhf.PRESETS["paper"]["all"] | dict(num_updates=10)))
    files = {path.stem for path in tmp_path.glob("*.pt")}
    vdn = "vdn-paper-beta1-alpha1-seed1"
    assert files == {"reward-paper-alpha1-seed1", "bc-paper-seed1", vdn, f"{vdn}-best"}
    network = torch.load(tmp_path / f"{vdn}.pt", weights_only=True)["meta"]["network"]
    assert network["network"] == "gru" and network["hidden_dim"] == 64 and not network["time_input"]


def test_beta_pulls_towards_the_reference(spread_models, tmp_path):
    log_pi_ref = []
    for beta in (0.0, 100.0):
        path = tmp_path / f"vdn-{beta:g}.pt"
        args = Args(beta=beta, data_path=str(spread_models), vdn_path=str(path), num_updates=200, learning_rate=3e-3)
        args.device, args.hidden_dim, args.gamma, args.imitation_updates = "cpu", 64, 0.5, 0
        vdn_rlhf.main(args)
        log_pi_ref.append(torch.load(path, weights_only=True)["metrics"]["charts/log_pi_ref"])
    assert log_pi_ref[1] > log_pi_ref[0] + 0.2


def test_unknown_game_finds_the_best_policy(made_up_data, tmp_path, capsys):
    """In the made-up game agent i earns by playing action i: after training, that is what it plays."""
    np.savez(made_up_data, **made_up_arrays(num_trajectories=400, num_pairs=8000))
    common = dict(env="made-up", data_path=str(made_up_data))
    train_reward.main(train_reward.Args(alpha=0.0, max_epochs=20, learning_rate=3e-3, **common, **SMALL))
    train_bc.main(train_bc.Args(max_epochs=2, **common, **SMALL))
    vdn_rlhf.main(
        Args(alpha=0.0, beta=0.1, num_updates=600, imitation_updates=100, learning_rate=3e-3, td_lambda=0.0, **common, **SMALL)
    )
    assert "evaluation skipped" in capsys.readouterr().out
    path = made_up_data.parent / "vdn-beta0.1-alpha0-seed1.pt"
    checkpoint = torch.load(path, weights_only=True)
    network = vdn_rlhf.build_network(RegularizedPolicy, path, checkpoint, "cpu")
    observations = torch.randn(200, 9, 4, 5, generator=torch.Generator().manual_seed(9))
    greedy = network(observations)[0].argmax(dim=-1)  # (B, T, A)
    assert (greedy == torch.arange(4)).float().mean() > 0.9
    assert not (made_up_data.parent / "vdn-beta0.1-alpha0-seed1-best.pt").exists()
