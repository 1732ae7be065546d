"""Train a team policy offline from preferences: VDN (Sunehag et al., 2017) on the learned reward, Eq. (4),
plus the KL term to the reference policy, Eq. (3). Reads observations and actions of a dataset.npz, a
reward-*.pt and a bc-*.pt (pi_ref), never labels or true rewards; the sibling scripts make what is missing.
Writes vdn-*.pt, the last policy.
Usage: python vdn_rlhf.py --env spread --beta 1

Metrics in NAME.json, their curves also in wandb (--track); returns need evaluate.py beside this script:
    charts/test_return, charts/reference_return   of VDN and of pi_ref alone, from the same start states: mean
                               over agents of the undiscounted greedy return of 25 steps, fresh episodes
    charts/score, charts/reference_score   random policy 0, the authors' best expert 100 (tag: our expert)
    charts/log_pi_ref          mean log pi_ref(a | o_i) of greedy actions on data; uniform: -log |A_i|
    losses/td_loss             mean squared TD error of the last minibatch

Deviations from the paper:
1. The Q-network is an MLP that sees the time step, not a GRU (--network gru).
2. The KL term is a known part of the Q-values, the network learns the rest (VDNPolicy; --no-known-kl).
3. Eq. (3) with pi_w = softmax(Q / beta), played greedily; 5.3 has 1 / |A_i| for pi_w (--no-soft-values).
4. Q(lambda) with off-policy corrections, not one-step targets (--td-lambda 0).
5. Also in the preset: double Q, gamma 0.9, clipped gradients, slow target network, cosine learning rates."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import shlex
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

try:  # test returns are the work of evaluate.py, where it stands beside this script
    from evaluate import compare, find_game, load_policies, mean_return
except ImportError:
    find_game = None

VERSION = 2  # raised when a change of this file changes its results by more than rounding


@dataclass
class Args:
    env: str = "spread"
    """the game; must be the dataset's"""
    dataset: str = "diversified"
    """folder in runs/<game>/; collect_data.py --help lists the mixtures"""
    beta: float = 3.0
    """weight of the KL term, Eq. (3); 1 in reference unless given (paper: 1, in tag 3)"""
    alpha: float = 1.0
    """smoothness weight of the reward model to use, Eq. (1)"""
    keep: float = 1.0
    """pi_ref imitates this share of the trajectories, by learned team return; its file name has no alpha"""
    seed: int = 1
    """fixes everything; also picks the reward model and BC policy of that seed"""
    preset: Literal["default", "paper"] = "default"
    """paper: the values of the paper's Table 5"""
    run_name: str = ""
    """marks the file name of a run with other settings: vdn-<run name>-beta3-alpha1-seed1.pt"""
    data_path: str = ""
    """dataset, instead of runs/<game>/<dataset>/dataset.npz"""
    reward_path: str = ""
    """reward model, instead of reward-alpha1-seed1.pt beside the dataset"""
    bc_path: str = ""
    """reference policy, instead of bc-seed1.pt beside the dataset"""
    vdn_path: str = ""
    """where to write, instead of beside the dataset"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """CPU threads; small networks run fastest on one"""
    deterministic: bool = False
    """bit-equal runs on CUDA too (on CPU they always are)"""
    track: bool = False
    """log to wandb"""
    checkpoint_every: int = 1_000
    """updates between two checkpoints, NAME.training.pt beside the output"""
    resume: bool = False
    """go on where a run of the same command was stopped"""
    network: Literal["mlp", "gru"] = "mlp"
    """Q-network: mlp sees observation and time step, gru all observations so far (paper: gru)"""
    hidden_dim: int = 128
    """width of every hidden layer"""
    known_kl: bool = True
    """the KL term is a known part of the Q-values (paper: the network learns all of them)"""
    soft_values: bool = True
    """the next step is worth Eq. (3) of pi_w = softmax(Q / beta) (paper: of its greedy action)"""
    gamma: float = 0.9
    """discount"""
    td_lambda: float = 0.8
    """lambda of Q(lambda); 0: one-step targets (paper)"""
    learning_rate: float = 5e-3
    """of Adam; falls to zero along a cosine (paper: 1e-3)"""
    num_updates: int = 8_000
    """gradient steps"""
    batch_size: int = 32
    """trajectories per gradient step"""


# Table 5; beta is from section 5.3, the updates in tag from the published code (Table 5: 1e6).
PAPER = dict(run_name="paper", network="gru", hidden_dim=64, known_kl=False, soft_values=False, td_lambda=0.0)
PAPER |= dict(beta=1.0, learning_rate=1e-3, num_updates=10_000, batch_size=64)
PAPER_TAG = dict(beta=3.0, num_updates=50_000)
PRESETS = {"default": {"reference": dict(beta=1.0)}, "paper": {"all": PAPER, "tag": PAPER_TAG}}


# --- shared block: agent_network ---
# Origin: train_bc.py. The network of every policy here: imitation logits, Q-values of VDN.
class AgentNetwork(nn.Module):
    """One network for all agents, told apart by a one-hot id. An "mlp" sees observation and time step, like
    the pi_{h,i} of the time-inhomogeneous game of section 3; a "gru" reads the observations so far."""

    def __init__(self, sizes, network="mlp", hidden_dim=128):
        """sizes: observation size D, agents A (paper: m), number of actions |A_i|, horizon T (paper: H)."""
        super().__init__()
        self.sizes, self.network, width = tuple(sizes), network, hidden_dim
        D, A, num_actions, self.horizon = self.sizes
        if network == "mlp":
            shapes = [(D + A + 1, width), (width, width), (width, width)]
            self.body = nn.Sequential(*[layer for s in shapes for layer in (nn.Linear(*s), nn.ReLU())])
        else:
            self.embedding = nn.Linear(D + A, width)
            self.body = nn.GRU(width, width)
        self.head = nn.Linear(width, num_actions)

    def forward(self, observations, first_step=0, memory=None):
        """observations (B, T, A, D) from first_step on -> outputs (B, T, A, num_actions) and memory: the
        GRU's after the last step, for the next call (None: start of an episode)."""
        B, T, A, _ = observations.shape
        x = [observations, torch.eye(A, device=observations.device).expand(B, T, A, A)]
        if self.network == "mlp":
            steps = torch.arange(first_step, first_step + T, device=observations.device) / self.horizon
            x = self.body(torch.cat([*x, steps[:, None, None].expand(B, T, A, 1)], dim=-1))
        else:
            x = F.relu(self.embedding(torch.cat(x, dim=-1)))
            x = x.transpose(0, 1).flatten(1, 2)  # every agent is a sequence of its own: (T, B * A, width)
            x, memory = self.body(x, memory)
            x = x.unflatten(1, (B, A)).transpose(0, 1)
        return self.head(x), memory


# --- end shared block ---


# --- shared block: vdn_policy ---
# Origin: vdn_rlhf.py. What it learns.
class VDNPolicy(nn.Module):
    """Q_i(o_i, a) = f_i(o_i, a) + beta * (log pi_ref(a | o_i) + log |A_i|). The second term is the KL part of
    Eq. (3), known for every action; only f is learned. A network that learns all of Q never sees that part
    for actions that the dataset lacks. values (f), reference (pi_ref): AgentNetworks, or their arguments."""

    def __init__(self, values, reference, beta: float):
        super().__init__()
        self.values = AgentNetwork(**values) if isinstance(values, dict) else values
        self.reference = AgentNetwork(**reference) if isinstance(reference, dict) else reference
        self.beta, self.sizes = float(beta), self.values.sizes
        if self.reference.sizes != self.sizes or not math.isfinite(self.beta):
            raise ValueError("values and reference differ in size, or beta is no number")

    def forward(self, observations, first_step=0, memory=None):
        """As AgentNetwork: observations (B, T, A, D) -> Q-values (B, T, A, num_actions), memory of both."""
        memory = memory or (None, None)
        f, values_memory = self.values(observations, first_step, memory[0])
        logits, reference_memory = self.reference(observations, first_step, memory[1])
        return f + kl_rewards(logits, self.beta), (values_memory, reference_memory)


def kl_rewards(logits: torch.Tensor, beta: float) -> torch.Tensor:
    """The KL part of Eq. (3), beta * (log pi_ref(a | o_i) + log |A_i|), for all actions, from pi_ref's logits
    (..., num_actions), with 1 / |A_i| for pi_w (5.3). Soft values subtract beta * (log pi_w + log |A_i|)."""
    return beta * (logits.log_softmax(dim=-1) + math.log(logits.shape[-1]))


# --- end shared block ---


def team_rewards(r_phi: torch.Tensor, stats: dict[str, float], kl: torch.Tensor) -> torch.Tensor:
    """The step reward of Eq. (3): Eq. (4), a sum over agents, plus the KL part of the actions taken. r_phi
    and kl (..., A), mean and standard deviation of r_phi over the training part -> (...)."""
    return ((r_phi - stats["mean"]) / max(stats["std"], 1e-8) + kl).sum(dim=-1)


def q_lambda_targets(rewards, values, chosen_values, gamma: float, td_lambda: float) -> torch.Tensor:
    """Q(lambda) with off-policy corrections (Harutyunyan et al., 2016): G_t = r_t + gamma * (V_{t+1} + lambda
    * (G_{t+1} - Q_{t+1}(a_{t+1}))), all (B, T, ...), V of pi_w, a of the behavior; lambda 0: one-step
    targets. G, V and Q are 0 after step T, where the game ends: nothing is bootstrapped past it."""
    later = gamma * (values[:, 1:] - td_lambda * chosen_values[:, 1:])
    terms = rewards + torch.cat([later, torch.zeros_like(rewards[:, :1])], dim=1)
    steps = torch.arange(terms.shape[1], device=terms.device, dtype=terms.dtype)
    weights = ((gamma * td_lambda) ** (steps[:, None] - steps).clamp(min=0)).tril()
    return torch.einsum("st,bs...->bt...", weights, terms)  # (gamma * lambda)^(s - t) terms_s, s >= t


def vdn_loss(q, target_q, actions, rewards, gamma: float, td_lambda: float, temperature: float):
    """Mean squared TD error of Q_tot = sum_i Q_i over whole episodes. Q-values of the online and the target
    network (B, T, A, num_actions), actions (B, T, A), team rewards (B, T). Double Q-learning: the online
    network chooses the next pi_w = softmax(Q / temperature), the target network values it, by Eq. (3) where
    the temperature is beta; 0: the greedy action's value, with 1 / |A_i| for pi_w (5.3)."""
    taken = F.one_hot(actions, q.shape[-1])  # a CUDA graph holds no deterministic gradient of gather
    with torch.no_grad():
        log_pi = (q / max(temperature, 1e-6)).log_softmax(dim=-1)
        soft_q = target_q - temperature * (log_pi + math.log(q.shape[-1]))
        values = (log_pi.exp() * soft_q).sum(dim=(-2, -1))  # (B, T)
        chosen_values = (target_q * taken).sum(dim=-1).sum(dim=-1)
        targets = q_lambda_targets(rewards, values, chosen_values, gamma, td_lambda)
    return ((q * taken).sum(dim=-1).sum(dim=-1) - targets).square().mean()


def main(args: Args) -> None:
    started, device = time.time(), set_up(args)
    mark, keep = "paper-" if args.preset == "paper" else "", f"keep{args.keep:g}-" if args.keep < 1 else ""
    data_path = Path(args.data_path or f"runs/{args.env}/{args.dataset}/dataset.npz")
    ending = f"alpha{args.alpha:g}-seed{args.seed}.pt"
    name = f"vdn-{args.run_name}{args.run_name and '-'}{keep}beta{args.beta:g}-{ending}"
    path = Path(args.vdn_path or data_path.parent / name)
    reward_path = Path(args.reward_path or data_path.parent / f"reward-{mark}{ending}")
    bc_path = Path(args.bc_path or data_path.parent / f"bc-{mark}{keep}seed{args.seed}.pt")
    make_missing(args, [(data_path, args.data_path, "collect_data.py", ())])
    flags = ("data_path", "seed", "preset", "track", "resume")
    reward_job = (reward_path, args.reward_path, "train_reward.py", (*flags, "alpha"))
    bc_job = (bc_path, args.bc_path, "train_bc.py", (*flags, "keep", "reward_path"))
    if args.keep < 1:  # filtered BC asks the reward model
        make_missing(args, [reward_job])
        make_missing(replace(args, reward_path=str(reward_path)), [bc_job])
    make_missing(args, [reward_job, bc_job])

    data, meta, checksums = load_dataset(data_path, args.env, ("observations", "actions"))
    observations, actions = data["observations"].to(device), data["actions"].long().to(device)
    T, sizes = actions.shape[1], (observations.shape[-1], actions.shape[2], meta["num_actions"])

    def load(path: Path, given: str, kind: str, network_class: type, sizes: tuple, flag: str):
        """Another stage's model. At its default path it must fit these flags and the files read so far."""
        checkpoint = load_checkpoint(path, kind)
        made_from = {name: checksums[name] for name in checkpoint["meta"]["sources"] if name in checksums}
        wanted = {name: getattr(args, name) for name in ("env", "seed", "preset", flag)}
        if not given:
            check_same(path, checkpoint, wanted, made_from)
        checksums[kind] = checkpoint["meta"].get("checksum")  # filtered BC is made from a reward model
        return checkpoint, build_network(network_class, path, checkpoint, device, sizes)

    reward, reward_model = load(reward_path, args.reward_path, "reward", RewardNetwork, sizes, "alpha")
    if not all(isinstance(x, float) and math.isfinite(x) for x in map(reward["stats"].get, ("mean", "std"))):
        raise UserError(f"{reward_path}: has no mean and standard deviation of r_phi; make it again")
    bc, reference = load(bc_path, args.bc_path, "bc", AgentNetwork, (*sizes, T), "keep")
    sources = {"version": VERSION}
    sources |= {name: checksums[name] for name in ("meta", "observations", "actions", "reward", "bc")}
    if is_finished(path, "vdn", args, sources):
        return

    rewards, kl = [], []  # VDN changes neither: team rewards (N, T), KL of all actions (N, T, A, num_actions)
    chunks = zip(observations[:, :-1].split(1024), actions.split(1024), strict=True)
    with torch.no_grad():
        for o, a in tqdm(list(chunks), "learned rewards and pi_ref", unit="chunk", mininterval=1):
            kl.append(kl_rewards(reference(o)[0], args.beta))
            chosen_kl = kl[-1].gather(-1, a[..., None]).squeeze(-1)
            rewards.append(team_rewards(reward_model(o, a), reward["stats"], chosen_kl))
    rewards, kl = torch.cat(rewards), torch.cat(kl)

    batches = torch.randint(len(actions), (args.num_updates, args.batch_size)).to(device)
    shape = {"sizes": (*sizes, T), "network": args.network, "hidden_dim": args.hidden_dim}
    online = AgentNetwork(**shape).to(device)
    target = copy.deepcopy(online).to(device).requires_grad_(False)  # to(): packs a copied GRU's weights
    policy = VDNPolicy(online, reference, args.beta if args.known_kl else 0.0)
    temperature = args.beta if args.soft_values else 0.0
    lr = torch.tensor(args.learning_rate, device=device)  # a tensor, so that a CUDA graph reads it anew
    optimizer = torch.optim.Adam(online.parameters(), lr=lr, fused=True, capturable=lr.is_cuda)

    def update(batch):  # (B,): indices of trajectories
        seen, known = observations[batch, :-1], kl[batch] if args.known_kl else 0.0
        q, target_q = online(seen)[0] + known, target(seen)[0] + known
        loss = vdn_loss(q, target_q, actions[batch], rewards[batch], args.gamma, args.td_lambda, temperature)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(online.parameters(), 10.0)
        optimizer.step()
        with torch.no_grad():  # the target network follows slowly
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 0.01)
        return loss.detach()

    game = find_game(args.env, device, online.sizes) if find_game else None
    if game is None:
        print("test returns skipped: evaluate.py is not beside this script, or does not know the game")

    @torch.no_grad()
    def evaluate(loss) -> dict[str, float]:
        some = observations[:256, :-1]
        greedy = policy(some)[0].argmax(dim=-1, keepdim=True)
        log_pi_ref = reference(some)[0].log_softmax(dim=-1).gather(-1, greedy)
        metrics = {"losses/td_loss": loss.item(), "charts/log_pi_ref": log_pi_ref.mean().item()}
        return metrics | (game.metrics(mean_return(game, policy, device, args.seed, 1024)) if game else {})

    parts = {"online": online, "target": target, "optimizer": optimizer}
    speed, history = train(args, path, sources, parts, update, batches, evaluate, len(batches) // 20 or 1)
    metrics = {name: curve[-1] for name, curve in history.items()} | {"speed/updates_per_second": speed}
    if game is not None:  # the closing table: everybody from the same start states
        folder = os.path.relpath(Path(__file__).parent / "policies" / args.env)
        paths = [f"{folder}/{name}.pt" for name in ("novice", "rookie", "expert")]
        players = {"random": None, **load_policies(list(filter(os.path.exists, paths)), device, args.env)[1]}
        players |= {"pi_ref": reference, "VDN-RLHF": policy}
        report = compare(game, players, device, args.seed + 10**6)
        metrics |= {name: value for name, value in report["VDN-RLHF"].items() if name in metrics}
        names = {"charts/test_return": "charts/reference_return", "charts/score": "charts/reference_score"}
        metrics |= {names[name]: value for name, value in report["pi_ref"].items() if name in names}
    save_json(path, args, {**metrics, "history": history}, VERSION, started)
    network = {"values": shape, "reference": bc["meta"]["network"], "beta": policy.beta}
    meta = {"env": args.env, "network": network, "sources": sources}
    save_checkpoint(path, "vdn", args, meta, policy.state_dict(), {}, metrics)
    path.with_suffix(".training.pt").unlink(missing_ok=True)
    print(path)


def make_missing(args: Args, jobs: list[tuple[Path, str, str, tuple]]) -> None:
    """Sibling scripts make what is missing, side by side. jobs: path, given path or "", script, its flags."""
    processes = []
    for path, given, script, flags in jobs:
        sibling = Path(__file__).with_name(script)
        if path.exists():
            continue
        if given or not sibling.exists():
            raise UserError(f"{path}: no such file; {script} makes it")
        words = [os.path.relpath(sibling)]
        for name in ("env", "dataset", *flags, "device", "num_threads", "deterministic"):
            value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
            if value != getattr(Args, name):
                words.append(flag if value is True else f"{flag}={value}")
        print("$", shlex.join(["python", *words]), flush=True)
        position = {"TQDM_POSITION": str(len(processes))}  # of its progress bar
        processes.append(subprocess.Popen([sys.executable, *words], env={**os.environ, **position}))
    if status := next(filter(None, [process.wait() for process in processes]), 0):
        sys.exit(status)


# --- shared block: training ---
# Origin: train_bc.py. The loop around update(batch): measure, log, checkpoint, resume.
def is_finished(path: Path, kind: str, args, sources: dict[str, str]) -> bool:
    """Whether `path` is there, with these settings; raises UserError where it is there with others."""
    if path.suffix != ".pt":  # NAME.json and NAME.training.pt stand beside it
        raise UserError(f"{path}: the name of an output ends in .pt")
    if finished := path.exists():
        check_same(path, load_checkpoint(path, kind), vars(args), sources)
        print(f"{path}: already there, with these settings")
    return finished


def train(args, path: Path, sources: dict, parts: dict, update, batches, evaluate, every: int):
    """update(batch) for all rows of `batches`, the rate falling along a cosine, and evaluate(its output) ->
    metrics after each `every`. parts: optimizer, all else with a state. -> updates per second, history."""
    training_path, done, history, run_id = path.with_suffix(".training.pt"), 0, {}, f"{time.time_ns():x}"
    if training_path.exists():
        if not args.resume:
            raise UserError(f"{training_path}: of a stopped or running command; pass --resume or delete it")
        stored = load_checkpoint(training_path, "training")
        check_same(training_path, stored, vars(args), sources)
        try:
            for name, part in parts.items():  # minibatches are redrawn from the seed
                part.load_state_dict(stored["stats"][name])
            for group in parts["optimizer"].param_groups:  # which may come from another device
                group.update(lr=group["lr"].to(batches.device), capturable=batches.is_cuda)
            done, run_id, history = int(stored["meta"]["update"]), stored["meta"]["run_id"], stored["metrics"]
        except Exception as error:
            raise UserError(f"{training_path}: cannot be resumed ({error!r:.80}); delete it") from None
    if args.track:
        try:
            import wandb

            run = wandb.init(project="marlhf", name=path.stem, id=run_id, resume="allow", config=vars(args))
        except Exception as error:
            raise UserError(f"--track: wandb does not start ({error!r:.80})") from None
    update = capture(update, batches.device) if batches.is_cuda else update
    progress = tqdm(batches[done:], path.stem, len(batches), unit="update", initial=done, mininterval=1)
    begun, start = done, time.time()
    for batch in progress:
        if done % args.checkpoint_every == 0:  # and at 0: what cannot be written is told now
            meta = {"sources": sources, "update": done, "run_id": run_id}
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(training_path, "training", args, meta, {}, states, history)
        for group in parts["optimizer"].param_groups:
            group["lr"].fill_(args.learning_rate * (1 + math.cos(math.pi * done / len(batches))) / 2)
        output, done = update(batch), done + 1
        if done % every == 0 or done == len(batches):
            metrics = evaluate(output)
            for name, value in {**metrics, "update": done}.items():
                if not math.isfinite(value):
                    training_path.unlink(missing_ok=True)
                    raise UserError(f"{name} is {value} after {done} updates; try a smaller --learning-rate")
                history.setdefault(name, []).append(value)
            if args.track:
                run.log(metrics, step=done)
            progress.set_postfix({name.split("/")[-1]: f"{value:.4g}" for name, value in metrics.items()})
    return (done - begun) / max(time.time() - start, 1e-9), history


def capture(update, device):
    """update(batch), recorded as one CUDA graph: small networks spend their time on launching kernels."""
    torch.cuda.synchronize(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))  # before a recording nothing may use the default stream
    graph, calls, given, output = torch.cuda.CUDAGraph(), 0, None, None

    def replay(batch):
        nonlocal calls, given, output
        calls += 1
        if calls <= 3:  # as they are, so that the optimizer makes its state
            return update(batch)
        if calls == 4:
            given = batch.clone()
            with torch.cuda.graph(graph):
                output = update(given)
        given.copy_(batch)
        graph.replay()
        return output

    return replay


# --- end shared block ---


# --- shared block: dataset ---
# Origin: train_reward.py. Reading dataset.npz (format 1, README), whatever tool wrote it.
def load_dataset(path: Path, env: str, names: tuple, optional: tuple = ()) -> tuple[dict, dict, dict]:
    """Tensors of the arrays `names` and of those `optional` that are there, the meta, checksums of all
    arrays. Raises UserError, naming file and key, for whatever does not fit the format or the game `env`."""

    def check(fine, key: str, problem: str) -> None:
        if not fine:
            raise UserError(f"{path}: '{key}' {problem}")

    try:
        with np.load(path, allow_pickle=False) as file:  # checks the CRC of what it reads
            info = {member.filename.removesuffix(".npy"): member for member in file.zip.infolist()}
            if sum(x.file_size for x in info.values()) > max(2**30, 50 * os.path.getsize(path)):
                raise ValueError("packed too tightly")
            arrays = {key: file[key] for key in ("meta", *names, *optional) if key in file.files}
        meta = dict(json.loads(str(arrays.pop("meta"))))
    except Exception as error:  # truncated, foreign or malicious: numpy and zipfile raise many kinds
        games = "spread, spread-5x4, tag, reference"
        raise UserError(f"{path}: no dataset ({error!r:.80}); collect_data.py makes it for {games}") from None
    game, num_actions = meta.get("env"), meta.get("num_actions")
    check(meta.get("format") == 1, "meta", "is not of format 1")
    check(game == env, "meta", f"is of the game {game!r:.40}, not {env}; name it with --env")
    check(type(num_actions) is int and 0 < num_actions <= 256, "meta", "has no num_actions from 1 to 256")
    for key in names:
        check(key in arrays and arrays[key].ndim, key, "is missing")
    check(arrays["actions"].ndim == 3, "actions", "is not of the shape (N, T, A)")
    (N, T, A), M = arrays["actions"].shape, len(arrays.get("pairs", ()))
    layout = {  # kinds of numbers, type here, allowed shapes (-1: any), smallest and largest value
        "observations": ("f", np.float32, [(N, T + 1, A, -1)], -3e38, 3e38),
        "actions": ("iu", np.uint8, [(N, T, A)], 0, num_actions - 1),
        "pairs": ("iu", np.int64, [(M, 2)], 0, N - 1),
        "labels": ("iu", np.int8, [(M, A), (M, 1)], -1, 1),
        "block": ("iu", np.int64, [(N,)], -(2**62), 2**62),
        "true_rewards": ("f", np.float32, [(N, T, A)], -3e38, 3e38),
    }
    data = {}
    for key, array in arrays.items():
        kinds, dtype, shapes, low, high = layout[key]
        fits = [len(s) == array.ndim and all(np.equal(s, array.shape) | np.equal(s, -1)) for s in shapes]
        problem = f"is {array.dtype} {array.shape}, expected {dtype.__name__} {shapes[0]} (-1: any)"
        check(array.dtype.kind in kinds and any(fits) and array.size, key, problem)
        problem = f"has values {array.min()} to {array.max()}, {env} has {low} to {high}; of another --env?"
        check(array.min() >= low and array.max() <= high, key, problem)
        data[key] = torch.from_numpy(array.astype(dtype))
    if "pairs" in data:
        check((data["pairs"].diff() != 0).all(), "pairs", "compares a trajectory with itself")
        block = data.get("block", torch.zeros(N))
        check((block[data["pairs"]].diff() == 0).all(), "block", "has pairs that cross blocks")
    return data, meta, {key: f"{member.CRC:08x}" for key, member in info.items()}


# --- end shared block ---


# --- shared block: reward_network ---
# Origin: train_reward.py. r_phi of Eq. (1) to (4).
class RewardNetwork(nn.Module):
    """Step rewards of all agents: embeddings of observation and action are added, three hidden layers follow
    (B.1). With input "joint" the observation is that of all agents, s in r_phi(s, a_i), else its own."""

    def __init__(self, sizes, input="joint", network="mlp", hidden_dim=128):
        """sizes: observation size, agents, actions."""
        super().__init__()
        self.sizes, self.input, self.network = tuple(sizes), input, network
        (D, A, num_actions), H = self.sizes, hidden_dim
        self.observation_embedding = nn.Linear(D * A if input == "joint" else D, H)
        self.action_embedding = nn.Linear(A + num_actions, H, bias=False)  # of one-hot id and action
        layers = [layer for _ in range(3) for layer in (nn.Linear(H, H), nn.ReLU())]
        self.body = nn.GRU(H, H) if network == "gru" else nn.Sequential(*layers)
        self.head = nn.Linear(H, 1)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """observations (B, T, A, D), actions (B, T, A) -> rewards (B, T, A)."""
        B, T, A = actions.shape
        if self.input == "joint":  # embedded once, added to every agent
            observations = observations.flatten(-2)[..., None, :]  # (B, T, 1, A * D)
        ids = torch.eye(A, device=observations.device).expand(B, T, A, A)
        one_hot = F.one_hot(actions.long(), self.sizes[2]).to(ids.dtype)
        x = self.action_embedding(torch.cat([ids, one_hot], dim=-1))
        x = F.relu(x + self.observation_embedding(observations))  # (B, T, A, H)
        if self.network == "gru":  # every agent of every trajectory is a sequence of its own
            x = self.body(x.transpose(0, 1).flatten(1, 2))[0].unflatten(1, (B, A)).transpose(0, 1)
        else:
            x = self.body(x)
        return self.head(x).squeeze(-1)


# --- end shared block ---


# --- shared block: build_network ---
# Origin: collect_data.py.
def build_network(network_class: type, path: Path, checkpoint: dict, device, sizes=()) -> nn.Module:
    """The network of `sizes` that meta["network"] and state_dict describe, without gradients."""
    try:
        with torch.device("meta"):  # takes no memory, however large the sizes in the file
            network = network_class(**checkpoint["meta"]["network"])
        if not all(x.is_contiguous() and x.isfinite().all() for x in checkpoint["state_dict"].values()):
            raise ValueError("weights that are NaN, infinite or larger than the file")
        weights = {name: tensor.float().clone() for name, tensor in checkpoint["state_dict"].items()}
        network.load_state_dict(weights, assign=True)
        if sizes and network.sizes != sizes:
            raise ValueError(f"sizes {network.sizes}, not {sizes}")
        return network.to(device).requires_grad_(False)
    except Exception as error:
        raise UserError(f"{path}: no network can be built ({error!r:.80}); make it again") from None


# --- end shared block ---


# --- shared block: command_line ---
# Origin: collect_data.py. Mistakes that a user can mend, presets, device and seed.
class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit status 2."""


def run_command_line(main, args_class: type, presets: dict[str, dict[str, dict]]) -> None:
    """Call main with sys.argv. presets[--preset]["all"] and [--env] replace defaults, given flags win."""
    try:
        args = tyro.cli(args_class)
        if presets:
            values = presets[args.preset].get("all", {}) | presets[args.preset].get(args.env, {})
            args = tyro.cli(args_class, default=replace(args_class(), **values))
        main(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def set_up(args) -> torch.device:
    """Check the numbers, apply --num-threads, --seed, --deterministic -> the device that --device names."""
    for field in fields(args):
        value, low = getattr(args, field.name), 1 if field.type == "int" and field.name != "seed" else 0
        high = 1 if field.name in ("gamma", "td_lambda", "epsilon", "keep", "mistakes", "myopia") else 2**31
        if field.type in ("int", "float") and not low <= value <= high:
            raise UserError(f"--{field.name.replace('_', '-')} {value}: must be from {low} to {high}")
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)  # CPUs take six times as long for tiny probabilities
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({error!r:.80})") from None


# --- end shared block ---


# --- shared block: files ---
# Origin: collect_data.py. Files that are written whole or not at all, and read without executing anything.
def save_file(path: Path, content) -> None:
    """Write beside `path`, then rename, so that nobody ever sees half a file."""
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if os.path.exists(partial):
            partial.unlink()


def save_json(path: Path, args, metrics: dict, version: int, started: float) -> None:
    """The results beside an output NAME.pt or NAME.npz, as NAME.json."""
    get = torch.cuda.get_device_name if torch.cuda.is_initialized() else torch.backends.cpu.get_cpu_capability
    content = {"version": version, "args": vars(args), "metrics": metrics, "machine": get()}
    content["command"] = " ".join(["python", *sys.argv])
    content |= {"packages": {"torch": str(torch.__version__)}, "seconds": round(time.time() - started, 1)}
    save_file(path.with_suffix(".json"), json.dumps(content, indent=1).encode())


def save_checkpoint(path: Path, kind: str, args, meta: dict, weights: dict, stats: dict, metrics: dict):
    weights = {name: tensor.cpu() for name, tensor in weights.items()}
    checksum = zlib.crc32(b"".join(tensor.numpy().tobytes() for tensor in weights.values()))
    content = {"format": 1, "kind": kind, "args": vars(args), "meta": {**meta, "checksum": f"{checksum:08x}"}}
    buffer = io.BytesIO()  # torch.save hides why a write failed, a plain write does not
    torch.save({**content, "state_dict": weights, "stats": stats, "metrics": metrics}, buffer)
    save_file(path, buffer.getbuffer())


def load_checkpoint(path: Path, *kinds: str) -> dict:
    """Read a .pt file of this project; raises UserError when it is anything else."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.save packs nothing
            if sum(x.file_size for x in file.infolist()) > os.path.getsize(path) or file.testzip():
                raise ValueError("packed or damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != 1 or checkpoint["kind"] not in kinds:
            raise ValueError(f"kind {checkpoint['kind']!r:.40}")
        checkpoint["meta"]["sources"] = dict(checkpoint["meta"].get("sources", {}))
        return {key: dict(checkpoint[key]) for key in ("args", "meta", "state_dict", "stats", "metrics")}
    except Exception as error:  # truncated, foreign or malicious: zipfile and torch raise many kinds
        raise UserError(f"{path}: no {' or '.join(kinds)} checkpoint ({error!r:.80})") from None


def check_same(path: Path, stored: dict, wanted: dict, sources: dict[str, str]) -> None:
    """Raise UserError where a checkpoint has other flags than `wanted`, or was made from other `sources`."""
    neutral = {"device", "num_threads", "deterministic", "track", "checkpoint_every", "resume"}
    there, stored_sources = stored["args"], stored["meta"]["sources"]
    differing = [f"another {name}" for name in sources if stored_sources.get(name) != sources[name]]
    for name, value in wanted.items():  # what a path names is compared by its checksum
        if name not in neutral and not name.endswith("_path") and (there.get(name) == value) is not True:
            differing.append(f"--{name.replace('_', '-')} {there.get(name)!r:.40} there, {value!r} here")
    if differing:
        raise UserError(f"{path}: made with other settings ({'; '.join(differing)}); delete or rename it")


# --- end shared block ---


if __name__ == "__main__":
    run_command_line(main, Args, PRESETS)
