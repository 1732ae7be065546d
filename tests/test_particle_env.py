"""The batched environment against the mpe2 package, step by step from the same start states with the same
actions."""

import functools

import numpy as np
import pytest
import torch

from collect_data import ParticleEnv, prey_observation, reference, spread, tag
from evaluate import Mpe2Env

EPISODES = 80
# spread-5x4 stands for landmarks != agents; tag is played with all four bodies.
GAMES = {"spread": spread(3, 3), "spread-5x4": spread(5, 4), "reference": reference(), "tag": tag(None)}


@functools.cache
def mpe2_episodes(name: str):
    """The package plays random actions -> the start (positions, velocities, landmarks, goals), actions and
    rewards, and per step the observations of the agents and of the last body, positions and velocities (N,
    bodies, 2). Half of the episodes start within 0.2 and are pushed apart."""
    game, rng = GAMES[name], np.random.default_rng(0)
    bodies, L = len(game.body_sizes), game.num_landmarks
    crowded = (np.arange(EPISODES) % 2 == 0)[:, None, None]
    positions = rng.uniform(-1, 1, (EPISODES, bodies, 2)) * np.where(crowded, 0.2, 1.0)
    velocities = rng.uniform(-0.5, 0.5, (EPISODES, bodies, 2)) * crowded
    landmarks = rng.uniform(-1, 1, (EPISODES, L, 2)) * game.landmark_range
    goals = rng.integers(L, size=(EPISODES, 2))
    start = [torch.from_numpy(x) for x in (positions, velocities, landmarks, goals)]
    env = ParticleEnv(game, EPISODES, dtype=torch.float64)
    env.set_state(*start)
    real = Mpe2Env(env)

    def look():
        observations, states = [], []
        for env in real.envs:
            world, scenario = env.unwrapped.world, env.unwrapped.scenario
            observations.append([scenario.observation(agent, world) for agent in world.agents])
            states.append([(agent.state.p_pos, agent.state.p_vel) for agent in world.agents])
        agents = torch.tensor(np.array([o[: game.num_agents] for o in observations]))
        last = torch.tensor(np.array([o[-1] for o in observations]))
        return agents, last, *torch.tensor(np.array(states)).unbind(2)

    shape = (game.horizon, EPISODES, bodies)
    actions = torch.randint(game.num_actions, shape, generator=torch.Generator().manual_seed(0))
    real.reset()
    looks, rewards = [look()], []
    for joint_actions in actions:
        rewards.append(real.step(joint_actions)[1])
        looks.append(look())
    return start, actions, rewards, looks


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", GAMES)
def test_every_step_equals_that_of_mpe2(name, dtype, atol):
    """Over whole episodes in float64; in float32 each step starts from what the package has reached."""
    game, (start, actions, rewards, looks) = GAMES[name], mpe2_episodes(name)
    env, sizes = ParticleEnv(game, EPISODES, dtype=dtype), torch.tensor(game.body_sizes, dtype=torch.float64)
    observations, reward = env.set_state(*start), None
    assert observations.shape[1:] == (game.num_agents, game.observation_dim)
    for step, (agents, last, positions, velocities) in enumerate(looks):
        torch.testing.assert_close(observations.double(), agents, rtol=0, atol=atol)
        if name == "tag":
            torch.testing.assert_close(prey_observation(env).double(), last, rtol=0, atol=atol)
        if step > 0:
            # A contact is a jump of the reward: leave out what rounding may put on its other side.
            gaps = torch.cdist(positions, positions) - (sizes + sizes[:, None])
            clear = (gaps.abs() > atol / 10).all(dim=2).all(dim=1)
            assert clear.float().mean() > 0.97
            torch.testing.assert_close(reward[clear].double(), rewards[step - 1][clear], rtol=0, atol=atol)
        if step < game.horizon:
            if dtype == torch.float32:
                env.set_state(positions, velocities, *start[2:])
            observations, reward = env.step(actions[step])


@pytest.mark.parametrize("name", ["spread", "spread-5x4", "tag"])
def test_those_episodes_have_contacts(name):
    """Else the parity proves nothing about them."""
    game, (start, _, _, looks) = GAMES[name], mpe2_episodes(name)
    positions, velocities = (torch.stack([x[i] for x in looks]) for i in (2, 3))  # (T + 1, N, bodies, 2)
    distances = (positions[:, :, 0] - positions[:, :, -1]).norm(dim=-1)
    assert (distances < game.body_sizes[0] + game.body_sizes[-1]).float().mean() > 0.01
    if name == "tag":
        distances = torch.cdist(positions, start[2]).amin(dim=-1)
        assert (distances < torch.tensor(game.body_sizes) + game.landmark_size).float().mean() > 0.01
        at_most = torch.tensor(game.max_speed, dtype=torch.float64)
        assert (velocities.norm(dim=-1) - at_most).abs().lt(1e-9).float().mean() > 0.005


@pytest.mark.parametrize("name", GAMES)
def test_start_states_are_uniform(name):
    """Bodies in +-1, landmarks in +-1 (tag: +-0.9), goals independent of each other, all at rest."""
    env, width = ParticleEnv(GAMES[name], 20_000), 0.9 if name == "tag" else 1.0
    env.reset(torch.Generator().manual_seed(0))
    for x, limit in ((env.positions, 1), (env.landmarks, width)):  # (entities, 2, N)
        assert 0.999 * limit < x.abs().max() <= limit and x.mean(dim=2).abs().max() < 0.02
        assert (x.var(dim=2) - limit**2 / 3).abs().max() < 0.01
    assert (env.velocities == 0).all()
    if name == "reference":
        joint = torch.bincount(env.goals[0] * 3 + env.goals[1], minlength=9) / env.num_envs
        torch.testing.assert_close(joint, torch.full((9,), 1 / 9), atol=0.01, rtol=0)
