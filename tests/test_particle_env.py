"""The batched environment against the mpe2 package, step by step from the same start states with the same actions."""

import functools

import numpy as np
import pytest
import torch

from benchmark.train_prey import prey_reward
from collect_data import ParticleEnv, make_game, mean_return, prey_observation, reference, spread, tag
from evaluate import make_mpe2_env

EPISODES = 200
# spread-5x3 stands for landmarks != agents (an mpe2 scenario of its own in evaluate.py); tag is played with all four bodies
GAMES = {"spread": spread(3, 3), "spread-5x3": spread(5, 3), "reference": reference(), "tag": tag(prey=None)}


def start_states(kind: str, game, seed: int):
    """Positions, velocities, landmarks, goals, actions. Crowded: everything starts within 0.2 and is pushed together."""
    rng = np.random.default_rng(seed)
    bodies, L, T = len(game.body_sizes), game.num_landmarks, game.horizon
    width = 1.0 if kind == "random" else 0.2
    positions = rng.uniform(-width, width, (EPISODES, bodies, 2))
    velocities = rng.uniform(-0.5, 0.5, (EPISODES, bodies, 2)) * (kind == "crowded")
    landmarks = rng.uniform(-1, 1, (EPISODES, L, 2)) * game.landmark_range
    goals = rng.integers(L, size=(EPISODES, bodies))
    actions = rng.integers(game.num_actions, size=(EPISODES, T, bodies))
    return positions, velocities, landmarks, goals, actions


def mpe2_episode(env, dtype, positions, velocities, landmarks, goals, actions):
    """One mpe2 episode, the state rounded to dtype before every step -> observations of every body [(T + 1, D) ...],
    rewards (T, bodies), positions and velocities (T + 1, bodies, 2, 2)."""
    env.reset(seed=0)
    world, scenario = env.unwrapped.world, env.unwrapped.scenario
    for i, agent in enumerate(world.agents):
        agent.state.p_pos, agent.state.p_vel = positions[i].copy(), velocities[i].copy()
        if hasattr(agent, "goal_b"):  # reference
            agent.goal_b = world.landmarks[goals[i]]
    for i, landmark in enumerate(world.landmarks):
        landmark.state.p_pos = landmarks[i].copy()

    def look():
        state = np.array([[agent.state.p_pos, agent.state.p_vel] for agent in world.agents])
        return [scenario.observation(agent, world) for agent in world.agents], state

    looks, rewards = [look()], []
    for joint_action in actions:
        for agent in world.agents:
            agent.state.p_pos, agent.state.p_vel = (
                x.astype(dtype).astype(float) for x in (agent.state.p_pos, agent.state.p_vel)
            )
        named = {agent.name: int(a) for agent, a in zip(world.agents, joint_action, strict=True)}
        reward = env.step(named)[1]
        rewards.append([reward[agent.name] for agent in world.agents])
        looks.append(look())
    observations, states = zip(*looks, strict=True)
    return [np.stack(o) for o in zip(*observations, strict=True)], np.array(rewards), np.stack(states)


@functools.cache
def mpe2_episodes(name: str, kind: str, dtype):
    game = GAMES[name]
    starts = [x.astype(dtype).astype(float) if x.dtype == float else x for x in start_states(kind, game, seed=0)]
    env = make_mpe2_env(game)
    episodes = [mpe2_episode(env, dtype, *start) for start in zip(*starts, strict=True)]
    observations, rewards, states = zip(*episodes, strict=True)
    observations = [np.stack(o) for o in zip(*observations, strict=True)]  # of every body (N, T + 1, D)
    return game, starts, observations, np.stack(rewards), np.stack(states)


every_game = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in GAMES for kind in ("random", "crowded")])


def assert_equal_observations(env, observed, observations, step, atol):
    agents = np.stack([o[:, step] for o in observations[: env.game.num_agents]], axis=1)
    np.testing.assert_allclose(observed.numpy(), agents, rtol=0, atol=atol)
    if env.game.name == "tag":
        np.testing.assert_allclose(prey_observation(env)[0].T.numpy(), observations[3][:, step], rtol=0, atol=atol)


def all_rewards(env, reward) -> np.ndarray:
    """Of the agents and, in tag, of the prey (N, bodies)."""
    return torch.cat([reward, prey_reward(env)[:, None]], dim=1).numpy() if env.game.name == "tag" else reward.numpy()


@every_game
def test_whole_episodes_equal_mpe2_in_float64(name, kind):
    game, (positions, velocities, landmarks, goals, actions), observations, rewards, _ = mpe2_episodes(name, kind, np.float64)
    env = ParticleEnv(game, EPISODES, dtype=torch.float64)
    observed = env.set_state(*map(torch.from_numpy, (positions, velocities, landmarks, goals)))
    assert observed.shape[-1] == game.observation_dim
    assert_equal_observations(env, observed, observations, 0, atol=1e-9)
    for step in range(game.horizon):
        observed, reward = env.step(torch.from_numpy(actions[:, step]))
        assert_equal_observations(env, observed, observations, step + 1, atol=1e-9)
        np.testing.assert_allclose(all_rewards(env, reward), rewards[:, step], rtol=0, atol=1e-9)


@every_game
def test_single_steps_equal_mpe2_in_float32(name, kind):
    game, (_, _, landmarks, goals, actions), observations, rewards, states = mpe2_episodes(name, kind, np.float32)
    env = ParticleEnv(game, EPISODES, dtype=torch.float32)
    sizes = np.array(game.body_sizes)
    for step in range(game.horizon):
        positions, velocities = torch.from_numpy(states[:, step]).unbind(2)
        env.set_state(positions, velocities, torch.from_numpy(landmarks), torch.from_numpy(goals))
        observed, reward = env.step(torch.from_numpy(actions[:, step]))
        # A contact is a jump of the reward: leave out what stands within 1e-6 of the threshold.
        after = states[:, step + 1, :, 0]
        gaps = np.linalg.norm(after[:, :, None] - after[:, None], axis=-1) - (sizes[:, None] + sizes)
        clear = (np.abs(gaps) > 1e-6).all(axis=(1, 2))
        assert clear.mean() > 0.99
        np.testing.assert_allclose(all_rewards(env, reward)[clear], rewards[clear, step], rtol=0, atol=1e-5)
        assert_equal_observations(env, observed, observations, step + 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "crowded"])
@pytest.mark.parametrize("name", ["spread", "spread-5x3", "tag"])
def test_episodes_have_contacts(name, kind):
    """Else the parity proves nothing about them."""
    game, (_, _, landmarks, *_), *_, states = mpe2_episodes(name, kind, np.float64)
    positions, velocities = states[:, :, :, 0], states[:, :, :, 1]
    touches = np.linalg.norm(positions[:, :, 0] - positions[:, :, -1], axis=-1) < game.body_sizes[0] + game.body_sizes[-1]
    assert touches.mean() > {"random": 0.002, "crowded": 0.02}[kind]
    if name == "tag":
        gaps = np.linalg.norm(positions[:, :, :, None] - landmarks[:, None, None], axis=-1)  # (N, T + 1, bodies, L)
        assert (gaps.min(axis=-1) < np.array(game.body_sizes) + game.landmark_size).mean() > 0.01
        assert np.isclose(np.linalg.norm(velocities, axis=-1), game.max_speeds).mean() > 0.005


def test_start_states_are_uniform():
    env = ParticleEnv(GAMES["spread"], 20_000)
    env.reset(torch.Generator().manual_seed(0))
    entities = torch.cat([env.positions, env.landmarks])  # (A + L, 2, N)
    assert entities.abs().max() <= 1
    assert entities.mean(dim=2).abs().max() < 0.02
    assert (entities.var(dim=2) - 1 / 3).abs().max() < 0.01
    assert (env.velocities == 0).all()


@pytest.mark.parametrize("name", ["spread", "spread-4x5", "spread-5x5", "spread-6x5", "spread-7x5", "reference"])
def test_random_policy_scores_zero(name):
    """Against returns measured elsewhere, 20,000 episodes each."""
    game = make_game(name)
    assert abs(mean_return(game, None, 20_000, 0, "cpu") - game.low) < 0.3  # standard error 0.06


def test_tag_landmarks_start_further_in():
    env = ParticleEnv(GAMES["tag"], 2000)
    env.reset(torch.Generator().manual_seed(0))
    assert 0.85 < env.landmarks.abs().max() <= 0.9 < env.positions.abs().max() <= 1


def test_goals_are_uniform_and_independent():
    env = ParticleEnv(GAMES["reference"], 20_000)
    env.reset(torch.Generator().manual_seed(0))
    pairs = torch.bincount(env.goals[0] * 3 + env.goals[1], minlength=9) / env.num_envs
    torch.testing.assert_close(pairs, torch.full((9,), 1 / 9), atol=0.01, rtol=0)
