"""How far policies are from a Nash equilibrium. Nash-Gap(pi) (section 3) is the sum over agents of what
agent i gains if it alone plays a best response to the others. For each agent one is trained by double DQN
in the batched environment, on the agent's own reward and with its own observation, starting from the
better of the policy itself and the shipped expert (policies/<game>/expert.pt, where there is one).
Candidates are these two and checkpoints along the training, each deviating from its start policy only
where that promises more than one of several margins. On one set of episodes the one is chosen whose gain
has the highest lower end of its 95 % interval (the highest mean would be the luckiest of many), on another
it is measured, with and without the deviation on every start state. A gain that turns out negative there
stays negative; the policy itself, chosen where no candidate is surely better, gains exactly 0. Up to their
intervals all numbers are lower bounds, because a search can miss the best response.

Usage: python benchmark/nash_gap.py --policies policies/spread/rookie.pt runs/spread/diversified/bc-seed1.pt

Reported for every policy (on stdout the first four, all of it with --json-path):
    charts/nash_gap       the sum of agent_gains
    nash_gap_interval     its 95 % confidence interval over episodes
    agent_gains           mean gain of each agent, undiscounted, of one episode
    agent_gain_intervals  the same for each agent
    best_responses        of each agent: what the one chosen starts from (policy or expert), the updates
                          behind it (0: just that), its margin in units of reward, its gain when chosen
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import evaluate
from benchmark.train_experts import ROOT, FactoredNetwork
from evaluate import AgentNetwork, Game, ParticleEnv, load_policies, prey_observation, rollout
from vdn_rlhf import q_lambda_targets

# Double DQN. The unit of margins is the standard deviation of what exploring changes in an agent's return.
GAMMA, TD_LAMBDA, EPSILON, LEARNING_RATE, MARGIN = 0.95, 0.8, 0.1, 3e-3, 0.02
NUM_ENVS, UPDATES_PER_ROLLOUT, BATCH_SIZE, BUFFER_SIZE = 128, 8, 64, 8192  # in episodes
NUM_CHECKPOINTS, CANDIDATE_MARGINS, CHOICE_EPISODES = 4, (0.0, 0.02, 0.05, 0.1, 0.2), 1024
EPISODES_AT_ONCE = 128


@dataclass
class Args:
    policies: tuple[str, ...]
    """policy files, and the word random for the random policy"""
    env: str = ""
    """the game; needed for random alone, else that of the files"""
    num_updates: int = 2_000
    """gradient steps of the best responses to each policy"""
    num_episodes: int = 4096
    """episodes in which gains are measured"""
    sample: bool = False
    """the policies draw their actions from the softmax of their outputs instead of playing the best one"""
    seed: int = 1
    """fixes everything"""
    json_path: str = ""
    """also write the report there"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""


def draw(logits: torch.Tensor, num_copies: int, generator) -> torch.Tensor:
    """Actions from the softmax of logits (num_copies * M, ..., num_actions), with the same noise in all
    copies of the M environments."""
    shape = (len(logits) // num_copies, *logits.shape[1:])
    gumbel = -torch.empty(shape, device=logits.device).exponential_(generator=generator).log()
    return (logits + torch.cat([gumbel] * num_copies)).argmax(dim=-1)


def paired_actor(policy, num_actions: int, num_copies: int, generator, sample: bool) -> Callable:
    """-> act(observations (num_copies * M, A, D), step) -> actions, and the outputs behind them. As
    make_actor, but copies differ only by what is done differently in them."""
    memory = None

    def act(observations, step):
        nonlocal memory
        if policy is None:
            outputs = observations.new_zeros(*observations.shape[:2], num_actions)
        else:
            outputs, memory = policy(observations[:, None], step, memory if step > 0 else None)
            outputs = outputs[:, 0]
        if sample or policy is None:
            return draw(outputs, num_copies, generator), outputs
        return outputs.argmax(dim=-1), outputs

    return act


def own(x: torch.Tensor, num_agents: int) -> torch.Tensor:
    """What concerns agent i in the i-th copies: x (2 * A * M, A, ...) -> a view (2, M, A, ...) of it."""
    return x.unflatten(0, (2, num_agents, -1)).diagonal(dim1=1, dim2=3).movedim(-1, 2)


@torch.no_grad()
def play_pairs(game, policies, respond, baseline, num_envs: int, generator, sample, dtype=torch.float32):
    """Episodes from M = num_envs start states, 2 A times each: in copy i agent i plays respond(inputs,
    known_actions, step), in copy A + i the action of policies[baseline[i]], and all others follow
    policies[0] (None: random play). Start states and draws are the same in all copies.

    -> inputs (M, T, A, F), known actions (M, T, A, K) and actions (M, T, A) of the agents that respond, and
    how much more each earns in each step than in its other copy (M, T, A). The inputs of agent i are its
    observation and, of each of the K policies, its action as one-hot and its outputs, standardised."""
    A, device, steps = game.num_agents, generator.device, []
    start = ParticleEnv(game, num_envs, device, dtype)
    start.reset(generator)
    state = [x.permute(2, 0, 1) for x in (start.positions, start.velocities, start.landmarks)]
    state += [start.goals.T] if game.num_words else []
    env = ParticleEnv(replace(game, prey=None), 2 * A * num_envs, device, dtype)  # act moves the prey
    observations = env.set_state(*(torch.cat([x] * 2 * A) for x in state))
    act_policy = paired_actor(policies[0], game.num_actions, 2 * A, generator, sample)
    act_others = [paired_actor(policy, game.num_actions, 2, generator, False) for policy in policies[1:]]
    agents = torch.arange(A, device=device)

    def act(observations, step):
        actions, outputs = act_policy(observations, step)
        seen, played = own(observations, A), own(actions, A)  # (2, M, A, ...)
        known = [(played.clone(), own(outputs, A))]
        for act_other in act_others:
            known.append(tuple(x.unflatten(0, (2, num_envs)) for x in act_other(seen.flatten(0, 1), step)))
        known_actions = torch.stack([x for x, _ in known], dim=-1)
        features = [seen]
        for known_action, outputs in known:
            features.append(F.one_hot(known_action, game.num_actions))
            features.append(F.layer_norm(outputs, outputs.shape[-1:]))
        inputs = torch.cat(features, dim=-1)
        played[0] = respond(inputs[0], known_actions[0], step)  # writes into actions
        played[1] = known_actions[1][..., agents, baseline]
        steps.append((inputs[0], known_actions[0], played[0]))
        if game.prey is None:
            return actions
        prey_logits = game.prey(prey_observation(env).float())
        return torch.cat([actions, draw(prey_logits, 2 * A, generator)[:, None]], dim=1)

    rewards = own(rollout(env, act, observations)[2].transpose(1, 2), A)  # (2, M, A, T)
    return *(torch.stack(x, dim=1) for x in zip(*steps, strict=True)), (rewards[0] - rewards[1]).mT


def with_margin(q: torch.Tensor, base_actions: torch.Tensor, margin: float) -> torch.Tensor:
    """The greedy actions where they are better than the base actions by more than the margin, else these."""
    best, greedy = q.max(dim=-1)
    base_values = q.gather(-1, base_actions[..., None]).squeeze(-1)
    return torch.where(best - base_values > margin, greedy, base_actions)


def greedy_response(network, start: torch.Tensor, margin: float) -> Callable:
    """For play_pairs: agent i deviates from what policies[start[i]] does where the Q-network promises more
    than the margin."""
    agents = torch.arange(len(start), device=start.device)

    def respond(inputs, known_actions, step):
        return with_margin(network(inputs[:, None], step)[0][:, 0], known_actions[..., agents, start], margin)

    return respond


def measure_gains(game, policies, respond, num_episodes: int, seed: int, device, sample) -> torch.Tensor:
    """What each agent gains when it alone plays respond, not policies[0], per episode (num_episodes, A)."""
    generator, gains = torch.Generator(device).manual_seed(seed), []
    baseline = torch.zeros(game.num_agents, dtype=torch.long, device=device)
    for first in range(0, num_episodes, EPISODES_AT_ONCE):
        size = min(EPISODES_AT_ONCE, num_episodes - first)
        *_, gain = play_pairs(game, policies, respond, baseline, size, generator, sample, torch.float64)
        gains.append(gain.sum(dim=1))
    return torch.cat(gains)


def dqn_loss(online, target, start, episodes) -> torch.Tensor:
    """Mean squared TD error of every agent by itself; episodes are what play_pairs returns, with rewards in
    units of margins. Double Q-learning, Q(lambda) with off-policy corrections."""
    inputs, known_actions, actions, rewards = episodes
    q = online(inputs)[0]  # (B, T, A, num_actions)
    with torch.no_grad():
        target_q, agents = target(inputs)[0], torch.arange(len(start), device=start.device)
        greedy = with_margin(q, known_actions[..., agents, start], MARGIN)
        values, chosen_values = (target_q.gather(-1, a[..., None]).squeeze(-1) for a in (greedy, actions))
        targets = q_lambda_targets(rewards, values, chosen_values, GAMMA, TD_LAMBDA)  # (B, T, A)
    return F.mse_loss(q.gather(-1, actions[..., None]).squeeze(-1), targets)


def train_best_responses(game: Game, policies: list, args: Args, device) -> tuple[Callable, list[dict]]:
    """Double DQN with replay, for all agents at once -> the best responses chosen, for play_pairs, and a
    report on each.

    Every agent starts from the play of whichever of the policies earns it most against policies[0]. Learned
    is not the return but the gain on top of that: rewards are differences to the episode from the same start
    state and with the same draws in which the agent only plays its start policy. What is subtracted does not
    depend on the agent's deviations, so the best response is the same, and where nobody deviates all values
    are zero instead of the noise of whole returns."""
    generator, A = torch.Generator(device).manual_seed(args.seed + 2 * 10**6), game.num_agents
    inputs_dim = game.observation_dim + 2 * game.num_actions * len(policies)
    sizes = (inputs_dim, A, game.num_actions, game.horizon)
    online = (FactoredNetwork(sizes, game.num_words) if game.num_words else AgentNetwork(sizes)).to(device)
    for parameter in online.head.parameters():  # all values zero: with a margin this is the start policy
        nn.init.zeros_(parameter)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.Adam(online.parameters(), lr=LEARNING_RATE, fused=True)
    agents, candidates, choice_gains = torch.arange(A, device=device), [], []

    def add_candidate(updates, network, start, margin):
        candidates.append((updates, network, start, margin))
        respond, seed = greedy_response(network, start, margin), args.seed + 10**6
        gains = measure_gains(game, policies, respond, CHOICE_EPISODES, seed, device, args.sample)
        choice_gains.append(gains)

    def choose():  # -> indices of candidates (A,), mean gains (candidates, A)
        gains = torch.stack(choice_gains)  # (candidates, episodes, A)
        means = gains.mean(dim=1)
        return (means - 1.96 * gains.std(dim=1) / CHOICE_EPISODES**0.5).argmax(dim=0), means

    def explore(inputs, known_actions, step):
        actions = greedy_response(online, start, MARGIN)(inputs, known_actions, step)
        random_actions = torch.randint(game.num_actions, actions.shape, generator=generator, device=device)
        if game.num_words:  # another move, another word, both or none
            new_move, new_word = torch.rand((2, *actions.shape), generator=generator, device=device) < 0.5
            moves = torch.where(new_move, random_actions, actions) % 5
            random_actions = moves + 5 * (torch.where(new_word, random_actions, actions) // 5)
        deviates = torch.rand(actions.shape, generator=generator, device=device) < EPSILON
        return torch.where(deviates, random_actions, actions)

    for index in range(len(policies)):
        add_candidate(0, target, torch.full_like(agents, index), math.inf)
    start, buffer, scale = choose()[0], None, None
    num_rollouts = -(-args.num_updates // UPDATES_PER_ROLLOUT)
    checkpoints = {num_rollouts * (i + 1) // NUM_CHECKPOINTS for i in range(NUM_CHECKPOINTS)}
    rollouts = range(1, num_rollouts + 1)
    for i in tqdm(rollouts, f"best responses on {game.name}", unit="rollout", mininterval=1):
        episodes = play_pairs(game, policies, explore, start, NUM_ENVS, generator, args.sample)
        if buffer is None:
            gains = episodes[-1].sum(dim=1)
            scale = torch.where(gains.std() > 0, gains.std(), 1.0)
            buffer = [x.new_zeros(BUFFER_SIZE, *x.shape[1:]) for x in episodes]
        slots = torch.arange((i - 1) * NUM_ENVS, i * NUM_ENVS, device=device) % BUFFER_SIZE
        for stored, new in zip(buffer, episodes, strict=True):
            stored[slots] = new
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, 2 * (1 - (i - 1) / num_rollouts))
        for _ in range(UPDATES_PER_ROLLOUT):
            filled = min(i * NUM_ENVS, BUFFER_SIZE)
            batch = torch.randint(filled, (BATCH_SIZE,), generator=generator, device=device)
            inputs, known_actions, actions, rewards = (x[batch] for x in buffer)
            loss = dqn_loss(online, target, start, (inputs, known_actions, actions, rewards / scale))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(online.parameters(), 10.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 0.01)
        if i in checkpoints:
            frozen = copy.deepcopy(online).requires_grad_(False)
            for margin in CANDIDATE_MARGINS:
                add_candidate(i * UPDATES_PER_ROLLOUT, frozen, start, margin)

    best, means = choose()
    reports, responses = [], []
    for agent, index in enumerate(best.tolist()):
        updates, network, starts, margin = candidates[index]
        responses.append(greedy_response(network, starts, margin))
        report = {"start": ("policy", "expert")[starts[agent]], "updates": updates}
        report["margin"] = (margin * scale).item() if updates else None  # in units of reward
        reports.append({**report, "choice_gain": means[index, agent].item()})

    def respond(inputs, known_actions, step):
        actions = [response(inputs, known_actions, step)[:, i] for i, response in enumerate(responses)]
        return torch.stack(actions, dim=1)

    return respond, reports


def find_gap(game: Game, policy, expert, args: Args, device) -> dict:
    """The report on one policy; expert is None where none is known."""
    policies = [policy] if expert is None else [policy, expert]
    respond, best_responses = train_best_responses(game, policies, args, device)
    gains = measure_gains(game, policies, respond, args.num_episodes, args.seed, device, args.sample)
    gains = torch.cat([gains.sum(dim=1, keepdim=True), gains], dim=1)  # (N, 1 + A), the gap goes first
    means, margins = gains.mean(dim=0), 1.96 * gains.std(dim=0, correction=0) / len(gains) ** 0.5
    intervals = torch.stack([means - margins, means + margins], dim=1).tolist()
    report = {"charts/nash_gap": means[0].item(), "nash_gap_interval": intervals[0]}
    report |= {"agent_gains": means[1:].tolist(), "agent_gain_intervals": intervals[1:]}
    return {**report, "best_responses": best_responses, "num_updates": args.num_updates}


def main(args: Args) -> dict[str, dict]:
    device = evaluate.set_up(args)
    game, policies = load_policies(args.policies, device, args.env)
    path, expert, report = ROOT / "policies" / game.name / "expert.pt", None, {}
    if path.exists():
        expert = load_policies([path], device, game.name)[1][path]
    if args.json_path:
        evaluate.save_file(Path(args.json_path + ".try"), b"")  # what cannot be written is told now
        Path(args.json_path + ".try").unlink()
    for name, policy in policies.items():
        torch.manual_seed(args.seed)
        report[name] = find_gap(game, policy, expert, args, device)
        low, high = report[name]["nash_gap_interval"]
        gains = "  ".join(f"{gain:.3f}" for gain in report[name]["agent_gains"])
        gap = f"{report[name]['charts/nash_gap']:.3f} ± {(high - low) / 2:.3f}"
        print(f"{name} on {game.name}: Nash gap {gap}, gains of the agents {gains}", flush=True)
    if args.json_path:
        evaluate.save_file(Path(args.json_path), json.dumps(report, indent=1).encode())
    return report


if __name__ == "__main__":
    evaluate.run_command_line(main, Args, presets={})
