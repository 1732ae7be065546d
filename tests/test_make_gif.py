"""benchmark/make_gif.py: what the panels show."""

import numpy as np
import pytest
import torch
from conftest import ROOT

import benchmark.make_gif as make_gif
import evaluate

EXPERT = str(ROOT / "policies/spread/expert.pt")


@pytest.mark.parametrize("env, num_frames", [("spread", 26), ("tag", 25), ("reference", 26)])
def test_panels_show_the_same_episode(env, num_frames, tmp_path):
    """In tag the first step changes nothing: bodies start at rest, and a GIF merges equal frames."""
    Image = pytest.importorskip("PIL.Image")
    path, expert = tmp_path / "new" / "rollout.gif", str(ROOT / f"policies/{env}/expert.pt")
    make_gif.main(make_gif.Args(("random", expert), gif_path=str(path), num_episodes=1))
    frames, milliseconds = [], 0
    with Image.open(path) as gif:
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("L")))
            milliseconds += gif.info["duration"]
    panels = np.stack([np.stack(np.split(frame, 2, axis=1)) for frame in frames])  # (frames, 2, 244, 220)
    labels, pictures = panels[:, :, :24, 1:], panels[:, :, 24:, 1:]
    assert len(panels) == num_frames and milliseconds == 25 * 100 + 1500
    assert (pictures[0, 0] == pictures[0, 1]).all() and (pictures[0] < 128).any()
    assert (pictures[-1, 0] != pictures[-1, 1]).any() and (labels[0, 0] != labels[0, 1]).any()
    edge = np.ones(pictures.shape[2:], dtype=bool)  # stays white: nothing is cut off
    edge[1:-1, 1:-1] = False
    assert (pictures[:, :, edge] >= 250).all()


def test_returns_are_those_of_the_episodes_that_evaluate_plays():
    """From zero to the return of the episode with the same seed."""
    args = make_gif.Args(("random",), env="spread", seed=3)
    worlds, returns = make_gif.record(evaluate.make_game("spread"), None, args, torch.device("cpu"))
    assert len(worlds) == 26 and returns.shape == (3, 26) and (returns[:, 0] == 0).all()
    report = evaluate.main(evaluate.Args(("random",), env="spread", seed=3, num_episodes=3, device="cpu"))
    np.testing.assert_allclose(returns[:, -1], report["random"]["episode_returns"], rtol=0, atol=1e-6)
    positions = [[agent.state.p_pos for agent in step[0].agents] for step in worlds]
    assert np.ptp(np.stack(positions), axis=0).min() > 0  # copies, not one world 26 times


MISTAKES = [("rollout.png", (), "must end in .gif"), ("folder.gif", ("one", "two"), "cannot be written")]
MISTAKES += [("rollout.gif", ("one",), "give each of 2 policies a name")]


@pytest.mark.parametrize("path, names, problem", MISTAKES)
def test_mistakes_are_told(path, names, problem, tmp_path):
    (tmp_path / "folder.gif").mkdir()
    args = make_gif.Args(("random", EXPERT), gif_path=str(tmp_path / path), names=names, num_episodes=1)
    with pytest.raises(evaluate.UserError, match=problem):
        make_gif.main(args)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.gif"]
