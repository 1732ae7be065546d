"""Train expert, rookie and novice of a game, the players that collect_data.py needs: online VDN (Sunehag et
al., 2017) with replay of whole episodes, TD(lambda) targets and epsilon-greedy exploration. Rookie and novice
are early checkpoints of the expert's run (section 6.2: "early stop"). Writes
policies/<game>/{expert,rookie,novice}.pt. For spread with more than 3 agents train_spread_experts.py makes
better ones in less time; train_prey.py comes before tag.

Usage: python benchmark/train_experts.py --env spread

Deviation from the paper, which has no word on how words are learned: in reference agents explore whole
languages, not single words (explore_speech), and the Q-value of an action is that of its word plus that of
its move (FactoredNetwork).
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from tqdm import tqdm

import evaluate
from evaluate import AgentNetwork, Game, ParticleEnv, UserError, make_actor, make_game, mean_return, rollout
from vdn_rlhf import q_lambda_targets

ROOT = Path(__file__).parent.parent
# Which checkpoint of the run is whose: how far it has come from the random policy's return to the expert's.
STRENGTHS = {"expert": 1.0, "rookie": 0.4, "novice": 0.2}
UPDATES_PER_ROLLOUT = 4
HISTORY_EPISODES = 1024  # behind every return measured during training


@dataclass
class Args:
    env: str = "spread"
    """the game: spread, tag, reference or spread-5x4 (agents, landmarks)"""
    seed: int = 1
    """fixes everything"""
    preset: Literal["default"] = "default"
    """the values of each game, the only ones there are"""
    policies_path: str = ""
    """folder to write to, instead of policies/<game>/ beside the scripts"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""

    hidden_dim: int = 128
    """width of every hidden layer"""
    gamma: float = 0.95
    """discount"""
    td_lambda: float = 0.3
    """lambda of TD(lambda)"""
    learning_rate: float = 1e-3
    """of Adam; falls linearly to 2 % over the second half"""
    num_updates: int = 60_000
    """gradient steps, four after each rollout"""
    num_envs: int = 64
    """episodes per rollout"""
    batch_size: int = 64
    """episodes per gradient step"""
    buffer_size: int = 20_000
    """episodes in the replay buffer"""
    exploration_updates: int = 4_000
    """the share of random actions falls linearly from 1 to epsilon over this many updates"""
    epsilon: float = 0.05
    """share of uniformly random actions from then on"""


PRESETS = {
    "default": {
        "reference": dict(td_lambda=0.9, buffer_size=5_000, num_updates=40_000),
        "tag": dict(num_updates=3_500),  # stopped at about the strength of the authors' expert
    },
}


class FactoredNetwork(AgentNetwork):
    """For actions 5 * word + move: one output per word plus one per move. What a word is worth is learned
    from all moves that went with it."""

    def __init__(self, sizes, num_words: int, hidden_dim=128):
        super().__init__(sizes, hidden_dim=hidden_dim)
        self.num_words = num_words
        self.head = nn.Linear(hidden_dim, num_words + sizes[2] // num_words)

    def forward(self, observations, first_step=0, memory=None):
        """As AgentNetwork."""
        outputs, memory = super().forward(observations, first_step, memory)
        words, moves = outputs[..., : self.num_words, None], outputs[..., None, self.num_words :]
        return (words + moves).flatten(-2), memory


def dense_weights(network: AgentNetwork) -> dict[str, torch.Tensor]:
    """A copy of the weights, as those of an AgentNetwork with the same outputs."""
    weights = copy.deepcopy(network.state_dict())
    if isinstance(network, FactoredNetwork):
        for name in ("head.weight", "head.bias"):
            words, moves = weights[name][: network.num_words], weights[name][network.num_words :]
            weights[name] = (words[:, None] + moves[None]).flatten(0, 1)
    return weights


class OnlineVDN:
    """The learner: Q-network, target network, optimizer and a buffer of whole episodes. args has
    learning_rate, gamma, td_lambda, batch_size and buffer_size."""

    def __init__(self, network: AgentNetwork, args):
        self.online, self.args = network, args
        self.target = copy.deepcopy(network).requires_grad_(False)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate, fused=True)
        self.buffer, self.stored = None, 0

    def store(self, observations, actions, rewards) -> None:
        """N episodes, in the place of the oldest: (N, T, A, D), (N, T, A) and rewards of the team (N, T)."""
        episodes = (observations, actions.to(torch.uint8), rewards)
        if self.buffer is None:
            capacity = max(self.args.buffer_size, len(actions))
            self.buffer = [x.new_zeros(capacity, *x.shape[1:]) for x in episodes]
        capacity = len(self.buffer[0])
        slots = torch.arange(self.stored, self.stored + len(actions), device=actions.device) % capacity
        for stored, new in zip(self.buffer, episodes, strict=True):
            stored[slots] = new
        self.stored += len(actions)

    def update(self, done: float, generator) -> torch.Tensor:
        """One gradient step on the squared TD error of Q_tot = sum_i Q_i; done: share of the training."""
        args = self.args
        filled = min(self.stored, len(self.buffer[0]))
        batch = torch.randint(filled, (args.batch_size,), generator=generator, device=generator.device)
        observations, actions, rewards = (x[batch] for x in self.buffer)
        q = self.online(observations)[0]  # (B, T, A, num_actions)
        chosen = q.gather(-1, actions.long()[..., None]).sum(dim=(-2, -1))  # (B, T)
        with torch.no_grad():
            # Double Q-learning. Values in the place of those of the actions taken make Q(lambda) TD(lambda):
            # nearly all actions of an online learner are greedy, there is little to correct.
            target_q = self.target(observations)[0]
            values = target_q.gather(-1, q.argmax(dim=-1, keepdim=True)).sum(dim=(-2, -1))  # (B, T)
            targets = q_lambda_targets(rewards, values, values, args.gamma, args.td_lambda)
        loss = (chosen - targets).square().mean()
        self.optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, max(0.02, 2 * (1 - done)))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.online.parameters(), 10.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 0.01)
        return loss.detach()


def train_experts(args: Args, game: Game, device) -> list[tuple]:
    """-> (updates, greedy return, weights) of checkpoints along the training, the last after all updates."""
    generator = torch.Generator(device).manual_seed(args.seed)
    network = AgentNetwork(game.sizes, hidden_dim=args.hidden_dim)
    if game.num_words:
        network = FactoredNetwork(game.sizes, game.num_words, args.hidden_dim)
    learner, env = OnlineVDN(network.to(device), args), ParticleEnv(game, args.num_envs, device)
    language = random_language(game, args.seed, device) if game.num_words else None
    num_rollouts, checkpoints = -(-args.num_updates // UPDATES_PER_ROLLOUT), []
    progress = tqdm(range(num_rollouts), f"online VDN on {game.name}", unit="rollout", mininterval=1)
    for i in progress:
        done, explored = i / num_rollouts, i * UPDATES_PER_ROLLOUT / args.exploration_updates
        epsilon = 1 - min(explored, 1) * (1 - args.epsilon)
        act = make_actor(network, game.num_actions, generator, epsilon=epsilon)
        if language is not None:
            hold_share = max(0.1, 1 - done / 0.6)
            act = explore_speech(act, language, game.num_words, 1.5 - explored, hold_share, generator)
        observations, actions, rewards = rollout(env, act, env.reset(generator))
        learner.store(observations[:, :-1], actions, rewards.sum(dim=-1))
        for _ in range(UPDATES_PER_ROLLOUT):
            loss = learner.update(done, generator)
        # 200 checkpoints, and ten times as many in the first hundredth, where rookies and novices come from.
        every = max(num_rollouts // (2000 if done < 0.01 else 200), 1)
        if (i + 1) % every == 0 or i + 1 == num_rollouts:
            if not loss.isfinite():
                raise UserError(f"the loss is {loss.item()}; try a smaller --learning-rate")
            value = mean_return(game, network, device, args.seed + 1000 + i, HISTORY_EPISODES)
            checkpoints.append(((i + 1) * UPDATES_PER_ROLLOUT, value, dense_weights(network)))
            progress.set_postfix({"return": f"{value:.2f}", "loss": f"{loss.item():.3g}"})
    return checkpoints


def random_language(game: Game, seed: int, device) -> Callable:
    """-> language(observations (N, A, D)) -> words (N, A): the argmax of a fixed random linear map of what an
    agent sees, each number standardised by random play."""
    generator = torch.Generator(device).manual_seed(seed)
    env = ParticleEnv(game, 1024, device)
    observations = rollout(env, make_actor(None, game.num_actions, generator), env.reset(generator))[0]
    mean, std = observations.mean(dim=(0, 1, 2)), observations.std(dim=(0, 1, 2)).clamp(min=0.1)
    weights = torch.randn(game.observation_dim, game.num_words, generator=generator, device=device)
    return lambda observations: ((observations - mean) / std @ weights).argmax(dim=-1)


def explore_speech(act: Callable, language: Callable, num_words: int, language_share, hold_share, generator):
    """Exploration where actions are moves and words. A word that tells the goal with probability 1/2 instead
    of 1/3 is worth next to nothing, a single word moves the listener by a single step, and so independent
    random words never become speech. Therefore a share of the agents, hold_share, hold each word for ten
    steps on average: 30 % are uniformly random, of the rest a language_share (clipped to 0 .. 1) belongs to a
    language that already depends on the goal, the others are act's."""
    held = holds = None

    def speaking_act(observations, step):
        nonlocal held, holds
        actions = act(observations, step)

        def draw(share):
            return torch.rand(actions.shape, generator=generator, device=actions.device) < share

        words = torch.where(draw(language_share), language(observations), actions // 5)
        random_words = torch.randint(num_words, actions.shape, generator=generator, device=actions.device)
        words = torch.where(draw(0.3), random_words, words)
        if step == 0:
            held, holds = words, draw(hold_share)
        held = torch.where(draw(0.1), words, held)
        return torch.where(holds, actions % 5 + 5 * held, actions)

    return speaking_act


def is_finished(args, game: Game, folder: Path) -> bool:
    """Whether expert, rookie and novice are there, with these settings; UserError where others are."""
    paths = [folder / f"{name}.pt" for name in STRENGTHS]
    wanted = {name: value for name, value in vars(args).items() if name != "preset"}  # what it sets counts
    for path in filter(Path.exists, paths):
        evaluate.check_same(path, evaluate.load_checkpoint(path, "expert"), wanted, find_sources(game))
    if finished := all(path.exists() for path in paths):
        print(f"{folder}: expert, rookie and novice are already there, with these settings")
    return finished


def find_sources(game: Game) -> dict[str, str]:
    """Which prey the policies of tag learned against."""
    path = ROOT / "policies" / "tag" / "prey.pt"
    return {"prey": evaluate.load_checkpoint(path, "prey")["meta"]["checksum"]} if game.prey else {}


def save_experts(args, game: Game, folder: Path, checkpoints: list[tuple], device) -> None:
    """Choose expert, rookie and novice among checkpoints (updates, return, weights), and write them."""
    shape = {"sizes": game.sizes, "hidden_dim": args.hidden_dim}
    meta = {"env": game.name, "network": shape, "seed": args.seed, "torch": str(torch.__version__)}
    meta["command"], meta["sources"] = shlex.join(["python", *sys.argv]), find_sources(game)
    network = AgentNetwork(**shape).to(device)

    def measure(weights) -> float:
        network.load_state_dict(weights)
        return mean_return(game, network, device, args.seed + 10**6)

    low, high = mean_return(game, None, device, args.seed + 10**6), measure(checkpoints[-1][2])
    for name, strength in STRENGTHS.items():
        wanted = low + strength * (high - low)
        updates, _, weights = min(checkpoints, key=lambda checkpoint: abs(checkpoint[1] - wanted))
        if name == "expert":
            updates, _, weights = checkpoints[-1]
        test_return = measure(weights)
        metrics = {**game.metrics(test_return), "updates": updates}
        evaluate.save_checkpoint(folder / f"{name}.pt", "expert", args, meta, weights, {}, metrics)
        print(f"{folder / name}.pt: return {test_return:.2f} (random {low:.2f}) after {updates} updates")


def main(args: Args) -> None:
    device, game = evaluate.set_up(args), make_game(args.env)
    folder = Path(args.policies_path or ROOT / "policies" / args.env)
    if not is_finished(args, game, folder):
        save_experts(args, game, folder, train_experts(args, game, device), device)


if __name__ == "__main__":
    evaluate.run_command_line(main, Args, PRESETS)
