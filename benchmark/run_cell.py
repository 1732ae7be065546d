"""One cell of a table for one seed: the stages that it needs, then benchmark/results/<scale>/<cell>-<key>.json. The key is a
hash of every setting of every stage and of the shipped policies, so that a result is only reused for what made it. Datasets,
reward models and policies stay in runs/<game>/<mixture>-<scale>/, have such a key too and are shared between cells. The machine
is not part of the key, only of the result: other processors round otherwise, and not all multiply in bfloat16.

Usage: python benchmark/run_cell.py --kind policy --env spread --dataset diversified --seed 4 --scale cpu
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import sys
import time
import traceback
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import tyro

import collect_data
import evaluate
import train_bc
import train_reward
import vdn_rlhf
from collect_data import MIXTURES, NEUTRAL_ARGS, ParticleEnv, UserError, make_actor, make_game, play_mixture, rollout, save_file

ROOT = Path(__file__).parent.parent
VERSION = 1  # to be raised when a change of the code, not of a setting, changes results
HISTORY_EPISODES = vdn_rlhf.HISTORY_EPISODES
DATASET_SEED, TEST_SEED = 2, 12345  # settings were chosen on dataset seed 1; start states of the test episodes
STAGES = {"collect_data": collect_data, "train_reward": train_reward, "train_bc": train_bc, "vdn_rlhf": vdn_rlhf}
PRESETS = ("default", "paper")
NEEDED = {"dataset": ["collect_data"], "reward": ["collect_data", "train_reward"], "policy": list(STAGES)}


@dataclass(frozen=True)
class Scale:
    seeds: tuple[int, ...]
    num_other_seeds: int
    """so many of the seeds, the first, in all tables but Table 2"""
    test_episodes: int
    num_trajectories: int
    overrides: dict
    """by preset and stage; what is not there has the value of the preset"""


SCALES = {
    "paper": Scale(seeds=(4, 5, 6, 7, 8), num_other_seeds=5, test_episodes=4096, num_trajectories=38_400, overrides={}),
    "cpu": Scale(
        seeds=(4, 5, 6, 7, 8),
        num_other_seeds=3,
        test_episodes=4096,
        num_trajectories=9_728,
        overrides={
            "default": {
                "train_reward": dict(max_epochs=8),
                "train_bc": dict(max_epochs=16),
                "vdn_rlhf": dict(imitation_updates=1_500, num_updates=1_500),
            },
            "paper": {
                "train_reward": dict(max_epochs=12),
                "train_bc": dict(max_epochs=12),
                "vdn_rlhf": dict(num_updates=1_500),
            },
        },
    ),
    "smoke": Scale(
        seeds=(4,),
        num_other_seeds=1,
        test_episodes=128,
        num_trajectories=768,
        overrides={
            preset: {
                "train_reward": dict(max_epochs=4),
                "train_bc": dict(max_epochs=2),
                "vdn_rlhf": dict(num_updates=20) | (dict(imitation_updates=20) if preset == "default" else {}),
            }
            for preset in ("default", "paper")
        },
    ),
}


@dataclass(frozen=True)
class Cell:
    kind: str = "policy"
    """dataset (how it is mixed), reward (a reward model) or policy (all stages)"""
    env: str = "spread"
    """spread, tag, reference or, with 4 to 7 agents and 5 landmarks, spread-4x5 to spread-7x5"""
    dataset: str = "diversified"
    """the mixture of Table 1: diversified, mix-unilateral, mix-expert or pure-expert"""
    preset: str = "default"
    """default, or paper: the values of the paper's Table 5"""
    alpha: float = 1.0
    """weight of the smoothness term, Eq. (1)"""
    beta: float = 1.0
    """weight of the KL term, Eq. (3)"""
    seed: int = 4
    """of the training; the dataset has its own"""
    scale: str = "paper"
    """smoke, cpu or paper: sizes, see SCALES"""

    def __str__(self) -> str:
        parts = [self.kind, self.env, self.dataset]
        if self.kind != "dataset":
            parts += [self.preset, f"alpha{self.alpha:g}"]
        if self.kind == "policy":
            parts.append(f"beta{self.beta:g}")
        return "-".join(parts if self.kind == "dataset" else [*parts, f"seed{self.seed}"])

    def check(self) -> None:
        """Raises UserError where there is no such cell."""
        choices = dict(kind=NEEDED, dataset=MIXTURES, preset=PRESETS, scale=SCALES)
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"--{name} {getattr(self, name)}: unknown, choose from {', '.join(known)}")
        if make_game(self.env) is None:
            raise UserError(f"--env {self.env}: unknown game, choose from spread, tag, reference, spread-4x5 to spread-7x5")

    def command(self) -> str:
        """The command that makes the result."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        words = ["python benchmark/run_cell.py", *(f"--{name} {value}" for name, value in changed.items())]
        return " ".join(words)

    @property
    def folder(self) -> Path:
        return Path(f"runs/{self.env}/{self.dataset}-{self.scale}")

    @property
    def log_path(self) -> Path:
        return Path(f"runs/logs/{self.scale}-{self}.log")

    @property
    def result_path(self) -> Path:
        key = make_key([TEST_SEED, self.test_sizes, self.settings()])
        return Path(f"benchmark/results/{self.scale}/{self}-{key}.json")

    @property
    def test_sizes(self) -> list[int]:
        return [SCALES[self.scale].test_episodes, HISTORY_EPISODES]

    def result(self) -> dict | None:
        return json.loads(self.result_path.read_text()) if self.result_path.exists() else None

    def args(self, stage: str):
        """The Args of a stage: the preset's for the game, then the scale's, then the cell's."""
        module, scale, game = STAGES[stage], SCALES[self.scale], self.env.split("-")[0]
        preset = module.PRESETS.get(self.preset, {}) if stage != "collect_data" else {}
        values = preset.get("all", {}) | preset.get(game, {}) | scale.overrides.get(self.preset, {}).get(stage, {})
        values |= dict(env=game, dataset=self.dataset)
        if "x" in self.env:
            num_agents, num_landmarks = self.env.split("-")[1].split("x")
            values |= dict(num_agents=int(num_agents), num_landmarks=int(num_landmarks))
        if stage == "collect_data":
            values |= dict(seed=DATASET_SEED, num_trajectories=scale.num_trajectories)
        else:
            values |= dict(seed=self.seed, preset=self.preset)
        if stage in ("train_reward", "vdn_rlhf"):
            values |= dict(alpha=self.alpha)
        if stage == "vdn_rlhf":
            values |= dict(beta=self.beta)
        return module.Args(**values)

    def settings(self) -> dict[str, dict]:
        """All that changes the result, by stage."""
        stages = {stage: vars(self.args(stage)) for stage in NEEDED[self.kind] if stage != "collect_data"}
        settings = {stage: {k: v for k, v in args.items() if k not in NEUTRAL_ARGS} for stage, args in stages.items()}
        paths = [Path(f"policies/{self.env}/{name}.pt") for name in ("expert", "rookie", "novice", "prey")]
        shipped = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in paths if path.exists()}
        dataset = collect_data.dataset_args(self.args("collect_data")) | dict(env=self.env, policies=shipped)
        return {"collect_data": dataset} | settings

    def paths(self) -> dict[str, Path]:
        """The file that each stage writes; its name has a key of the settings of this stage and of those before it."""
        settings, run_name = self.settings(), "" if self.preset == "default" else f"-{self.preset}"
        names = dict(collect_data="dataset", train_reward=f"reward{run_name}-alpha{self.alpha:g}-seed{self.seed}")
        names |= dict(train_bc=f"bc{run_name}-seed{self.seed}")
        names |= dict(vdn_rlhf=f"vdn{run_name}-beta{self.beta:g}-alpha{self.alpha:g}-seed{self.seed}")
        paths = {}
        for stage in NEEDED[self.kind]:
            made_from = {name: settings[name] for name in ("collect_data", stage)}
            made_from = [settings, self.test_sizes] if stage == "vdn_rlhf" else made_from  # it holds a learning curve
            suffix = "npz" if stage == "collect_data" else "pt"
            paths[stage] = self.folder / f"{names[stage]}-{make_key(made_from)}.{suffix}"
        return paths


def make_key(what) -> str:
    return hashlib.sha256(json.dumps([VERSION, what], sort_keys=True).encode()).hexdigest()[:8]


@contextlib.contextmanager
def only_one(path: Path):
    """Wait until no other process is at that file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.cell"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure_dataset(cell: Cell) -> dict:
    with np.load(cell.paths()["collect_data"]) as file:
        data = {name: torch.from_numpy(file[name]) for name in ("true_rewards", "behavior", "deviator", "pairs")}
    returns = data["true_rewards"].sum(dim=1).mean(dim=1)  # (N,)
    metrics = {}
    for behavior, name in enumerate(("expert", "unilateral", "rookie", "trivial")):
        chosen = data["behavior"] == behavior
        metrics[name] = dict(
            trajectories=int(chosen.sum()), mean_return=returns[chosen].mean().item() if chosen.any() else None
        )
    return metrics | dict(pairs=len(data["pairs"]), deviators=torch.bincount(data["deviator"].long() + 1).tolist()[1:])


def load_reward_model(cell: Cell) -> tuple[dict, torch.nn.Module]:
    path = cell.paths()["train_reward"]
    checkpoint = train_reward.load_checkpoint(path, ("reward",))
    return checkpoint, train_reward.build_network(train_reward.RewardNetwork, path, checkpoint, "cpu")


@torch.no_grad()
def compare_on_fresh_data(cell: Cell, model) -> dict[str, float]:
    """Error and correlation of the step rewards, both standardised, on 1,024 fresh trajectories of the diversified mixture: the
    same test for the models of all datasets."""
    args, game = replace(cell.args("collect_data"), dataset="diversified", num_trajectories=1024, seed=TEST_SEED), cell.env
    networks = {}
    for name in ("expert", *collect_data.EARLY_CHECKPOINTS):
        path = Path(f"policies/{cell.env}/{name}.pt")
        checkpoint = collect_data.load_checkpoint(path, ("vdn", "pathwise"))
        networks[name] = collect_data.build_network(collect_data.AgentNetwork, path, checkpoint, "cpu")
    data = play_mixture(args, make_game(game), networks, torch.device("cpu"))
    rewards = model(data["observations"][:, :-1], data["actions"]).double(), data["true_rewards"].double()
    predicted, true = ((r - r.mean()) / r.std(correction=0).clamp(min=1e-8) for r in rewards)
    return dict(fresh_mse=(predicted - true).square().mean().item(), fresh_correlation=(predicted * true).mean().item())


def spikiness(rewards: torch.Tensor) -> float:
    """Mean squared change from step to step, rewards (N, T, A)."""
    return (rewards[:, 1:] - rewards[:, :-1]).square().mean().item()


@torch.no_grad()
def measure_reward(cell: Cell) -> dict:
    """The trainer's metrics and history; `example` is one fresh episode of the shipped expert, the same for every model: true
    and predicted rewards, both standardised, [step][agent]; spikiness is that of the standardised rewards of the first 1,024
    trajectories of the dataset."""
    checkpoint, model = load_reward_model(cell)
    metrics = checkpoint["metrics"] | compare_on_fresh_data(cell, model)
    names = ("observations", "actions", "true_rewards")
    data, _ = train_reward.load_dataset(cell.paths()["collect_data"], cell.env, names)
    stats, true = checkpoint["stats"], data["true_rewards"]
    true_mean, true_std = true.mean(), true.std(correction=0).clamp(min=1e-8)

    def predict(observations, actions):
        return (model(observations[:, :-1].float(), actions) - stats["mean"]) / max(stats["std"], 1e-8)

    metrics["spikiness"] = spikiness(predict(data["observations"][:1024], data["actions"][:1024]))
    metrics["true_spikiness"] = spikiness((true[:1024] - true_mean) / true_std)
    game, shipped = make_game(cell.env), Path(f"policies/{cell.env}/expert.pt")
    expert = collect_data.load_checkpoint(shipped, ("vdn", "pathwise"))
    expert = collect_data.build_network(collect_data.AgentNetwork, shipped, expert, "cpu")
    generator = torch.Generator().manual_seed(TEST_SEED)
    env = ParticleEnv(game, 1, "cpu")
    observations, actions, rewards = rollout(env, make_actor(expert, game.num_actions, generator), env.reset(generator))
    example = dict(true=(rewards[0] - true_mean) / true_std, predicted=predict(observations, actions)[0])
    rounded = {name: [[round(x, 3) for x in step] for step in values.tolist()] for name, values in example.items()}
    return metrics | dict(example=rounded)


def measure_policy(cell: Cell) -> dict:
    """Returns and scores of the learned policy, of pi_ref and of the BC policy, greedy; the learning curve; the reward model's
    metrics."""
    reports, paths = {}, cell.paths()
    for name, stage in (("", "vdn_rlhf"), ("bc_", "train_bc")):
        args = evaluate.Args(str(paths[stage]), num_episodes=SCALES[cell.scale].test_episodes, seed=TEST_SEED)
        report = evaluate.main(args)
        reports |= {f"{name}return": report["charts/test_return"], f"{name}score": report.get("charts/score")}
    trained = vdn_rlhf.load_checkpoint(paths["vdn_rlhf"], ("vdn",))["metrics"]
    reference = make_game(cell.env).metrics(trained["charts/reference_return"])
    reports |= {"reference_return": reference["charts/test_return"], "reference_score": reference.get("charts/score")}
    reports["log_pi_ref"] = trained["charts/log_pi_ref"]
    reports["history"] = [[entry["update"], entry["charts/test_return"]] for entry in trained["history"]]
    checkpoint, model = load_reward_model(cell)
    reward_metrics = {name: value for name, value in checkpoint["metrics"].items() if isinstance(value, float)}
    return reports | {"reward": reward_metrics | compare_on_fresh_data(cell, model)}


def describe_machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    return f"{names[0]}, bfloat16 {'in hardware' if train_reward.use_bfloat16(True, torch.device('cpu')) else 'not used'}"


def run_cell(cell: Cell) -> None:
    """Make the result if it is missing. Raises what went wrong, after it was written to the log."""
    cell.check()
    torch.set_num_threads(1)
    with only_one(cell.log_path):
        if cell.result_path.exists():
            return
        with open(cell.log_path, "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                print("$", cell.command(), flush=True)
                make_result(cell)
            except BaseException:
                traceback.print_exc()
                raise


def train(stage: str, args, path: Path) -> None:
    """A reward model no better than chance, for which train_reward.py stops, is a result here: of a large alpha in Table 7."""
    try:
        STAGES[stage].main(args)
    except train_reward.UserError as error:
        if "no better than chance" not in str(error):
            raise
        train_reward.best_path(path).rename(path)
        train_reward.training_path(path).unlink()


def make_result(cell: Cell) -> None:
    vdn_rlhf.TEST_EPISODES = train_bc.TEST_EPISODES = num_episodes = SCALES[cell.scale].test_episodes
    vdn_rlhf.HISTORY_EPISODES = min(HISTORY_EPISODES, num_episodes)
    paths, seconds = cell.paths(), {}
    flags = dict(collect_data="data_path", train_reward="reward_path", train_bc="bc_path", vdn_rlhf="vdn_path")
    for stage, path in paths.items():
        with only_one(path):
            if not path.exists():
                start, args = time.time(), cell.args(stage)
                args.resume = True  # where a killed run of this cell left off
                for name in NEEDED[cell.kind]:  # where its sources stand and where it writes
                    if flags[name] in vars(args):
                        setattr(args, flags[name], str(paths[name]))
                train(stage, args, path)
                seconds[stage] = round(time.time() - start, 1)
    start = time.time()
    measure = {"dataset": measure_dataset, "reward": measure_reward, "policy": measure_policy}[cell.kind]
    result = dict(cell=vars(cell), command=cell.command(), metrics=measure(cell), settings=cell.settings())
    seconds["measure"] = round(time.time() - start, 1)
    result |= dict(seconds=seconds, machine=describe_machine(), torch=torch.__version__)
    save_file(cell.result_path, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))


if __name__ == "__main__":
    cell = tyro.cli(Cell)
    os.chdir(ROOT)
    try:
        cell.check()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        run_cell(cell)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        print(f"failed: {cell.command()} (see {cell.log_path}): {error}", file=sys.stderr)
        sys.exit(1)
    print(cell.result_path)
