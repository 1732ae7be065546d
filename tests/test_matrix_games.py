"""The theory made executable: games, covariances, maximum likelihood, Algorithms 2 to 4 and the lemmas."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import benchmark.matrix_games as matrix_games
from benchmark.matrix_games import (
    TABLE_4,
    Args,
    Bounds,
    Data,
    Game,
    behavior_policy,
    best_responses,
    check_lemmas,
    collect,
    compute_bounds,
    confidence_radii,
    covariances,
    coverage_measures,
    estimation_error,
    find_equilibrium,
    fit_reward,
    list_trajectories,
    matrix_game,
    minimize_surrogate,
    model_backup,
    nash_gaps,
    policy_actions,
    policy_values,
    random_game,
    reward_bounds,
    theorem_4_bound,
    uncertainties,
)
from collect_data import UserError


@pytest.fixture(scope="module")
def game() -> Game:
    return random_game(1, num_states=3, horizon=3)


@pytest.fixture(scope="module")
def data(game) -> Data:
    return collect(game, behavior_policy(game, find_equilibrium(game), "unilateral"), 2000, np.random.default_rng(0))


def one_step_data(cells, counts, points=None) -> Data:
    """Comparisons in a 2 x 2 game; the first of the trajectories is tau_ref."""
    counts = np.array(counts, dtype=float)
    visits = np.zeros((1, 4))
    visits[0, cells] = counts.sum(axis=1)
    points = None if points is None else np.array(points, dtype=float)
    return Data(np.array(cells)[:, None], counts, points, visits, np.zeros((1, 4, 1)), np.array(cells[:1]))


# Games ------------------------------------------------------------------------------------------------------------------------
def test_nash_gaps_of_known_matrix_games():
    # M1: a1 and b1 dominate, and either player gains 0.5 by going there.
    assert nash_gaps(matrix_game(TABLE_4[0])) == pytest.approx(np.array([[0, 0.5], [0.5, 1]]))
    assert nash_gaps(matrix_game(TABLE_4[1])) == pytest.approx(np.array([[1, 0.5], [0.5, 0]]))
    assert find_equilibrium(matrix_game(TABLE_4[0])) == (0, 0)
    assert find_equilibrium(matrix_game(TABLE_4[1])) == (1, 1)
    # Prisoner's dilemma, 0 cooperates: together 0.6, exploited 0, exploiting 1, neither 0.2.
    dilemma = np.array([[0.6, 0.0], [1.0, 0.2]])
    game = Game(np.stack([dilemma, dilemma.T])[:, None, None], np.ones((1, 1, 2, 2, 1)))
    assert nash_gaps(game) == pytest.approx(np.array([[0.8, 0.2], [0.2, 0.0]]))
    # Matching pennies has no pure equilibrium: whoever loses gains 1.
    assert nash_gaps(matrix_game(np.eye(2))) == pytest.approx(np.ones((2, 2)))


def test_no_policy_is_good_in_both_games_of_table_4():
    """Theorem 3 for every output, mixed ones too: the gaps in the two games add up to 1, so the worse is at least 0.5."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.dirichlet(np.ones(2)), rng.dirichlet(np.ones(2))
        gaps = [(r @ y).max() - x @ r @ y + x @ r @ y - (x @ r).min() for r in TABLE_4]
        assert sum(gaps) == pytest.approx(1)


def test_values_of_enumerated_policies_are_expected_returns(game):
    """By summing over trajectories instead of dynamic programming."""
    H, S, A, B = game.shape
    values = policy_values(model_backup(game.rewards[0], game.transitions), game.shape)[0][..., 0]
    assert values.shape == (128, 128)  # an action in state 0, then 2 x 3 of them
    for first, second in np.random.default_rng(0).integers(128, size=(20, 2)):
        one, two = policy_actions(first, game.shape, 0), policy_actions(second, game.shape, 1)
        behavior = np.zeros(game.shape)
        for h in range(H):
            behavior[h, np.arange(S), one[h], two[h]] = 1
        cells, states, probabilities = list_trajectories(game, behavior)
        assert probabilities.sum() == pytest.approx(1)
        assert (cells // (A * B) == states).all()
        returns = sum(game.rewards[0, h].ravel()[cells[:, h]] for h in range(H))
        assert values[first, second] == pytest.approx(probabilities @ returns)


def test_best_responses_are_the_best_of_all_policies(game):
    for i in range(2):
        backup = model_backup(game.rewards[i], game.transitions)
        values, responses = policy_values(backup, game.shape), best_responses(backup, i, game.shape)
        for h in range(3):
            assert responses[h] == pytest.approx(values[h].max(axis=i))


def test_random_game_has_an_equilibrium_and_is_a_game(game):
    assert nash_gaps(game)[find_equilibrium(game)] == pytest.approx(0)
    assert nash_gaps(game).min() > -1e-9
    assert game.transitions.sum(axis=-1) == pytest.approx(1)
    assert game.rewards.min() >= 0 and game.rewards.max() <= 1
    for seed in range(5):
        other = random_game(seed, 2, 2)
        assert nash_gaps(other)[find_equilibrium(other)] == pytest.approx(0)


# Data and covariances ---------------------------------------------------------------------------------------------------------
def test_behavior_policies_cover_what_their_names_say(game):
    first, second = find_equilibrium(game)
    one, two = policy_actions(first, game.shape, 0), policy_actions(second, game.shape, 1)
    unilateral = behavior_policy(game, (first, second), "unilateral")
    for h, s, a, b in np.ndindex(game.shape):
        expected = 1 / 3 if a == one[h, s] or b == two[h, s] else 0
        assert unilateral[h, s, a, b] == pytest.approx(expected)
    assert (behavior_policy(game, (first, second), "uniform") == 0.25).all()


def test_labels_follow_bradley_and_terry_for_each_player():
    game = matrix_game(np.array([[1.0, 0.2], [0.0, 0.0]]))
    behavior = np.array([[[[0.5, 0.5], [0.0, 0.0]]]])
    data = collect(game, behavior, 100_000, np.random.default_rng(0))
    assert data.counts.sum() / 2 == 100_000
    n = data.counts[0, 1]  # comparisons of the two, about half
    assert n == pytest.approx(50_000, abs=800)  # 5 standard deviations
    same = data.counts[0, 0] / 2  # with itself: a point for either label
    chance = 1 / (1 + np.exp(-0.8))
    assert (data.points[0, 0] - same) / n == pytest.approx(chance, abs=0.011)
    assert (data.points[1, 0] - same) / n == pytest.approx(1 - chance, abs=0.011)
    assert data.points.sum() == 2 * 100_000


def test_trajectories_follow_the_game(game, data):
    """Visits and next states are those of the trajectories, and as frequent as their probabilities."""
    H, S, A, B = game.shape
    assert data.cells.shape == (3 * 9 * 9, H)
    assert data.visits.sum(axis=1) == pytest.approx(4000)
    assert data.next_states.sum(axis=2)[:-1] == pytest.approx(data.visits[:-1])
    assert not data.next_states[-1].any()
    assert (data.cells[data.counts.sum(axis=1).argmax()] == data.reference).all()
    many = collect(game, behavior_policy(game, find_equilibrium(game), "unilateral"), 10**8, np.random.default_rng(0))
    for h in range(H - 1):
        frequencies = many.next_states[h] / np.maximum(many.visits[h], 1)[:, None]
        visited = many.visits[h] > 0
        assert frequencies[visited] == pytest.approx(game.transitions[h].reshape(-1, S)[visited], abs=1e-3)
        assert many.next_states[h].sum(axis=0) == pytest.approx(many.visits[h + 1].reshape(S, A * B).sum(axis=1))


def test_covariances_worked_by_hand():
    """Three comparisons of (a1, b1) with (a2, b2), lambda 1: Sigma^r = I + 3 (e1 - e4)(e1 - e4)^T, which is 7 along e1 - e4."""
    data = one_step_data([0, 3], [[0, 3], [3, 0]])
    preference, transition = covariances(data, lam=1.0)
    assert preference == pytest.approx(np.array([[4, 0, 0, -3], [0, 1, 0, 0], [0, 0, 1, 0], [-3, 0, 0, 4]]))
    assert transition[0] == pytest.approx(np.diag([4, 1, 1, 4]))
    raw, visits = uncertainties(data, (1, 1, 2, 2), 1.0, anchored=False)
    assert raw.ravel() ** 2 == pytest.approx([4 / 7, 1, 1, 4 / 7])
    assert visits.ravel() == pytest.approx([1 / 2, 1, 1, 1 / 2])
    anchored = uncertainties(data, (1, 1, 2, 2), 1.0, anchored=True)[0]
    assert anchored.ravel() ** 2 == pytest.approx([0, 4 / 7 + 1, 4 / 7 + 1, 2 / 7])
    assert uncertainties(data, (1, 1, 2, 2), 2.0, anchored=True)[0][0, 0, 1, 1] == pytest.approx((2 / 8) ** 0.5)

    # Definition 1 at (a2, b2): there, at (a1, b2) or (a2, b1), and anywhere.
    expected = [(2 / 7) ** 0.5 + 1 / 2, (11 / 7) ** 0.5 + 1, (11 / 7) ** 0.5 + 1]
    assert coverage_measures(matrix_game(TABLE_4[1]), data, (1, 1), 1.0, True) == pytest.approx(expected)
    expected = [(4 / 7) ** 0.5 + 1 / 2, 2, 2]
    assert coverage_measures(matrix_game(TABLE_4[1]), data, (1, 1), 1.0, False) == pytest.approx(expected)


def test_only_the_worst_policy_leaves_the_unilateral_cells():
    """All but (a2, b2) compared a lot, equilibrium (a1, b1): its deviations are covered, (a2, b2) is not."""
    counts = 1e8 * (np.ones((3, 3)) - np.eye(3))
    single, unilateral, uniform = coverage_measures(
        matrix_game(TABLE_4[0]), one_step_data([0, 1, 2], counts), (0, 0), 1.0, True
    )
    assert single < unilateral < 1e-3 < 2 < uniform


def test_unilateral_coverage_is_of_the_worse_covered_player():
    """Equilibrium (a1, b1), compared a lot with (a1, b2), where player 2 can go, never with (a2, b1), where player 1 can."""
    data = one_step_data([0, 1], [[0, 1e8], [1e8, 0]])
    assert coverage_measures(matrix_game(TABLE_4[0]), data, (0, 0), 1.0, True)[1] > 2


def test_covariances_are_sums_over_pairs(game, data):
    features = data.features()
    d, expected = data.visits.shape[1], np.zeros((36, 36))
    transition = np.zeros((3, d, d))
    for i, j in np.argwhere(np.triu(data.counts)):
        times = data.counts[i, j] / (2 if i == j else 1)
        difference = features[i] - features[j]
        expected += times * np.outer(difference, difference)
        for h in range(3):
            for t in (i, j):
                psi = features[t, h * d : (h + 1) * d]
                transition[h] += times * np.outer(psi, psi)
    assert (features.sum(axis=1) == 3).all()
    assert covariances(data, 0.5)[0] == pytest.approx(0.5 * np.eye(36) + expected)
    assert covariances(data, 0.5)[1] == pytest.approx(0.5 * np.eye(d) + transition)


# Maximum likelihood and its confidence set ------------------------------------------------------------------------------------
def test_maximum_likelihood_of_two_trajectories():
    """Won 70 of 100: the logit of 0.7. Won 95 of 100: more than rewards in [0, 1] allow. Comparisons with itself change
    nothing."""
    data = one_step_data([0, 3], [[20, 100], [100, 0]], points=[[10 + 70, 30], [10 + 95, 5]])
    estimate = fit_reward(data, 0)
    assert estimate[0, 0] - estimate[0, 3] == pytest.approx(np.log(0.7 / 0.3), abs=1e-6)
    assert estimate[0, 1] == estimate[0, 2] == 0  # never seen
    assert fit_reward(data, 1)[0] == pytest.approx([0.5, 0, 0, -0.5])


def test_maximum_likelihood_expects_the_wins_that_were_seen():
    """Its condition in a million comparisons: for each feature within the box as many points as the model expects."""
    game = random_game(0, 2, 2)
    data = collect(game, np.full(game.shape, 0.25), 10**6, np.random.default_rng(0))
    features = data.features()
    for i in range(2):
        estimate = fit_reward(data, i)
        within = np.abs(estimate.ravel()) < 0.4999
        assert within.sum() >= 15
        returns = features @ estimate.ravel()
        expected = (data.counts / (1 + np.exp(returns - returns[:, None]))).sum(axis=1)
        assert (features.T @ (expected - data.points[i]))[within] == pytest.approx(0, abs=0.1)


def test_confidence_radii_worked_by_hand():
    """H = 1, four cells, delta 0.05, lambda 1: k = 4, t = log 80 = 4.382, gamma = 0.19661, g = sqrt(4 + 8.373 + 8.764) / 2."""
    C_r, C_P = confidence_radii((1, 1, 2, 2), 0.05, 1.0, 1.0, 1.0)
    assert (C_r, C_P) == pytest.approx((2.29875 / 0.19661 + 2, 3.39656 + 1), abs=1e-3)  # 3.39656 = sqrt(2 (log 2 + log 160))
    # 3 steps, 3 states: k = 36, gamma = 0.045177, g = sqrt(36 + 25.120 + 8.764) / 2, 4.32478 = sqrt(2 (3 log 2 + log 1440))
    C_r, C_P = confidence_radii((3, 3, 2, 2), 0.05, 1.0, 1.0, 1.0)
    assert (C_r, C_P) == pytest.approx((4.17983 / 0.045177 + 6, 3 * 4.32478 + 3), abs=1e-3)
    # What bounds the bias of lambda does not shrink with c_r and c_p: an unvisited cell has to reach the clip H.
    C_r, C_P = confidence_radii((3, 3, 2, 2), 0.05, 4.0, 0.0, 0.0)
    assert (C_r, C_P) == pytest.approx((2 * 36**0.5, 3 * 2))


def test_reward_bounds_are_the_extremes_of_the_confidence_set(data):
    """Rewards on the ellipsoid's surface come close to the bounds and never pass them; tau_ref's reward is 0 for certain."""
    norms, (sigma, _) = uncertainties(data, (3, 3, 2, 2), 1.0, True)[0], covariances(data, 1.0)
    estimate, rng = fit_reward(data, 0), np.random.default_rng(0)
    low, high = reward_bounds(data, estimate, norms, C_r=2.0)
    for h in range(3):
        assert low[h].ravel()[data.reference[h]] == high[h].ravel()[data.reference[h]] == 0
    root = np.linalg.inv(np.linalg.cholesky(sigma)).T
    directions = rng.normal(size=(1000, 36))
    thetas = estimate.ravel() + 2.0 * (directions / np.linalg.norm(directions, axis=1, keepdims=True)) @ root.T
    thetas = thetas.reshape(1000, 3, 12)
    rewards = thetas - thetas[:, np.arange(3), data.reference][:, :, None]
    assert (rewards <= high.reshape(3, 12) + 1e-9).all() and (rewards >= low.reshape(3, 12) - 1e-9).all()
    # The extreme theta of one cell attains its bound.
    feature = np.zeros((3, 12))
    feature[1, 5] += 1
    feature[1, data.reference[1]] -= 1
    step = np.linalg.solve(sigma, feature.ravel())
    best = estimate.ravel() + 2.0 * step / np.sqrt(feature.ravel() @ step)
    assert feature.ravel() @ best == pytest.approx(high.reshape(3, 12)[1, 5])


def test_estimation_error_worked_by_hand():
    """Sigma = I + 3 (e1 - e4)(e1 - e4)^T, and theta_hat off by 0.1 in e1 and 0.2 in e2."""
    data, rewards = one_step_data([0, 3], [[0, 3], [3, 0]]), matrix_game(TABLE_4[0]).rewards[0]
    estimate = rewards.reshape(1, 4) - 0.5 + np.array([0.1, 0.2, 0, 0])
    assert estimation_error(data, estimate, rewards, 1.0) == pytest.approx((4 * 0.1**2 + 0.2**2) ** 0.5)


# Algorithms 2 to 4 ------------------------------------------------------------------------------------------------------------
def test_algorithms_2_and_3_against_slow_loops(game, data):
    """Line by line as the paper writes them, for some policies, with every visit of the data spelled out."""
    H, S, A, B = game.shape
    C_r, C_P, lam = 8.0, 2.5, 1.0
    estimates = [fit_reward(data, i) for i in range(2)]
    bounds = compute_bounds(data, estimates, game.shape, lam, C_r, C_P)
    norms, (_, sigmas) = uncertainties(data, game.shape, lam, True)[0], covariances(data, lam)
    eye = np.eye(S * A * B)

    def slow(rewards, sign, reduce):
        V = np.zeros(S)
        for h in reversed(range(H)):
            total, inverse = np.zeros(12), np.linalg.inv(sigmas[h])
            for cell in range(12):
                total += data.visits[h, cell] * eye[cell] * rewards[h].ravel()[cell]
                for s in range(S):
                    total += data.next_states[h, cell, s] * eye[cell] * V[s]
            w, Q = inverse @ total, np.zeros((S, A, B))
            for cell in range(12):
                q = eye[cell] @ w + sign * C_P * (eye[cell] @ inverse @ eye[cell]) ** 0.5
                Q.ravel()[cell] = min(q, H - h) if sign > 0 else max(q, -(H - h))
            V = np.array([reduce(h, s, Q[s]) for s in range(S)])
        return V[0]

    for first, second in np.random.default_rng(0).integers(128, size=(5, 2)):
        one, two = policy_actions(first, game.shape, 0), policy_actions(second, game.shape, 1)
        for i, other in ((0, second), (1, first)):
            low, high = reward_bounds(data, estimates[i], norms, C_r)
            value = slow(low, -1, lambda h, s, Q, one=one, two=two: Q[one[h, s], two[h, s]])
            assert bounds.pessimistic[i][0][first, second, 0] == pytest.approx(value)
            fixed = (two, one)[i]  # the other's action, in the column of Q[s] or in its row
            response = slow(high, 1, lambda h, s, Q, i=i, fixed=fixed: Q.take(fixed[h, s], axis=1 - i).max())
            assert bounds.optimistic[i][0][other, 0] == pytest.approx(response)
    # Some values are clipped and some are not, or the comparison would say little.
    assert 0 < (np.abs(bounds.pessimistic[0][1]) == 2).mean() < 1


def test_surrogate_is_summed_over_players_and_ties_are_broken_at_random():
    flat = [np.zeros((2, 2, 1))], [np.zeros((2, 1))]
    bounds = Bounds([], [[np.array([[[1.0], [2.0]], [[3.0], [4.0]]])], flat[0]], [[np.array([[10.0], [20.0]])], flat[1]])
    assert bounds.surrogate() == pytest.approx(np.array([[9, 18], [7, 16]]))  # player 1's response is to the columns
    assert minimize_surrogate(bounds, np.random.default_rng(0)) == (1, 0)
    tie = Bounds([], [flat[0], flat[0]], [flat[1], flat[1]])
    assert len({minimize_surrogate(tie, np.random.default_rng(seed)) for seed in range(50)}) == 4


def test_theorem_4_bound_worked_by_hand():
    """At (a2, b2) both players may deviate to cells with norms sqrt(11 / 7) and 1, see above."""
    data = one_step_data([0, 3], [[0, 3], [3, 0]])
    bound = theorem_4_bound(matrix_game(TABLE_4[1]), data, (1, 1), lam=1.0, C_r=3.0, C_P=5.0)
    assert bound == pytest.approx(2 * 4 * (3 * (11 / 7) ** 0.5 + 5))


# What the theory says ---------------------------------------------------------------------------------------------------------
def test_single_policy_data_fail_and_unilateral_data_suffice():
    args = Args(num_seeds=6, table_sizes=(100, 10_000, 1_000_000))
    results = matrix_games.measure_table_games(args)
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
    measures = results["measures"]
    assert np.diagonal(measures[:, 1]) == pytest.approx([2**-0.5, 3**-0.5, 4**-0.5], abs=0.003)
    measures = measures[:, 0]  # rows: data; columns: single, unilateral, uniform
    assert (measures < 0.01).tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_bracket_holds_and_shrinks(game):
    args = Args(num_datasets=8, markov_sizes=(100_000, 1_000_000, 10_000_000))
    results = matrix_games.measure_markov_game(args)
    for lemma in ("lemma_1", "lemma_2", "lemma_4"):
        assert (results[lemma].mean(axis=2) >= 1 - args.delta).all()
    width = results["width"].mean(axis=2)
    assert width[0, 0] < 12  # not all of it is clipped
    assert (width[:, 1:] < 0.4 * width[:, :-1]).all()  # the square root of 10 is 3.2
    assert (results["width"] <= results["bound"]).all()
    assert (results["gap"] <= results["bound"]).all()
    assert results["gap"][0, 0].mean() > 0.1 and results["gap"][:, -1].max() < 0.01
    assert results["error"].max() < confidence_radii((3, 3, 2, 2), 0.05, 1.0, 0.1, 0.1)[0]
    behavior = behavior_policy(game, find_equilibrium(game), "unilateral")
    for s in range(4):
        data = collect(game, behavior, 100_000, np.random.default_rng((args.seed, 3, 100_000, s)))
        errors = [estimation_error(data, fit_reward(data, i), game.rewards[i], 1.0) for i in range(2)]
        assert results["error"][0, s] == pytest.approx(max(errors))


def test_the_checks_notice_a_single_wrong_number(game):
    """Of any player, in any step, of either side."""
    data = collect(game, np.full(game.shape, 0.25), 10**6, np.random.default_rng(0))
    norms = uncertainties(data, game.shape, 1.0, True)[0]
    estimates = [fit_reward(data, i) for i in range(2)]

    def check(wrong=lambda bounds: None):
        bounds = compute_bounds(data, estimates, game.shape, 1.0, 98.5, 16.0)
        wrong(bounds)
        return tuple(check_lemmas(game, data, bounds, norms, 98.5).values())

    assert check() == (True, True)
    for i in range(2):
        for h in range(3):
            assert check(lambda bounds, i=i, h=h: bounds.pessimistic[i][h].put(-1, 9)) == (True, False)
            assert check(lambda bounds, i=i, h=h: bounds.optimistic[i][h].put(-1, -9)) == (True, False)
        for side, wrong in ((0, 9), (1, -9), (0, -99), (1, 99)):  # past the true reward, and too far from it
            assert check(lambda bounds, i=i, side=side, wrong=wrong: bounds.rewards[i][side].put(-1, wrong)) == (False, True)


def test_the_checks_notice_constants_that_are_too_small(monkeypatch):
    """The norm of theta_hat - theta is about 10."""
    monkeypatch.setattr(matrix_games, "confidence_radii", lambda *args: (0.5, 0.05))
    results = matrix_games.measure_markov_game(Args(num_datasets=10, markov_sizes=(1_000_000,)))
    assert not results["lemma_1"].any() and not results["lemma_2"].any()


# The script -------------------------------------------------------------------------------------------------------------------
def test_same_command_same_files(tmp_path, capsys):
    """From the shell script, in a process of its own, and from main."""
    sizes = dict(num_seeds=2, num_datasets=2, table_sizes=(100, 1000), markov_sizes=(1000,))
    path = tmp_path / "new" / "table.md"
    flags = f"--num-seeds 2 --num-datasets 2 --table-sizes 100 1000 --markov-sizes 1000 --result-path {path}"
    command = f"bash {ROOT}/benchmark/table4.sh {flags}"
    done = subprocess.run(command.split(), capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    text, image = path.read_text(), path.with_suffix(".png").read_bytes()
    assert done.stdout == text + "\n"
    matrix_games.main(Args(**sizes, result_path=str(path)))
    assert path.read_text() == text and path.with_suffix(".png").read_bytes() == image
    assert capsys.readouterr().out == text + "\n"
    assert "| a1 | 0.5 | 1 | | a1 | 0.5 | 0 |\n| a2 | 0 | 0.5 | | a2 | 1 | 0.5 |\n" in text
    assert f"`python benchmark/matrix_games.py {flags}`" in text
    matrix_games.main(Args(**sizes, seed=2, result_path=str(path)))
    parts = [part.partition("|---|")[2] for part in path.read_text().split("## A random Markov game")]
    assert all(part not in text for part in parts)  # another seed, other numbers in both
    assert sorted(file.name for file in path.parent.iterdir()) == ["table.md", "table.png"]


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("--delta", dict(delta=1.0)),
        ("--lam", dict(lam=0.0)),
        ("--sharper", dict(sharper=float("nan"))),
        ("--seed", dict(seed=-1)),
        ("--num-seeds", dict(num_seeds=0)),
        ("--table-sizes", dict(table_sizes=())),
        ("--table-sizes", dict(table_sizes=(1000, 100))),
        ("--markov-sizes", dict(markov_sizes=(10**20,))),
        ("--result-path", dict(result_path="table4.txt")),
    ],
)
def test_bad_flags_are_named(flag, change):
    with pytest.raises(UserError, match=f"^{flag}.*must"):
        matrix_games.main(Args(**change))


def test_shipped_result_is_of_the_default_flags():
    text = Path(ROOT / "benchmark/results/table4.md").read_text()
    assert "Made by `python benchmark/matrix_games.py` (" in text
    assert Path(ROOT / "benchmark/results/table4.png").stat().st_size < 100_000
