import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import same_weights

import collect_data
from collect_data import EARLY_CHECKPOINTS, Args, draw_labels, draw_pairs, make_game, mean_return

BLOCK = collect_data.BLOCK_SIZE
POLICIES = ("expert", "rookie", "novice")


def load(path) -> tuple[dict, dict]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def test_format(spread_data):
    arrays, meta = load(spread_data)
    N, T, A, D = 2560, 25, 3, 18
    expected = {
        "observations": ((N, T + 1, A, D), np.float32),
        "actions": ((N, T, A), np.uint8),
        "behavior": ((N,), np.int8),
        "deviator": ((N,), np.int8),
        "pairs": ((10 * N, 2), np.int32),
        "labels": ((10 * N, A), np.int8),
        "block": ((N,), np.int32),
        "true_rewards": ((N, T, A), np.float32),
    }
    assert {key: (array.shape, array.dtype.type) for key, array in arrays.items()} == expected
    assert meta["env"] == "spread" and meta["mixture"] == "diversified" and meta["num_actions"] == 5
    returns = arrays["true_rewards"].sum(axis=1)
    np.testing.assert_allclose(meta["return_mean"], returns.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(meta["return_std"], returns.std(axis=0), rtol=1e-4)


@pytest.mark.parametrize("mixture", collect_data.MIXTURES)
def test_mixture_has_the_ratios_of_table_1(mixture, tmp_path, monkeypatch):
    path = tmp_path / "dataset.npz"
    monkeypatch.setattr(collect_data, "ENVIRONMENTS_AT_ONCE", 100)  # several chunks, the last one short
    collect_data.main(Args(dataset=mixture, num_trajectories=1024, data_path=str(path), device="cpu"))
    arrays, _ = load(path)
    counts = np.bincount(arrays["behavior"], minlength=4)
    assert counts.tolist() == [256 * part for part in collect_data.MIXTURES[mixture]]
    unilateral = arrays["behavior"] == collect_data.UNILATERAL
    assert (arrays["deviator"][~unilateral] == -1).all()
    if unilateral.any():  # the deviator rotates over the agents
        assert np.bincount(arrays["deviator"][unilateral]).max() - np.bincount(arrays["deviator"][unilateral]).min() <= 1
    # Permuted: every block holds all behaviors, in about the mixture's ratio.
    expert_share = (arrays["behavior"].reshape(-1, BLOCK) == collect_data.EXPERT).mean(axis=1)
    assert np.abs(expert_share - counts[0] / 1024).max() < 0.12


def test_behaviors_are_ordered_by_return(spread_data):
    arrays, _ = load(spread_data)
    returns = arrays["true_rewards"].sum(axis=1).mean(axis=1)
    expert, unilateral, rookie, trivial = (returns[arrays["behavior"] == b].mean() for b in range(4))
    assert expert > unilateral + 1 > rookie + 2 > trivial + 4


def test_stored_actions_and_observations_are_of_the_same_steps(spread_data):
    """Replay stored actions in a fresh environment from the stored first observation."""
    arrays, _ = load(spread_data)
    first = torch.from_numpy(arrays["observations"][:64, 0])  # velocity, position, landmarks relative to the agent, ...
    positions, velocities = first[..., 2:4], first[..., :2]
    landmarks = first[:, 0, 4:10].view(-1, 3, 2) + positions[:, :1]
    env = collect_data.ParticleEnv(make_game("spread"), 64)
    env.set_state(positions, velocities, landmarks)
    for step in range(5):
        observed, rewards = env.step(torch.from_numpy(arrays["actions"][:64, step].astype(np.int64)))
        np.testing.assert_allclose(observed, arrays["observations"][:64, step + 1], atol=1e-4)
        np.testing.assert_allclose(rewards, arrays["true_rewards"][:64, step], atol=1e-4)


def test_share_of_random_actions(spread_data, tmp_path):
    """Experts repeat the greedy action of their network in 1 - epsilon * 4 / 5 of all cases, trivial agents in 1 / 5."""
    arrays, _ = load(spread_data)
    path = collect_data.Path(collect_data.__file__).parent / "policies" / "spread" / "expert.pt"
    checkpoint = collect_data.load_checkpoint(path, ("vdn",))
    expert = collect_data.build_network(collect_data.AgentNetwork, path, checkpoint, "cpu")
    outputs, _ = expert(torch.from_numpy(arrays["observations"][:, :-1]))
    agrees = (outputs.argmax(dim=-1).numpy() == arrays["actions"]).mean(axis=(1, 2))
    assert agrees[arrays["behavior"] == collect_data.EXPERT].mean() == pytest.approx(1 - 0.05 * 0.8, abs=0.005)
    assert agrees[arrays["behavior"] == collect_data.TRIVIAL].mean() == pytest.approx(0.2, abs=0.01)
    unilateral = arrays["behavior"] == collect_data.UNILATERAL
    agrees = (outputs.argmax(dim=-1).numpy() == arrays["actions"])[unilateral].mean(axis=1)  # (n, A)
    deviates = np.arange(3) == arrays["deviator"][unilateral][:, None]
    assert agrees[~deviates].mean() == pytest.approx(0.96, abs=0.01)
    assert agrees[deviates].mean() < 0.8


def test_pairs_are_of_different_trajectories_of_one_block():
    pairs = draw_pairs(4 * BLOCK, 10, torch.Generator().manual_seed(0))
    assert pairs.shape == (40 * BLOCK, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert (pairs[:, 0] // BLOCK == pairs[:, 1] // BLOCK).all()
    assert torch.bincount(pairs[:, 0] // BLOCK).tolist() == [10 * BLOCK] * 4
    for side in pairs.T:  # uniform: every trajectory stands about 10 times on either side
        counts = torch.bincount(side, minlength=4 * BLOCK).float()
        assert counts.min() >= 1 and counts.var() == pytest.approx(10, rel=0.2)


def test_labels_follow_the_bradley_terry_probability():
    generator = torch.Generator().manual_seed(0)
    returns = torch.tensor([[0.0, 5.0], [1.0, 5.5], [2.0, 4.5]])
    pairs = torch.tensor([[0, 1], [2, 0], [1, 2]]).repeat(20_000, 1)
    labels, mean, std = draw_labels(returns, pairs, 1.5, generator)
    torch.testing.assert_close(mean, torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(std, torch.tensor([(2 / 3) ** 0.5, (1 / 6) ** 0.5]))
    share = (labels.view(-1, 3, 2) == 1).float().mean(dim=0)  # (pair, agent)
    gap = 1.5 * 1.5**0.5  # agent 0: neighbours differ by sqrt(3 / 2) standard deviations
    expected = torch.sigmoid(torch.tensor([[-gap, -gap], [2 * gap, -gap], [-gap, 2 * gap]]))
    torch.testing.assert_close(share, expected, atol=0.012, rtol=0)
    assert labels.dtype == torch.int8 and set(labels.unique().tolist()) == {-1, 1}


def test_same_command_same_arrays(tmp_path):
    paths = [tmp_path / name / "dataset.npz" for name in ("a", "b", "other-seed")]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        collect_data.main(Args(num_trajectories=512, seed=seed, data_path=str(path), device="cpu"))
    (a, meta_a), (b, meta_b), (c, _) = map(load, paths)
    assert meta_a == meta_b
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert not np.array_equal(a["observations"], c["observations"]) and not np.array_equal(a["labels"], c["labels"])


def test_same_command_same_policies(tmp_path):
    """Online VDN twice, and a folder that lacks one of the policies is left alone."""
    weights = []
    for name in ("a", "b"):
        args = Args(policies_path=str(tmp_path / name), num_trajectories=256, data_path=str(tmp_path / name / "dataset.npz"))
        args.num_updates, args.num_envs, args.hidden_dim, args.num_layers, args.device = 8, 16, 16, 2, "cpu"
        collect_data.main(args)
        checkpoints = [torch.load(tmp_path / name / "spread" / f"{p}.pt", weights_only=True) for p in POLICIES]
        weights.append([checkpoint["state_dict"] for checkpoint in checkpoints])
    for a, b in zip(*weights, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    rookie = tmp_path / "b" / "spread" / "rookie.pt"
    rookie.unlink()
    with pytest.raises(collect_data.UserError, match=r"rookie.pt: no such file; --train-policies"):
        collect_data.main(args)
    args.policies_path = str(tmp_path / "a")
    args.data_path = str(spread_with_other_policies(tmp_path))
    with pytest.raises(collect_data.UserError, match=r"dataset.npz: made with other policies"):
        collect_data.main(args)


def spread_with_other_policies(tmp_path):
    path = tmp_path / "other" / "dataset.npz"
    collect_data.main(Args(num_trajectories=256, data_path=str(path), device="cpu"))
    return path


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_online_vdn_learns(network, tmp_path):
    """320 updates lift the greedy policy well above the untrained one; a dataset can be collected from both checkpoints."""
    args = Args(policies_path=str(tmp_path), num_trajectories=256, data_path=str(tmp_path / "dataset.npz"), device="cpu")
    args = dataclasses.replace(args, network=network, num_updates=320, exploration_updates=200, learning_rate=3e-3)
    args = dataclasses.replace(args, hidden_dim=64, num_layers=2, num_envs=32, batch_size=32)
    collect_data.main(args)
    metrics = {n: torch.load(tmp_path / "spread" / f"{n}.pt", weights_only=True)["metrics"] for n in POLICIES}
    first, last = metrics["expert"]["history"][0][1], metrics["expert"]["charts/test_return"]
    assert last > first + 5 and last > -28
    returns = np.array([value for _, value in metrics["expert"]["history"]])
    low = mean_return(make_game("spread"), None, collect_data.TEST_EPISODES, args.seed + 10**6, "cpu")
    for name, share in EARLY_CHECKPOINTS.items():
        nearest = np.abs(returns - (low + share * (last - low))).argmin()
        assert metrics[name]["updates"] == metrics["expert"]["history"][nearest][0] < args.num_updates
        assert not same_weights(*(tmp_path / "spread" / f"{policy}.pt" for policy in (name, "expert")))


def test_interrupted_policy_training_goes_on(tmp_path, monkeypatch):
    """Stopped in mid-run and started again, it ends with the weights of the run that was not stopped."""
    small = dict(env="reference", num_trajectories=256, num_updates=80, num_envs=16, hidden_dim=16, num_layers=2, device="cpu")
    small |= dict(checkpoint_every=4)
    args = [Args(policies_path=str(tmp_path / n), data_path=str(tmp_path / n / "dataset.npz"), **small) for n in "ab"]
    collect_data.main(args[0])
    save_content = collect_data.save_content

    def save_and_die(path, **content):
        save_content(path, **content)
        if content["kind"] == "training" and content["metrics"]["online VDN"][0] >= 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(collect_data, "save_content", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        collect_data.main(args[1])
    assert [path.name for path in (tmp_path / "b/reference").iterdir()] == ["expert.training.pt"]
    monkeypatch.setattr(collect_data, "save_content", save_content)
    args[1].hidden_dim, args[1].resume = 8, True
    with pytest.raises(collect_data.UserError, match=r"training.pt: .*--hidden-dim is 16 there and 8 here.*leave out --resume"):
        collect_data.main(args[1])
    args[1].hidden_dim, args[1].dataset = 16, "mix-expert"  # what no policy depends on may change
    collect_data.main(args[1])
    for name in POLICIES:
        assert same_weights(*(tmp_path / folder / "reference" / f"{name}.pt" for folder in "ab"))
    assert not (tmp_path / "b/reference/expert.training.pt").exists()


def test_speech_is_explored_by_holding_words():
    """Words change every tenth step, to the language's or (30 %) a random one; moves, and agents that do not hold, stay."""
    generator = torch.Generator().manual_seed(0)

    def act(observations, step):
        return torch.full((4000, 2), 5 * 7 + 2)  # word 7, move 2

    def language(observations):
        return torch.full((4000, 2), 3)

    explorer = collect_data.explore_speech(act, language, 10, 1.0, 1.0, generator)
    actions = torch.stack([explorer(None, step) for step in range(25)], dim=1)
    assert (actions % 5 == 2).all()
    words = actions // 5
    assert (words == 3).float().mean() == pytest.approx(0.7 + 0.03, abs=0.02)
    assert (words[:, 1:] != words[:, :-1]).float().mean() == pytest.approx(0.1 * (1 - 0.73**2 - 9 * 0.03**2), abs=0.005)
    explorer = collect_data.explore_speech(act, language, 10, 1.0, 0.0, generator)
    assert (explorer(None, 0) == 5 * 7 + 2).all()


def test_random_language_depends_on_the_goal():
    game, generator = make_game("reference"), torch.Generator().manual_seed(0)
    env = collect_data.ParticleEnv(game, 20_000)
    words = collect_data.random_language(game, 1, "cpu")(env.reset(generator))
    joint = torch.zeros(3, 10).index_put_((env.goals[0], words[:, 0]), torch.tensor(1 / 20_000), accumulate=True)
    independent = joint.sum(dim=0) * joint.sum(dim=1, keepdim=True)
    information = (joint * (joint / independent).clamp(min=1e-9).log2()).sum()
    assert 0.1 < information < 1.58  # bits; a word that told the goal would have log2(3)
