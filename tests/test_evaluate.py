import json

import numpy as np
import pytest
import torch
from conftest import ROOT

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
