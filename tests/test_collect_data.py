"""The dataset: its format, who plays in it, which pairs it compares, and how the labels were drawn."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, read

import collect_data
import train_reward
from collect_data import MIXTURES, Args, draw_pairs, make_game, spread

BLOCK = collect_data.BLOCK_SIZE
EXPERT, UNILATERAL, ROOKIE, TRIVIAL = range(4)


def load(path) -> tuple[dict, dict]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def test_format(spread_data):
    arrays, meta = load(spread_data)
    N, T, A, D = 2560, 25, 3, 18
    expected = {"observations": ((N, T + 1, A, D), np.float32), "actions": ((N, T, A), np.uint8)}
    expected |= {"behavior": ((N,), np.int8), "deviator": ((N,), np.int8), "block": ((N,), np.int32)}
    expected |= {"pairs": ((10 * N, 2), np.int32), "labels": ((10 * N, A), np.int8)}
    expected |= {"true_rewards": ((N, T, A), np.float32)}
    assert {key: (array.shape, array.dtype.type) for key, array in arrays.items()} == expected
    assert arrays["block"].tolist() == [n // BLOCK for n in range(N)]
    returns = arrays["true_rewards"].sum(axis=1)
    np.testing.assert_allclose(meta.pop("return_mean"), returns.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(meta.pop("return_std"), returns.std(axis=0), rtol=1e-4)
    files = {name: read(ROOT / f"policies/spread/{name}.pt") for name in ("expert", "rookie", "novice")}
    checksums = {name: file["meta"]["checksum"] for name, file in files.items()}
    checksums["version"] = collect_data.VERSION
    args = {"env": "spread", "dataset": "diversified", "seed": 1, "num_trajectories": N}
    args |= {"pairs_per_trajectory": 10, "steepness": 5.0, "epsilon": 0.05}
    sizes = {"num_actions": 5, "num_agents": 3, "horizon": 25}
    wanted = {"format": 1, "env": "spread", "args": args, "steepness": 5.0, "sources": checksums} | sizes
    assert wanted.items() <= meta.items()
    results = json.loads(spread_data.with_suffix(".json").read_text())
    assert {"command", "args", "metrics", "version", "packages", "machine", "seconds"} == results.keys()
    behaviors = enumerate(("expert", "unilateral", "rookie", "trivial"))
    measured = {f"return/{name}": returns[arrays["behavior"] == b].mean() for b, name in behaviors}
    assert results["metrics"] == pytest.approx(measured, abs=1e-3)
    expert, unilateral, rookie, trivial = measured.values()
    assert expert > unilateral + 1 > rookie + 2 > trivial + 4


class Always(torch.nn.Module):
    def __init__(self, action):
        super().__init__()
        self.action = action

    def forward(self, observations, first_step=0, memory=None):
        actions = torch.full(observations.shape[:3], self.action)
        return torch.nn.functional.one_hot(actions, 5).float(), None


PARTS = {  # of 1,536 trajectories: expert, unilateral, rookie and trivial
    "diversified": (384, 384, 384, 384),
    "mix-unilateral": (768, 384, 0, 384),
    "mix-expert": (1152, 0, 0, 384),
    "pure-expert": (1536, 0, 0, 0),
    "no-expert": (0, 0, 768, 768),
    "trivial": (0, 0, 0, 1536),
}


@pytest.mark.parametrize(("dataset", "num_agents"), [*((x, 3) for x in MIXTURES), ("diversified", 4)])
def test_who_plays(dataset, num_agents, monkeypatch):
    """The shares of Table 1; every policy is replaced by one that always plays its own action, 0 for the
    expert, 1 for the rookie, 2 for the novice."""
    monkeypatch.setattr(collect_data, "ENVIRONMENTS_AT_ONCE", 100)  # several chunks, the last one short
    policies = {"expert": Always(0), "rookie": Always(1), "novice": Always(2)}
    args = Args(dataset=dataset, num_trajectories=1536, epsilon=0.0)
    data = collect_data.play_mixture(args, spread(num_agents, 3), policies, torch.device("cpu"))
    behavior, deviator, actions = data["behavior"], data["deviator"], data["actions"].long()
    assert tuple(torch.bincount(behavior, minlength=4).tolist()) == PARTS[dataset]
    assert (actions[behavior == EXPERT] == 0).all() and (actions[behavior == ROOKIE] == 1).all()
    if dataset != "pure-expert":
        random = actions[behavior == TRIVIAL].flatten()
        shares = torch.bincount(random, minlength=5) / len(random)
        torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.01, rtol=0)
    # Exactly one agent deviates, for the whole episode: every agent as often as a rookie as as a novice.
    assert (deviator[behavior != UNILATERAL] == -1).all()
    chosen, deviates = actions[behavior == UNILATERAL], deviator[behavior == UNILATERAL]
    others = torch.arange(num_agents) != deviates[:, None]
    assert (chosen.transpose(1, 2)[others] == 0).all()
    played = chosen.transpose(1, 2)[~others]  # (n, T)
    assert (played == played[:, :1]).all()
    joint = torch.bincount(deviates * 3 + played[:, 0], minlength=3 * num_agents).view(-1, 3)
    assert joint.tolist() == [[0] + [len(chosen) / (2 * num_agents)] * 2] * num_agents
    # Permuted: every block holds all behaviors, in about the mixture's ratio.
    for b in range(4):
        shares = (behavior.view(-1, BLOCK) == b).float().mean(dim=1)
        assert (shares - PARTS[dataset][b] / 1536).abs().max() < 0.24  # 4 standard deviations


def test_share_of_random_actions(spread_data):
    """An action is the greedy one of the network with probability 1 - epsilon * 4 / 5, of trivial agents with
    1 / 5. The network, observations and actions must then be of the same steps."""
    arrays, _ = load(spread_data)
    agrees = {}
    for name in ("expert", "rookie", "novice"):
        path = ROOT / f"policies/spread/{name}.pt"
        checkpoint = collect_data.load_checkpoint(path, "expert")
        network = collect_data.build_network(collect_data.AgentNetwork, path, checkpoint, "cpu")
        outputs, _ = network(torch.from_numpy(arrays["observations"][:, :-1]))
        agrees[name] = (outputs.argmax(dim=-1).numpy() == arrays["actions"]).mean(axis=1)  # (N, A)
    behavior = arrays["behavior"]
    assert agrees["expert"][behavior == EXPERT].mean() == pytest.approx(0.96, abs=0.005)
    assert agrees["rookie"][behavior == ROOKIE].mean() == pytest.approx(0.96, abs=0.005)
    assert agrees["expert"][behavior == TRIVIAL].mean() == pytest.approx(0.2, abs=0.01)
    deviates = np.arange(3) == arrays["deviator"][:, None]
    unilateral = (behavior == UNILATERAL)[:, None]
    assert agrees["expert"][unilateral & ~deviates].mean() == pytest.approx(0.96, abs=0.005)
    likely = np.maximum(agrees["rookie"], agrees["novice"])[unilateral & deviates]
    assert likely.mean() == pytest.approx(0.96, abs=0.01) and agrees["expert"][deviates].mean() < 0.8


def test_stored_actions_lead_to_the_stored_observations_and_rewards(spread_data):
    """Replayed in a fresh environment from the first observation."""
    arrays, _ = load(spread_data)
    first = torch.from_numpy(arrays["observations"][:64, 0])  # velocity, position, landmarks from there, ...
    positions, velocities = first[..., 2:4], first[..., :2]
    landmarks = first[:, 0, 4:10].view(-1, 3, 2) + positions[:, :1]
    env = collect_data.ParticleEnv(make_game("spread"), 64)
    env.set_state(positions, velocities, landmarks)
    for step in range(5):
        observed, rewards = env.step(torch.from_numpy(arrays["actions"][:64, step].astype(np.int64)))
        np.testing.assert_allclose(observed, arrays["observations"][:64, step + 1], atol=1e-4)
        np.testing.assert_allclose(rewards, arrays["true_rewards"][:64, step], atol=1e-4)


def test_pairs_are_of_different_trajectories_of_one_block():
    pairs = draw_pairs(4 * BLOCK, 10, torch.Generator().manual_seed(0))
    assert pairs.shape == (40 * BLOCK, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert (pairs[:, 0] // BLOCK == pairs[:, 1] // BLOCK).all()
    assert torch.bincount(pairs[:, 0] // BLOCK).tolist() == [10 * BLOCK] * 4
    for side in pairs.T:  # uniform: every trajectory stands about 10 times on either side
        counts = torch.bincount(side, minlength=4 * BLOCK).float()
        assert counts.min() >= 1 and counts.var() == pytest.approx(10, rel=0.2)


def test_labels_follow_the_bradley_terry_probability(spread_data):
    """Their counts are sums of independent Bernoulli draws: in ten bins of the probability, for every agent,
    within four standard errors."""
    arrays, meta = load(spread_data)
    standardized = (arrays["true_rewards"].sum(axis=1) - meta["return_mean"]) / meta["return_std"]
    first, second = arrays["pairs"].T
    probability = 1 / (1 + np.exp(-5 * (standardized[first] - standardized[second])))  # (M, A)
    prefers_first = arrays["labels"] == 1
    assert (arrays["labels"][~prefers_first] == -1).all()
    for low in np.linspace(0, 0.9, 10):
        chosen = (low <= probability) & (probability < low + 0.1)
        error = np.sqrt((probability * (1 - probability) * chosen).sum(axis=0))
        assert (np.abs(((prefers_first - probability) * chosen).sum(axis=0)) < 4 * error).all()
        assert (chosen.sum(axis=0) > 200).all()


@pytest.mark.parametrize("ties", [0.0, 0.5])
@pytest.mark.parametrize("mistakes", [0.0, 0.1, 1.0])
def test_an_annotator_that_errs(mistakes, ties, spread_data):
    """Flags change the answers that they are about, and draw no other numbers for the rest."""
    arrays, meta = load(spread_data)
    rewards, pairs = torch.from_numpy(arrays["true_rewards"]), torch.from_numpy(arrays["pairs"])
    plain, labels = (
        collect_data.draw_labels(rewards, pairs, args, torch.Generator().manual_seed(2))[0]
        for args in (Args(), Args(mistakes=mistakes, ties=ties))
    )
    standardized = (rewards.sum(dim=1) - torch.tensor(meta["return_mean"])) / torch.tensor(meta["return_std"])
    difference = standardized[pairs[:, 0]] - standardized[pairs[:, 1]]
    sure = (difference.abs() - ties).abs() > 1e-4  # of its side of the limit, for all rounding
    assert ((labels == 0) == (difference.abs() < ties))[sure].all()
    flipped = (labels == -plain)[labels != 0].float().mean().item()
    assert flipped == pytest.approx(mistakes, abs=0.01)


def test_a_myopic_annotator_and_one_that_judges_the_team():
    """Agent 0 earns early in the first trajectory, agent 1 half as much late in the second."""
    rewards = torch.zeros(2, 3, 2)
    rewards[0, 0, 0], rewards[1, 2, 1] = 4.0, 2.0
    cases = [({}, [1, -1]), ({"team_labels": True}, [1]), ({"team_labels": True, "myopia": 0.75}, [1])]
    cases += [({"team_labels": True, "myopia": 0.7}, [-1]), ({"myopia": 0.0}, [0, -1])]
    for flags, wanted in cases:  # 4 * 0.75 ** 2 > 2 > 4 * 0.7 ** 2
        args = Args(steepness=1e6, ties=1e-3, **flags)
        labels, mean, _ = collect_data.draw_labels(rewards, torch.tensor([[0, 1]]), args, torch.Generator())
        assert labels.tolist() == [wanted] and mean.shape == (len(wanted),)


@pytest.mark.parametrize("flags", [{"team_labels": True}, {"mistakes": 0.1}, {"ties": 0.1}, {"myopia": 0.9}])
def test_what_the_truth_would_predict_is_told_only_of_annotators_that_follow_it(flags, tmp_path):
    args = Args(num_trajectories=512, data_path=str(tmp_path / "dataset.npz"), device="cpu", **flags)
    collect_data.main(args)
    arrays, meta = load(args.data_path)
    assert flags.items() <= meta["args"].items()
    rewards, pairs = torch.from_numpy(arrays["true_rewards"]), torch.from_numpy(arrays["pairs"]).long()
    test = torch.arange(512)[None], pairs[None], torch.from_numpy(arrays["labels"]).float()[None]
    metrics = train_reward.compare_with_truth(rewards, rewards, test, meta, train_reward.Args())
    if "team_labels" not in flags:
        assert "reward/bayes_nll" not in metrics
    else:
        assert arrays["labels"].shape == (5120, 1) and set(arrays["labels"][:, 0]) == {-1, 1}
        returns = rewards.sum(dim=1).mean(dim=1)
        logits = 5 * (returns[pairs[:, 0]] - returns[pairs[:, 1]]) / returns.std(correction=0)
        nll = torch.nn.functional.softplus(-logits * test[2][0, :, 0]).mean().item()
        assert metrics["reward/bayes_nll"] == pytest.approx(nll, rel=1e-4)
    args.mistakes = 0.3
    with pytest.raises(collect_data.UserError, match=r"--mistakes 0.\d? there, 0.3 here"):
        collect_data.main(args)


def test_seeds_and_a_finished_dataset(tmp_path, capsys, monkeypatch):
    paths = [tmp_path / name / "dataset.npz" for name in ("a", "b", "other-seed")]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        collect_data.main(Args(num_trajectories=512, seed=seed, data_path=str(path), device="cpu"))
    (a, meta_a), (b, meta_b), (c, _) = map(load, paths)
    assert meta_a == meta_b
    assert all(a[key].tobytes() == b[key].tobytes() for key in a)
    assert all((a[key] != c[key]).any() for key in ("observations", "actions", "pairs", "labels"))

    # The same command again keeps it and plays nothing; another one does not write over it.
    monkeypatch.setattr(collect_data, "play_mixture", None)
    before = {path.name: path.read_bytes() for path in paths[0].parent.iterdir()}
    assert before.keys() == {"dataset.npz", "dataset.json"}
    again = Args(num_trajectories=512, seed=3, data_path=str(paths[0]), device="cpu")
    collect_data.main(again)
    assert "dataset.npz: already there, with these settings" in capsys.readouterr().out
    again.epsilon, again.dataset = 0.1, "no-expert"
    problem = "--dataset 'diversified' there, 'no-expert' here; --epsilon 0.05 there, 0.1 here"
    with pytest.raises(collect_data.UserError, match=problem):
        collect_data.main(again)
    again.epsilon, again.dataset = 0.05, "diversified"
    shutil.copytree(ROOT / "policies/spread", tmp_path / "policies")
    shutil.copy(tmp_path / "policies/rookie.pt", tmp_path / "policies/novice.pt")
    again.policies_path = str(tmp_path / "policies")
    with pytest.raises(collect_data.UserError, match=r"dataset.npz: .*another novice"):
        collect_data.main(again)
    assert {path.name: path.read_bytes() for path in paths[0].parent.iterdir()} == before


TRAIN = "python benchmark/train_spread_experts.py --env spread-2x2"
MISTAKES = [
    ({"env": "spread-2x2"}, f"2x2/expert.pt: no such file; `{TRAIN}`"),
    ({"num_trajectories": 100}, "--num-trajectories 100: must be a multiple of 64"),
    ({"num_trajectories": 0}, "--num-trajectories 0: must be from 1"),
    ({"epsilon": 1.5}, "--epsilon 1.5: must be from 0 to 1"),
    ({"mistakes": 1.1}, "--mistakes 1.1: must be from 0 to 1"),
    ({"myopia": -0.1}, "--myopia -0.1: must be from 0 to 1"),
    ({"steepness": float("nan")}, "--steepness nan: must be from 0"),
    ({"data_path": "file/dataset.npz"}, r"file/dataset.\w+: cannot be written"),
    ({"data_path": "folder.npz"}, "folder.npz: no dataset of this script"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes(flags, message, tmp_path, monkeypatch):
    """Told before anything is played."""
    monkeypatch.setattr(collect_data, "play_mixture", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(collect_data.UserError, match=message):
        collect_data.main(Args(**{"device": "cpu"} | flags))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.npz"]
