"""Runs trained at once equal the same runs trained one by one: in one process, compiled, and shared out over processes."""

import copy
import os
import subprocess
import sys
from functools import partialmethod
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, made_up_arrays, same_weights
from torch import nn
from tqdm import tqdm

import train_bc
import train_reward
import vdn_rlhf
from vdn_rlhf import AgentNetwork, GRURecurrence, accelerate, gru, list_runs, make_optimizer, stack_networks, take_step, unstack

CPU = torch.device("cpu")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made_up_tensors() -> tuple[dict, dict]:
    """The made-up game in float64, and what a network for it takes."""
    data = {name: torch.from_numpy(array) for name, array in made_up_arrays().items() if name != "meta"}
    shape = dict(observation_dim=5, num_agents=4, num_actions=7, hidden_dim=12)
    return data | {"observations": data["observations"].double()}, shape


def assert_same(a: dict, b: dict, moved_from: dict) -> None:
    """Within 1e-8, as far as that means anything: both are far from `moved_from`."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-8)
    assert max((a[name] - moved_from[name]).abs().max() for name in a) > 0.05


def nothing(*_):
    pass


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_stacked_vdn_equals_single_runs(network, float64):
    """Two seeds with two betas, 200 updates: every run has its own minibatches, rewards and pi_ref, and its own clipping."""
    data, shape = made_up_tensors()
    shape |= dict(horizon=9, network=network, num_layers=2)
    args = vdn_rlhf.Args(num_seeds=2, beta=(0.5, 2.0), num_updates=200, batch_size=4, max_grad_norm=0.5, bf16=False)
    runs = list_runs(args, "beta")
    assert [(run.seed, run.beta, run.num_seeds) for run in runs] == [(1, 0.5, 1), (1, 2.0, 1), (2, 0.5, 1), (2, 2.0, 1)]
    rewards = torch.randn(2, 60, 9, generator=torch.Generator().manual_seed(0))[[0, 0, 1, 1]]
    references = [AgentNetwork(**shape).requires_grad_(False) for _ in range(2) for _ in range(2)]

    def learn(chosen):
        generators = [torch.Generator().manual_seed(runs[s].seed) for s in chosen]
        results = vdn_rlhf.learn_policies(
            *([runs[s] for s in chosen], None, shape, data["observations"], data["actions"], rewards[chosen]),
            *([references[s] for s in chosen], generators, nothing),
        )
        return [result["policy"].values.state_dict() for result in results]

    stacked = learn([0, 1, 2, 3])
    for s in range(4):
        start = unstack(stack_networks(AgentNetwork, shape, [runs[s]], CPU), 0)
        assert_same(stacked[s], learn([s])[0], start)
    assert (stacked[0]["head.weight"] - stacked[1]["head.weight"]).abs().max() > 1e-3  # beta matters
    assert (stacked[0]["head.weight"] - stacked[2]["head.weight"]).abs().max() > 1e-3  # so does the seed


def test_stacked_references_equal_single_runs(float64):
    """With beta 0 pi_ref is the BC policy, and the others' places do not shift."""
    data, shape = made_up_tensors()
    shape |= dict(horizon=9, num_modes=3)
    runs = list_runs(vdn_rlhf.Args(num_seeds=2, beta=(0.0, 1.0), imitation_updates=200, batch_size=4, bf16=False), "beta")
    policies = [AgentNetwork(**shape).requires_grad_(False) for _ in range(2)]
    bc_policies, returns = [policies[0], policies[0], policies[1], policies[1]], torch.arange(4 * 60.0).view(4, 60) / 60

    def imitate(chosen):
        generators = [torch.Generator().manual_seed(runs[s].seed) for s in chosen]
        chosen_runs, chosen_policies = [runs[s] for s in chosen], [bc_policies[s] for s in chosen]
        common = (shape, data["observations"], data["actions"], returns[chosen], generators)
        return vdn_rlhf.make_reference_policies(chosen_runs, chosen_policies, *common)

    stacked = imitate([0, 1, 2, 3])
    assert stacked[0] is policies[0] and stacked[2] is policies[1]
    for s in (1, 3):
        start = unstack(stack_networks(AgentNetwork, shape | {"num_modes": 1}, [runs[s]], CPU), 0)
        assert_same(stacked[s].state_dict(), imitate([s])[0].state_dict(), start)


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_stacked_rewards_equal_single_runs(network, float64):
    """Two seeds with two alphas, 200 updates: each run has a split of its own."""
    data, shape = made_up_tensors()
    data |= {"pairs": data["pairs"] % 6 + 6 * (torch.arange(400) % 10)[:, None], "block": torch.arange(60) // 6}
    data["pairs"][:, 1] = torch.where(
        data["pairs"][:, 0] == data["pairs"][:, 1], data["pairs"][:, 1] // 6 * 6, data["pairs"][:, 1]
    )
    data["labels"] = data["labels"].double()
    args = train_reward.Args(num_seeds=2, alpha=(0.0, 3.0), max_epochs=25, bf16=False, learning_rate=1e-2)
    runs = list_runs(args, "alpha")
    shape |= dict(input="joint", network=network, num_layers=2)

    def learn(chosen):
        generators = [torch.Generator().manual_seed(runs[s].seed) for s in chosen]
        parts = [train_reward.split_into_minibatches(data, generator) for generator in generators]
        parts = train_reward.stack_parts(parts, "dataset.npz", CPU)
        assert parts[0][0].shape[1] == 8  # minibatches an epoch
        return train_reward.learn_rewards([runs[s] for s in chosen], shape, data, parts, generators, nothing)

    stacked = learn([0, 1, 2, 3])
    for s in range(4):
        (single,) = learn([s])
        start = unstack(stack_networks(train_reward.RewardNetwork, shape, [runs[s]], CPU), 0)
        assert_same(stacked[s]["final_weights"], single["final_weights"], start)
        assert stacked[s]["epoch"] == single["epoch"]
        np.testing.assert_allclose(stacked[s]["history"], single["history"], rtol=0, atol=1e-8)


def test_stacked_imitation_equals_single_runs(float64):
    data, shape = made_up_tensors()
    shape |= dict(horizon=9, num_modes=3, num_layers=2)
    runs = list_runs(train_bc.Args(num_seeds=3, max_epochs=29, batch_size=8, bf16=False))  # 7 updates an epoch

    def imitate(chosen):
        generators = [torch.Generator().manual_seed(runs[s].seed) for s in chosen]
        order = torch.stack([torch.randperm(60, generator=generator) for generator in generators])
        data_and_parts = (data["observations"], data["actions"], order[:, :4], order[:, 4:])
        return train_bc.imitate([runs[s] for s in chosen], shape, *data_and_parts, generators, nothing)

    stacked = imitate([0, 1, 2])
    for s in range(3):
        (single,) = imitate([s])
        np.testing.assert_allclose(stacked[s]["history"], single["history"], rtol=0, atol=1e-8)
        start = unstack(stack_networks(AgentNetwork, shape, [runs[s]], CPU), 0)
        assert_same(stacked[s]["weights"], single["weights"], start)


def test_every_run_has_its_own_file(spread_data, tmp_path):
    """All files of a stack, from the command line's point of view: names, settings and metrics are those of single runs."""
    small = dict(hidden_dim=16, device="cpu", bf16=False)
    paths = {}
    for name, num_seeds, seeds in (("stacked", 2, (1,)), ("single", 1, (1, 2))):
        folder = tmp_path / name
        folder.mkdir()
        os.link(spread_data, folder / "dataset.npz")
        data_path = str(folder / "dataset.npz")
        for seed in seeds:
            common = dict(data_path=data_path, seed=seed, num_seeds=num_seeds, **small)
            train_reward.main(train_reward.Args(max_epochs=1, **common))
            train_bc.main(train_bc.Args(max_epochs=1, **common))
            for beta in (1.0, 10.0) if num_seeds == 1 else ((1.0, 10.0),):
                vdn_rlhf.main(vdn_rlhf.Args(beta=beta, num_updates=20, imitation_updates=20, **common))
        paths[name] = {path.name: path for path in folder.glob("*.pt")}
    assert paths["stacked"].keys() == paths["single"].keys() and len(paths["single"]) == 2 + 2 + 2 * 4
    for name, path in paths["stacked"].items():
        a, b = (torch.load(p, weights_only=True) for p in (path, paths["single"][name]))
        assert {k: v for k, v in a["args"].items() if k != "data_path"} == {
            k: v for k, v in b["args"].items() if k != "data_path"
        }
        assert a["meta"].keys() == b["meta"].keys() and a["metrics"].keys() == b["metrics"].keys()
        for key, tensor in a["state_dict"].items():
            torch.testing.assert_close(tensor, b["state_dict"][key], rtol=0, atol=1e-4)


def test_each_run_is_clipped_by_itself():
    """A step with plain gradient descent: run 0 has a gradient of norm 5, run 1 of norm 50; both may have 10."""
    stack = nn.Linear(2, 1, bias=False)
    stack.weight.data = torch.zeros(2, 1, 2)
    optimizer = torch.optim.SGD(stack.parameters(), lr=1.0)
    slopes = torch.tensor([[[3.0, 4.0]], [[30.0, 40.0]]])
    take_step((stack.weight * slopes).sum(dim=(1, 2)), optimizer, 10.0)
    torch.testing.assert_close(stack.weight.data, torch.tensor([[[-3.0, -4.0]], [[-6.0, -8.0]]]))
    take_step((stack.weight * slopes).sum(dim=(1, 2)), optimizer)
    torch.testing.assert_close(stack.weight.data[1], torch.tensor([[-36.0, -48.0]]))


def test_gru_equals_torch(float64):
    """Outputs, state and all gradients, from the start of an episode and going on from a state, alone and in a stack."""
    torch.manual_seed(0)
    layers = [nn.GRU(6, 6, batch_first=True) for _ in range(2)]
    stack = copy.deepcopy(layers[0])
    for name, parameter in stack.named_parameters():
        parameter.data = torch.stack([layer.get_parameter(name).data for layer in layers])
    x, direction = torch.randn(2, 3, 5, 4, 6, requires_grad=True), torch.randn(2, 3, 5, 4, 6)  # (S, B, T, A, H)
    for steps, memory in ((slice(0, 2), None), (slice(2, 5), torch.randn(2, 12, 6))):
        for parameter in (x, *stack.parameters(), *layers[0].parameters(), *layers[1].parameters()):
            parameter.grad = None
        outputs, state = gru(x[:, :, steps], stack, memory)
        (outputs * direction[:, :, steps]).sum().backward()
        x_grad, x.grad = x.grad, None
        for s, layer in enumerate(layers):
            start = None if memory is None else memory[s][None]
            sequences = x[s, :, steps].transpose(1, 2).flatten(0, 1)
            expected, expected_state = layer(sequences, start)
            expected = expected.unflatten(0, (3, 4)).transpose(1, 2)
            (expected * direction[s, :, steps]).sum().backward()
            torch.testing.assert_close(outputs[s], expected)
            torch.testing.assert_close(state[s], expected_state[0])
            alone, alone_state = gru(x[s, :, steps], layer, start)
            torch.testing.assert_close(alone, expected)
            torch.testing.assert_close(alone_state, expected_state)
            for name, parameter in layer.named_parameters():
                torch.testing.assert_close(stack.get_parameter(name).grad[s], parameter.grad)
        torch.testing.assert_close(x_grad, x.grad)
    inputs = torch.randn(3, 2, 2, 9), torch.randn(2, 2, 3), torch.randn(2, 9, 3), torch.randn(2, 9)
    assert torch.autograd.gradcheck(GRURecurrence.apply, [tensor.requires_grad_() for tensor in inputs])


@pytest.fixture
def small_vdn(float64):
    """compute_losses(batch) and step of a VDN learner on the made-up game, its online network, and six minibatches."""
    data, shape = made_up_tensors()
    runs = [SimpleNamespace(seed=1), SimpleNamespace(seed=2)]
    online, target = (stack_networks(AgentNetwork, shape | dict(horizon=9, num_layers=1), runs, CPU) for _ in range(2))
    target.requires_grad_(False)
    optimizer, actions = make_optimizer(online, 1e-2, CPU), data["actions"].long()
    rewards = data["true_rewards"].sum(dim=-1).double()

    def compute_losses(batch):
        episodes = data["observations"][batch], actions[batch], rewards[batch]
        return vdn_rlhf.vdn_loss(online, target, *episodes, 0.9, 0.8)

    return compute_losses, lambda losses: take_step(losses, optimizer, 1.0), online, torch.randint(60, (6, 2, 8))


def test_compiled_losses_equal_eager_ones(small_vdn):
    compute_losses, _, online, batches = small_vdn
    losses, start = {}, copy.deepcopy(online.state_dict())
    for compile in (False, True):
        for parameter, value in zip(online.parameters(), start.values(), strict=True):
            parameter.data.copy_(value)
        update = accelerate(
            compute_losses, lambda losses: losses.sum().backward(), SimpleNamespace(compile=compile, cudagraphs=False), CPU
        )
        losses[compile] = torch.stack([update(batch) for batch in batches])
        gradient = online.head.weight.grad.clone()
        online.zero_grad()
        losses[compile, "gradient"] = gradient
    torch.testing.assert_close(losses[False], losses[True], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses[False, "gradient"], losses[True, "gradient"], rtol=1e-10, atol=1e-10)


def test_failing_compilation_goes_on_without(small_vdn, monkeypatch, capsys):
    compute_losses, step, _, batches = small_vdn

    def broken(function, **_):
        def fail(*_):
            raise RuntimeError("no compiler here\nsecond line")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    update = accelerate(compute_losses, step, SimpleNamespace(compile=True, cudagraphs=None), CPU)
    losses = [update(batch) for batch in batches]
    assert capsys.readouterr().err == "warning: --compile failed, going on without it (no compiler here)\n"
    assert len(losses) == 6 and not torch.equal(losses[0], losses[-1])
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is no reason to go on
        eager = accelerate(lambda batch: 1 / 0, step, SimpleNamespace(compile=None, cudagraphs=None), CPU)
        eager(batches[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(beta=(1.0, 1.0)), r"--beta 1.0 1.0: every value once, and at least one"),
        (dict(beta=()), r"--beta : every value once, and at least one"),
        (dict(beta=(1.0, -1.0)), r"--beta \(1.0, -1.0\): must be a finite number and not negative"),
        (dict(num_seeds=0), r"--num-seeds 0: must be at least 1"),
        (dict(num_seeds=2, vdn_path="x.pt"), r"x.pt: names one file, but this command makes 2; leave the path out"),
        (dict(cudagraphs=True), r"--cudagraphs True: there is no CUDA device"),
    ],
)
def test_flags_of_several_runs(flags, message):
    if "cudagraphs" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(vdn_rlhf.UserError, match=message):
        vdn_rlhf.main(vdn_rlhf.Args(device="cpu", **flags))


def test_minibatches_of_different_sizes_are_not_stacked(made_up_data):
    """Without blocks the number of pairs that cross the split depends on the seed."""
    args = train_reward.Args(env="made-up", data_path=str(made_up_data), num_seeds=3, device="cpu")
    with pytest.raises(train_reward.UserError, match=r"differ in number or size from seed to seed; leave out --num-seeds"):
        train_reward.main(args)


def test_two_processes_make_the_files_of_one(spread_data, tmp_path):
    """torchrun with two processes on the loopback: each trains its share of three seeds, rank 0 prints one table for all."""
    script = tmp_path / "small.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import vdn_rlhf as v; v.TEST_EPISODES = v.HISTORY_EPISODES = 64\n"
        "v.run_command_line(v.main, v.Args, v.PRESETS)"
    )
    outputs, weights = {}, {}
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        folder = tmp_path / name
        folder.mkdir()
        os.link(spread_data, folder / "dataset.npz")
        for seed, (kind, trainer) in product((1, 2, 3), (("reward-alpha1", train_reward), ("bc", train_bc))):
            if name == "one":
                args = trainer.Args(data_path=str(folder / "dataset.npz"), seed=seed, max_epochs=1, hidden_dim=8, device="cpu")
                trainer.main(args)
            else:
                os.link(tmp_path / "one" / f"{kind}-seed{seed}.pt", folder / f"{kind}-seed{seed}.pt")
        flags = (
            f"--data-path {folder}/dataset.npz --num-seeds 3 --num-updates 5 --imitation-updates 5 --hidden-dim 8 --device cpu"
        )
        command = [sys.executable, *launcher, str(script), *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        outputs[name] = [line for line in done.stdout.splitlines() if line.startswith(("| ", "Mean"))]
        weights[name] = {path.name: torch.load(path, weights_only=True) for path in folder.glob("vdn*.pt")}
    assert weights["one"].keys() == weights["two"].keys() and len(weights["one"]) == 6
    for name, checkpoint in weights["one"].items():
        assert checkpoint["args"]["seed"] == weights["two"][name]["args"]["seed"]
        for key, tensor in checkpoint["state_dict"].items():
            torch.testing.assert_close(tensor, weights["two"][name]["state_dict"][key], rtol=0, atol=1e-5)
    assert outputs["one"] == outputs["two"] and any(line.startswith("| VDN-RLHF, last") for line in outputs["one"])


def test_silent_progress_changes_nothing(made_up_data, tmp_path, monkeypatch):
    """Processes that do not report have no progress bars, and schedules do not depend on them."""
    weights = []
    for name in ("loud", "silent"):
        common = dict(env="made-up", data_path=str(made_up_data), max_epochs=3, hidden_dim=8, device="cpu")
        train_reward.main(train_reward.Args(reward_path=str(tmp_path / f"reward-{name}.pt"), **common))
        train_bc.main(train_bc.Args(bc_path=str(tmp_path / f"bc-{name}.pt"), batch_size=8, **common))
        weights.append([tmp_path / f"{kind}-{name}.pt" for kind in ("reward", "bc")])
        monkeypatch.setattr(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))
    assert all(same_weights(loud, silent) for loud, silent in zip(*weights, strict=True))


def test_a_failing_process_fails_the_job(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        str(ROOT / "vdn_rlhf.py"),
    ]
    done = subprocess.run(
        [*command, "--num-seeds", "2", "--gamma", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "error: --gamma 2.0: must be at most 1" in done.stderr
