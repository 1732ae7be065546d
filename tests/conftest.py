"""Small datasets shared by the tests: one of spread, played by the shipped policies, and one of a made-up
game; no network."""

import json
import os
import runpy
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # two threads on a busy core crawl
    os.environ.setdefault(name, "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import numpy as np
import pytest
import torch

import collect_data

ROOT = Path(__file__).parent.parent
NO_NETWORK = ROOT / "tests" / "no_network"
paths = f"{NO_NETWORK}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # for processes that tests start
os.environ["PYTHONPATH"] = paths.rstrip(os.pathsep)
runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def every_number():
    """Scripts flush denormal numbers; hypothesis, which draws them, does not start where that is so."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def spread_data(tmp_path_factory) -> Path:
    """2,560 trajectories (10 blocks) of the diversified mixture."""
    path = tmp_path_factory.mktemp("spread") / "dataset.npz"
    collect_data.main(collect_data.Args(num_trajectories=2560, data_path=str(path), device="cpu"))
    return path


def made_up_arrays(num_trajectories=60, num_pairs=400, seed=0) -> dict[str, np.ndarray]:
    """A game that no script knows: 4 agents, 7 actions, horizon 9. Agent i earns 1 whenever it plays action
    i, and labels are exact, so the best policy, the best reward model and the uniform behavior policy are all
    known."""
    rng = np.random.default_rng(seed)
    N, T, A, D, num_actions = num_trajectories, 9, 4, 5, 7
    actions = rng.integers(num_actions, size=(N, T, A))
    rewards = (actions == np.arange(A)).astype(np.float32)
    first = rng.integers(N, size=num_pairs)
    pairs = np.stack([first, (first + rng.integers(1, N, size=num_pairs)) % N], axis=1)
    returns = rewards.sum(axis=1) + rng.uniform(0, 1e-3, (N, A))  # no ties
    labels = np.where(returns[pairs[:, 0]] > returns[pairs[:, 1]], 1, -1)
    meta = {"format": 1, "env": "made-up", "num_agents": A, "num_actions": num_actions, "horizon": T}
    return {
        "observations": rng.normal(size=(N, T + 1, A, D)).astype(np.float32),
        "actions": actions.astype(np.uint8),
        "pairs": pairs.astype(np.int32),
        "labels": labels.astype(np.int8),
        "true_rewards": rewards,
        "meta": np.array(json.dumps(meta)),
    }


@pytest.fixture
def made_up_data(tmp_path) -> Path:
    path = tmp_path / "made-up" / "dataset.npz"
    path.parent.mkdir()
    np.savez(path, **made_up_arrays())
    return path


def without(path: Path, keys: tuple[str, ...], to: Path) -> Path:
    """A copy of a dataset that lacks some arrays."""
    with np.load(path) as file:
        np.savez(to, **{key: file[key] for key in file.files if key not in keys})
    return to


def read(path) -> dict:
    return torch.load(path, weights_only=True)


def rebuild(network_class, checkpoint: dict) -> torch.nn.Module:
    network = network_class(**checkpoint["meta"]["network"])
    network.load_state_dict(checkpoint["state_dict"])
    return network


def same_weights(path_a: Path, path_b: Path) -> bool:
    a, b = (read(path)["state_dict"] for path in (path_a, path_b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
