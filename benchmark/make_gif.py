"""Draw a few episodes of one game, played from the same start states by several policies, side by side as an
animated GIF; the real package (mpe2) plays and draws them.

Usage: python benchmark/make_gif.py --policies random runs/spread/diversified/bc-seed1.pt
    runs/spread/diversified/vdn-beta1-alpha1-seed1.pt policies/spread/expert.pt --gif-path rollout.gif
"""

from __future__ import annotations

import copy
import io
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
from evaluate import Game, Mpe2Env, ParticleEnv, UserError, load_policies, make_actor, make_mpe2_env, rollout

PANEL_SIZE, LABEL_SIZE = 220, 24  # in pixels


@dataclass
class Args:
    policies: tuple[str, ...]
    """policy files, and the word random for the random policy, from left to right"""
    gif_path: str = "rollout.gif"
    """where to write"""
    names: tuple[str, ...] = ()
    """what to call them, instead of the first part of their file names"""
    env: str = ""
    """the game; needed for random alone, else that of the files"""
    num_episodes: int = 3
    """episodes to draw: the first that evaluate.py plays with the same seed"""
    sample: bool = False
    """sample actions from the softmax of the outputs instead of playing the best one"""
    seed: int = 1
    """fixes start states and all draws"""
    device: str = "cpu"
    """of the networks: cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads"""
    deterministic: bool = False
    """bit-equal runs on CUDA too"""


def record(game: Game, policy, args: Args, device) -> tuple[list, torch.Tensor]:
    """Play E episodes in the package -> copies of its worlds, T + 1 lists of E, and the return so far, mean
    over agents, (E, T + 1). Draws as in evaluate.play."""
    starts = torch.Generator(device).manual_seed(args.seed)
    draws = torch.Generator(device).manual_seed(args.seed + 2**31)
    start, worlds = ParticleEnv(game, args.num_episodes, device, torch.float64), []
    start.reset(starts, draws)
    env, act_policy = Mpe2Env(start), make_actor(policy, game.num_actions, draws, args.sample)

    def act(observations, step):
        worlds.append([copy.deepcopy(x.unwrapped.world) for x in env.envs])
        return act_policy(observations, step)

    rewards = rollout(env, act, env.reset())[2].mean(dim=2)  # (E, T)
    worlds.append([x.unwrapped.world for x in env.envs])
    return worlds, F.pad(rewards.cumsum(dim=1), (1, 0))


def draw_world(renderer, world, camera: float) -> np.ndarray:
    """The package's picture, (700, 700, 3), of the square from -camera to camera and a ninth around it. By
    itself it zooms in every frame to what is outermost; that is now a landmark of no size in the corner."""
    corner = copy.deepcopy(world.landmarks[0])
    corner.size, corner.state.p_pos = 0.0, np.full(2, camera)
    for agent in world.agents:
        agent.size = agent.size if agent.silent else 0.1  # those that speak would look like landmarks
    world.agents = sorted(world.entities, key=lambda x: -x.size)  # in the order in which they are drawn
    world.landmarks, renderer.world, renderer.original_cam_range = [corner], world, 1.0  # 1: discs to scale
    return renderer.render()


def draw_frames(game: Game, recordings: dict[str, tuple[list, torch.Tensor]]) -> tuple[list, list[int]]:
    """-> pictures, one episode after the other, and how long to show each, in ms."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise UserError(f"a GIF needs the package pillow ({error}); pip install pillow") from None
    renderer, font = make_mpe2_env(game).unwrapped, ImageFont.load_default(15)
    renderer.render_mode, renderer.game_font.size, renderer.game_font.strong = "rgb_array", 32, True
    num_episodes = len(next(iter(recordings.values()))[1])
    moments = [(episode, step) for episode in range(num_episodes) for step in range(game.horizon + 1)]
    cameras = []
    for episode in range(num_episodes):  # wide enough for all policies and steps
        worlds = [step[episode] for worlds, _ in recordings.values() for step in worlds]
        bodies = [body for world in worlds for body in world.entities]
        cameras.append(max(abs(body.state.p_pos).max() + max(body.size, 0.1) for body in bodies))
    frames = []
    for episode, step in tqdm(moments, desc=f"{game.name} as GIF", unit="frame", mininterval=1):
        frame = Image.new("RGB", (len(recordings) * PANEL_SIZE, LABEL_SIZE + PANEL_SIZE), "white")
        draw = ImageDraw.Draw(frame)
        for i, (name, (worlds, returns)) in enumerate(recordings.items()):
            picture = Image.fromarray(draw_world(renderer, worlds[step][episode], cameras[episode]))
            frame.paste(picture.resize((PANEL_SIZE, PANEL_SIZE)), (i * PANEL_SIZE, LABEL_SIZE))
            text = f"{name}, return {returns[episode, step]:.1f}"
            draw.text(((i + 0.5) * PANEL_SIZE, LABEL_SIZE / 2), text, fill="black", font=font, anchor="mm")
            draw.line((i * PANEL_SIZE, 0, i * PANEL_SIZE, frame.height), fill="lightgray")
        frames.append(frame)
    some = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[:: game.horizon]]))
    palette = some.quantize(64, Image.Quantize.MAXCOVERAGE)  # one for all frames, or colours would flicker
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    return frames, [1500 if step == game.horizon else 100 for _, step in moments]


def main(args: Args) -> None:
    device, path = evaluate.set_up(args), Path(args.gif_path)
    if path.suffix.lower() != ".gif":
        raise UserError(f"--gif-path {path}: the name must end in .gif")
    game, policies = load_policies(args.policies, device, args.env)
    kinds = {"bc": "BC", "vdn": "VDN-RLHF"}
    stems = [Path(name).stem.split("-")[0] for name in policies]
    names = args.names or [kinds.get(stem, stem) for stem in stems]
    if not len(set(names)) == len(names) == len(policies):
        raise UserError(f"--names {' '.join(names)}: give each of {len(policies)} policies a name of its own")
    recordings = {}
    for name, policy in zip(names, policies.values(), strict=True):
        recordings[name] = record(game, policy, args, device)
    frames, durations = draw_frames(game, recordings)
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    evaluate.save_file(path, buffer.getbuffer())
    print(f"{path}: {len(durations)} frames of {', '.join(recordings)}")


if __name__ == "__main__":
    evaluate.run_command_line(main, Args, presets={})
