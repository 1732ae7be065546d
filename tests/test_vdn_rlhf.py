"""Eq. (3) and (4), the targets of Q(lambda), what the updates get, and the policy that comes out."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from conftest import made_up_arrays, read, rebuild, same_weights, without

import train_bc
import train_reward
import vdn_rlhf
from vdn_rlhf import AgentNetwork, Args, RewardNetwork, VDNPolicy, kl_rewards, q_lambda_targets, team_rewards

MADE_UP = {"env": "made-up", "device": "cpu"}
SMALL = MADE_UP | {"hidden_dim": 16, "num_updates": 20}


def model_paths(data_path) -> dict[str, str]:
    names = {"reward_path": "reward-alpha0-seed1.pt", "bc_path": "bc-seed1.pt"}
    return {flag: str(data_path.with_name(name)) for flag, name in names.items()}


def make_models(folder, num_trajectories=60, num_pairs=400):
    """A dataset of the made-up game, a reward model and a BC policy -> the dataset's path."""
    data_path = folder / "dataset.npz"
    np.savez(data_path, **made_up_arrays(num_trajectories, num_pairs))
    flags = {"data_path": str(data_path), "hidden_dim": 32, **MADE_UP}
    train_reward.main(train_reward.Args(alpha=0.0, input="own", learning_rate=1e-2, max_epochs=6, **flags))
    train_bc.main(train_bc.Args(num_updates=20, **flags))
    return data_path


@pytest.fixture(scope="module")
def few_data(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def many_data(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("many"), 1000, 5000)


def learn(data_path, path, **flags) -> dict:
    vdn_rlhf.main(Args(data_path=str(data_path), alpha=0.0, vdn_path=str(path), **SMALL | flags))
    return read(path)


@pytest.mark.parametrize("td_lambda", [0.0, 0.8, 1.0])
def test_targets_against_a_slow_sum(td_lambda):
    """Q(lambda): G_t = Q_t + sum over k >= t of (gamma * lambda) ** (k - t) * delta_k, where delta_k is the
    one-step error r_k + gamma * V_{k+1} - Q_k; nothing is bootstrapped after the last step."""
    generator, B, T, gamma = torch.Generator().manual_seed(0), 3, 6, 0.9
    r, V, Q = (torch.randn(B, T, generator=generator, dtype=torch.float64) for _ in range(3))
    targets = q_lambda_targets(r, V, Q, gamma, td_lambda)
    for b, t in np.ndindex(B, T):
        expected = Q[b, t].item()
        for k in range(t, T):
            bootstrap = gamma * V[b, k + 1] if k + 1 < T else 0.0
            expected += (gamma * td_lambda) ** (k - t) * (r[b, k] + bootstrap - Q[b, k]).item()
        assert targets[b, t].item() == pytest.approx(expected)
    torch.testing.assert_close(targets[:, -1], r[:, -1])


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_loss_and_its_gradient_against_slow_loops(temperature):
    generator, (B, T, A, K) = torch.Generator().manual_seed(0), (2, 4, 3, 5)
    q, target_q = (torch.randn(B, T, A, K, generator=generator, dtype=torch.float64) for _ in range(2))
    actions, rewards = torch.randint(K, (B, T, A), generator=generator), torch.randn(B, T).double()
    q, target_q = q.requires_grad_(), target_q.requires_grad_()
    loss = vdn_rlhf.vdn_loss(q, target_q, actions, rewards, 0.9, 0.8, temperature)
    loss.backward()
    values, chosen, q_tot = torch.zeros(3, B, T, dtype=torch.float64)
    for b, t, i in np.ndindex(B, T, A):
        numbers = q[b, t, i].tolist()
        pi = [math.exp(x / temperature) if temperature else x == max(numbers) for x in numbers]
        for k, p in enumerate(pi):
            entropy = temperature and temperature * math.log(K * p / sum(pi))
            values[b, t] += p / sum(pi) * (target_q[b, t, i, k].item() - entropy)
        chosen[b, t] += target_q[b, t, i, actions[b, t, i]].item()
        q_tot[b, t] += q[b, t, i, actions[b, t, i]].item()
    error = q_tot - q_lambda_targets(rewards, values, chosen, 0.9, 0.8)
    assert loss.item() == pytest.approx(error.square().mean().item())
    gradient = torch.zeros_like(q)
    for b, t, i in np.ndindex(B, T, A):
        gradient[b, t, i, actions[b, t, i]] = 2 * error[b, t] / (B * T)
    torch.testing.assert_close(q.grad, gradient)
    assert target_q.grad is None


def test_the_kl_part_alone_is_worth_nothing_to_its_own_policy():
    """Where f is 0, pi_w is pi_ref and its KL term 0, be it sure or not; greedy values count a bonus."""
    q = kl_rewards(torch.tensor([3.0, 0, 0]).expand(1, 2, 1, 3), beta=2.0)
    inputs = (q, q, torch.zeros(1, 2, 1).long(), torch.zeros(1, 2), 1.0, 0.0)
    losses = [vdn_rlhf.vdn_loss(*inputs, temperature) for temperature in (2.0, 0.0)]
    chosen = q[0, 0, 0, 0].item()
    assert [x.item() for x in losses] == pytest.approx([chosen**2, chosen**2 / 2], abs=1e-4)


def test_equations_3_and_4_against_numbers_worked_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log() + 7.0  # of two agents
    kl = kl_rewards(logits, beta=2.0)  # 2 * (log pi_ref - log(1 / 3))
    torch.testing.assert_close(kl, 2 * torch.tensor([[1.5, 0.75, 0.75], [0.3, 0.3, 2.4]]).log())
    r_phi, stats = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), {"mean": 2.0, "std": 0.5}
    taken = torch.stack([kl[[0, 1], [0, 2]], kl[[0, 1], [1, 0]]])  # of the actions taken in two steps
    expected = [(1 - 2) / 0.5 + (3 - 2) / 0.5 + 2 * math.log(1.5 * 2.4), 0 + 2 * math.log(0.75 * 0.3)]
    torch.testing.assert_close(team_rewards(r_phi, stats, taken), torch.tensor(expected))
    constant = team_rewards(torch.full((4, 2), 0.3), {"mean": torch.tensor(0.3).item(), "std": 0.0}, 0.0)
    assert constant.tolist() == [0.0] * 4


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_policy_adds_the_kl_part_and_remembers_step_by_step(network):
    torch.manual_seed(0)
    sizes = (4, 2, 3, 5)
    policy = VDNPolicy({"sizes": sizes, "network": network, "hidden_dim": 8}, {"sizes": sizes}, beta=2.0)
    observations, memory = torch.randn(3, 5, 2, 4), None
    pi_ref = policy.reference(observations)[0].softmax(dim=-1)
    expected = policy.values(observations)[0] + 2 * (pi_ref * 3).log()
    torch.testing.assert_close(policy(observations)[0], expected)
    for step in range(5):
        output, memory = policy(observations[:, step : step + 1], step, memory)
        torch.testing.assert_close(output[:, 0], expected[:, step])
    again = policy(observations[:, :1])[0]  # a new episode remembers nothing
    torch.testing.assert_close(again[:, 0], expected[:, 0])


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_what_an_agent_sees(network):
    """Its own observations, of the present and, by a GRU, of the past; the step and its id tell apart what
    else would be equal."""
    torch.manual_seed(0)
    policy, observations = AgentNetwork((4, 3, 5, 6), network, hidden_dim=16), torch.randn(2, 6, 3, 4)
    changed = observations.clone()
    changed[0, 2, 1] += 1
    differs = (policy(changed)[0] != policy(observations)[0]).any(dim=-1).nonzero().tolist()
    assert differs == [[0, t, 1] for t in range(2, 3 if network == "mlp" else 6)]
    same = policy(torch.zeros(1, 6, 3, 4))[0][0]
    assert len({tuple(row) for row in same.flatten(0, 1).tolist()}) == 18


class Stop(Exception):
    pass


def open_up(monkeypatch, data_path, path, **flags) -> tuple[dict, dict]:
    """The arguments of train(), and what its update works on."""
    caught = {}

    def stop(*words):
        caught.update(inspect.signature(train).bind(*words).arguments)
        raise Stop

    train = vdn_rlhf.train
    monkeypatch.setattr(vdn_rlhf, "train", stop)
    with pytest.raises(Stop):
        learn(data_path, path, **flags)
    return caught, inspect.getclosurevars(caught["update"]).nonlocals


@pytest.mark.parametrize(("known_kl", "soft_values"), [(True, True), (True, False), (False, True)])
def test_the_loss_gets_equation_3(known_kl, soft_values, few_data, tmp_path, monkeypatch):
    """Rewards with the KL part of the actions taken, always; Q-values with that of all actions where it is
    known, else none."""
    flags = {"beta": 2.0, "known_kl": known_kl, "soft_values": soft_values, "batch_size": 6}
    caught, inside = open_up(monkeypatch, few_data, tmp_path / "vdn.pt", **flags)
    given, real_loss = [], vdn_rlhf.vdn_loss
    monkeypatch.setattr(vdn_rlhf, "vdn_loss", lambda *words: given.append(words) or real_loss(*words))
    batch = caught["batches"][0]
    online, target = (copy.deepcopy(inside[name]) for name in ("online", "target"))
    caught["update"](batch)
    q, target_q, actions, rewards, *numbers = given[0]

    with np.load(few_data) as file:
        observations = torch.from_numpy(file["observations"])[batch][:, :-1]
        expected_actions = torch.from_numpy(file["actions"])[batch].long()
    reward, bc = map(read, model_paths(few_data).values())
    reward_model, reference = rebuild(RewardNetwork, reward), rebuild(AgentNetwork, bc)
    kl = 2 * (reference(observations)[0].log_softmax(dim=-1) + math.log(7))
    r_std = (reward_model(observations, expected_actions) - reward["stats"]["mean"]) / reward["stats"]["std"]
    expected = sum(r_std[..., i] + kl[:, :, i].gather(-1, actions[..., i : i + 1])[..., 0] for i in range(4))
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-4)
    for values, network in ((q, online), (target_q, target)):
        expected = network(observations)[0] + (kl if known_kl else 0)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(actions, expected_actions) and numbers == [0.9, 0.8, 2.0 if soft_values else 0.0]


def test_the_rate_falls_along_a_cosine_and_the_target_follows_slowly(few_data, tmp_path, monkeypatch):
    rates, train = [], vdn_rlhf.train

    def watched(args, path, sources, parts, update, *rest):
        def watch(batch):
            online, target = (parts[name].head.weight for name in ("online", "target"))
            rates.append(float(parts["optimizer"].param_groups[0]["lr"]))
            before, output = target.clone(), update(batch)
            torch.testing.assert_close(target, 0.99 * before + 0.01 * online)
            return output

        return train(args, path, sources, parts, watch, *rest)

    monkeypatch.setattr(vdn_rlhf, "train", watched)
    learn(few_data, tmp_path / "vdn.pt", learning_rate=0.02)
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * i / 20)) for i in range(20)], rel=1e-4)


def test_labels_and_true_rewards_change_no_bit_and_equal_commands_give_equal_results(few_data, tmp_path):
    stripped = without(few_data, ("true_rewards", "labels", "pairs"), tmp_path / "stripped.npz")
    paths = model_paths(few_data)
    metrics = []
    for name, data_path in (("with", few_data), ("without", stripped), ("again", few_data)):
        metrics.append(learn(data_path, tmp_path / f"{name}.pt", network="gru", **paths)["metrics"])
        metrics[-1].pop("speed/updates_per_second")
    assert all(same_weights(tmp_path / "with.pt", tmp_path / f"{name}.pt") for name in ("without", "again"))
    assert metrics[0] == metrics[1] == metrics[2]


@pytest.mark.parametrize("changed", ["observations", "labels"])
def test_models_of_another_dataset_are_refused_at_their_default_paths(changed, tmp_path):
    """Labels too: who relabels a dataset wants a reward model of the new labels."""
    data_path, arrays = make_models(tmp_path), made_up_arrays()
    arrays[changed] = -arrays[changed]
    np.savez(data_path, **arrays)
    problem = f"reward-alpha0-seed1.pt: made with other.*another {changed}"
    with pytest.raises(vdn_rlhf.UserError, match=problem):
        learn(data_path, tmp_path / "vdn.pt")
    learn(data_path, tmp_path / "vdn.pt", **model_paths(data_path))  # by its path anything may be had


def test_beta_pulls_towards_the_reference(few_data, tmp_path):
    runs = [learn(few_data, tmp_path / f"{beta}.pt", beta=beta, num_updates=60) for beta in (0.0, 100.0)]
    free, bound = (run["metrics"]["charts/log_pi_ref"] for run in runs)
    assert free < bound - 0.05 and bound > -math.log(7)


VARIANTS = [{}, {"td_lambda": 0.0}, {"network": "gru", "td_lambda": 0.0}]
VARIANTS += [{"known_kl": False, "soft_values": soft_values} for soft_values in (True, False)]


@pytest.mark.parametrize("flags", VARIANTS, ids=str)
def test_finds_the_best_policy_of_a_game_that_nobody_knows(flags, many_data, tmp_path, capsys):
    """Agent i earns by playing action i: after training, that is what it plays; and the file says how."""
    flags = {"beta": 0.1, "num_updates": 300, "hidden_dim": 32, **flags}
    checkpoint = learn(many_data, tmp_path / "vdn.pt", **flags)
    assert "test returns skipped" in capsys.readouterr().out
    policy = rebuild(VDNPolicy, checkpoint)
    observations = torch.randn(200, 9, 4, 5, generator=torch.Generator().manual_seed(9))
    greedy = policy(observations)[0].argmax(dim=-1)  # (B, T, A)
    assert (greedy == torch.arange(4)).float().mean() > 0.9
    assert policy.beta == (0.1 if flags.get("known_kl", True) else 0.0)
