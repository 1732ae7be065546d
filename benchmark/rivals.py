"""What stands beside VDN-RLHF: placebos, an oracle, and rivals that use no reward model or no KL term. Flags
and outputs are those of vdn_rlhf.py, the method marks the file name. --method:
    zero      placebo: r_phi is 0, what is left is the reference's
    shuffled  placebo: the learned rewards of another trajectory, drawn within 1,024
    oracle    the true reward, which no preference learner sees
    cql       the conservative term of CQL (Kumar et al., 2020) instead of the KL term
    ipl       inverse preference learning (Hejna and Sadigh, 2023): Q-values from the labels, no r_phi
    true-returns  writes the reward model again with the true team returns, for train_bc.py --keep
The closing table calls all of them VDN-RLHF, but ipl.

Usage: python benchmark/rivals.py --env spread --method oracle"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import vdn_rlhf
from evaluate import compare, find_game, mean_return
from train_reward import split_into_blocks

vdn_loss = vdn_rlhf.vdn_loss  # main replaces that one
CQL_WEIGHT = 1.0  # of the conservative term, beside the TD error of standardized rewards
IPL_BETA, IPL_PENALTY = 0.1, 0.5  # temperature of its soft values; weight of the squared implicit rewards


@dataclass
class Args(vdn_rlhf.Args):
    method: Literal["zero", "shuffled", "oracle", "cql", "ipl", "true-returns"] = "oracle"
    """see above"""


def cql_loss(q, target_q, actions, *others):
    """vdn_loss plus log-sum-exp of all actions' values minus that of the data's: lowers what they lack."""
    gap = q.logsumexp(dim=-1) - q.gather(-1, actions[..., None]).squeeze(-1)  # (B, T, A)
    return vdn_loss(q, target_q, actions, *others) + CQL_WEIGHT * gap.sum(dim=-1).mean()


def ipl_loss(f, target_f, log_pi_ref, actions, pairs, labels, gamma, beta):
    """Bradley-Terry loss of the rewards that Q_tot implies, r_t = Q_tot(s_t, a_t) - gamma * V_tot(s_{t+1}),
    V_i = beta * log sum_a pi_ref(a) exp(Q_i(a) / beta). f (Q of the online network), target_f and log_pi_ref
    (B, T, A, num_actions), actions (B, T, A), pairs (P, 2), labels (P, A)."""
    chosen = f.gather(-1, actions[..., None]).sum(dim=(-2, -1))  # (B, T)
    values = (beta * (log_pi_ref + target_f / beta).logsumexp(dim=-1)).sum(dim=-1)
    rewards = chosen - gamma * F.pad(values[:, 1:], (0, 1))  # the game ends after the last step
    returns = rewards.sum(dim=1)
    difference = returns[pairs[:, 0]] - returns[pairs[:, 1]]
    targets = ((labels + 1) / 2).mean(dim=1)  # the share of agents that prefer the first
    return F.binary_cross_entropy_with_logits(difference, targets) + IPL_PENALTY * rewards.square().mean()


def learn_from_labels(args: Args, path: Path, data_path: Path, bc_path: Path) -> None:
    """Inverse preference learning: main of vdn_rlhf.py with ipl_loss on minibatches of pairs."""
    started, device = time.time(), vdn_rlhf.set_up(args)
    names = ("observations", "actions", "pairs", "labels")
    data, meta, checksums = vdn_rlhf.load_dataset(data_path, args.env, names, optional=("block",))
    training = [x.to(device) for x in split_into_blocks(data, data_path)[0]]
    observations, actions = data["observations"][:, :-1].to(device), data["actions"].long().to(device)
    (_, T, A), D = actions.shape, observations.shape[-1]
    bc = vdn_rlhf.load_checkpoint(bc_path, "bc")
    sizes = (D, A, meta["num_actions"], T)
    reference = vdn_rlhf.build_network(vdn_rlhf.AgentNetwork, bc_path, bc, device, sizes)
    sources = {"version": vdn_rlhf.VERSION, **checksums, "bc": bc["meta"]["checksum"]}
    if vdn_rlhf.is_finished(path, "vdn", args, sources):
        return
    shape = {"sizes": sizes, "network": args.network, "hidden_dim": args.hidden_dim}
    online = vdn_rlhf.AgentNetwork(**shape).to(device)
    target = copy.deepcopy(online).requires_grad_(False)
    policy = vdn_rlhf.VDNPolicy(online, reference, IPL_BETA)
    lr = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam(online.parameters(), lr=lr, fused=True, capturable=lr.is_cuda)
    batches = torch.randint(len(training[0]), (args.num_updates, 1)).to(device)

    def update(batch):
        trajectories, pairs, labels = (x[batch].squeeze(0) for x in training)
        seen = observations[trajectories]
        with torch.no_grad():
            target_f, log_pi_ref = target(seen)[0], reference(seen)[0].log_softmax(dim=-1)
        inputs = (online(seen)[0], target_f, log_pi_ref, actions[trajectories], pairs, labels)
        loss = ipl_loss(*inputs, args.gamma, IPL_BETA)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(online.parameters(), 10.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 0.01)
        return loss.detach()

    game = find_game(args.env, device, sizes)

    def evaluate(loss):
        tested = game.metrics(mean_return(game, policy, device, args.seed, 1024)) if game else {}
        return {"losses/td_loss": loss.item()} | tested

    parts = {"online": online, "target": target, "optimizer": optimizer}
    every = len(batches) // 20 or 1
    _, history = vdn_rlhf.train(args, path, sources, parts, update, batches, evaluate, every)
    metrics = {name: curve[-1] for name, curve in history.items()}
    if game is not None:
        report = compare(game, {"pi_ref": reference, "IPL": policy}, device, args.seed + 10**6)
        metrics |= report["IPL"] | {"charts/reference_score": report["pi_ref"]["charts/score"]}
    vdn_rlhf.save_json(path, args, {**metrics, "history": history}, vdn_rlhf.VERSION, started)
    network = {"values": shape, "reference": bc["meta"]["network"], "beta": policy.beta}
    meta = {"env": args.env, "network": network, "sources": sources}
    vdn_rlhf.save_checkpoint(path, "vdn", args, meta, policy.state_dict(), {}, metrics)
    path.with_suffix(".training.pt").unlink(missing_ok=True)


def main(args: Args) -> None:
    args = replace(args, run_name=args.method)
    data_path = Path(args.data_path or f"runs/{args.env}/{args.dataset}/dataset.npz")
    folder = data_path.parent
    if args.method in ("oracle", "true-returns"):
        names = ("actions", "true_rewards")
        true_rewards = vdn_rlhf.load_dataset(data_path, args.env, names)[0]["true_rewards"]  # (N, T, A)
    if args.method == "true-returns":
        path = folder / f"reward-alpha{args.alpha:g}-seed{args.seed}.pt"
        made = path.with_name(path.name.replace("reward-", "reward-true-returns-"))
        if not made.exists():
            checkpoint = vdn_rlhf.load_checkpoint(path, "reward")
            stats = checkpoint["stats"] | {"team_returns": true_rewards.sum(dim=(1, 2))}
            meta, weights, metrics = (checkpoint[key] for key in ("meta", "state_dict", "metrics"))
            vdn_rlhf.save_checkpoint(made, "reward", args, meta, weights, stats, metrics)
    elif args.method == "ipl":
        name = f"vdn-ipl-beta{args.beta:g}-alpha{args.alpha:g}-seed{args.seed}.pt"
        path = Path(args.vdn_path or folder / name)
        bc_path = Path(args.bc_path or folder / f"bc-seed{args.seed}.pt")
        learn_from_labels(args, path, data_path, bc_path)
    else:  # vdn_rlhf.py with one function replaced; it asks for the rewards of 1,024 trajectories at a time
        learned = vdn_rlhf.team_rewards
        if args.method == "oracle":
            truth = iter(true_rewards.split(1024))
            true_stats = {"mean": true_rewards.mean().item(), "std": true_rewards.std(correction=0).item()}
        vdn_rlhf.team_rewards = {
            "zero": lambda r_phi, stats, kl: kl.sum(dim=-1),
            "shuffled": lambda r_phi, stats, kl: learned(r_phi[torch.randperm(len(r_phi))], stats, kl),
            "oracle": lambda r_phi, stats, kl: learned(next(truth).to(kl), true_stats, kl),
            "cql": learned,
        }[args.method]
        if args.method == "cql":
            args, vdn_rlhf.vdn_loss = replace(args, beta=0.0), cql_loss
        vdn_rlhf.main(args)


if __name__ == "__main__":
    vdn_rlhf.run_command_line(main, Args, vdn_rlhf.PRESETS)
