"""Environment steps per second of the batched environment on one CPU thread, and on CUDA where there is one. A step is
actions in, physics, rewards and observations out. Run from the repository root: python benchmark/speed.py"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from collect_data import ParticleEnv, reference, spread, tag


def steps_per_second(env: ParticleEnv, episodes: int = 20) -> float:
    shape = (env.game.horizon, env.num_envs, len(env.game.body_sizes))
    actions = torch.randint(env.game.num_actions, shape, device=env.device)
    for timed in (False, True):  # the first round warms up
        start = time.time()
        for _ in range(episodes):
            env.reset()
            for joint_actions in actions:
                env.step(joint_actions)
        if env.device.type == "cuda":
            torch.cuda.synchronize()
        if timed:
            return episodes * env.game.horizon * env.num_envs / (time.time() - start)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for game in (spread(3, 3), spread(7, 5), tag(prey=None), reference()):
            for num_envs in (64, 4096, 65_536):
                rate = steps_per_second(ParticleEnv(game, num_envs, device))
                print(f"{game.name}, {device}, {num_envs:6d} environments: {rate / 1e6:6.2f} million steps per second")
