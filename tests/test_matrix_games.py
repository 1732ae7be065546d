"""The theory made executable: games, covariances, maximum likelihood, Algorithms 2 to 4, Lemma 4."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import benchmark.matrix_games as mg
from collect_data import UserError

M1, M2 = (mg.matrix_game(payoffs) for payoffs in mg.TABLE_4)


@pytest.fixture(scope="module")
def game() -> mg.Game:
    return mg.random_game(1, num_states=3, horizon=3)


@pytest.fixture(scope="module")
def data(game) -> mg.Data:
    return collect_unilateral(game, 2000)


def collect_unilateral(game, n) -> mg.Data:
    behavior = mg.behavior_policy(game, mg.find_equilibrium(game), "unilateral")
    return mg.collect(game, behavior, n, np.random.default_rng(0))


def one_step_data(cells, counts, points=None) -> mg.Data:
    """Comparisons in a 2 x 2 game; the first of the trajectories is tau_ref."""
    counts = np.array(counts, dtype=float)
    visits = np.zeros((1, 4))
    visits[0, cells] = counts.sum(axis=1)
    points = None if points is None else np.array(points, dtype=float)
    return mg.Data(np.array(cells)[:, None], counts, points, visits, np.zeros((1, 4, 1)), np.array(cells[:1]))


# Games and data ---
def test_nash_gaps_of_known_matrix_games():
    # M1: a1 and b1 dominate, and either player gains 0.5 by going there.
    assert mg.nash_gaps(M1) == pytest.approx(np.array([[0, 0.5], [0.5, 1]]))
    assert mg.nash_gaps(M2) == pytest.approx(np.array([[1, 0.5], [0.5, 0]]))
    assert mg.find_equilibrium(M1) == (0, 0)
    assert mg.find_equilibrium(M2) == (1, 1)
    # Prisoner's dilemma, 0 cooperates: together 0.6, exploited 0, exploiting 1, neither 0.2.
    dilemma = np.array([[0.6, 0.0], [1.0, 0.2]])
    game = mg.Game(np.stack([dilemma, dilemma.T])[:, None, None], np.ones((1, 1, 2, 2, 1)))
    assert mg.nash_gaps(game) == pytest.approx(np.array([[0.8, 0.2], [0.2, 0.0]]))
    # Matching pennies has no pure equilibrium: whoever loses gains 1.
    assert mg.nash_gaps(mg.matrix_game(np.eye(2))) == pytest.approx(np.ones((2, 2)))


def test_behavior_policies_cover_what_their_names_say(game):
    first, second = mg.find_equilibrium(game)
    one, two = mg.policy_actions(first, game.shape, 0), mg.policy_actions(second, game.shape, 1)
    unilateral = mg.behavior_policy(game, (first, second), "unilateral")
    for h, s, a, b in np.ndindex(game.shape):
        expected = 1 / 3 if a == one[h, s] or b == two[h, s] else 0
        assert unilateral[h, s, a, b] == pytest.approx(expected)
    assert (mg.behavior_policy(game, (first, second), "uniform") == 0.25).all()


def test_labels_follow_bradley_and_terry_for_each_player():
    game = mg.matrix_game(np.array([[1.0, 0.2], [0.0, 0.0]]))
    behavior = np.array([[[[0.5, 0.5], [0.0, 0.0]]]])
    data = mg.collect(game, behavior, 100_000, np.random.default_rng(0))
    assert data.counts.sum() / 2 == data.points[0].sum() == data.points[1].sum() == 100_000
    n = data.counts[0, 1]  # comparisons of the two, about half
    assert n == pytest.approx(50_000, abs=800)  # 5 standard deviations
    same = data.counts[0, 0] / 2  # with itself: a point for either label
    chance = 1 / (1 + np.exp(-0.8))
    assert (data.points[:, 0] - same) / n == pytest.approx([chance, 1 - chance], abs=0.011)


def test_trajectories_follow_the_game(game):
    """Next states are as frequent as their probabilities, and are where the next step is played."""
    data = collect_unilateral(game, 10**8)
    assert (data.cells[data.counts.sum(axis=1).argmax()] == data.reference).all()
    assert data.visits.sum(axis=1) == pytest.approx(2 * 10**8)
    assert not data.next_states[-1].any()
    for h in range(2):
        visited = data.visits[h] > 0
        frequencies = data.next_states[h, visited] / data.visits[h, visited, None]
        assert frequencies == pytest.approx(game.transitions[h].reshape(12, 3)[visited], abs=1e-3)
        assert data.next_states[h].sum(axis=0) == pytest.approx(data.visits[h + 1].reshape(3, 4).sum(axis=1))


# Covariances, maximum likelihood and its confidence set ---
def test_covariances_measures_and_bounds_worked_by_hand():
    """Three comparisons of (a1, b1) with (a2, b2), lambda 1: Sigma^r = I + 3 (e1 - e4)(e1 - e4)^T, which is 7
    along e1 - e4."""
    data = one_step_data([0, 3], [[0, 3], [3, 0]])
    preference, transition = mg.covariances(data, 1.0)
    assert preference == pytest.approx(np.array([[4, 0, 0, -3], [0, 1, 0, 0], [0, 0, 1, 0], [-3, 0, 0, 4]]))
    assert transition[0] == pytest.approx(np.diag([4, 1, 1, 4]))
    raw, visits = mg.uncertainties(data, (1, 1, 2, 2), 1.0, anchored=False)
    assert raw.ravel() ** 2 == pytest.approx([4 / 7, 1, 1, 4 / 7])
    assert visits.ravel() == pytest.approx([1 / 2, 1, 1, 1 / 2])
    anchored = mg.uncertainties(data, (1, 1, 2, 2), 1.0, anchored=True)[0]
    assert anchored.ravel() ** 2 == pytest.approx([0, 11 / 7, 11 / 7, 2 / 7])
    # Definition 1 at (a2, b2): there, at (a1, b2) or (a2, b1), and anywhere.
    expected = [(2 / 7) ** 0.5 + 1 / 2, (11 / 7) ** 0.5 + 1, (11 / 7) ** 0.5 + 1]
    assert mg.coverage_measures(M2, data, (1, 1), 1.0, True) == pytest.approx(expected)
    expected = [(4 / 7) ** 0.5 + 1 / 2, 2, 2]
    assert mg.coverage_measures(M2, data, (1, 1), 1.0, False) == pytest.approx(expected)
    # Theorem 4 sums over the players what Definition 1 has the maximum of.
    bound = mg.theorem_4_bound(M2, data, (1, 1), lam=1.0, C_r=3.0, C_P=5.0)
    assert bound == pytest.approx(2 * 4 * (3 * (11 / 7) ** 0.5 + 5))
    # theta_hat off by 0.1 in e1 and 0.2 in e2
    estimate = M1.rewards[0].reshape(1, 4) - 0.5 + np.array([0.1, 0.2, 0, 0])
    error = mg.estimation_error(data, estimate, M1.rewards[0], 1.0)
    assert error == pytest.approx((4 * 0.1**2 + 0.2**2) ** 0.5)
    # (a1, b1) compared with the cell where one player can go, never with that where the other can: it counts.
    for covered in (1, 2):
        data = one_step_data([0, covered], [[0, 1e8], [1e8, 0]])
        assert mg.coverage_measures(M1, data, (0, 0), 1.0, True)[1] > 2


def test_maximum_likelihood_of_two_trajectories():
    """Won 70 of 100: the logit of 0.7. Won 95 of 100: more than rewards in [0, 1] allow. Comparisons with
    itself change nothing."""
    data = one_step_data([0, 3], [[20, 100], [100, 0]], points=[[10 + 70, 30], [10 + 95, 5]])
    estimate = mg.fit_reward(data, 0)
    assert estimate[0, 0] - estimate[0, 3] == pytest.approx(np.log(0.7 / 0.3), abs=1e-6)
    assert estimate[0, 1] == estimate[0, 2] == 0  # never seen
    assert mg.fit_reward(data, 1)[0] == pytest.approx([0.5, 0, 0, -0.5])


def test_confidence_radii_worked_by_hand():
    """3 steps, 3 states, 2 x 2 actions, delta 0.05, lambda 1: k = 36, t = log 80 = 4.382, gamma = 0.045177,
    g = sqrt(36 + 25.120 + 8.764) / 2 = 4.17983, and 4.32478 = sqrt(2 (3 log 2 + log 1440))."""
    radii = mg.confidence_radii((3, 3, 2, 2), 0.05, 1.0, 1.0, 1.0)
    assert radii == pytest.approx((4.17983 / 0.045177 + 6, 3 * 4.32478 + 3), abs=1e-3)
    # What bounds the bias of lambda does not shrink with c_r, c_p: an unvisited cell has to reach the clip.
    assert mg.confidence_radii((3, 3, 2, 2), 0.05, 4.0, 0.0, 0.0) == pytest.approx((2 * 36**0.5, 3 * 2))


def test_reward_bounds_are_the_extremes_of_the_confidence_set(data):
    """Of each anchored reward <theta, feature>, at the ends of the ellipsoid |theta - theta_hat|_Sigma = 2
    along Sigma^-1 feature."""
    sigma, estimate = mg.covariances(data, 1.0)[0], mg.fit_reward(data, 0)
    norms = mg.uncertainties(data, (3, 3, 2, 2), 1.0, True)[0]
    bounds = np.reshape(mg.reward_bounds(data, estimate, norms, C_r=2.0), (2, 3, 12))
    for h, cell in np.ndindex(3, 12):
        feature = np.zeros((3, 12))
        feature[h, cell] += 1
        feature[h, data.reference[h]] -= 1
        step = np.linalg.solve(sigma, feature.ravel())
        step *= 2.0 / max(step @ sigma @ step, 1e-30) ** 0.5
        extremes = [feature.ravel() @ (estimate.ravel() + sign * step) for sign in (-1, 1)]
        assert bounds[:, h, cell] == pytest.approx(extremes)


# Algorithms 2 to 4 ---
def test_algorithms_2_and_3_against_slow_loops(game, data):
    """For some policies, with what the ridge regressions are in tables: means that shrink with few visits."""
    C_r, C_P, lam = 8.0, 2.5, 0.5
    estimates = [mg.fit_reward(data, i) for i in range(2)]
    bounds = mg.compute_bounds(data, estimates, game.shape, lam, C_r, C_P)
    norms = mg.uncertainties(data, game.shape, lam, True)[0]

    def slow(rewards, sign, reduce):
        V = np.zeros(3)
        for h in (2, 1, 0):
            weights = data.visits[h] + lam
            Q = (data.visits[h] * rewards[h].ravel() + data.next_states[h] @ V) / weights
            Q += sign * C_P / weights**0.5
            Q = np.minimum(Q, 3 - h) if sign > 0 else np.maximum(Q, h - 3)
            V = np.array([reduce(h, s, Q.reshape(3, 2, 2)[s]) for s in range(3)])
        return V[0]

    for first, second in np.random.default_rng(0).integers(128, size=(5, 2)):
        one, two = mg.policy_actions(first, game.shape, 0), mg.policy_actions(second, game.shape, 1)
        for i, other in ((0, second), (1, first)):
            low, high = mg.reward_bounds(data, estimates[i], norms, C_r)
            value = slow(low, -1, lambda h, s, Q, one=one, two=two: Q[one[h, s], two[h, s]])
            assert bounds.pessimistic[i][0][first, second, 0] == pytest.approx(value)
            fixed = (two, one)[i]  # the other's action, in the column of Q[s] or in its row
            response = slow(high, 1, lambda h, s, Q, i=i, fixed=fixed: Q.take(fixed[h, s], axis=1 - i).max())
            assert bounds.optimistic[i][0][other, 0] == pytest.approx(response)
    # Some values are clipped and some are not, or the comparison would say little.
    assert 0 < (np.abs(bounds.pessimistic[0][1]) == 2).mean() < 1


def test_surrogate_is_summed_over_players_and_ties_are_broken_at_random():
    flat, flat_responses = [np.zeros((2, 2, 1))], [np.zeros((2, 1))]
    values, responses = [np.array([[[1.0], [2.0]], [[3.0], [4.0]]])], [np.array([[10.0], [20.0]])]
    bounds = mg.Bounds([values, flat], [responses, flat_responses])
    # Player 1's response is to the columns.
    assert bounds.surrogate() == pytest.approx(np.array([[9, 18], [7, 16]]))
    assert mg.minimize_surrogate(bounds, np.random.default_rng(0)) == (1, 0)
    tie = mg.Bounds([flat, flat], [flat_responses, flat_responses])
    assert len({mg.minimize_surrogate(tie, np.random.default_rng(seed)) for seed in range(50)}) == 4


# What the theory says ---
def test_single_policy_data_fail_and_unilateral_data_suffice():
    results = mg.measure_table_games(mg.Args(num_seeds=6, table_sizes=(100, 10_000, 1_000_000)))
    single, unilateral, uniform = results["gap"]
    assert single.min() >= 0.5
    assert unilateral[0].mean() > 0.2 and uniform[0].mean() > 0.2  # a hundred comparisons do not suffice
    assert not unilateral[-1].any() and not uniform[-1].any()
    assert (results["gap"] <= results["bound"]).all()
    anchored, raw, bound = (results[name].mean(axis=2) for name in ("anchored", "raw", "bound"))
    assert (anchored[:, -1] < 0.004).all()
    assert anchored[:, 0] / anchored[:, -1] == pytest.approx(100, rel=0.1)  # by the square root of n
    assert raw[:, -1] == pytest.approx([2**-0.5, 3**-0.5, 4**-0.5], abs=0.003)  # the floors of raw U_D
    assert bound[0, -1] > 100  # what single-policy data leave out stays unknown
    assert (bound[1:, -1] < 0.3).all()
    measures = results["measures"]  # (data, anchored and raw, measures); both: single, unilateral, uniform
    assert np.diagonal(measures[:, 1]) == pytest.approx(raw[:, -1])
    assert (measures[:, 0] < 0.01).tolist() == [[True, False, False], [True, True, False], [True] * 3]


def test_bracket_holds_and_shrinks():
    args = mg.Args(num_datasets=4, markov_sizes=(100_000, 1_000_000, 10_000_000))
    results = mg.measure_markov_game(args)
    assert (results["lemma_4"].mean(axis=2) >= 1 - args.delta).all()
    width = results["width"].mean(axis=2)
    assert width[0, 0] < 12  # not all of it is clipped
    assert (width[:, 1:] < 0.4 * width[:, :-1]).all()  # the square root of 10 is 3.2
    assert (results["width"] <= results["bound"]).all()
    assert (results["gap"] <= results["bound"]).all()
    assert results["gap"][0, 0].mean() > 0.1 and results["gap"][:, -1].max() < 0.01
    assert results["error"].max() < mg.confidence_radii((3, 3, 2, 2), 0.05, 1.0, 0.1, 0.1)[0]


# The script ---
def test_same_command_same_files(tmp_path):
    """From the shell script, in a process of its own, and from main."""
    sizes = {"num_seeds": 2, "num_datasets": 2, "table_sizes": (100, 1000), "markov_sizes": (1000,)}
    path = tmp_path / "new" / "table.md"
    flags = f"--num-seeds 2 --num-datasets 2 --table-sizes 100 1000 --markov-sizes 1000 --result-path {path}"
    command = f"bash {ROOT}/benchmark/table4.sh {flags}"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command.split(), capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    text, image = path.read_text(), path.with_suffix(".png").read_bytes()
    assert done.stdout == text + "\n"
    assert "| a1 | 0.5 | 1 | | a1 | 0.5 | 0 |\n| a2 | 0 | 0.5 | | a2 | 1 | 0.5 |\n" in text
    mg.main(mg.Args(**sizes, result_path=str(path)))
    assert path.read_text() == text and path.with_suffix(".png").read_bytes() == image
    mg.main(mg.Args(**sizes, seed=2, result_path=str(path)))
    parts = [part.rpartition("|---|")[2] for part in path.read_text().split("## A random Markov game")]
    assert all(part not in text for part in parts)  # another seed, other numbers in both


@pytest.mark.parametrize("name, value", [("delta", 1.0), ("sharper", float("nan")), ("table_sizes", ())])
def test_bad_flags_are_refused(name, value):
    with pytest.raises(UserError, match="must be above 0"):
        mg.main(mg.Args(**{name: value}))
