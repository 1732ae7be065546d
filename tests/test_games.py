"""The games beside spread: tag with its prey, reference, other counts of agents; from shipped policies to a learned one."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import benchmark.train_prey as train_prey
import benchmark.train_spread_experts as train_spread_experts
import collect_data
import evaluate
import train_bc
import train_reward
import vdn_rlhf
from collect_data import AgentNetwork, build_network, load_checkpoint, make_game, mean_return, tag

POLICIES = ROOT / "policies"
# Bars of the shipped experts. The authors' best are at -10.03, -10.36, -26.58, -18.73, -25.03 and -24.16.
BARS = {"spread": -8.2, "reference": -9.0, "spread-4x5": -21.0, "spread-5x5": -15.0, "spread-6x5": -17.5, "spread-7x5": -17.0}
SHIPPED = [*BARS, "tag"]


def shipped(name: str, policy: str):
    path = POLICIES / name / f"{policy}.pt"
    checkpoint = load_checkpoint(path, ("vdn", "pathwise"))
    assert path.stat().st_size < 200_000
    trainer = "train_spread_experts.py" if name.startswith("spread-") else "collect_data.py"
    assert trainer in checkpoint["meta"]["command"] and checkpoint["meta"]["seed"] >= 0
    return build_network(AgentNetwork, path, checkpoint, "cpu"), checkpoint["metrics"]


@pytest.mark.parametrize("name", BARS)
def test_shipped_experts_meet_their_bars(name):
    network, metrics = shipped(name, "expert")
    measured = mean_return(make_game(name), network, 4096, 12345, "cpu")
    assert measured >= BARS[name]
    assert measured == pytest.approx(metrics["charts/test_return"], abs=0.4)


@pytest.mark.parametrize("name", SHIPPED)
def test_rookie_and_novice_are_on_the_way_to_the_expert(name):
    """By the share of the way from the random policy to the expert."""
    random, *returns = (
        mean_return(make_game(name), policy and shipped(name, policy)[0], 2048, 12345, "cpu")
        for policy in (None, "novice", "rookie", "expert")
    )
    novice, rookie, _ = ((value - random) / (returns[-1] - random) for value in returns)
    assert 0.1 < novice < rookie - 0.1 and 0.3 < rookie < 0.6
    assert name != "spread" or -22 <= returns[1] <= -18


class UniformPrey(torch.nn.Module):
    def forward(self, observations, first_step=0, memory=None):
        return torch.zeros(*observations.shape[:3], 5), None


def test_prey_is_a_real_opponent():
    game, (expert, _) = make_game("tag"), shipped("tag", "expert")
    random, against_prey, against_uniform = (
        mean_return(g, network, 4096, 12345, "cpu")
        for g, network in ((game, None), (game, expert), (tag(UniformPrey()), expert))
    )
    assert random < 6 and against_prey >= 10 * random  # the authors': 3.95 and 39.3
    assert against_prey <= 0.87 * against_uniform  # the authors': 39.3 and 45.4
    assert game.low == pytest.approx(random, abs=0.3) and game.high == pytest.approx(against_prey, abs=1)


def test_prey_draws_its_moves_from_its_softmax():
    class Fixed(torch.nn.Module):
        def forward(self, observations, first_step=0, memory=None):
            assert observations.shape[2:] == (1, 14)
            return torch.tensor([0.0, 2.0, 1.0, 0.0, 0.0]).expand(*observations.shape[:3], 5), None

    env = collect_data.ParticleEnv(tag(Fixed()), 20_000)
    env.reset(torch.Generator().manual_seed(0))
    still = torch.zeros(20_000, 3, dtype=torch.long)
    env.step(still)
    share = torch.softmax(torch.tensor([0.0, 2.0, 1.0, 0.0, 0.0]), 0)
    pushed = env.velocities[3].round(decimals=3)  # (2, N); from rest a push gives 0.4, unless something stood in the way
    for move, push in enumerate(([0.0, 0.0], [-0.4, 0.0], [0.4, 0.0], [0.0, -0.4], [0.0, 0.4])):
        measured = (pushed == torch.tensor(push)[:, None]).all(dim=0).float().mean()
        assert measured == pytest.approx(share[move].item(), rel=0.25)


@pytest.mark.parametrize("script", ["evaluate", "collect_data"])
def test_tag_without_its_prey_says_so_in_one_line(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    words = ["--env", "tag", *(["--policy-path", "random"] if script == "evaluate" else [])]
    done = subprocess.run([sys.executable, f"{script}.py", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "policies/tag/prey.pt: no such file; tag needs" in done.stderr


@pytest.mark.parametrize("module", [collect_data, train_reward, train_bc, vdn_rlhf])
@pytest.mark.parametrize("env, flag, count", [("tag", "num_agents", 3), ("reference", "num_landmarks", 4)])
def test_counts_where_the_game_fixes_them(module, env, flag, count):
    with pytest.raises(module.UserError, match=f"--{flag.replace('_', '-')} {count}: only --env spread"):
        module.main(module.Args(env=env, device="cpu", **{flag: count}))


def test_policies_of_other_games_and_counts(tmp_path):
    expert = str(POLICIES / "spread" / "expert.pt")
    for env, agents, message in (("spread", 5, "not spread-5x5"), ("tag", None, "not tag")):
        with pytest.raises(evaluate.UserError, match=f"'meta' says it plays 'spread', {message}"):
            evaluate.main(evaluate.Args(expert, env=env, num_agents=agents, device="cpu"))
    shutil.copytree(POLICIES / "spread", tmp_path / "spread-4x3")
    args = collect_data.Args(num_agents=4, num_landmarks=3, policies_path=str(tmp_path), device="cpu")
    with pytest.raises(collect_data.UserError, match="'meta' says it plays spread, not spread-4x3"):
        collect_data.main(args)
    checkpoint = torch.load(expert, weights_only=True)
    torch.save(checkpoint | {"meta": checkpoint["meta"] | {"env": "spread-4x3"}}, tmp_path / "lies.pt")
    with pytest.raises(evaluate.UserError, match=r"\(agents, observation size, actions, steps\) are .* but spread-4x3 has"):
        evaluate.main(evaluate.Args(str(tmp_path / "lies.pt"), device="cpu"))


def test_policies_that_learned_against_another_prey(tmp_path):
    shutil.copytree(POLICIES / "tag", tmp_path / "tag")
    checkpoint = torch.load(tmp_path / "tag" / "rookie.pt", weights_only=True)
    checkpoint["meta"]["sources"]["prey"] = "0" * 16
    torch.save(checkpoint, tmp_path / "tag" / "rookie.pt")
    args = collect_data.Args(env="tag", policies_path=str(tmp_path), data_path=str(tmp_path / "dataset.npz"), device="cpu")
    with pytest.raises(collect_data.UserError, match=r"rookie.pt: learned against another prey; --train-policies"):
        collect_data.main(args)
    assert not (tmp_path / "dataset.npz").exists()


def test_online_vdn_does_not_write_over_better_experts(tmp_path):
    shutil.copytree(POLICIES / "spread-5x5", tmp_path / "spread-5x5")
    before = (tmp_path / "spread-5x5" / "expert.pt").read_bytes()
    args = collect_data.Args(num_agents=5, num_landmarks=5, policies_path=str(tmp_path), train_policies=True, device="cpu")
    with pytest.raises(collect_data.UserError, match=r"expert.pt: made by benchmark/train_spread_experts.py; delete it"):
        collect_data.main(args)
    assert (tmp_path / "spread-5x5" / "expert.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("trainer", "flag", "value", "message"),
    [
        (train_spread_experts, "num_agents", 0, "--num-agents 0: must be at least 1"),
        (train_spread_experts, "touch_depth", 0.0, "--touch-depth 0.0: must be above 0"),
        (train_spread_experts, "feedback", 3.0, "--feedback 3.0: must be at most 1"),
        (train_prey, "prey_learning_rate", 0.0, "--prey-learning-rate 0.0: must be above 0"),
        (train_prey, "buffer_size", 1000, "--buffer-size 1000: must be a multiple of --num-envs 256"),
    ],
)
def test_flags_of_the_trainers_in_benchmark(trainer, flag, value, message):
    with pytest.raises(collect_data.UserError, match=message):
        trainer.main(trainer.Args(device="cpu", **{flag: value}))


def test_dataset_of_another_count(spread_data, tmp_path):
    args = train_bc.Args(num_agents=5, num_landmarks=5, data_path=str(spread_data), bc_path=str(tmp_path / "bc.pt"))
    with pytest.raises(train_bc.UserError, match="'meta' is of the game 'spread', not spread-5x5; pass that game's --env"):
        train_bc.main(args)


@pytest.mark.parametrize(
    ("name", "env", "counts"),
    [("reference", "reference", {}), ("tag", "tag", {}), ("spread-5x4", "spread", {"num_agents": 5, "num_landmarks": 4})],
)
def test_whole_pipeline(name, env, counts, tmp_path, monkeypatch, capsys):
    """Every stage runs on every game and every file names it. Where policies are shipped, few updates on a small dataset beat
    the random policy; elsewhere policies of eight updates and a uniform prey stand in."""
    monkeypatch.chdir(tmp_path)
    common = dict(env=env, device="cpu", **counts)
    stand_in = {}
    if name not in SHIPPED:
        stand_in = dict(policies_path=str(tmp_path / "policies"), num_updates=8, num_envs=16)
        prey = AgentNetwork(14, 1, 5, 25, hidden_dim=8, time_input=False).requires_grad_(False)
        for module in (collect_data, train_bc, vdn_rlhf):
            monkeypatch.setattr(module, "load_prey", lambda: prey)
    collect_data.main(collect_data.Args(num_trajectories=2560, **common, **stand_in))
    train_reward.main(train_reward.Args(max_epochs=20 if name in SHIPPED else 1, hidden_dim=32, **common))
    train_bc.main(train_bc.Args(max_epochs=4 if name in SHIPPED else 1, batch_size=16, hidden_dim=32, **common))
    vdn_rlhf.main(vdn_rlhf.Args(num_updates=200 if name in SHIPPED else 40, imitation_updates=300, hidden_dim=64, **common))
    folder = tmp_path / "runs" / name / "diversified"
    for file in ("reward-alpha1-seed1.pt", "bc-seed1.pt", "vdn-beta1-alpha1-seed1.pt"):
        assert torch.load(folder / file, weights_only=True)["meta"]["env"] == name
    game, table = collect_data.make_game(name), capsys.readouterr().out
    assert all(f"| {row}" in table for row in ("random", "BC, greedy", "BC, sampled", "VDN-RLHF, last", "VDN-RLHF, best"))
    if name not in SHIPPED:
        return
    assert all(f"| {row}" in table for row in ("novice", "rookie", "expert"))
    path = folder / "vdn-beta1-alpha1-seed1.pt"
    policy = build_network(vdn_rlhf.RegularizedPolicy, path, load_checkpoint(path, ("vdn",)), "cpu")
    assert game.metrics(mean_return(game, policy, 1024, 1, "cpu"))["charts/score"] > 15
    bc = torch.load(folder / "bc-seed1.pt", weights_only=True)["metrics"]
    assert bc["bc/mode_nll"] < bc["bc/nll"] < 0.9 * math.log(game.num_actions)


@pytest.mark.parametrize("name", ["spread", "reference"])
def test_deviators_are_rookies_and_novices_of_every_agent(name):
    """Each policy replaced by one that always plays its own action."""

    class Always(torch.nn.Module):
        def __init__(self, action):
            super().__init__()
            self.action = action

        def forward(self, observations, first_step=0, memory=None):
            return torch.nn.functional.one_hot(torch.full(observations.shape[:3], self.action), 5).float(), None

    game, args = make_game(name), collect_data.Args(num_trajectories=1024, epsilon=0.0)
    networks = {name: Always(action) for name, action in (("expert", 0), ("rookie", 1), ("novice", 2))}
    data = collect_data.play_mixture(args, game, networks, torch.device("cpu"))
    unilateral = data["behavior"] == collect_data.UNILATERAL
    actions, deviator = data["actions"][unilateral].long(), data["deviator"][unilateral]
    A = game.num_agents
    counts = torch.zeros(A, 3)
    for agent in range(A):
        chosen = actions[deviator == agent]  # (n, T, A)
        assert (chosen[:, :, [a for a in range(A) if a != agent]] == 0).all()
        assert (chosen[:, :, agent] == chosen[:, :1, agent]).all()
        counts[agent] = torch.bincount(chosen[:, 0, agent], minlength=3)
    assert (counts[:, 0] == 0).all() and (counts[:, 1:] - 256 / (2 * A)).abs().max() <= 1
    assert (data["actions"][data["behavior"] == collect_data.ROOKIE] == 1).all()


def test_counts_without_a_scale_have_no_score(capsys):
    report = evaluate.main(evaluate.Args("random", env="spread", num_agents=2, num_episodes=64, device="cpu"))
    assert report["env"] == "spread-2x2" and "charts/score" not in report
    assert report["charts/test_return"] < 0 and "charts/score" not in capsys.readouterr().out


@pytest.mark.parametrize("module", [collect_data, train_reward, train_bc, vdn_rlhf])
def test_counts_have_one_spelling(module):
    with pytest.raises(module.UserError, match="--env spread-5x5: pass --env spread with --num-agents and --num-landmarks"):
        module.main(module.Args(env="spread-5x5", device="cpu"))


def test_prey_of_other_sizes(tmp_path, monkeypatch):
    (tmp_path / "policies/tag").mkdir(parents=True)
    monkeypatch.setattr(collect_data, "__file__", str(tmp_path / "collect_data.py"))
    shape = dict(observation_dim=16, num_agents=1, num_actions=5, horizon=25, hidden_dim=8)
    path = tmp_path / "policies/tag/prey.pt"
    collect_data.save_checkpoint(path, "prey", collect_data.Args(), {"network": shape}, AgentNetwork(**shape), {}, {})
    with pytest.raises(collect_data.UserError, match=r"prey.pt: 'meta' has other sizes than the prey's 14 observations"):
        make_game("tag")


def test_generalised_advantages_against_a_loop():
    rewards, values = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    measured = train_prey.gae(rewards, values, gamma=0.9, gae_lambda=0.7)
    for n in range(3):
        for t in range(6):
            deltas = [rewards[n, k] + 0.9 * (values[n, k + 1] if k < 5 else 0) - values[n, k] for k in range(t, 6)]
            expected = sum((0.9 * 0.7) ** i * delta for i, delta in enumerate(deltas))
            assert measured[n, t].item() == pytest.approx(expected.item())


@pytest.mark.parametrize(("clip", "low", "high"), [(0.2, 1.2, 2.0), (100.0, 3.0, 5.0)])
def test_ppo_prefers_what_paid(clip, low, high):
    """One state, one step, one of five actions pays: its probability rises until the clip stops it, and the critic learns the
    mean reward."""
    args = train_prey.Args(num_epochs=40, hidden_dim=16, clip=clip, entropy_coefficient=0.0)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    prey = train_prey.Prey(3, args, "cpu")
    observations, states = torch.ones(256, 1, 1, 14), torch.ones(256, 1, 3)
    actions = torch.randint(5, (256, 1, 1), generator=generator)
    rewards = (actions == 2).float().squeeze(-1)
    probability = [prey.log_probs(observations, actions)[0][actions[..., 0] == 2][0].exp().item()]
    prey.update(observations, actions, states, rewards, args, generator)
    probability.append(prey.log_probs(observations, actions)[0][actions[..., 0] == 2][0].exp().item())
    assert low < probability[1] / probability[0] < high
    assert prey.critic(states).mean().item() == pytest.approx(rewards.mean().item(), abs=0.1)


def test_prey_and_hunters_learn(tmp_path, capsys, monkeypatch):
    """A few rollouts: the prey learns to stay where it costs nothing, and the file is what tag loads. The hunters, too weak yet
    for a figure, are updated on the team's rewards: 30 for every touch."""
    team_rewards, weights, vdn_loss = [], [], train_prey.vdn_loss

    def spy(online, target, observations, actions, rewards, *others):
        team_rewards.append(rewards)
        weights.append(online.head.weight.detach().clone())
        return vdn_loss(online, target, observations, actions, rewards, *others)

    monkeypatch.setattr(train_prey, "vdn_loss", spy)
    path = tmp_path / "prey.pt"
    args = train_prey.Args(str(path), num_iterations=20, num_envs=64, hidden_dim=32, exploration_iterations=10, device="cpu")
    train_prey.main(args)
    team_rewards = torch.cat(team_rewards)
    assert (team_rewards % 30 == 0).all() and (team_rewards >= 0).all() and team_rewards.max() > 0
    assert len(weights) == 80 and not torch.equal(weights[0], weights[-1])
    checkpoint = load_checkpoint(path, ("prey",))
    prey = build_network(AgentNetwork, path, checkpoint, "cpu")
    assert (prey.observation_dim, prey.num_agents, prey.num_actions) == (14, 1, 5)
    first, last = checkpoint["metrics"]["history"][0], checkpoint["metrics"]["history"][-1]
    assert last[2] > first[2] + 3  # the prey's return, -10 for a touch
    random_return = mean_return(tag(prey), None, 4096, 1, "cpu")
    assert checkpoint["metrics"]["random_return"] == pytest.approx(random_return, abs=0.6)
    assert f"{path}: adversary_return" in capsys.readouterr().out
    args.clip = 0.3
    with pytest.raises(collect_data.UserError, match=r"prey.pt: .*--clip is 0.2 there and 0.3 here"):
        train_prey.main(args)
