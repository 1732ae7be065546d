"""Experts of spread by the gradient through the simulator."""

import pytest
import torch
import torch.nn.functional as F
from conftest import same_weights

import benchmark.train_spread_experts as experts
import collect_data
from benchmark.train_spread_experts import Args, DifferentiableSpread
from collect_data import ParticleEnv, make_game, mean_return, rollout


def test_one_hot_weights_are_the_actions():
    game = make_game("spread-4x3")
    env, differentiable = ParticleEnv(game, 64), DifferentiableSpread(game, 64)
    env.reset(torch.Generator().manual_seed(0)), differentiable.reset(torch.Generator().manual_seed(0))
    for step in range(25):
        actions = torch.randint(5, (64, 4), generator=torch.Generator().manual_seed(step))
        observations, rewards = env.step(actions)
        assert torch.equal(observations, differentiable.step(F.one_hot(actions, 5).float()))
        touches = (env.distances[:, 3:] < env.contact_distances[:, 3:]).sum(dim=1).float().mean()
        depths = F.relu(env.contact_distances[:, 3:] - env.distances[:, 3:]).sum(dim=1).mean()
        assert differentiable.cost(0.1).item() == pytest.approx((-rewards.mean() - 0.5 * touches + 5 * depths).item(), abs=1e-5)


def test_derivative_of_the_cost_is_that_of_finite_differences():
    """Of what a push in the first step costs over four steps, in float64 and without contacts."""
    game, push = make_game("spread"), torch.zeros(1, 3, 5, dtype=torch.float64)
    positions = torch.tensor([[[-0.8, -0.5], [0.0, 0.7], [0.8, -0.3]]])
    landmarks = torch.tensor([[[-0.3, 0.2], [0.5, 0.5], [0.4, -0.8]]])

    def cost(weights):
        env = DifferentiableSpread(game, 1, dtype=torch.float64)
        env.set_state(positions, torch.zeros(1, 3, 2), landmarks)
        total = 0
        for step in range(4):
            env.step(weights if step == 0 else push)
            total = total + env.cost(0.1)
        return total

    weights = torch.full((1, 3, 5), 0.2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cost(weights), weights)
    assert gradient.abs().max() > 0.01
    for agent in range(3):
        for action in range(5):
            step = torch.zeros_like(weights)
            step[0, agent, action] = 1e-5
            difference = (cost(weights + step) - cost(weights - step)).item() / 2e-5
            assert gradient[0, agent, action].item() == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize("feedback", [0.0, 0.25])
def test_share_of_the_gradient_through_what_agents_see(feedback):
    """What the agents see in the second step depends on the logits of the first, by the whole or a share of the derivative."""

    def derivative(share):
        logits, inputs = torch.zeros(3, 5, requires_grad=True), []

        def network(observations, step):
            inputs.append(observations)
            return logits.expand(8, 1, 3, 5), None

        env = DifferentiableSpread(make_game("spread"), 8)
        experts.loss_of_episodes(env, network, share, 0.1, torch.Generator().manual_seed(0))
        velocities = inputs[1][..., :2].square().sum()
        return torch.autograd.grad(velocities, logits, allow_unused=True, materialize_grads=True)[0]

    whole = derivative(1.0)
    assert whole.abs().max() > 1e-3
    assert torch.allclose(derivative(feedback), feedback * whole, atol=1e-6)


def test_learns_within_seconds(tmp_path):
    args = Args(num_agents=2, num_landmarks=2, policies_path=str(tmp_path), num_updates=80, num_envs=64, hidden_dim=64)
    args.device = "cpu"
    experts.main(args)
    game = make_game("spread-2x2")
    path = tmp_path / "spread-2x2" / "expert.pt"
    checkpoint = collect_data.load_checkpoint(path, ("pathwise",))
    network = collect_data.build_network(collect_data.AgentNetwork, path, checkpoint, "cpu")
    env = ParticleEnv(game, 1024)
    observations = env.reset(torch.Generator().manual_seed(1))
    still = rollout(env, lambda observations, step: torch.zeros(1024, 2, dtype=torch.long), observations)[2].sum(1).mean()
    assert mean_return(game, network, 1024, 1, "cpu") > still + 3
    args.learning_rate = 2e-2
    with pytest.raises(collect_data.UserError, match=r"expert.pt: .*--learning-rate is 0.01 there and 0.02 here"):
        experts.main(args)


def test_interrupted_training_goes_on(tmp_path, monkeypatch):
    """Stopped in mid-run and started again, it ends with the weights of the run that was not stopped."""
    small = dict(num_agents=2, num_landmarks=1, num_updates=40, num_envs=16, hidden_dim=16, device="cpu")
    experts.main(Args(policies_path=str(tmp_path / "a"), **small))
    save_content = experts.save_content

    def save_and_die(path, **content):
        save_content(path, **content)
        if content["metrics"]["updates"] >= 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(experts, "save_content", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        experts.main(Args(policies_path=str(tmp_path / "b"), **small))
    assert [path.name for path in (tmp_path / "b/spread-2x1").iterdir()] == ["training.pt"]
    monkeypatch.setattr(experts, "save_content", save_content)
    experts.main(Args(policies_path=str(tmp_path / "b"), **small))
    for name in ("expert", "rookie", "novice"):
        assert same_weights(*(tmp_path / folder / "spread-2x1" / f"{name}.pt" for folder in "ab"))
    assert not (tmp_path / "b/spread-2x1/training.pt").exists()
