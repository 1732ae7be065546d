import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageSequence

import evaluate
from evaluate import Args

EXPERT = str(ROOT / "policies" / "spread" / "expert.pt")


SHIPPED = sorted(path for path in (ROOT / "policies").glob("*/*.pt") if path.stem in ("expert", "rookie", "novice"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_both_backends_give_the_same_greedy_returns(path):
    """Paired episodes: same start states, same draws of a prey, the batched environment against the package
    (benchmark/results/parity.md has 2,000 of each)."""
    episodes = 200 if path.parent.name == "spread" else 20
    reports = [evaluate.main(Args(str(path), num_episodes=episodes, backend=b, device="cpu")) for b in ("torch", "mpe2")]
    np.testing.assert_allclose(reports[0]["episode_returns"], reports[1]["episode_returns"], rtol=0, atol=1e-6)
    assert np.std(reports[0]["episode_returns"]) > 1


def test_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    report = evaluate.main(Args(EXPERT, num_episodes=300, json_path=str(path), device="cpu"))
    assert json.loads(path.read_text()) == report
    returns = np.array(report["episode_returns"])
    assert len(returns) == 300 and report["charts/test_return"] == pytest.approx(returns.mean())
    assert report["standard_error"] == pytest.approx(returns.std(ddof=1) / 300**0.5)
    assert np.mean(report["agent_returns"]) == pytest.approx(returns.mean())
    assert report["charts/score"] == pytest.approx(100 * (returns.mean() + 26.46) / (26.46 - 10.03))
    assert f"charts/test_return {returns.mean():.2f}" in capsys.readouterr().out


def test_seeds(capsys):
    first, again, other = (evaluate.main(Args(EXPERT, num_episodes=50, seed=s, device="cpu")) for s in (1, 1, 2))
    assert first["episode_returns"] == again["episode_returns"] != other["episode_returns"]


def test_random_policy_and_sampling():
    random = evaluate.main(Args("random", env="spread", num_episodes=4096, device="cpu"))
    assert abs(random["charts/score"]) < 3
    greedy, sampled = (evaluate.main(Args(EXPERT, num_episodes=512, sample=s, device="cpu")) for s in (False, True))
    assert greedy["charts/test_return"] > sampled["charts/test_return"]


def test_sampling_follows_the_softmax():
    class Fixed(torch.nn.Module):
        def forward(self, observations, first_step=0, memory=None):
            B, T, A, _ = observations.shape
            return torch.tensor([0.0, 1.0, 2.0]).expand(B, T, A, 3), None

    act = evaluate.make_actor(Fixed(), 3, torch.Generator().manual_seed(0), sample=True)
    actions = act(torch.zeros(40_000, 2, 4), 0)
    share = torch.bincount(actions.flatten(), minlength=3) / actions.numel()
    torch.testing.assert_close(share, torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.01, rtol=0)


def read_panels(path, num_panels: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels (frames, panels, 24, 220, 3) and pictures (frames, panels, 220, 220, 3) of a GIF, and its milliseconds."""
    with Image.open(path) as file:
        frames = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(file)]
    panels = np.stack([np.stack(np.split(frame, num_panels, axis=1)) for frame, _ in frames])
    assert panels.shape[2:] == (244, 220, 3)
    return panels[:, :, :24], panels[:, :, 24:], sum(duration for _, duration in frames)


@pytest.mark.parametrize("game", ["spread", "tag", "reference", "spread-7x5"])
def test_gif_shows_the_same_episodes_of_random_policy_and_expert(game, tmp_path):
    path, expert = tmp_path / "new" / "rollout.gif", str(ROOT / "policies" / game / "expert.pt")
    evaluate.main(Args(expert, gif=str(path), num_episodes=1, device="cpu"))
    assert path.stat().st_size < 10**6 and list(path.parent.iterdir()) == [path]
    labels, pictures, milliseconds = read_panels(path, 2)
    assert milliseconds == 3 * (25 * 100 + 1500)
    # In tag the first step changes nothing, not even the return: bodies start at rest, and a GIF merges equal frames.
    assert len(pictures) == (75 if game == "tag" else 78)
    for first in range(0, len(pictures), len(pictures) // 3):
        last = first + len(pictures) // 3 - 1
        assert (pictures[first, 0] == pictures[first, 1]).all() and (pictures[first] < 128).any()
        assert (pictures[last, 0] != pictures[last, 1]).any()
        assert (labels[first, 0] != labels[first, 1]).any()  # their names
    # Nothing is cut off: the edge of the pictures stays white, but for the line between panels.
    edge = np.ones((220, 220), dtype=bool)
    edge[1:-1, 2:-1] = False
    edge[:, 0] = False
    assert (pictures[:, :, edge] >= 250).all()


def save_policies(folder, source: str) -> str:
    """An untrained BC policy, and a learned one that says it was trained with the BC policy of that hash (or with this one)."""
    networks = [evaluate.AgentNetwork(18, 3, 5, 25, hidden_dim=8) for _ in range(2)]
    meta = dict(env="spread", network=dict(observation_dim=18, num_agents=3, num_actions=5, horizon=25, hidden_dim=8))
    sources = dict(bc=source or evaluate.hash_weights(networks[0], {}))
    for kind, network, more in (("bc", networks[0], {}), ("vdn", networks[1], {"sources": sources})):
        evaluate.save_checkpoint(folder / f"{kind}-seed1.pt", kind, SimpleNamespace(), meta | more, network, {}, {})
    return str(folder / "vdn-seed1.pt")


@pytest.mark.parametrize("source, num_panels", [("", 4), ("the hash of another", 3)])
def test_gif_shows_the_bc_policy_behind_a_learned_one(source, num_panels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "GIF_EPISODES", 1)
    path, vdn = tmp_path / "rollout.gif", save_policies(tmp_path, source)
    evaluate.main(Args(vdn, gif=str(path), num_episodes=1, device="cpu"))
    labels, pictures, _ = read_panels(path, num_panels)
    assert len(pictures) == 26 and len({label.tobytes() for label in labels[0]}) == num_panels
    assert len({picture.tobytes() for picture in pictures[0, :, :, 1:]}) == 1
    left_out = capsys.readouterr().out.count(f"{path}: no BC, because {vdn} was trained with none of {tmp_path}/bc*.pt\n")
    assert left_out == (num_panels == 3)


def test_gif_tells_the_returns_of_its_episodes():
    """The return so far begins at zero and ends at the return of the episode that is reported for the same seed."""
    game, args = evaluate.make_game("spread"), Args("random", env="spread", num_episodes=3, device="cpu")
    worlds, returns = evaluate.record(game, None, args, "cpu")
    assert len(worlds) == 26 and returns.shape == (3, 26) and (returns[:, 0] == 0).all()
    np.testing.assert_allclose(returns[:, -1], evaluate.main(args)["episode_returns"], rtol=0, atol=1e-6)
    positions = [[agent.state.p_pos for agent in step[0].agents] for step in worlds]
    assert np.ptp(np.stack(positions), axis=0).min() > 0  # copies, not one world 26 times


@pytest.mark.parametrize("name", ["rollout.png", "rollout", "file/rollout.gif", "folder.gif"])
def test_gif_that_cannot_be_written(name, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gif").mkdir()
    problem = {"file/rollout.gif": r"cannot be written \(", "folder.gif": "is a folder; name a file"}.get(
        name, "must end in .gif"
    )
    with pytest.raises(evaluate.UserError, match=rf"{name}: .*{problem}"):
        evaluate.main(Args(EXPERT, gif=str(tmp_path / name), num_episodes=1, device="cpu"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.gif"]


@pytest.mark.parametrize("module, words", [("mpe2", "the package mpe2"), ("PIL", "the package pillow")])
def test_gif_without_a_package(module, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(evaluate.UserError, match=rf"^--.*gif needs? {words} \(.*\); pip install [a-z0-9]+$"):
        evaluate.main(Args(EXPERT, gif=str(tmp_path / "rollout.gif"), num_episodes=1, device="cpu"))
    assert list(tmp_path.iterdir()) == []


def test_gif_of_an_unknown_game(tmp_path):
    with pytest.raises(evaluate.UserError, match=r"^--env chess: choose from spread, tag, reference$"):
        evaluate.main(Args("random", env="chess", gif=str(tmp_path / "rollout.gif"), device="cpu"))
