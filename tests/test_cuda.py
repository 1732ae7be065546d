"""The five stages on a GPU; skipped where there is none."""

import pytest
import torch
from conftest import same_weights

import collect_data
import evaluate
import train_bc
import train_reward
import vdn_rlhf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SMALL = dict(device="cuda", deterministic=True, hidden_dim=32)


@pytest.fixture(autouse=True)
def leave_determinism_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_pipeline_twice_is_bit_equal(network, tmp_path):
    for name in ("a", "b"):
        data = str(tmp_path / name / "dataset.npz")
        collect_data.main(collect_data.Args(num_trajectories=2560, data_path=data, device="cuda", deterministic=True))
        train_reward.main(train_reward.Args(data_path=data, max_epochs=2, network=network, **SMALL))
        train_bc.main(train_bc.Args(data_path=data, max_epochs=2, network=network, **SMALL))
        vdn_rlhf.main(vdn_rlhf.Args(data_path=data, num_updates=50, imitation_updates=50, network=network, **SMALL))
    for file in ("reward-alpha1-seed1.pt", "bc-seed1.pt", "vdn-beta1-alpha1-seed1.pt"):
        assert same_weights(tmp_path / "a" / file, tmp_path / "b" / file)
        a, b = (torch.load(tmp_path / name / file, weights_only=True)["metrics"] for name in "ab")
        assert a.keys() == b.keys() and all(a[key] == b[key] for key in a if not key.startswith("speed/"))
    policy = str(tmp_path / "a" / "vdn-beta1-alpha1-seed1.pt")
    reports = [evaluate.main(evaluate.Args(policy, num_episodes=64, backend=b, device="cuda")) for b in ("torch", "mpe2")]
    assert reports[0]["charts/test_return"] == pytest.approx(reports[1]["charts/test_return"], abs=1e-3)


@pytest.mark.parametrize("game", [collect_data.spread(3, 3), collect_data.reference(), collect_data.tag(prey=None)])
def test_physics_equal_the_cpu(game):
    generator = torch.Generator().manual_seed(0)
    cpu, cuda = (collect_data.ParticleEnv(game, 256, device, torch.float64) for device in ("cpu", "cuda"))
    cpu.reset(generator)
    cuda.set_state(*cpu.state())
    for _ in range(game.horizon):
        actions = torch.randint(game.num_actions, (256, len(game.body_sizes)), generator=generator)
        (a, reward_a), (b, reward_b) = cpu.step(actions), cuda.step(actions.cuda())
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-9)
        torch.testing.assert_close(reward_a, reward_b.cpu(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("compile", [False, True])
def test_captured_updates_equal_eager_ones(compile, spread_data, tmp_path, capsys):
    """The whole of vdn_rlhf.py for two seeds, eager and not; in float32, so that only rounding differs."""
    common = dict(data_path=str(spread_data), num_seeds=2, device="cuda", hidden_dim=32, bf16=False)
    models = dict(max_epochs=1, compile=False, cudagraphs=False)
    train_reward.main(train_reward.Args(**common, **models))
    train_bc.main(train_bc.Args(**common, **models))
    weights = {}
    for fast in (False, True):
        args = vdn_rlhf.Args(**common, num_updates=40, imitation_updates=40, compile=compile and fast, cudagraphs=fast)
        vdn_rlhf.main(args)
        paths = [spread_data.parent / f"vdn-beta1-alpha1-seed{seed}.pt" for seed in (1, 2)]
        weights[fast] = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
        for path in spread_data.parent.glob("vdn*.pt"):
            path.unlink()
    assert "warning" not in capsys.readouterr().err
    for eager, captured in zip(weights[False], weights[True], strict=True):
        for name, tensor in eager.items():
            torch.testing.assert_close(captured[name], tensor, rtol=1e-3, atol=1e-3)
