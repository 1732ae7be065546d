"""The paper's theory made executable (sections 3 and 4, appendix A): tabular two-player Markov games with
preference data, the coverage measures of Definition 1, the maximum-likelihood reward with its confidence set,
Algorithm 2 (pessimistic values), 3 (optimistic best responses) and 4 (surrogate minimization, by
enumeration), all exact. First the two games of Table 4 under single-policy, unilateral and uniform data
(Theorems 1 to 4), then a random Markov game on which Lemma 4 is checked.

Usage: python benchmark/matrix_games.py        (writes benchmark/results/table4.md and table4.png)

Letters: H steps, S states, A and B actions of player 1 and 2, d = SAB features, K1 and K2 enumerated policies
of player 1 and 2, T trajectories that the behavior policy can produce. Steps, states, players and actions
count from 0 in the code.

# Deviation: what is ambiguous or wrong in the paper, and what stands here instead.
1. As Table 4 is printed, b beside the rows and a above the columns, the equilibria of its caption are none if
   the player of a earns r. Rows are a here, player 1 picks the row and earns r, player 2 earns 1 - r: then
   they are.
2. Theorem 3's labels, Ber(exp(r - r')), are no probabilities; they follow Bradley and Terry here, as in
   section 3.
3. Theorem 3's U_D(pi*) cannot fall below every C > 0: preferences never identify a constant in each step, so
   that direction of psi stays uncovered. The algorithms see every reward minus that of a covered trajectory
   tau_ref in the same step, features psi(tau) - psi(tau_ref); values shift by a constant, Nash gaps do not.
   The raw U_D is reported beside it. As rewards are in [0, 1], anchored values of the steps h to H lie in
   +-(H - h + 1): these replace the clips 0 of Algorithm 2 and H of Algorithm 3.
4. Sigma_D^r contains lambda I already; Theta, Lemmas 1 and 3 and Theorem 4 add it again. It counts once here.
5. C_r = C sqrt((dH + log(1/delta)) / (lambda^2 n) + d) and Lemma 5 disagree, and neither is Lemma 3.1 of Zhu
   et al.: that has gamma^2, of the curvature of the logistic loss, in the place of lambda^2, and its 1/n
   belongs to Sigma / n, not to the sum Sigma. `confidence_radii` states ours with a proof, C_P in its form
   for tables too. The beta of Algorithm 3 is C_P.
6. The estimate's constraint, a norm of theta_h of at most sqrt(d), becomes a box: rewards minus 1/2 are in
   [-1/2, 1/2].
7. Lemma 4 writes pi for pi*, and Theorem 4 lost the sum over players of its own proof, sum_i max_{pi_i}.
8. Algorithm 4 minimizes over deterministic policies. Ties, which the order of enumeration would decide for
   (a1, b1), are decided at random. The uniform mixed policy, with a gap of 1/2 in each game of Table 4 (the
   bound of Theorem 3, where the table shows 1), is no candidate: on single-policy data it ties with (a1, b1)
   and (a2, b2), with values 0 of covered and +-1 of other cells, so that luck alone would choose it.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from scipy.optimize import minimize
from tqdm import tqdm

from collect_data import UserError, run_command_line, save_file

COVERAGES = ("single", "unilateral", "uniform")
NUM_STATES, HORIZON = 3, 3  # of the random game
# r of M1 and M2; rows a1, a2; columns b1, b2
TABLE_4 = np.array([[0.5, 1.0], [0.0, 0.5]]), np.array([[0.5, 0.0], [1.0, 0.5]])


@dataclass
class Args:
    seed: int = 1
    """fixes everything: the random game, the datasets, and how ties are broken"""
    num_seeds: int = 20
    """datasets for each size and coverage on the games of Table 4"""
    num_datasets: int = 200
    """datasets for each size on the random Markov game"""
    table_sizes: tuple[int, ...] = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
    """numbers of preference pairs n on the games of Table 4, ascending"""
    markov_sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
    """numbers of preference pairs n on the random Markov game, ascending"""
    delta: float = 0.05
    """the bounds may fail with this probability"""
    lam: float = 1.0
    """lambda in both covariance matrices"""
    c_r: float = 1.0
    """C_r = c_r sqrt(k + 2 sqrt(k t) + 2 t) / (2 gamma) + sqrt(lambda k) with k = dH, t = log(2 m / delta), m
    = 2 players, gamma = 1 / (2 + exp(H) + exp(-H)); the bounds are proven for 1"""
    c_p: float = 1.0
    """C_P = H [ c_p sqrt(2 (S log 2 + log(2 d H / delta))) + sqrt(lambda) ]; the bounds are proven for 1"""
    sharper: float = 0.1
    """the Markov game's bounds are measured a second time with c_r and c_p times this: what holds in
    practice, without proof"""
    result_path: str = str(Path(__file__).parent / "results" / "table4.md")
    """the tables; the plot goes beside it as .png"""


# Games and policies ---
@dataclass(frozen=True)
class Game:
    """A linear Markov game (Assumption 1) with one-hot psi(s, a), so theta is the table of rewards and mu
    that of transitions. Play starts in state 0."""

    rewards: np.ndarray  # (2, H, S, A, B), in [0, 1], deterministic
    transitions: np.ndarray  # (H, S, A, B, S); those of the last step do not matter

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.rewards.shape[1:]


def matrix_game(payoffs: np.ndarray) -> Game:
    """One step, one state; player 1 picks the row and gets r (A, B), player 2 the column and gets 1 - r."""
    A, B = payoffs.shape
    return Game(np.stack([payoffs, 1 - payoffs])[:, None, None], np.ones((1, 1, A, B, 1)))


def random_game(seed: int, num_states: int, horizon: int) -> Game:
    """2 x 2 actions, general-sum rewards uniform in [0, 1] and Dirichlet(1) transitions, drawn again until
    one has an equilibrium of deterministic Markov policies. Every state can follow every other, so that
    comparisons of trajectories identify the rewards of each step up to a constant."""
    rng = np.random.default_rng(seed)
    while True:
        rewards = rng.uniform(size=(2, horizon, num_states, 2, 2))
        game = Game(rewards, rng.dirichlet(np.ones(num_states), size=(horizon, num_states, 2, 2)))
        if nash_gaps(game).min() < 1e-9:
            return game


def stage_policies(num_actions: int, num_states: int) -> np.ndarray:
    """All maps from states to actions, (num_actions ** num_states, num_states)."""
    return np.array(list(itertools.product(range(num_actions), repeat=num_states)))


def policy_actions(index: int, shape: tuple, player: int) -> np.ndarray:
    """The actions (H, S) of a player's enumerated policy; in the first step only that of state 0 counts."""
    H, S, A = shape[0], shape[1], shape[2 + player]
    tables = [stage_policies(A, 1 if h == 0 else S) for h in range(H)]
    actions = np.zeros((H, S), dtype=int)
    for h, stage in enumerate(np.unravel_index(index, [len(table) for table in tables])):
        actions[h, : tables[h].shape[1]] = tables[h][stage]
    return actions


def policy_values(backup: Callable, shape: tuple) -> list[np.ndarray]:
    """Values of all joint deterministic Markov policies: for each step (K1, K2, S), over the policies of the
    steps from there on, and in the first step only in state 0. backup(h, V (..., S)) -> Q (..., S, A, B)."""
    H, S, A, B = shape
    V, values = np.zeros((1, 1, S)), []
    for h in reversed(range(H)):
        n = 1 if h == 0 else S
        first, second = stage_policies(A, n), stage_policies(B, n)
        V = backup(h, V)[:, :, np.arange(n), first[:, None], second]  # (K1, K2, stages of 1, of 2, n)
        V = V.transpose(2, 0, 3, 1, 4).reshape(len(first) * V.shape[0], len(second) * V.shape[1], n)
        values.insert(0, V)
    return values


def best_responses(backup: Callable, player: int, shape: tuple) -> list[np.ndarray]:
    """Values of best responses to all deterministic Markov policies of the other player: per step (K, S)."""
    H, S = shape[:2]
    V, values = np.zeros((1, S)), []
    for h in reversed(range(H)):
        n = 1 if h == 0 else S
        others = stage_policies(shape[3 - player], n)
        V = backup(h, V).max(axis=-2 + player)[:, np.arange(n), others]  # (K, stages of the other, n)
        V = V.transpose(1, 0, 2).reshape(-1, n)
        values.insert(0, V)
    return values


def model_backup(rewards: np.ndarray, transitions: np.ndarray) -> Callable:
    """The Bellman operator of rewards (H, S, A, B) and transitions (H, S, A, B, S)."""
    return lambda h, V: rewards[h] + np.einsum("sabt,...t->...sab", transitions[h], V)


def nash_gaps(game: Game) -> np.ndarray:
    """Nash gaps (K1, K2) of all joint deterministic Markov policies."""
    backups = [model_backup(rewards, game.transitions) for rewards in game.rewards]
    values = [policy_values(backup, game.shape)[0][..., 0] for backup in backups]
    responses = [best_responses(backups[i], i, game.shape)[0][:, 0] for i in range(2)]
    return responses[0][None, :] - values[0] + responses[1][:, None] - values[1]


def find_equilibrium(game: Game) -> tuple[int, int]:
    """The first deterministic Markov equilibrium."""
    return tuple(np.argwhere(nash_gaps(game) < 1e-9)[0].tolist())


# Data ---
@dataclass(frozen=True)
class Data:
    """n pairs of trajectories with one label per player, summed up: which pairs, who won how often, what
    followed what."""

    cells: np.ndarray  # (T, H): index of (s, a, b) in each step
    counts: np.ndarray  # (T, T), symmetric: comparisons of two trajectories in either order
    points: np.ndarray  # (2, T): comparisons that a trajectory won in the eyes of each player
    visits: np.ndarray  # (H, d)
    next_states: np.ndarray  # (H, d, S), of the last step zero
    reference: np.ndarray  # (H,): cells of tau_ref, the most frequent trajectory

    def features(self) -> np.ndarray:
        """psi(tau), (T, Hd)."""
        H, d = self.visits.shape
        return np.eye(d)[self.cells].reshape(-1, H * d)


def behavior_policy(game: Game, equilibrium: tuple[int, int], coverage: str) -> np.ndarray:
    """Probabilities of joint actions (H, S, A, B): uniform over those where at least one player keeps to the
    equilibrium (unilateral), or over all (uniform)."""
    H, S, A, B = game.shape
    first, second = (policy_actions(index, game.shape, i) for i, index in enumerate(equilibrium))
    keeps = (np.arange(A) == first[..., None])[..., None] | (np.arange(B) == second[..., None])[..., None, :]
    allowed = keeps if coverage == "unilateral" else np.ones((H, S, A, B))
    return allowed / allowed.sum(axis=(2, 3), keepdims=True)


def list_trajectories(game: Game, behavior: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> cells (T, H), states (T, H), probabilities (T,) of all trajectories up to the last action."""
    H, S, A, B = game.shape
    cells, states, probabilities = np.zeros((1, 0), dtype=int), np.zeros((1, 1), dtype=int), np.ones(1)
    for h in range(H):
        now = states[:, -1]
        rows, actions = np.nonzero(behavior[h, now].reshape(-1, A * B))
        cells = np.concatenate([cells[rows], (now[rows] * A * B + actions)[:, None]], axis=1)
        probabilities = probabilities[rows] * behavior[h].reshape(S, A * B)[now[rows], actions]
        states = states[rows]
        if h < H - 1:
            chances = game.transitions[h].reshape(-1, S)[cells[:, -1]]
            rows, followers = np.nonzero(chances)
            cells, states = cells[rows], np.concatenate([states[rows], followers[:, None]], axis=1)
            probabilities = probabilities[rows] * chances[rows, followers]
    return cells, states, probabilities


def collect(game: Game, behavior: np.ndarray, n: int, rng: np.random.Generator) -> Data:
    """n pairs of independent trajectories, and for each player a label by Bradley and Terry."""
    H, S, A, B = game.shape
    cells, states, probabilities = list_trajectories(game, behavior)
    T, d = len(cells), S * A * B
    chances = np.outer(probabilities, probabilities).ravel()
    pairs = rng.multinomial(n, chances / chances.sum()).reshape(T, T)
    points = np.zeros((2, T))
    for i in range(2):
        returns = game.rewards[i].reshape(H, d)[np.arange(H), cells].sum(axis=1)  # (T,)
        won = rng.binomial(pairs, 1 / (1 + np.exp(returns - returns[:, None])))  # by the first of the pair
        points[i] = won.sum(axis=1) + (pairs - won).sum(axis=0)
    counts = (pairs + pairs.T).astype(float)
    times = counts.sum(axis=1)  # (T,)
    visits, next_states = np.zeros((H, d)), np.zeros((H, d, S))
    for h in range(H):
        np.add.at(visits[h], cells[:, h], times)
        if h < H - 1:
            np.add.at(next_states[h], (cells[:, h], states[:, h + 1]), times)
    return Data(cells, counts, points, visits, next_states, cells[times.argmax()])


# Covariances, coverage, reward ---
def covariances(data: Data, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Sigma_D^r (Hd, Hd) of the differences psi(tau) - psi(tau'), and Sigma_D,h^p (H, d, d) of all visits
    (section 4.1)."""
    features = data.features()
    laplacian = np.diag(data.counts.sum(axis=1)) - data.counts  # sums (x - y)(x - y)^T over the pairs
    preference = features.T @ laplacian @ features
    d = data.visits.shape[1]
    return lam * np.eye(len(preference)) + preference, lam * np.eye(d) + data.visits[:, :, None] * np.eye(d)


def uncertainties(data: Data, shape: tuple, lam: float, anchored: bool) -> tuple[np.ndarray, np.ndarray]:
    """Norms (H, S, A, B) of psi_h(s, a), or with `anchored` of psi_h(s, a) - psi_h(tau_ref), under the
    inverse of Sigma_D^r, and of psi(s, a) under that of Sigma_D,h^p."""
    H, d = data.visits.shape
    preference, transition = covariances(data, lam)
    features = np.eye(H * d)
    if anchored:
        features = features - np.repeat(features[np.arange(H) * d + data.reference], d, axis=0)
    squares = np.einsum("xi,ij,xj->x", features, np.linalg.inv(preference), features)
    diagonals = np.diagonal(np.linalg.inv(transition), axis1=1, axis2=2)
    return np.sqrt(np.maximum(squares, 0)).reshape(shape), np.sqrt(diagonals).reshape(shape)


def coverage_measures(game: Game, data: Data, equilibrium, lam: float, anchored: bool) -> list[float]:
    """Definition 1: U_D of the equilibrium, of the worst unilateral deviation, and of the worst policy."""
    backup = model_backup(sum(uncertainties(data, game.shape, lam, anchored)), game.transitions)
    values = policy_values(backup, game.shape)[0][..., 0]
    deviations = [best_responses(backup, i, game.shape)[0][equilibrium[1 - i], 0] for i in range(2)]
    return [float(values[equilibrium]), float(max(deviations)), float(values.max())]


def fit_reward(data: Data, player: int) -> np.ndarray:
    """The maximum-likelihood reward (H, d) minus 1/2, in [-1/2, 1/2], up to a constant in each step."""
    features, points, n = data.features(), data.points[player], data.counts.sum() / 2

    def loss(theta):
        returns = features @ theta
        powers = np.exp(returns)
        sums = powers[:, None] + powers
        nll = (data.counts * np.log(sums)).sum() / 2 - points @ returns
        gradient = powers * (data.counts / sums).sum(axis=1) - points
        return nll / n, features.T @ gradient / n

    options = {"maxiter": 1000, "ftol": 1e-16, "gtol": 1e-10}
    start, box = np.zeros(features.shape[1]), [(-0.5, 0.5)] * features.shape[1]
    fit = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=box, options=options)
    return fit.x.reshape(data.visits.shape)


def confidence_radii(shape: tuple, delta: float, lam: float, c_r: float, c_p: float) -> tuple[float, float]:
    """C_r and C_P, such that all bounds hold at once with probability 1 - delta when c_r = c_p = 1. The parts
    with lambda bound biases, not chance: they keep cells without data at the clips, whatever c_r and c_p.

    C_r, for each player with probability 1 - delta / (2 m), m = 2: let D = theta_hat - theta, x the psi(tau)
    - psi(tau') and e the deviations of the labels from their means. Returns differ by at most H, so the
    curvature of the loss is at least gamma = s(H) s(-H), s logistic, and as the estimate is optimal in a
    convex set that has theta in it,
        gamma |D|^2_(sum x x^T) <= - <gradient at theta, D> <= | sum e x |_(Sigma^-1) |D|_Sigma.
    e is 1/2-subgaussian, hence (Hsu, Kakade and Zhang, 2012) the first factor is at most g = sqrt(k + 2
    sqrt(k t) + 2 t) / 2, k = dH, t = log(2 m / delta). Adding lambda |D|^2 <= lambda k and solving for
    |D|_Sigma gives g / gamma + sqrt(lambda k).

    C_P, with probability 1 - delta / 2: the frequencies of what follows N visits of a cell are off by at most
    sqrt(2 (S log 2 + log(2 d H / delta)) / N) in L1 (Weissman et al., 2003), values lie in +-H, and ridge
    regression takes the share lambda / (N + lambda) from a value; 1 / sqrt(N + lambda) is the norm of psi."""
    H, S, A, B = shape
    d = S * A * B
    k, t = d * H, np.log(2 * 2 / delta)
    gamma = 1 / (2 + np.exp(H) + np.exp(-H))
    C_r = c_r * np.sqrt(k + 2 * np.sqrt(k * t) + 2 * t) / (2 * gamma) + np.sqrt(lam * k)
    C_P = H * (c_p * np.sqrt(2 * (S * np.log(2) + np.log(2 * d * H / delta))) + np.sqrt(lam))
    return float(C_r), float(C_P)


def estimation_error(data: Data, estimate: np.ndarray, rewards: np.ndarray, lam: float) -> float:
    """|theta_hat - theta|_Sigma of a player, theta the rewards - 1/2; in the confidence set at most C_r."""
    error = estimate.ravel() - (rewards.ravel() - 0.5)
    return float(np.sqrt(error @ covariances(data, lam)[0] @ error))


# Algorithms 2 to 4 ---
def reward_bounds(data: Data, estimate: np.ndarray, norms: np.ndarray, C_r: float):
    """The least and largest anchored reward (H, S, A, B) in the confidence set of an estimate (H, d)."""
    anchored = (estimate - estimate[np.arange(len(estimate)), data.reference][:, None]).reshape(norms.shape)
    return anchored - C_r * norms, anchored + C_r * norms


def estimated_backup(data: Data, rewards, norms, lam: float, sign: int, C_P: float) -> Callable:
    """Lines 4 and 5 of Algorithm 2 (sign -1, the pessimistic rewards) or 3 (sign 1, the optimistic ones)."""
    H = len(rewards)
    inverses = np.linalg.inv(covariances(data, lam)[1])  # (H, d, d)

    def backup(h, V):
        targets = data.visits[h] * rewards[h].ravel() + V @ data.next_states[h].T  # sum of psi [r + V(s')]
        w = targets @ inverses[h]  # (..., d); psi is one-hot: <psi(s, a), w> is an entry of w
        Q = w.reshape(*V.shape[:-1], *norms.shape[1:]) + sign * C_P * norms[h]
        return sign * np.minimum(sign * Q, H - h)

    return backup


@dataclass(frozen=True)
class Bounds:
    """What Algorithms 2 and 3 find, for each player and step."""

    pessimistic: list[list[np.ndarray]]  # (K1, K2, S), of all policies
    optimistic: list[list[np.ndarray]]  # (K, S), against all policies of the other player

    def surrogate(self) -> np.ndarray:
        """sum_i [optimistic best response - pessimistic value] of all policies, (K1, K2)."""
        responses = self.optimistic[0][0][None, :, 0] + self.optimistic[1][0][:, None, 0]
        return responses - self.pessimistic[0][0][..., 0] - self.pessimistic[1][0][..., 0]


def compute_bounds(data: Data, estimates: list, shape: tuple, lam: float, C_r: float, C_P: float) -> Bounds:
    reward_norms, transition_norms = uncertainties(data, shape, lam, anchored=True)
    pessimistic, optimistic = [], []
    for i in range(2):
        low, high = reward_bounds(data, estimates[i], reward_norms, C_r)
        below = estimated_backup(data, low, transition_norms, lam, -1, C_P)
        above = estimated_backup(data, high, transition_norms, lam, 1, C_P)
        pessimistic.append(policy_values(below, shape))
        optimistic.append(best_responses(above, i, shape))
    return Bounds(pessimistic, optimistic)


def minimize_surrogate(bounds: Bounds, rng: np.random.Generator) -> tuple[int, int]:
    """Algorithm 4 over the deterministic Markov policies."""
    surrogate = bounds.surrogate()
    return tuple(rng.choice(np.argwhere(surrogate < surrogate.min() + 1e-9)).tolist())


def theorem_4_bound(game: Game, data: Data, equilibrium, lam: float, C_r: float, C_P: float) -> float:
    """sum_i max_{pi_i} 4 E_{pi_i, pi*_-i} sum_h [ C_P |psi| + C_r |psi - psi_ref| ]."""
    reward_norms, transition_norms = uncertainties(data, game.shape, lam, anchored=True)
    backup = model_backup(C_P * transition_norms + C_r * reward_norms, game.transitions)
    return 4 * sum(float(best_responses(backup, i, game.shape)[0][equilibrium[1 - i], 0]) for i in range(2))


# Experiments ---
def measure_table_games(args: Args) -> dict[str, np.ndarray]:
    """Of the worse of the two games, for each coverage, size and seed (3, sizes, seeds): the Nash gap of
    Algorithm 4's output, the anchored and the raw U_D of the measure that has the data's name, Theorem 4's
    bound. `measures` (3, 2, 3): of each coverage's data at the largest size all three measures, anchored and
    raw, means over games and seeds."""
    games = [matrix_game(payoffs) for payoffs in TABLE_4]
    equilibria, gaps = [find_equilibrium(game) for game in games], [nash_gaps(game) for game in games]
    C_r, C_P = confidence_radii(games[0].shape, args.delta, args.lam, args.c_r, args.c_p)
    names, shape = ("gap", "anchored", "raw", "bound"), (3, len(args.table_sizes), args.num_seeds)
    results = {name: np.zeros(shape) for name in names} | {"measures": np.zeros((3, 2, 3))}
    for c, k, s in tqdm(list(np.ndindex(shape)), desc="games of Table 4", unit="dataset"):
        rng, runs = np.random.default_rng((args.seed, c, args.table_sizes[k], s)), []
        for game, equilibrium, gap in zip(games, equilibria, gaps, strict=True):
            if COVERAGES[c] != "single":
                behavior = behavior_policy(game, equilibrium, COVERAGES[c])
            else:  # both equilibria, which both games reward alike: one dataset for the two (Theorem 3)
                behavior = np.eye(2)[None, None] / 2
            if COVERAGES[c] != "single" or not runs:
                data = collect(game, behavior, args.table_sizes[k], rng)
                estimates = [fit_reward(data, i) for i in range(2)]
                bounds = compute_bounds(data, estimates, game.shape, args.lam, C_r, C_P)
                output = minimize_surrogate(bounds, rng)
            anchored, raw = (coverage_measures(game, data, equilibrium, args.lam, x) for x in (True, False))
            bound = theorem_4_bound(game, data, equilibrium, args.lam, C_r, C_P)
            runs.append((gap[output], anchored[c], raw[c], bound))
            if k == len(args.table_sizes) - 1:
                results["measures"][c] += np.array([anchored, raw]) / (len(games) * args.num_seeds)
        for name, values in zip(names, zip(*runs, strict=True), strict=True):
            results[name][c, k, s] = max(values)
    return results


def measure_markov_game(args: Args) -> dict[str, np.ndarray]:
    """On unilateral data, for the stated and the sharper constants, each size and dataset (2, sizes,
    datasets): whether Lemma 4 holds; the width sum_i [optimistic - pessimistic] at the equilibrium,
    Theorem 4's bound and the gap of Algorithm 4's output. `error` (sizes, datasets): the larger
    |theta_hat - theta|_Sigma of the two players."""
    game = random_game(args.seed, NUM_STATES, HORIZON)
    equilibrium, gaps = find_equilibrium(game), nash_gaps(game)
    behavior = behavior_policy(game, equilibrium, "unilateral")
    names = ("lemma_4", "width", "bound", "gap")
    shape = (len(args.markov_sizes), args.num_datasets)
    results = {name: np.zeros((2, *shape)) for name in names} | {"error": np.zeros(shape)}
    for k, s in tqdm(list(np.ndindex(shape)), desc="random Markov game", unit="dataset"):
        rng = np.random.default_rng((args.seed, len(COVERAGES), args.markov_sizes[k], s))
        data = collect(game, behavior, args.markov_sizes[k], rng)
        estimates = [fit_reward(data, i) for i in range(2)]
        errors = [estimation_error(data, estimates[i], game.rewards[i], args.lam) for i in range(2)]
        results["error"][k, s] = max(errors)
        for scale, factor in enumerate((1, args.sharper)):
            C = confidence_radii(game.shape, args.delta, args.lam, factor * args.c_r, factor * args.c_p)
            bounds = compute_bounds(data, estimates, game.shape, args.lam, *C)
            width, gap = bounds.surrogate()[equilibrium], gaps[minimize_surrogate(bounds, rng)]
            run = {"width": width, "gap": gap, "lemma_4": gap <= width + 1e-9}
            run["bound"] = theorem_4_bound(game, data, equilibrium, args.lam, *C)
            for name, value in run.items():
                results[name][scale, k, s] = value
    return results


def report(args: Args, table: dict[str, np.ndarray], markov: dict[str, np.ndarray], plot_name: str) -> str:
    def radii(shape, factor=1.0):
        C_r, C_P = confidence_radii(shape, args.delta, args.lam, factor * args.c_r, factor * args.c_p)
        return f"C_r = {C_r:.1f}, C_P = {C_P:.1f}"

    shape = (HORIZON, NUM_STATES, 2, 2)
    lines = ["# Table 4: which data identify an equilibrium", ""]
    lines += ["| M1 | b1 | b2 | | M2 | b1 | b2 |", "|---|---|---|---|---|---|---|"]
    for a, (left, right) in enumerate(zip(*TABLE_4, strict=True), start=1):
        lines.append(f"| a{a} | {left[0]:g} | {left[1]:g} | | a{a} | {right[0]:g} | {right[1]:g} |")
    lines += f"""
Player 1 picks the row and earns r, player 2 picks the column and earns 1 - r. The equilibrium is (a1, b1) in
M1 and (a2, b2) in M2. Made by `python benchmark/matrix_games.py` with delta {args.delta:g}, lambda
{args.lam:g}, c_r {args.c_r:g}, c_p {args.c_p:g} and seed {args.seed}.

Algorithm 4 on n preference pairs, {args.num_seeds} seeds, {radii((1, 1, 2, 2))}. Single-policy data are
(a1, b1) and (a2, b2) only, one dataset for both games, and the gaps of any policy in the two add up to 1
(Theorem 3); unilateral data have the equilibrium and the two cells beside it, uniform data all four. Each
number is that of the worse of the two games. U_D is the measure of Definition 1 that has the data's name.
Anchored: with features psi(tau) - psi(tau_ref); raw: as in the paper, where a constant stays open.

| data | n | Nash gap: mean | smallest | largest | U_D anchored | U_D raw | Theorem 4's bound |
|---|---|---|---|---|---|---|---|""".split("\n")
    for c, coverage in enumerate(COVERAGES):
        for k, n in enumerate(args.table_sizes):
            gap, bound = table["gap"][c, k], table["bound"][c, k].mean()
            measures = " | ".join(f"{table[name][c, k].mean():.3f}" for name in ("anchored", "raw"))
            cells = f"{gap.mean():.3f} | {gap.min():.3f} | {gap.max():.3f} | {measures} | {bound:.2f}"
            lines.append(f"| {coverage} | {n:,} | {cells} |")
    lines += f"""
All three measures at n = {args.table_sizes[-1]:,}, anchored (raw), means over games and seeds:

| data | single: pi* | unilateral: worst deviation | uniform: worst policy |
|---|---|---|---|""".split("\n")
    for coverage, pair in zip(COVERAGES, table["measures"], strict=True):
        cells = " | ".join(f"{x:.3f} ({y:.3f})" for x, y in zip(*pair, strict=True))
        lines.append(f"| {coverage} | {cells} |")
    lines += f"""
## A random Markov game

{HORIZON} steps, {NUM_STATES} states, 2 x 2 actions, general-sum rewards: the first game drawn that has a
deterministic Markov equilibrium. Unilateral data, {args.num_datasets} datasets of each size n, of which
at least {(1 - args.delta) * args.num_datasets:g} should satisfy Lemma 4: the gap of Algorithm 4's output is
at most the width, sum_i [optimistic - pessimistic] at pi*, which clipping keeps at {4 * HORIZON} or less.
Constants: {radii(shape)} (proven for c_r = c_p = 1) and, with {args.sharper:g} times c_r and c_p,
{radii(shape, args.sharper)} (not proven). The last column is the largest |theta_hat - theta|_Sigma, which
C_r has to exceed.

| c_r, c_p | n | Lemma 4 | width | Theorem 4's bound | gap: mean | largest | theta error |
|---|---|---|---|---|---|---|---|""".split("\n")
    for scale, factor in enumerate((1, args.sharper)):
        for k, n in enumerate(args.markov_sizes):
            holds = f"{markov['lemma_4'][scale, k].sum():.0f}"
            means = " | ".join(f"{markov[name][scale, k].mean():.3f}" for name in ("width", "bound", "gap"))
            largest = f"{markov['gap'][scale, k].max():.3f} | {markov['error'][k].max():.2f}"
            constants = f"{factor * args.c_r:g}, {factor * args.c_p:g}"
            lines.append(f"| {constants} | {n:,} | {holds} | {means} | {largest} |")
    return "\n".join([*lines, "", f"![gap, bounds and widths against n]({plot_name})", ""])


def plot(args: Args, table: dict[str, np.ndarray], markov: dict[str, np.ndarray]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    labels = {"bound": "Theorem 4", "anchored": "anchored U_D", "raw": "raw U_D"}
    labels |= {"width": "width at pi*", "gap": "gap of the output"}
    for c, coverage in enumerate(COVERAGES):
        gap, color = table["gap"][c], f"C{c}"
        axes[0].plot(args.table_sizes, gap.mean(axis=1), "o-", color=color, label=f"{coverage} data")
        axes[0].fill_between(args.table_sizes, gap.min(axis=1), gap.max(axis=1), color=color, alpha=0.15)
        for name, style in (("bound", "--"), ("anchored", "-"), ("raw", ":")):
            means, label = table[name][c].mean(axis=1), f"{labels[name]}, {coverage}"
            axes[1].plot(args.table_sizes, means, style, color=color, label=label)
    axes[0].axhline(0.5, color="gray", linestyle=":", label="0.5 (Theorem 3)")
    for scale, factor in enumerate((1, args.sharper)):
        for name, style in (("bound", "--"), ("width", "o-"), ("gap", "^:")):
            means = np.maximum(markov[name][scale].mean(axis=1), 1e-3)
            label, color = f"{labels[name]}, c_r = {factor * args.c_r:g}", f"C{len(COVERAGES) + scale}"
            axes[2].plot(args.markov_sizes, means, style, color=color, label=label)
    axes[0].set(title="Table 4, worse game: Nash gap", ylabel=f"mean and range of {args.num_seeds} seeds")
    axes[1].set(title="Table 4: bound and coverage", yscale="log", ylabel="mean")
    axes[2].set(title="Random Markov game, unilateral data", yscale="log", ylabel="mean, cut off below 0.001")
    for ax in axes:
        ax.set(xscale="log", xlabel="preference pairs n")
        ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure


def main(args: Args) -> None:
    sizes = (args.num_seeds, args.num_datasets, *args.table_sizes, *args.markov_sizes)
    constants = (args.lam, args.c_r, args.c_p, args.sharper)
    fine = all(0 < x <= 10**15 for x in (*sizes, *constants)) and args.table_sizes and args.markov_sizes
    if not fine or args.seed < 0 or not 0 < args.delta < 1:
        raise UserError("sizes and constants must be above 0, --delta between 0 and 1, --seed not negative")
    table, markov = measure_table_games(args), measure_markov_game(args)
    path, buffer = Path(args.result_path), io.BytesIO()
    text = report(args, table, markov, path.with_suffix(".png").name)
    print(text)
    save_file(path, text.encode())
    plot(args, table, markov).savefig(buffer, format="png", dpi=75, metadata={"Software": None})
    save_file(path.with_suffix(".png"), buffer.getvalue())


if __name__ == "__main__":
    run_command_line(main, Args, presets={})
