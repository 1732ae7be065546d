"""evaluate.py --nash-gap: games whose gap is known, the pairs of episodes, the targets."""

import json

import pytest
import torch
from conftest import ROOT

import evaluate
from evaluate import AgentNetwork, Args, Game, ParticleEnv, make_actor, make_game, measure_gains, play_pairs, rollout

LEFT, RIGHT = 1, 2
STRENGTHS = (1.0, 0.4)  # how much faster than by 0.5 an agent gets per step
CPU = torch.device("cpu")


def observe(env):
    """Own velocity along x, whether the landmark is to the left or right of the middle, and how far."""
    landmark = env.landmarks[:, 0].expand(2, -1)  # (A, N)
    return torch.stack([env.velocities[:, 0], landmark.sign(), landmark.abs()], dim=1)


def reward(env):
    """Own speed along x in the direction of the landmark, the more the further out it is, and all of the other's."""
    speeds = env.velocities[:, 0] * env.landmarks[:, 0]
    return speeds + speeds.flip(0)


GAME = Game(
    **dict(name="speed", num_agents=2, num_landmarks=1, num_actions=5, observation_dim=3, observe=observe, reward=reward),
    **dict(body_sizes=(-float("inf"),) * 2, accelerations=tuple(5 * s for s in STRENGTHS), max_speeds=(float("inf"),) * 2),
    **dict(horizon=6),
)
# Pushed towards the landmark from rest, the speed after t steps is 2 * (1 - 0.75^t) times the strength, and the landmark is at
# a distance of 1/2 on average. The other's part of the reward is the same with and without the deviation.
GAPS = [s * 0.5 * sum(2 * (1 - 0.75**t) for t in range(1, 7)) for s in STRENGTHS]


class Scripted(torch.nn.Module):
    """A policy from a function of observations (..., D) to actions (...)."""

    def __init__(self, choose):
        super().__init__()
        self.choose = choose

    def forward(self, observations, first_step=0, memory=None):
        return torch.nn.functional.one_hot(self.choose(observations), 5).float(), None


def stand(observations):
    return torch.zeros(observations.shape[:-1], dtype=torch.long)


def push(observations):
    return torch.where(observations[..., 1] > 0, RIGHT, LEFT)


@pytest.fixture
def small_budget(monkeypatch):
    for name, value in dict(NUM_ENVS=64, CHOICE_EPISODES=256, NUM_CHECKPOINTS=2).items():
        monkeypatch.setattr(evaluate, name, value)


def find_gap(policy, **options):
    torch.manual_seed(0)
    options = dict(num_updates=240, num_episodes=1024) | options
    return evaluate.nash_gap(GAME, policy, Args("scripted", device="cpu", **options), CPU)


def test_known_gap(small_budget):
    report = find_gap(Scripted(stand))
    for gain, interval, gap in zip(report["agent_gains"], report["agent_gain_intervals"], GAPS, strict=True):
        # A gain is twice the gap times a uniformly random distance, whose standard deviation is 1 / sqrt(12).
        width = 2 * 1.96 * 2 * gap / 12**0.5 / 1024**0.5
        assert interval[0] < gap < interval[1] and interval[1] - interval[0] == pytest.approx(width, rel=0.05)
        assert sum(interval) / 2 == pytest.approx(gain)
    assert report["charts/nash_gap"] == pytest.approx(sum(report["agent_gains"]))
    # Both gains of an episode grow with the same distance, so that the deviation of their sum is the sum of theirs.
    low, high = report["nash_gap_interval"]
    assert low < sum(GAPS) < high and high - low == pytest.approx(
        sum(b - a for a, b in report["agent_gain_intervals"]), rel=0.05
    )
    assert all(best["updates"] > 0 and best["choice_gain"] > 0 for best in report["best_responses"])


def test_gap_of_the_random_policy(small_budget):
    """Random pushes to both sides cancel out, so that the gap is that of standing still."""
    report = find_gap(None)
    for gain, interval, gap in zip(report["agent_gains"], report["agent_gain_intervals"], GAPS, strict=True):
        assert interval[0] < gap and gain == pytest.approx(gap, rel=0.15)


def test_equilibrium(small_budget):
    report = find_gap(Scripted(push), num_updates=80)
    for low, high in (report["nash_gap_interval"], *report["agent_gain_intervals"]):
        assert low <= 0 <= high and high - low < 0.05


def test_every_agent_has_its_own_best_response(small_budget, monkeypatch):
    """Three candidates. The second is said to be the best one for agent 0, because the third is so only in one of two episodes,
    and the third, which never deviates from the policy, for agent 1."""
    gains = iter(([[0.0, 0.0], [0.0, 0.0]], [[2.0, 1.0], [2.0, 1.0]], [[0.0, 3.0], [6.0, 3.0]]))
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "NUM_CHECKPOINTS", 1)
        patch.setattr(evaluate, "CANDIDATE_MARGINS", (0.0, 1e6))
        patch.setattr(evaluate, "measure_gains", lambda *args: torch.tensor(next(gains), dtype=torch.float64))
        patch.setattr(evaluate, "CHOICE_EPISODES", 2)
        args = Args("scripted", num_updates=80, device="cpu")
        respond, reports = evaluate.train_best_responses(GAME, [Scripted(stand)], args, CPU)
    assert [report["choice_gain"] for report in reports] == [2, 3] and [report["updates"] for report in reports] == [80, 80]
    assert reports[0]["margin"] == 0 and reports[1]["margin"] > 1e5
    measured = measure_gains(GAME, [Scripted(stand)], respond, 256, 0, CPU, False)
    assert measured[:, 0].mean() > 0.9 * GAPS[0] and (measured[:, 1] == 0).all()


def test_gains_are_not_clipped():
    def respond(inputs, known_actions, step):
        return torch.zeros_like(known_actions[..., 0])

    gains = measure_gains(GAME, [Scripted(push)], respond, 4000, 0, CPU, False)
    assert gains.shape == (4000, 2) and (gains < 0).all()
    torch.testing.assert_close(gains.mean(dim=0), -torch.tensor(GAPS, dtype=torch.float64), rtol=0.05, atol=0)
    torch.testing.assert_close(gains[:, 1], 0.4 * gains[:, 0])


def test_pairs_are_the_episodes_that_make_actor_plays():
    """With two recurrent policies: the deviation of each agent alone, what it earns more than by the second policy (agent 0) or
    the first (agent 1), and what it sees."""
    torch.manual_seed(0)
    game, M = make_game("reference"), 5
    shape = dict(network="gru", hidden_dim=16, num_words=10)
    policies = [AgentNetwork(21, 2, 50, 25, **shape).requires_grad_(False) for _ in range(2)]

    def respond(inputs, known_actions, step):
        deviates = (torch.arange(M)[:, None] % 2 == 0) & (step % 3 == 1)
        return torch.where(deviates, 13, known_actions[:, [0, 1], [1, 0]])

    baseline, generator = torch.tensor([1, 0]), torch.Generator().manual_seed(3)
    inputs, known_actions, actions, gains = play_pairs(game, policies, respond, baseline, M, generator, False, torch.float64)
    returns = {}
    for agent, responds in ((0, True), (0, False), (1, True), (1, False)):
        act_policy, act_other = (make_actor(policy, 50, None) for policy in policies)

        def act(observations, step, agent=agent, responds=responds, act_policy=act_policy, act_other=act_other):
            joint, other = act_policy(observations, step), act_other(observations, step)
            known = torch.stack([joint, other], dim=-1)
            base = other if agent == 0 else joint
            played = (respond(None, known, step) if responds else base)[:, agent]
            if responds:
                assert torch.equal(inputs[:, step, agent, :21], observations[:, agent])
                assert torch.equal(known_actions[:, step, agent], known[:, agent])
                assert torch.equal(actions[:, step, agent], played)
            return torch.where(torch.arange(2) == agent, played[:, None], joint)

        env = ParticleEnv(game, M, dtype=torch.float64)
        observations = env.reset(torch.Generator().manual_seed(3))
        returns[agent, responds] = rollout(env, act, observations)[2][..., agent]
    for agent in (0, 1):
        torch.testing.assert_close(gains[..., agent], returns[agent, True] - returns[agent, False])
        assert (gains[::2, :, agent].abs().amax(dim=1) > 1e-3).all() and (gains[1::2, :, agent] == 0).all()
    for k, first in enumerate((21, 121)):  # one-hot actions, then outputs, of both policies
        for numbers in (inputs[..., first : first + 50], inputs[..., first + 50 : first + 100]):
            assert torch.equal(numbers.argmax(dim=-1), known_actions[..., k])


@pytest.mark.parametrize("policy", ["random", "sampled"])
def test_copies_have_the_same_draws(policy):
    """Of the policy and of the prey: who deviates by nothing gains nothing, and until the first deviation nothing changes."""
    torch.manual_seed(0)
    game = make_game("tag")
    network = None if policy == "random" else AgentNetwork(16, 3, 5, 25, hidden_dim=16).requires_grad_(False)

    def play(respond):
        generator, baseline = torch.Generator().manual_seed(0), torch.zeros(3, dtype=torch.long)
        return play_pairs(game, [network], respond, baseline, 1000, generator, policy == "sampled", torch.float64)

    _, known_actions, _, gains = play(lambda inputs, known_actions, step: known_actions[..., 0])
    assert (gains == 0).all() and len(known_actions.unique()) == 5
    gains = play(lambda inputs, known_actions, step: known_actions[..., 0] * (step < 10))[-1]
    assert (gains[:, :11] == 0).all() and (gains[:, 11:] != 0).any(dim=(0, 1)).all()


def test_sampling_follows_the_softmax_and_is_equal_in_all_copies():
    class Fixed(torch.nn.Module):
        def forward(self, observations, first_step=0, memory=None):
            return torch.tensor([0.0, 1.0, 2.0]).expand(*observations.shape[:3], 3), None

    act = evaluate.paired_actor(Fixed(), 3, 2, torch.Generator().manual_seed(0), sample=True)
    first, second = act(torch.zeros(80_000, 2, 4), 0)[0].chunk(2)
    assert torch.equal(first, second)
    share = torch.bincount(first.flatten(), minlength=3) / first.numel()
    torch.testing.assert_close(share, torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.01, rtol=0)


def test_intervals_in_print():
    assert evaluate.with_interval(1.5, [1.25, 1.75]) == "1.500 +- 0.250" and evaluate.with_interval(1.5, None) == "1.500"


def test_best_responses_know_the_step():
    def q_network(inputs, step):
        return torch.nn.functional.one_hot(torch.full(inputs.shape[:3], step), 5).float(), None

    respond = evaluate.greedy_response(q_network, torch.tensor([0, 1, 0]), 0.5)
    assert (respond(torch.zeros(2, 3, 4), torch.zeros(2, 3, 2, dtype=torch.long), 4) == 4).all()


def test_best_responses_keep_to_the_policy_that_they_start_from():
    """Unless the Q-network promises more than the margin: action 4 in the first row."""
    q_values = torch.zeros(2, 1, 3, 5)
    q_values[0, ..., 4], q_values[1, ..., 4] = 0.6, 0.4
    respond = evaluate.greedy_response(lambda inputs, step: (q_values, None), torch.tensor([0, 1, 0]), 0.5)
    known_actions = torch.tensor([1, 2]).expand(2, 3, 2)
    assert respond(torch.zeros(2, 3, 4), known_actions, 0).tolist() == [[4, 4, 4], [1, 2, 1]]


def test_search_starts_from_an_expert_that_is_better(small_budget):
    """Pushing from the beginning is the exact best response, without any training that matters."""
    args = Args("scripted", num_updates=1, device="cpu")
    respond, reports = evaluate.train_best_responses(GAME, [Scripted(stand), Scripted(push)], args, CPU)
    assert [(report["start"], report["updates"]) for report in reports] == [("expert", 0)] * 2
    gains = measure_gains(GAME, [Scripted(stand), Scripted(push)], respond, 4000, 0, CPU, False)
    torch.testing.assert_close(gains.mean(dim=0), torch.tensor(GAPS, dtype=torch.float64), rtol=0.05, atol=0)
    # And improves on one that is the policy but for agent 1.
    torch.manual_seed(0)
    args = Args("scripted", num_updates=240, device="cpu")

    def second_pushes(observations):
        return push(observations) * torch.tensor([0, 1])

    reports = evaluate.train_best_responses(GAME, [Scripted(stand), Scripted(second_pushes)], args, CPU)[1]
    assert [report["start"] for report in reports] == ["policy", "expert"] and reports[0]["updates"] > 0
    for report, gap in zip(reports, GAPS, strict=True):
        assert report["choice_gain"] == pytest.approx(gap, rel=0.1)


def test_training_goes_on_from_the_start_policy(monkeypatch):
    """Of three candidates the second, the expert, is said to be better than the policy for agent 1 alone, the third, which is
    trained, better for both: agent 0 then deviates from standing still, agent 1 from pushing."""
    gains, seen, targets = iter(([0.0, 0.0], [-1.0, 1.0], [2.0, 2.0])), [], evaluate.double_dqn_targets
    for name, value in dict(NUM_ENVS=16, NUM_CHECKPOINTS=1, CANDIDATE_MARGINS=(0.0,), CHOICE_EPISODES=2).items():
        monkeypatch.setattr(evaluate, name, value)
    monkeypatch.setattr(evaluate, "measure_gains", lambda *args: torch.tensor([next(gains)] * 2))
    monkeypatch.setattr(evaluate, "double_dqn_targets", lambda *args: (seen.append(args[-1]), targets(*args))[1])
    args = Args("scripted", num_updates=8, device="cpu")
    reports = evaluate.train_best_responses(GAME, [Scripted(stand), Scripted(push)], args, CPU)[1]
    assert [(report["start"], report["updates"]) for report in reports] == [("policy", 8), ("expert", 8)]
    assert all((base[..., 0] == 0).all() and (base[..., 1] > 0).all() for base in seen) and len(seen) == 8


def test_exploration_changes_moves_and_words_apart(monkeypatch):
    """In a tenth of the steps, each in one half of them, to another one with probability 4/5 and 9/10."""
    game, episodes, play = make_game("reference"), [], play_pairs
    monkeypatch.setattr(evaluate, "measure_gains", lambda *args: torch.zeros(2, 2))
    monkeypatch.setattr(evaluate, "CHOICE_EPISODES", 2)
    monkeypatch.setattr(evaluate, "play_pairs", lambda *args: episodes.append(play(*args)) or episodes[-1])
    evaluate.train_best_responses(game, [None], Args("random", num_updates=1, device="cpu"), CPU)
    _, known_actions, actions, _ = episodes[0]  # 128 x 25 x 2 actions
    move, word = actions % 5 != known_actions[..., 0] % 5, actions // 5 != known_actions[..., 0] // 5
    for event, share in ((move, 0.04), (word, 0.045), (move & word, 0.1 * 0.4 * 0.45)):
        assert event.double().mean().item() == pytest.approx(share, rel=0.25)


def test_targets_equal_a_slow_loop(monkeypatch):
    """G_t = r_t + gamma V_{t+1} + sum over k > t of (gamma lambda)^(k - t) * (r_k + gamma V_{k+1} - Q_k(a_k)), V_T = 0."""
    generator = torch.Generator().manual_seed(0)
    B, T, A, gamma, td_lambda, margin = 3, 5, 2, 0.9, 0.7, 0.5
    for name, value in dict(GAMMA=gamma, TD_LAMBDA=td_lambda, MARGIN=margin).items():
        monkeypatch.setattr(evaluate, name, value)
    rewards = torch.randn(B, T, A, generator=generator)
    q_values, target_q_values = torch.randn(2, B, T, A, 4, generator=generator)
    actions, policy_actions = torch.randint(4, (2, B, T, A), generator=generator)
    targets = evaluate.double_dqn_targets(rewards, q_values, target_q_values, actions, policy_actions)
    kept = 0
    for b in range(B):
        for i in range(A):
            values = [0.0] * (T + 1)
            for t in range(T):
                q, own_action = q_values[b, t, i].tolist(), policy_actions[b, t, i].item()
                best = max(range(4), key=q.__getitem__)
                keep = q[best] - q[own_action] <= margin
                kept += keep and best != own_action
                values[t] = target_q_values[b, t, i, own_action if keep else best].item()
            for t in range(T):
                expected = rewards[b, t, i].item() + gamma * values[t + 1]
                for k in range(t + 1, T):
                    error = rewards[b, k, i] + gamma * values[k + 1] - target_q_values[b, k, i, actions[b, k, i]]
                    expected += (gamma * td_lambda) ** (k - t) * error.item()
                assert targets[b, t, i].item() == pytest.approx(expected, abs=1e-5)
    assert kept > 0  # the margin has mattered


@pytest.mark.parametrize("env", ["spread", "tag", "reference"])
def test_report(env, monkeypatch, tmp_path, capsys):
    for name, value in dict(NUM_ENVS=32, CHOICE_EPISODES=128, NUM_CHECKPOINTS=1, CANDIDATE_MARGINS=(0.0, 0.1)).items():
        monkeypatch.setattr(evaluate, name, value)
    rookie, path = str(ROOT / "policies" / env / "rookie.pt"), tmp_path / "report.json"
    args = Args(rookie, nash_gap=True, num_updates=16, num_episodes=130, json_path=str(path), device="cpu")
    report = evaluate.main(args)
    assert json.loads(path.read_text()) == report == evaluate.main(args)
    assert len(report["agent_gains"]) == len(report["best_responses"]) == make_game(env).num_agents
    assert report["charts/nash_gap"] == pytest.approx(sum(report["agent_gains"]))
    assert env != "spread" or [best["start"] for best in report["best_responses"]] == ["expert"] * 3  # it gains 5
    gap, high = report["charts/nash_gap"], report["nash_gap_interval"][1]
    assert f"charts/nash_gap    {gap:.3f} +- {high - gap:.3f} (" in capsys.readouterr().out
    plain = evaluate.main(Args(rookie, num_episodes=130, device="cpu"))
    assert plain["episode_returns"] == report["episode_returns"] and "charts/nash_gap" not in plain


def test_a_single_episode_has_no_interval(small_budget, capsys):
    args = Args("random", env="spread", num_agents=2, nash_gap=True, num_updates=1, num_episodes=1, device="cpu")
    report = evaluate.main(args)
    assert report["nash_gap_interval"] is None and report["agent_gain_intervals"] == [None, None]
    assert f"charts/nash_gap    {report['charts/nash_gap']:.3f} (" in capsys.readouterr().out


def test_it_needs_the_batched_environment():
    with pytest.raises(evaluate.UserError, match=r"--nash-gap --backend mpe2: best responses learn in the batched"):
        evaluate.main(Args("random", env="spread", nash_gap=True, backend="mpe2", device="cpu"))
