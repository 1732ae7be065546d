"""All stages on a GPU, skipped where there is none (TEST_DEVICE=cpu tries these tests without one); and,
anywhere, that updates are fit for a CUDA graph: they do not wait for the device, nor leave it, and a recorded
one goes on as it is."""

import os
import signal
import subprocess
import sys

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once a process, for --deterministic

import numpy as np
import pytest
import torch
from conftest import ROOT, made_up_arrays, same_weights
from test_resume import KILLED
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import collect_data
import evaluate
import train_bc
import train_reward
import vdn_rlhf

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
needs_cuda = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")
COMMON = {"env": "made-up", "device": DEVICE, "hidden_dim": 16}
STAGES = {  # what makes it, settings
    "reward-alpha1-seed1.pt": (train_reward, {"max_epochs": 10}),
    "bc-seed1.pt": (train_bc, {"num_updates": 40}),
    "vdn-beta3-alpha1-seed1.pt": (vdn_rlhf, {"num_updates": 40}),
}


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.set_stream(torch.cuda.default_stream())


def learn(folder, name: str, network="mlp", **flags) -> dict:
    """One stage on the made-up game -> its checkpoint without timings."""
    folder.mkdir(exist_ok=True)
    np.savez(folder / "dataset.npz", **made_up_arrays(200, 1000))
    module, few = STAGES[name]
    common = {"data_path": str(folder / "dataset.npz"), **COMMON}
    if module is not train_bc:
        common["network"] = network
    module.main(module.Args(**common | few | flags))
    checkpoint = torch.load(folder / name, weights_only=True)
    checkpoint["metrics"].pop("speed/updates_per_second")
    return checkpoint


def assert_close(a: dict, b: dict) -> None:
    """As far as rounding goes: learning with another rate, or of other minibatches, is much farther apart."""
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a["metrics"], b["metrics"], rtol=1e-2, atol=1e-2)


@needs_cuda
@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_captured_updates_equal_those_as_they_are(network, tmp_path, monkeypatch):
    for name, (module, _) in STAGES.items():
        captured = learn(tmp_path / "captured", name, network)
        with monkeypatch.context() as patch:
            patch.setattr(module, "capture", lambda update, _: update)
            assert_close(learn(tmp_path / "plain", name, network), captured)


@needs_cuda
def test_killed_and_resumed_equals_never_stopped(tmp_path):
    """The state of Adam comes back from the CPU, and the learning rate goes on to fall in the graph that is
    recorded anew."""
    folder = tmp_path / "made-up"
    finished = {name: learn(folder, name, checkpoint_every=10) for name in STAGES}
    for name, (module, few) in STAGES.items():
        (folder / name).unlink()
        flags = {"data_path": folder / "dataset.npz", **COMMON, **few, "checkpoint_every": 10}
        words = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
        command = [sys.executable, "-c", KILLED.format(module=module.__name__), *words]
        killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert_close(learn(folder, name, checkpoint_every=10, resume=True), finished[name])


@needs_cuda
def test_deterministic_pipeline_twice_is_bit_equal_and_plays_as_mpe2_does(tmp_path):
    reports = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        common = {"data_path": str(folder / "dataset.npz"), "device": DEVICE, "deterministic": True}
        collect_data.main(collect_data.Args(num_trajectories=2560, **common))
        for module, few in STAGES.values():
            module.main(module.Args(hidden_dim=32, **common | few))
        policies = (str(folder / "bc-seed1.pt"), str(folder / "vdn-beta3-alpha1-seed1.pt"))
        for backend in ("torch", "mpe2"):
            args = evaluate.Args(policies=policies, num_episodes=8, backend=backend, device=DEVICE)
            reports.append([row["episode_returns"] for row in evaluate.main(args).values()])
    assert all(same_weights(tmp_path / "a" / name, tmp_path / "b" / name) for name in STAGES)
    assert reports[:2] == reports[2:]
    np.testing.assert_allclose(reports[0], reports[1], rtol=0, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("game", ["spread", "reference", "tag"])
def test_physics_equal_the_cpu(game):
    game = collect_data.tag(prey=None) if game == "tag" else collect_data.make_game(game)
    generator = torch.Generator().manual_seed(0)
    cpu, cuda = (collect_data.ParticleEnv(game, 256, device, torch.float64) for device in ("cpu", DEVICE))
    cpu.reset(generator)
    state = [x.permute(2, 0, 1) for x in (cpu.positions, cpu.velocities, cpu.landmarks)]
    cuda.set_state(*state, cpu.goals.T if game.num_words else None)
    for _ in range(game.horizon):
        actions = torch.randint(game.num_actions, (256, len(game.body_sizes)), generator=generator)
        for a, b in zip(cpu.step(actions), cuda.step(actions.to(DEVICE)), strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-9)


class FitForAGraph(TorchDispatchMode):
    """Fails at what makes a GPU's host wait: numbers and shapes that depend on values, copies to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
        indices = tree_leaves(args[1:2]) if name.startswith(("index", "_index")) else []
        masks = [x for x in indices if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        assert not waits and not masks, "waits for the device"
        result = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert len({x.device for x in tensors}) < 2, "leaves the device"
        return result


class ExplicitDevices(TorchFunctionMode):
    """Fails at a new tensor without a device, which would be one of the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function not in _device_constructors() or kwargs.get("device") is not None, "leaves the device"
        return function(*args, **kwargs)


def one_hot(x, num_classes):
    """Without the check of the values, as torch.nn.functional.one_hot on CUDA."""
    return torch.zeros(*x.shape, num_classes, dtype=torch.long, device=x.device).scatter_(-1, x[..., None], 1)


def watched(update):
    def watch(batch):
        with FitForAGraph(), ExplicitDevices():
            return update(batch)

    return watch


def learn_with(change, folder, name: str, network: str, monkeypatch) -> None:
    """learn() on the CPU, with change(update, device) for an update."""
    module = STAGES[name][0]
    train = module.train

    def changed(args, path, sources, parts, update, batches, *rest):
        return train(args, path, sources, parts, change(update, batches.device), batches, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", changed)
        patch.setattr(torch.nn.functional, "one_hot", one_hot)
        learn(folder, name, network, device="cpu", num_threads=1)


MISTAKES = [lambda x: x.item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: 1 if x > 0 else 0]
MISTAKES += [lambda x: x.to("meta"), lambda x: torch.arange(3), lambda x: x + torch.tensor(1.0)]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_graph_cannot_hold_is_seen(mistake, tmp_path, monkeypatch):
    bc_loss = train_bc.bc_loss
    monkeypatch.setattr(train_bc, "bc_loss", lambda *x: (mistake(x[0].detach().sum()), bc_loss(*x))[1])
    with pytest.raises(AssertionError, match="the device"):
        learn_with(lambda update, _: watched(update), tmp_path, "bc-seed1.pt", "mlp", monkeypatch)


class RecordedOnCPU(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph: it records each operation with the memory it reads and writes, undoes
    what the recording itself has done, and replays into the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(x, x.clone()) for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, value in reversed(self.before):
                tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # else a view
                    old.copy_(new)


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_updates_stay_on_the_device_do_not_wait_and_go_on_when_recorded(network, tmp_path, monkeypatch):
    """A recording knows only memory: of the minibatch, of the learning rate that falls."""
    nothing = dict.fromkeys(("synchronize", "set_stream", "Stream"), lambda *_: None)
    for name, fake in {"CUDAGraph": RecordedOnCPU, "graph": lambda graph: graph, **nothing}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name, (module, _) in STAGES.items():
        record = lambda update, device, module=module: module.capture(watched(update), device)  # noqa: E731
        learn_with(record, tmp_path / "recorded", name, network, monkeypatch)
        learn(tmp_path / "plain", name, network, device="cpu", num_threads=1)
        assert same_weights(tmp_path / "recorded" / name, tmp_path / "plain" / name)
