"""The batched environment against the mpe2 package, step by step from the same start states with the same actions."""

import numpy as np
import pytest
import torch
from mpe2 import simple_spread_v3, simple_tag_v3

from collect_data import GAMES, Game, ParticleEnv, make_actor, rollout

EPISODES = 200


def start_states(kind: str, game, seed: int):
    """Positions, velocities, landmarks, actions. Crowded: everything starts within 0.2 and is pushed together."""
    rng = np.random.default_rng(seed)
    A, L, T = game.num_agents, game.num_landmarks, game.horizon
    spread = 1.0 if kind == "random" else 0.2
    positions = rng.uniform(-spread, spread, (EPISODES, A, 2))
    velocities = rng.uniform(-0.5, 0.5, (EPISODES, A, 2)) * (kind == "crowded")
    landmarks = rng.uniform(-1, 1, (EPISODES, L, 2))
    actions = rng.integers(game.num_actions, size=(EPISODES, T, A))
    return positions, velocities, landmarks, actions


def mpe2_episode(world_env, positions, velocities, landmarks, actions, observe=True):
    """One mpe2 episode in float64 -> observations (T + 1, A, D), rewards (T, A), positions and velocities (T + 1, A, 2)."""
    env = world_env.unwrapped
    world, scenario = env.world, env.scenario
    world_env.reset(seed=0)
    for i, agent in enumerate(world.agents):
        agent.state.p_pos, agent.state.p_vel = positions[i].copy(), velocities[i].copy()
    for i, landmark in enumerate(world.landmarks):
        landmark.state.p_pos = landmarks[i].copy()

    def look():
        state = [[agent.state.p_pos.copy(), agent.state.p_vel.copy()] for agent in world.agents]
        observations = [scenario.observation(agent, world) for agent in world.agents if observe]
        return np.array(observations), np.array(state)

    observed, rewards = [look()], []
    for joint_action in actions:
        named = {agent.name: int(a) for agent, a in zip(world.agents, joint_action, strict=True)}
        reward = world_env.step(named)[1]
        rewards.append([reward[agent.name] for agent in world.agents])
        observed.append(look())
    observations, states = zip(*observed, strict=True)
    return np.stack(observations), np.array(rewards), np.stack(states)


@pytest.fixture(scope="module", params=["random", "crowded"])
def episodes(request):
    game = GAMES["spread"]
    starts = start_states(request.param, game, seed=0)
    world_env = simple_spread_v3.parallel_env(N=game.num_agents, max_cycles=game.horizon)
    reference = [mpe2_episode(world_env, *start) for start in zip(*starts, strict=True)]
    return request.param, game, starts, [np.stack(parts) for parts in zip(*reference, strict=True)]


def test_whole_episodes_equal_mpe2_in_float64(episodes):
    _, game, (positions, velocities, landmarks, actions), (observations, rewards, _) = episodes
    env = ParticleEnv(game, EPISODES, dtype=torch.float64)
    observed = env.set_state(*map(torch.from_numpy, (positions, velocities, landmarks)))
    assert observed.shape[-1] == game.observation_dim
    np.testing.assert_allclose(observed.numpy(), observations[:, 0], rtol=0, atol=1e-9)
    for step in range(game.horizon):
        observed, reward = env.step(torch.from_numpy(actions[:, step]))
        np.testing.assert_allclose(observed.numpy(), observations[:, step + 1], rtol=0, atol=1e-9)
        np.testing.assert_allclose(reward.numpy(), rewards[:, step], rtol=0, atol=1e-9)


def test_single_steps_equal_mpe2_in_float32(episodes):
    _, game, (_, _, landmarks, actions), (observations, rewards, states) = episodes
    env = ParticleEnv(game, EPISODES, dtype=torch.float32)
    for step in range(game.horizon):
        positions, velocities = torch.from_numpy(states[:, step]).unbind(2)
        env.set_state(positions, velocities, torch.from_numpy(landmarks))
        observed, reward = env.step(torch.from_numpy(actions[:, step]))
        np.testing.assert_allclose(observed.numpy(), observations[:, step + 1], rtol=0, atol=1e-5)
        # A contact is a jump of the reward: leave out what stands within 1e-6 of the threshold.
        after = states[:, step + 1, :, 0]
        gaps = np.linalg.norm(after[:, :, None] - after[:, None], axis=-1) - 2 * game.agent_sizes[0]
        clear = (np.abs(gaps) > 1e-6).all(axis=(1, 2))
        assert clear.mean() > 0.99
        np.testing.assert_allclose(reward.numpy()[clear], rewards[clear, step], rtol=0, atol=1e-5)


def test_crowded_episodes_have_contacts(episodes):
    kind, game, _, (_, _, states) = episodes
    distances = np.linalg.norm(states[:, :, 0, 0] - states[:, :, 1, 0], axis=-1)
    touches = (distances < 2 * game.agent_sizes[0]).mean()
    assert touches > {"random": 0.01, "crowded": 0.05}[kind]  # else the parity proves nothing about contacts


def test_start_states_are_uniform():
    env = ParticleEnv(GAMES["spread"], 20_000)
    env.reset(torch.Generator().manual_seed(0))
    entities = torch.cat([env.positions, env.landmarks])  # (A + L, 2, N)
    assert entities.abs().max() <= 1
    assert entities.mean(dim=2).abs().max() < 0.02
    assert (entities.var(dim=2) - 1 / 3).abs().max() < 0.01
    assert (env.velocities == 0).all()


def test_random_policy_scores_zero():
    game, generator = GAMES["spread"], torch.Generator().manual_seed(0)
    env = ParticleEnv(game, 20_000)
    rewards = rollout(env, make_actor(None, game.num_actions, generator), env.reset(generator))[2]
    assert abs(rewards.sum(dim=1).mean().item() - game.low) < 0.3  # standard error 0.06


def test_speed_limits_and_colliding_landmarks_equal_mpe2():
    """Constants that spread does not use: the bodies of simple_tag, moved by the same actions in mpe2, in float64."""
    episodes, T = 40, 25
    game = Game(
        **dict(name="bodies of tag", num_agents=4, num_landmarks=2, num_actions=5, observation_dim=4, low=0.0, high=1.0),
        **dict(agent_sizes=(0.075, 0.075, 0.075, 0.05), accelerations=(3.0, 3.0, 3.0, 4.0), max_speeds=(1.0, 1.0, 1.0, 1.3)),
        **dict(landmark_size=0.2, landmark_range=0.9),
        observe=lambda env: torch.cat([env.velocities, env.positions], dim=1),
        reward=lambda env: torch.zeros(4, env.num_envs),
    )
    rng = np.random.default_rng(0)
    positions, velocities = rng.uniform(-0.5, 0.5, (episodes, 4, 2)), rng.uniform(-1, 1, (episodes, 4, 2))
    landmarks, actions = rng.uniform(-0.5, 0.5, (episodes, 2, 2)), rng.integers(5, size=(episodes, T, 4))
    world_env = simple_tag_v3.parallel_env(max_cycles=T)
    starts = zip(positions, velocities, landmarks, actions, strict=True)
    states = np.stack([mpe2_episode(world_env, *start, observe=False)[2] for start in starts])  # (N, T + 1, A, 2, 2)
    speeds = np.linalg.norm(states[:, :, :, 1], axis=-1)
    assert (np.isclose(speeds[:, :, :3], 1.0) | np.isclose(speeds[:, :, 3:], 1.3)).mean() > 0.05  # the limits do act
    env = ParticleEnv(game, episodes, dtype=torch.float64)
    env.set_state(*map(torch.from_numpy, (positions, velocities, landmarks)))
    for step in range(T):
        observed, _ = env.step(torch.from_numpy(actions[:, step]))
        expected = np.concatenate([states[:, step + 1, :, 1], states[:, step + 1, :, 0]], axis=-1)
        np.testing.assert_allclose(observed.numpy(), expected, rtol=0, atol=1e-9)
    env.reset(torch.Generator().manual_seed(0))
    assert 0.8 < env.landmarks.abs().max() <= 0.9 < env.positions.abs().max()
