"""benchmark/train_experts.py, train_prey.py and train_spread_experts.py: the parts against hand-worked
numbers, and short runs that learn."""

import pytest
import torch
import torch.nn.functional as F

import benchmark.train_experts as train_experts
import benchmark.train_prey as train_prey
import benchmark.train_spread_experts as spread_experts
import evaluate
from evaluate import AgentNetwork, ParticleEnv, make_game, mean_return

SMALL = {"num_envs": 32, "batch_size": 16, "device": "cpu"}


def load(path):
    checkpoint = evaluate.load_checkpoint(path, "expert")
    return evaluate.build_network(AgentNetwork, path, checkpoint, "cpu"), checkpoint


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_factored_head_is_saved_as_the_equal_dense_one():
    sizes = make_game("reference").sizes
    factored, dense = train_experts.FactoredNetwork(sizes, 10, 16), AgentNetwork(sizes, hidden_dim=16)
    dense.load_state_dict(train_experts.dense_weights(factored))
    observations = torch.randn(4, 25, 2, 21)
    outputs = factored(observations)[0]
    torch.testing.assert_close(dense(observations)[0], outputs)
    moves = outputs.unflatten(-1, (10, 5)).diff(dim=-1)  # the effect of a move is the same for all words
    torch.testing.assert_close(moves, moves[..., :1, :].expand_as(moves))


def test_update_is_td_lambda_on_the_team_reward():
    """With values of zero everywhere the target is the discounted return of lambda-weighted rewards. The
    oldest of three episodes, the only other one, is written over."""
    args = train_experts.Args(gamma=0.5, td_lambda=0.5, buffer_size=2, **SMALL)
    learner = train_experts.OnlineVDN(AgentNetwork((1, 2, 3, 3), hidden_dim=4), args)
    for network in (learner.online, learner.target):
        torch.nn.init.zeros_(network.head.weight)
        torch.nn.init.zeros_(network.head.bias)
    for rewards in ([1.0, 1.0, 1.0], [4.0, 8.0, 16.0], [4.0, 8.0, 16.0]):
        learner.store(torch.zeros(1, 3, 2, 1), torch.zeros(1, 3, 2), torch.tensor([rewards]))
    targets = [4 + 0.25 * (8 + 0.25 * 16), 8 + 0.25 * 16, 16]
    loss = learner.update(0.0, seeded())
    assert loss.item() == pytest.approx(sum(target**2 for target in targets) / 3)


def test_speech_is_explored_by_holding_words():
    """Words change every tenth step, to the language's or (30 %) a random one; moves, and agents that do not
    hold, stay."""

    def explore(hold_share):
        act, language = torch.full((4000, 2), 5 * 7 + 2), torch.full((4000, 2), 3)  # word 7, move 2; word 3
        players = (lambda *_: act), (lambda *_: language)
        explorer = train_experts.explore_speech(*players, 10, 1.0, hold_share, seeded())
        return torch.stack([explorer(None, step) for step in range(25)], dim=1)

    assert (explore(0.0) == 5 * 7 + 2).all()
    actions = explore(1.0)
    assert (actions % 5 == 2).all()
    words = actions // 5
    assert (words == 3).float().mean() == pytest.approx(0.7 + 0.03, abs=0.02)
    changes = (words[:, 1:] != words[:, :-1]).float().mean()
    assert changes == pytest.approx(0.1 * (1 - 0.73**2 - 9 * 0.03**2), abs=0.005)


def test_random_language_depends_on_the_goal():
    game = make_game("reference")
    env = ParticleEnv(game, 20_000)
    words = train_experts.random_language(game, 1, "cpu")(env.reset(seeded()))
    joint = torch.bincount(10 * env.goals[0] + words[:, 0], minlength=30).view(3, 10) / 20_000
    independent = joint.sum(dim=0) * joint.sum(dim=1, keepdim=True)
    information = (joint * (joint / independent).clamp(min=1e-9).log2()).sum()
    assert 0.1 < information < 1.58  # bits; a word that told the goal would have log2(3)


def test_online_vdn_learns_and_saves_what_it_was_then(tmp_path, capsys):
    args = train_experts.Args(env="reference", policies_path=str(tmp_path), num_updates=200, **SMALL)
    args.exploration_updates, args.hidden_dim, args.learning_rate = 100, 32, 3e-3
    train_experts.main(args)
    for name in ("expert", "rookie", "novice"):
        network, checkpoint = load(tmp_path / f"{name}.pt")
        measured = mean_return(make_game("reference"), network, "cpu", 1 + 10**6)
        assert measured == pytest.approx(checkpoint["metrics"]["charts/test_return"], abs=1e-3)
        if name == "expert":
            assert checkpoint["metrics"]["updates"] == 200
            assert measured > -40  # -56 after a few updates, when nobody knows where to go
    capsys.readouterr()
    train_experts.main(args)
    assert "already there" in capsys.readouterr().out
    args.gamma = 0.9
    with pytest.raises(evaluate.UserError, match=r"expert.pt: made with other settings \(--gamma 0.95 there"):
        train_experts.main(args)


def test_rookie_and_novice_are_the_checkpoints_of_their_strength(tmp_path, monkeypatch):
    """The random policy has -30, the expert, which is the last, -10: the rookie is next to -22, the novice to
    -26."""
    game, args = make_game("spread"), train_experts.Args(policies_path=str(tmp_path), hidden_dim=4)
    weights = AgentNetwork(game.sizes, hidden_dim=4).state_dict()
    checkpoints = [(i, value, weights) for i, value in enumerate((-31.0, -25.0, -23.0, -18.0, -9.0, -10.0))]
    monkeypatch.setattr(train_experts, "mean_return", lambda game, policy, *_: -10.0 if policy else -30.0)
    train_experts.save_experts(args, game, tmp_path, checkpoints, "cpu")
    for name, updates in (("expert", 5), ("rookie", 2), ("novice", 1)):
        assert load(tmp_path / f"{name}.pt")[1]["metrics"]["updates"] == updates


# The prey ---
def test_generalised_advantages_against_a_loop():
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64, generator=seeded())
    measured = train_prey.gae(rewards, values, gamma=0.9, gae_lambda=0.7)
    deltas = rewards + 0.9 * F.pad(values[:, 1:], (0, 1)) - values
    for t in range(6):
        expected = sum((0.9 * 0.7) ** (k - t) * deltas[:, k] for k in range(t, 6))
        torch.testing.assert_close(measured[:, t], expected)


@pytest.mark.parametrize(("clip", "low", "high"), [(0.2, 1.2, 2.0), (100.0, 3.0, 5.0)])
def test_ppo_prefers_what_paid(clip, low, high):
    """One state, one step, one of five actions pays: its probability rises until the clip stops it, and the
    critic learns the mean reward."""
    args, generator = train_prey.Args(num_epochs=40, hidden_dim=16, clip=clip), seeded()
    args.entropy_coefficient = 0.0
    torch.manual_seed(0)
    prey = train_prey.Prey(3, args, "cpu")
    observations, states = torch.ones(256, 1, 14), torch.ones(256, 1, 3)
    actions = torch.randint(5, (256, 1), generator=generator)
    rewards = (actions == 2).float()
    before = prey.actor(observations[0, 0]).softmax(-1)[2].item()
    prey.update(observations, actions, states, rewards, 0.0, generator)
    assert low < prey.actor(observations[0, 0]).softmax(-1)[2].item() / before < high
    assert prey.critic(states).mean().item() == pytest.approx(rewards.mean().item(), abs=0.1)


def test_the_prey_that_is_kept_is_the_last_before_random_adversaries_earn_less(tmp_path, monkeypatch):
    """The hunters learn on the rewards of the team: 30 for every touch."""
    returns, actors, stored, store = iter((5.0, 4.0, 3.5, 2.9)), [], [], train_experts.OnlineVDN.store
    monkeypatch.setattr(train_experts.OnlineVDN, "store", lambda *x: (stored.append(x[-1]), store(*x)))

    def measure(game, policy, device, seed):
        actors.append({name: tensor.clone() for name, tensor in game.prey.state_dict().items()})
        return next(returns)

    monkeypatch.setattr(train_prey, "mean_return", measure)
    args = train_prey.Args(prey_path=str(tmp_path / "prey.pt"), measure_every=2, hidden_dim=8, **SMALL)
    train_prey.main(args)
    checkpoint = evaluate.load_checkpoint(tmp_path / "prey.pt", "prey")
    assert checkpoint["metrics"]["random_return"] == 3.5 and checkpoint["metrics"]["updates"] == 6
    assert len(actors) == 4 and all(torch.equal(checkpoint["state_dict"][k], x) for k, x in actors[2].items())
    evaluate.build_network(evaluate.PreyNetwork, tmp_path / "prey.pt", checkpoint, "cpu")
    stored = torch.stack(stored)  # 8 rollouts of 32 episodes of 25 steps
    assert stored.shape == (8, 32, 25) and (stored % 30 == 0).all() and stored.max() > 0
    train_prey.main(args)  # is there already: no return is measured again


# Gradients through the simulator ---
def test_one_hot_weights_are_the_actions():
    game = make_game("spread-4x3")
    env, differentiable = ParticleEnv(game, 64), spread_experts.DifferentiableSpread(game, 64)
    env.reset(seeded())
    differentiable.reset(seeded())
    for step in range(25):
        actions = torch.randint(5, (64, 4), generator=seeded(step))
        observations, rewards = env.step(actions)
        assert torch.equal(observations, differentiable.step(F.one_hot(actions, 5).float()))
        touches = (env.distances[:, 3:] < env.contact_distances[:, 3:]).sum(dim=1).float().mean()
        depths = F.relu(env.contact_distances[:, 3:] - env.distances[:, 3:]).sum(dim=1).mean()
        expected = (-rewards.mean() - 0.5 * touches + 5 * depths).item()
        assert differentiable.cost(0.1).item() == pytest.approx(expected, abs=1e-5)


def test_derivative_of_the_cost_is_that_of_finite_differences():
    """Of what a push in the first step costs over four steps, in float64 and without contacts."""

    def cost(weights):
        env = spread_experts.DifferentiableSpread(make_game("spread-2x2"), 1, dtype=torch.float64)
        env.reset(seeded())
        total = 0
        for step in range(4):
            env.step(weights if step == 0 else torch.zeros_like(weights))
            total = total + env.cost(0.1)
        return total

    weights = torch.full((1, 2, 5), 0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(cost(weights), weights)[0].abs().max() > 0.01
    assert torch.autograd.gradcheck(cost, weights)


def test_share_of_the_gradient_through_what_agents_see():
    """What agents see in the second step depends on the logits of the first, by a share of the derivative."""

    def derivative(share):
        logits, inputs = torch.zeros(3, 5, requires_grad=True), []

        def network(observations, step):
            inputs.append(observations)
            return logits.expand(8, 1, 3, 5), None

        env = spread_experts.DifferentiableSpread(make_game("spread"), 8)
        spread_experts.loss_of_episodes(env, network, share, 0.1, seeded())
        return torch.autograd.grad(inputs[1][..., :2].square().sum(), logits)[0]

    assert derivative(1.0).abs().max() > 1e-3
    assert torch.allclose(derivative(0.25), 0.25 * derivative(1.0), atol=1e-6)


def test_pathwise_gradients_learn_within_seconds(tmp_path):
    args = spread_experts.Args("spread-2x2", policies_path=str(tmp_path), device="cpu")
    args.num_updates, args.num_envs, args.hidden_dim = 80, 64, 64
    spread_experts.main(args)
    network = load(tmp_path / "expert.pt")[0]
    assert mean_return(make_game("spread-2x2"), network, "cpu", 1, 1024) > -15  # -19.5 standing still
