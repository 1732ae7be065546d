"""All stages on a GPU, skipped where there is none; and, anywhere, that no update waits for the device."""

import inspect

import numpy as np
import pytest
import torch
from conftest import made_up_arrays, same_weights
from torch.utils._python_dispatch import TorchDispatchMode

import collect_data
import evaluate
import train_bc
import train_reward
import vdn_rlhf

DEVICE = "cuda"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STAGES = {  # what makes it, settings
    "reward-alpha1-seed1.pt": (train_reward, {"max_epochs": 10}),
    "bc-seed1.pt": (train_bc, {"num_updates": 40}),
    "vdn-beta1-alpha1-seed1.pt": (vdn_rlhf, {"num_updates": 40}),
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
    common = {"env": "made-up", "data_path": str(folder / "dataset.npz"), "device": DEVICE, "hidden_dim": 16}
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
def test_stopped_and_resumed_equals_never_stopped(tmp_path, monkeypatch):
    """In particular the learning rate goes on to fall in the graph that is recorded anew."""
    for name, (module, _) in STAGES.items():

        def stop(path, kind, args, meta, *rest, save_checkpoint=module.save_checkpoint):
            save_checkpoint(path, kind, args, meta, *rest)
            if meta.get("update") == 10:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, "save_checkpoint", stop)
            learn(tmp_path / "stopped", name, checkpoint_every=5)
        resumed = learn(tmp_path / "stopped", name, checkpoint_every=5, resume=True)
        assert_close(resumed, learn(tmp_path / "never stopped", name))


@needs_cuda
def test_deterministic_pipeline_twice_is_bit_equal_and_plays_as_mpe2_does(tmp_path):
    reports = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        common = {"data_path": str(folder / "dataset.npz"), "device": DEVICE, "deterministic": True}
        collect_data.main(collect_data.Args(num_trajectories=2560, **common))
        for module, few in STAGES.values():
            module.main(module.Args(hidden_dim=32, **common | few))
        policies = (str(folder / "bc-seed1.pt"), str(folder / "vdn-beta1-alpha1-seed1.pt"))
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


class NoWaiting(TorchDispatchMode):
    """Fails at what makes a GPU's host wait: numbers and shapes that depend on values, copies to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        indices = [x for x in args[1] if x is not None] if name.startswith("index") and len(args) > 1 else []
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"), name
        assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices), (
            "index by mask"
        )
        assert kwargs.get("device") is None or name != "_to_copy", "copy to another device"
        return function(*args, **kwargs)


def one_hot(x, num_classes):
    """Without the check of the values, as torch.nn.functional.one_hot on CUDA."""
    return torch.zeros(*x.shape, num_classes, dtype=torch.long).scatter_(-1, x[..., None], 1)


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_no_update_waits_for_the_device(network, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "one_hot", one_hot)
    for name, (module, _) in STAGES.items():
        signature, train, seen = inspect.signature(module.train), module.train, []

        def watched(*words, signature=signature, train=train, seen=seen):
            arguments = signature.bind(*words).arguments
            for batch in arguments["batches"][:3]:
                with NoWaiting():
                    seen.append(arguments["update"](batch))
                    arguments["parts"]["schedule"].step()
            return train(*words)

        monkeypatch.setattr(module, "train", watched)
        learn(tmp_path / "made-up", name, network, device="cpu", num_threads=1)
        assert len(seen) == 3
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        torch.ones(1).item()
