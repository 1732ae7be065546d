"""The games and the policies shipped for them: which names are games, how good the players are, and what the
prey of tag does."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT

import collect_data
import evaluate

# Bars of the shipped experts. The authors' best are at -10.03, -10.36, -26.58, -18.73, -25.03 and -24.16.
BARS = {"spread": -8.2, "reference": -9.0, "spread-4x5": -21.0, "spread-5x5": -15.0, "spread-6x5": -17.5}
BARS |= {"spread-7x5": -17.0, "tag": 36.0}


@pytest.mark.parametrize("name", BARS)
def test_shipped_policies_are_a_random_policy_a_novice_a_rookie_and_an_expert(name):
    """By the share of the way from the random policy to the expert, which is above its bar."""
    paths = {policy: ROOT / f"policies/{name}/{policy}.pt" for policy in ("novice", "rookie", "expert")}
    words = ("random", *map(str, paths.values()))
    report = evaluate.main(evaluate.Args(words, env=name, num_episodes=1024, seed=12345, device="cpu"))
    random, novice, rookie, expert = (report[word]["charts/test_return"] for word in words)
    assert expert >= BARS[name]
    novice, rookie = ((value - random) / (expert - random) for value in (novice, rookie))
    assert 0.1 < novice < rookie - 0.1 and 0.3 < rookie < 0.6
    for path in paths.values():
        checkpoint = collect_data.load_checkpoint(path, "expert")
        assert checkpoint["meta"]["env"] == name and checkpoint["meta"]["seed"] >= 0
        assert (ROOT / checkpoint["meta"]["command"].split()[1]).exists() and path.stat().st_size < 200_000
        measured, error = report[str(path)]["charts/test_return"], report[str(path)]["standard_error"]
        assert measured == pytest.approx(checkpoint["metrics"]["charts/test_return"], abs=6 * error)


@pytest.mark.parametrize("name", ["chess", "spread-0x3", "spread-5", "spread-5x4x3", "spread-05x4", ""])
def test_names_of_no_game(name):
    with pytest.raises(collect_data.UserError, match=f"^--env '{name}': unknown, choose spread, spread-5x4"):
        collect_data.make_game(name)
    assert evaluate.find_game(name, "cpu", (18, 3, 5, 25)) is None


class FixedPrey(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, observations):
        assert observations.shape[1:] == (14,) and observations.dtype == torch.float32
        return self.logits.expand(len(observations), 5)


def test_prey_draws_its_moves_from_its_softmax():
    logits = [0.0, 2.0, 1.0, 0.0, 0.0]
    env = collect_data.ParticleEnv(collect_data.tag(FixedPrey(logits)), 20_000, dtype=torch.float64)
    env.reset(torch.Generator().manual_seed(0))
    env.step(torch.zeros(20_000, 3, dtype=torch.long))
    # From rest a push gives a velocity of 0.4, unless something stood in the way.
    pushes = ([0.0, 0.0], [-0.4, 0.0], [0.4, 0.0], [0.0, -0.4], [0.0, 0.4])
    pushed = [(env.velocities[3].T - torch.tensor(push)).norm(dim=1) < 1e-6 for push in pushes]
    share = torch.stack(pushed).float().mean(dim=1)
    torch.testing.assert_close(share / share.sum(), torch.tensor(logits).softmax(0), atol=0.02, rtol=0)
    assert 0.8 < share.sum() < 1


def test_the_shipped_prey_is_a_real_opponent():
    game, policies = evaluate.load_policies([str(ROOT / "policies/tag/expert.pt")], "cpu")
    (expert,) = policies.values()
    uniform = evaluate.tag(FixedPrey([0.0] * 5))
    random, against_prey, against_uniform = (
        evaluate.play(played, policy, "cpu", seed=1, num_episodes=2048).mean(dim=1)
        for played, policy in ((game, None), (game, expert), (uniform, expert))
    )
    assert against_prey.mean() >= 10 * random.mean()  # the authors': 3.95 and 39.3
    assert against_prey.mean() <= 0.87 * against_uniform.mean()  # the authors': 39.3 and 45.4
    for scale, returns in ((game.low, random), (game.high, against_prey)):
        assert scale == pytest.approx(returns.mean().item(), abs=4 * returns.std().item() / 2048**0.5)


def test_policies_play_in_their_own_game_alone(tmp_path):
    """The game that a file names, and the sizes of its network, which another tool may have mixed up."""
    folder = ROOT / "policies/spread"
    for env, plays in (("tag", "not 'tag'"), ("spread-5x5", "not 'spread-5x5'")):
        with pytest.raises(evaluate.UserError, match=f"expert.pt: plays 'spread', {plays}"):
            evaluate.main(evaluate.Args((str(folder / "expert.pt"),), env=env, device="cpu"))
    checkpoint = torch.load(folder / "expert.pt", weights_only=True)
    checkpoint["meta"]["env"] = "spread-4x3"
    torch.save(checkpoint, tmp_path / "lies.pt")
    with pytest.raises(evaluate.UserError, match=r"lies.pt: .*sizes \(18, 3, 5, 25\), not \(22, 4, 5, 25\)"):
        evaluate.main(evaluate.Args((str(tmp_path / "lies.pt"),), device="cpu"))
    args = collect_data.Args(env="spread-4x3", policies_path=str(folder), device="cpu")
    with pytest.raises(collect_data.UserError, match=r"expert.pt: .*sizes \(18, 3, 5, 25\), not \(22, 4"):
        collect_data.main(args)


@pytest.mark.parametrize("env", ["tag", "reference", "spread-5x4"])
def test_every_game_makes_a_dataset(env, tmp_path):
    """spread-5x4, for which nothing is shipped, with untrained players."""
    game, path = collect_data.make_game(env), tmp_path / "dataset.npz"
    args = collect_data.Args(env, num_trajectories=256, data_path=str(path), device="cpu")
    if env == "spread-5x4":
        args.policies_path = str(tmp_path)
        network = {"sizes": game.sizes, "network": "gru", "hidden_dim": 8}
        for name in ("expert", "rookie", "novice"):
            meta, weights = {"env": env, "network": network}, evaluate.AgentNetwork(**network).state_dict()
            collect_data.save_checkpoint(tmp_path / f"{name}.pt", "expert", args, meta, weights, {}, {})
    collect_data.main(args)
    with np.load(path) as file:
        assert file["observations"].shape == (256, 26, game.num_agents, game.observation_dim)
        assert file["actions"].max() < game.num_actions and file["labels"].shape == (2560, game.num_agents)
        assert math.isfinite(file["observations"].sum()) and file["true_rewards"].std() > 0
