"""benchmark/nash_gap.py: games whose gap is known, the pairs of episodes, the targets."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import benchmark.nash_gap as nash_gap
from benchmark.nash_gap import Args, measure_gains, play_pairs
from evaluate import AgentNetwork, ParticleEnv, make_actor, make_game, rollout

STRENGTHS = (1.0, 0.4)  # how much faster than by 0.5 an agent gets per step
CPU = torch.device("cpu")


def observe(env):
    """Own velocity along x, whether the landmark is to the left or right of the middle, and how far."""
    landmark = env.landmarks[:, 0].expand(2, -1)  # (A, N)
    return torch.stack([env.velocities[:, 0], landmark.sign(), landmark.abs()], dim=1)


def reward(env):
    """Own speed along x towards the landmark, the more the further out it is, and all of the other's."""
    speeds = env.velocities[:, 0] * env.landmarks[:, 0]
    return speeds + speeds.flip(0)


PARTS = {"observation_dim": 3, "observe": observe, "reward": reward, "body_sizes": (-float("inf"),) * 2}
PARTS |= {"acceleration": tuple(5 * strength for strength in STRENGTHS), "horizon": 6}
GAME = replace(make_game("spread-2x1"), name="speed", **PARTS)
# Pushed towards the landmark from rest, the speed after t steps is 2 * (1 - 0.75^t) times the strength, and
# the landmark is at a distance of 1/2 on average. The other's part of the reward does not change.
GAPS = [strength * 0.5 * sum(2 * (1 - 0.75**t) for t in range(1, 7)) for strength in STRENGTHS]


def stand(observations, *_):
    """A policy, as push: observations (N, 1, A, 3) -> outputs (N, 1, A, 5), no memory."""
    return F.one_hot(torch.zeros_like(observations[..., 1]).long(), 5).float(), None


def push(observations, *_):
    return F.one_hot(torch.where(observations[..., 1] > 0, 2, 1), 5).float(), None


@pytest.fixture(autouse=True)
def small_budget(monkeypatch):
    small = {"NUM_ENVS": 32, "CHOICE_EPISODES": 128, "NUM_CHECKPOINTS": 1, "CANDIDATE_MARGINS": (0.0, 0.1)}
    for name, value in small.items():
        monkeypatch.setattr(nash_gap, name, value)


def train(game, policies, num_updates):
    torch.manual_seed(0)
    args = Args(("scripted",), num_updates=num_updates, device="cpu")
    return nash_gap.train_best_responses(game, policies, args, CPU)


@pytest.mark.parametrize(("policy", "gaps"), [(stand, GAPS), (None, GAPS), (push, [0, 0])])
def test_known_gaps(policy, gaps):
    """Random pushes to both sides cancel out, so their gap is that of standing; pushing is an equilibrium."""
    torch.manual_seed(0)
    args = Args(("scripted",), num_updates=240, num_episodes=1024, device="cpu")
    report = nash_gap.find_gap(GAME, policy, None, args, CPU)
    assert report["agent_gains"] == pytest.approx(gaps, rel=0.15, abs=0.02)


def test_intervals_of_known_gains(monkeypatch):
    """Of 1, 3 and 2, 6 in two episodes, so 3, 9 for both agents: standard deviations 1, 2 and 3."""
    monkeypatch.setattr(nash_gap, "train_best_responses", lambda *_: (None, []))
    monkeypatch.setattr(nash_gap, "measure_gains", lambda *_: torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    report = nash_gap.find_gap(GAME, stand, None, Args(("scripted",)), CPU)
    assert report["charts/nash_gap"] == 6 and report["agent_gains"] == [2, 4]
    intervals = [report["nash_gap_interval"], *report["agent_gain_intervals"]]
    for interval, mean, deviation in zip(intervals, (6, 2, 4), (3, 1, 2), strict=True):
        margin = 1.96 * deviation / 2**0.5
        assert interval == pytest.approx([mean - margin, mean + margin])


def test_every_agent_has_its_own_best_response(monkeypatch):
    """Of four candidates the second, the expert, is said to be better than the policy for agent 1 alone: it
    goes on from pushing, agent 0 from standing still. The third is said to be the best one for agent 0, for
    which the fourth is better in one of two episodes, and the fourth, which never deviates, for agent 1."""
    gains = iter([[[0, 0]] * 2, [[-1, 1]] * 2, [[2, 1]] * 2, [[0, 3], [6, 3]]])
    seen, loss = [], nash_gap.dqn_loss

    def spy(online, target, start, episodes):
        seen.append(episodes[1][..., torch.arange(2), start])  # the actions of the start policies
        return loss(online, target, start, episodes)

    monkeypatch.setattr(nash_gap, "CANDIDATE_MARGINS", (0.0, 1e6))
    monkeypatch.setattr(nash_gap, "CHOICE_EPISODES", 2)
    monkeypatch.setattr(nash_gap, "measure_gains", lambda *_: torch.tensor(next(gains)).double())
    monkeypatch.setattr(nash_gap, "dqn_loss", spy)
    respond, (one, two) = train(GAME, [stand, push], num_updates=80)
    assert (one["start"], one["updates"], one["margin"], one["choice_gain"]) == ("policy", 80, 0, 2)
    assert (two["start"], two["updates"], two["choice_gain"]) == ("expert", 80, 3) and two["margin"] > 1e5
    assert all((base[..., 0] == 0).all() and (base[..., 1] > 0).all() for base in seen)
    measured = measure_gains(GAME, [stand, push], respond, 4000, 0, CPU, False).mean(dim=0)
    assert measured.tolist() == pytest.approx(GAPS, rel=0.1)


def test_gains_are_not_clipped():
    gains = measure_gains(GAME, [push], lambda inputs, known, step: 0 * known[..., 0], 4000, 0, CPU, False)
    assert gains.shape == (4000, 2) and (gains < 0).all()
    assert gains.mean(dim=0).tolist() == pytest.approx([-gap for gap in GAPS], rel=0.05)


def test_pairs_are_the_episodes_that_make_actor_plays():
    """With two recurrent policies: the deviation of each agent alone, what it earns more than by the second
    policy (agent 0) or the first (agent 1), and what it sees."""
    torch.manual_seed(0)
    game, M = make_game("reference"), 5
    policies = [AgentNetwork(game.sizes, "gru", 16).requires_grad_(False) for _ in range(2)]

    def respond(inputs, known_actions, step):
        deviates = (torch.arange(M)[:, None] % 2 == 0) & (step % 3 == 1)
        return torch.where(deviates, 13, known_actions[:, [0, 1], [1, 0]])

    baseline = torch.tensor([1, 0])
    words = game, policies, respond, baseline, M, torch.Generator().manual_seed(3), False, torch.float64
    inputs, known_actions, actions, gains = play_pairs(*words)

    def play(agent, responds):
        """The returns of the agent, the others follow the first policy."""
        act_policy, act_other = (make_actor(policy, 50, torch.Generator()) for policy in policies)

        def act(observations, step):
            known = torch.stack([act_policy(observations, step), act_other(observations, step)], dim=-1)
            played = respond(None, known, step)[:, agent] if responds else known[:, agent, baseline[agent]]
            if responds:
                assert torch.equal(inputs[:, step, agent, :21], observations[:, agent])
                assert torch.equal(known_actions[:, step, agent], known[:, agent])
                assert torch.equal(actions[:, step, agent], played)
            return torch.where(torch.arange(2) == agent, played[:, None], known[..., 0])

        env = ParticleEnv(game, M, dtype=torch.float64)
        return rollout(env, act, env.reset(torch.Generator().manual_seed(3)))[2][..., agent]

    for agent in (0, 1):
        torch.testing.assert_close(gains[..., agent], play(agent, True) - play(agent, False))
        assert (gains[::2, :, agent].abs().amax(dim=1) > 1e-3).all() and (gains[1::2, :, agent] == 0).all()
    for k, first in enumerate((21, 121)):  # one-hot actions, then outputs, of both policies
        for numbers in (inputs[..., first : first + 50], inputs[..., first + 50 : first + 100]):
            assert torch.equal(numbers.argmax(dim=-1), known_actions[..., k])


@pytest.mark.parametrize("policy", ["random", "sampled"])
def test_copies_have_the_same_draws(policy):
    """Of the policy and of the prey: who deviates by nothing gains nothing, and until the first deviation
    nothing changes."""
    torch.manual_seed(0)
    game = make_game("tag")
    network = None if policy == "random" else AgentNetwork(game.sizes, hidden_dim=16).requires_grad_(False)

    def play(respond):
        generator, baseline = torch.Generator().manual_seed(0), torch.zeros(3, dtype=torch.long)
        return play_pairs(game, [network], respond, baseline, 1000, generator, True, torch.float64)

    _, known_actions, _, gains = play(lambda inputs, known_actions, step: known_actions[..., 0])
    assert (gains == 0).all() and len(known_actions.unique()) == 5
    gains = play(lambda inputs, known_actions, step: known_actions[..., 0] * (step < 10))[-1]
    assert (gains[:, :11] == 0).all() and (gains[:, 11:] != 0).any(dim=(0, 1)).all()


def test_sampling_follows_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0])
    actions = nash_gap.draw(logits.expand(40_000, 2, 3), 2, torch.Generator().manual_seed(0))
    share = torch.bincount(actions.flatten(), minlength=3) / actions.numel()
    torch.testing.assert_close(share, logits.softmax(0), atol=0.01, rtol=0)


def test_exploration_changes_moves_and_words_apart(monkeypatch):
    """In a tenth of the steps, each in one half of them, to another one with probability 4/5 and 9/10."""
    episodes = []
    monkeypatch.setattr(nash_gap, "NUM_ENVS", 512)
    monkeypatch.setattr(nash_gap, "measure_gains", lambda *_: torch.zeros(2, 2))
    monkeypatch.setattr(nash_gap, "play_pairs", lambda *x: episodes.append(play_pairs(*x)) or episodes[-1])
    train(make_game("reference"), [None], num_updates=1)
    _, known_actions, actions, _ = episodes[0]  # 512 x 25 x 2 actions: 25 % are five standard deviations
    move, word = actions % 5 != known_actions[..., 0] % 5, actions // 5 != known_actions[..., 0] // 5
    for event, share in ((move, 0.04), (word, 0.045), (move & word, 0.1 * 0.4 * 0.45)):
        assert event.double().mean().item() == pytest.approx(share, rel=0.25)


def test_loss_worked_by_hand(monkeypatch):
    """One episode of two steps, one agent, three actions, gamma 0.5, lambda 0.25. In step 1 the online net
    prefers action 2 by 0.4, which is within the margin of the start policy's action 0: the target network's
    value of that is 3. G_1 = 10, G_0 = 1 + 0.5 * (3 + 0.25 * (10 - 4)) = 3.25."""
    for name, value in {"GAMMA": 0.5, "TD_LAMBDA": 0.25, "MARGIN": 0.5}.items():
        monkeypatch.setattr(nash_gap, name, value)
    online = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.4]]).view(1, 2, 1, 3)
    target = torch.tensor([[7.0, 8.0, 9.0], [3.0, 4.0, 5.0]]).view(1, 2, 1, 3)
    known_actions, actions = torch.zeros(1, 2, 1, 1, dtype=torch.long), torch.tensor([1, 1]).view(1, 2, 1)
    episodes = (torch.zeros(1, 2, 1, 4), known_actions, actions, torch.tensor([1.0, 10.0]).view(1, 2, 1))
    start = torch.zeros(1, dtype=torch.long)
    loss = nash_gap.dqn_loss(lambda x: (online, None), lambda x: (target, None), start, episodes)
    assert loss.item() == pytest.approx(((1 - 3.25) ** 2 + (0 - 10) ** 2) / 2)


@pytest.mark.parametrize("env", ["spread", "tag", "reference"])
def test_report(env, tmp_path, capsys):
    rookie, path = str(ROOT / "policies" / env / "rookie.pt"), tmp_path / "report.json"
    args = Args((rookie, "random"), num_updates=16, num_episodes=130, json_path=str(path), device="cpu")
    report = nash_gap.main(args)
    assert json.loads(path.read_text()) == report == nash_gap.main(args)
    assert list(report) == [rookie, "random"] and list(tmp_path.iterdir()) == [path]
    row = report[rookie]
    assert len(row["agent_gains"]) == len(row["best_responses"]) == make_game(env).num_agents
    assert env != "spread" or [best["start"] for best in row["best_responses"]] == ["expert"] * 3
    gap, high = row["charts/nash_gap"], row["nash_gap_interval"][1]
    assert f"{rookie} on {env}: Nash gap {gap:.3f} ± {high - gap:.3f}, gains" in capsys.readouterr().out
