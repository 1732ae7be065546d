"""How fast every stage is, and how its cost grows with the number of runs, agents and trajectories. One command measures all of
it on CUDA where there is one, else on one CPU thread, and writes benchmark/results/speed-<device>.md; every row in a process of
its own, so that memory can be told. Data are random: speed does not depend on them.

Usage: python benchmark/speed.py                 (from the repository root; leave the machine alone meanwhile)
       python benchmark/speed.py --quick         (a few updates of each row, to see that everything runs)
"""

import multiprocessing
import platform
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from tqdm import tqdm

import collect_data
import train_bc
import train_reward
import vdn_rlhf
from collect_data import ParticleEnv, make_game

SIZES = dict(num_actions=5, horizon=25)
MODES = {  # --compile, --cudagraphs
    "eager": (False, False),
    "compiled": (True, False),
    "captured": (False, True),
    "compiled and captured": (True, True),
}


@dataclass
class Args:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda"""
    quick: bool = False
    """few updates of each row"""


@dataclass(frozen=True)
class Job:
    """One row: a stage with its sizes. `flags` are further arguments of the stage."""

    stage: str
    device: str
    seconds: float
    """about how long to measure"""
    mode: str = "eager"
    num_runs: int = 1
    num_agents: int = 3
    num_trajectories: int = 2048
    flags: tuple = ()


def random_data(job: Job) -> tuple[dict, dict]:
    """-> observations, actions, blocks of 256 trajectories with their pairs and labels; sizes of the networks."""
    N, A, T = job.num_trajectories, job.num_agents, SIZES["horizon"]
    D = make_game("spread" if A == 3 else f"spread-{A}x{A}").observation_dim
    observations = torch.randn(N, T + 1, A, D)
    actions = torch.randint(SIZES["num_actions"], (N, T, A), dtype=torch.uint8)
    pairs = torch.randint(255, (10 * N, 2))
    pairs[:, 1] += pairs[:, 1] >= pairs[:, 0]
    pairs += 256 * torch.arange(N // 256).repeat_interleave(2560)[:, None]
    labels = torch.randint(2, (10 * N, A)) * 2 - 1
    data = dict(observations=observations, actions=actions, pairs=pairs, labels=labels, block=torch.arange(N) // 256)
    return data, dict(observation_dim=D, num_agents=A, **SIZES)


class Clock:
    """Stands in for a trainer's log(s, metrics, step): what happens before the first call, compilation and recording
    included, does not count. Trainers wait for the device before they log."""

    def __init__(self):
        self.calls = []

    def __call__(self, s: int, metrics: dict, step: int) -> None:
        if s == 0 and (not self.calls or step > self.calls[-1][0]):
            self.calls.append((step, time.perf_counter()))

    def updates_per_second(self, num_runs: int) -> float:
        (first, start), (last, end) = self.calls[0], self.calls[-1]
        return num_runs * (last - first) / (end - start)


def nn_gru(x, layer, memory):
    """What `vdn_rlhf.gru` does, by the kernels of torch.nn.GRU, for a stack of one run and from the first step on."""
    _, B, T, A, H = x.shape
    parameters = [parameter[0] for parameter in (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)]
    sequences = x[0].transpose(1, 2).reshape(B * A, T, H)
    states, last = torch._VF.gru(sequences, x.new_zeros(1, B * A, H), parameters, True, 1, 0.0, True, False, True)
    return states.view(B, A, T, H).transpose(1, 2)[None], last


def measure_vdn(job: Job, num_updates: int) -> float:
    data, shape = random_data(job)
    args = replace(vdn_rlhf.Args(num_seeds=job.num_runs, num_updates=num_updates), **settings(job))
    if args.run_name == "nn.GRU":
        own = vdn_rlhf.gru
        vdn_rlhf.gru = lambda x, layer, memory: (nn_gru if x.dim() == 5 else own)(x, layer, memory)
    shape |= dict(network=args.network, hidden_dim=args.hidden_dim)
    runs, clock = vdn_rlhf.list_runs(args, "beta"), Clock()
    observations, actions = (data[name].to(job.device) for name in ("observations", "actions"))
    rewards = torch.randn(job.num_runs, *actions.shape[:2], device=job.device)
    references = [vdn_rlhf.AgentNetwork(**shape).to(job.device).requires_grad_(False)] * job.num_runs
    generators = [torch.Generator().manual_seed(run.seed) for run in runs]
    vdn_rlhf.learn_policies(runs, None, shape, observations, actions, rewards, references, generators, clock)
    return clock.updates_per_second(job.num_runs)


def measure_bc(job: Job, num_updates: int) -> float:
    data, shape = random_data(job)
    args = replace(train_bc.Args(num_seeds=job.num_runs), **settings(job))
    args.max_epochs = 2 + num_updates // ((job.num_trajectories - 2) // args.batch_size)
    runs, clock = train_bc.list_runs(args), Clock()
    observations, actions = (data[name].to(job.device) for name in ("observations", "actions"))
    order = torch.arange(job.num_trajectories, device=job.device).expand(job.num_runs, -1)
    generators = [torch.Generator().manual_seed(run.seed) for run in runs]
    shape |= dict(num_modes=args.num_modes, network=args.network, hidden_dim=args.hidden_dim, num_layers=args.num_layers)
    train_bc.imitate(runs, shape, observations, actions, order[:, :2], order[:, 2:], generators, clock)
    return clock.updates_per_second(job.num_runs)


def measure_reward(job: Job, num_updates: int) -> float:
    data, shape = random_data(job)
    args = replace(train_reward.Args(num_seeds=job.num_runs), **settings(job))
    generators = [torch.Generator().manual_seed(seed) for seed in range(job.num_runs)]
    parts = [train_reward.split_into_minibatches(data, generator) for generator in generators]
    training, *others = train_reward.stack_parts(parts, "random data", torch.device(job.device))
    args.max_epochs = 2 + num_updates // training[0].shape[1]
    parts, runs, clock = [training, *others], train_reward.list_runs(args, "alpha"), Clock()
    data |= {name: data[name].to(job.device) for name in ("observations", "actions")}
    shape = {name: size for name, size in shape.items() if name != "horizon"} | dict(input=args.input, network=args.network)
    shape |= dict(hidden_dim=args.hidden_dim, num_layers=args.num_layers)
    train_reward.learn_rewards(runs, shape, data, parts, generators, clock)
    return clock.updates_per_second(job.num_runs)


def measure_environment(job: Job, num_steps: int) -> float:
    """Steps per second; a step is actions in, physics, rewards and observations out."""
    game = dict(job.flags)["game"]
    game = collect_data.tag(prey=None) if game == "tag" else make_game(game)
    env = ParticleEnv(game, job.num_trajectories, job.device)
    actions = torch.randint(game.num_actions, (game.horizon, job.num_trajectories, len(game.body_sizes)), device=job.device)
    for timed in (False, True):  # the first round warms up
        start = time.perf_counter()
        for step in range(min(max(num_steps, game.horizon), 2000)):
            if step % game.horizon == 0:
                env.reset()
            env.step(actions[step % game.horizon])
        if job.device == "cuda":
            torch.cuda.synchronize()
        if timed:
            return job.num_trajectories * (step + 1) / (time.perf_counter() - start)


def measure_collection(job: Job, _) -> float:
    """Trajectories per second, policies, pairs, labels and writing included."""
    with tempfile.TemporaryDirectory() as folder:
        args = collect_data.Args(num_trajectories=job.num_trajectories, device=job.device, data_path=f"{folder}/dataset.npz")
        start = time.perf_counter()
        collect_data.main(args)
        return job.num_trajectories / (time.perf_counter() - start)


STAGES = {  # function, unit, guess of the rate on one CPU thread, which sets how much is measured
    "environment": (measure_environment, "million steps/s", 2e6),
    "collection": (measure_collection, "trajectories/s", 1),
    "reward model": (measure_reward, "run-updates/s", 18),
    "BC": (measure_bc, "run-updates/s", 50),
    "VDN": (measure_vdn, "run-updates/s", 60),
}


def settings(job: Job) -> dict:
    compile, cudagraphs = MODES[job.mode]
    return dict(device=job.device, compile=compile, cudagraphs=cudagraphs) | dict(job.flags)


def measure(job: Job) -> tuple[float, float]:
    """-> the rate in the stage's unit, the peak memory in MiB (of the process, or of the tensors on CUDA)."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as set_up does
    collect_data.keep_freed_memory()
    function, unit, guess = STAGES[job.stage]
    if job.device == "cuda" and job.stage != "collection":
        guess *= 20
    num_at_once = job.num_trajectories if job.stage == "environment" else job.num_runs
    rate = function(job, max(int(job.seconds * guess / num_at_once), 20))
    if job.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return rate / (1e6 if unit.startswith("million") else 1), memory


def tables(device: str, seconds: float) -> dict[str, list[tuple[str, Job]]]:
    """{title: [(label, job)]}"""
    modes = list(MODES) if device == "cuda" else ["eager", "compiled"]
    trained = ("reward model", "BC", "VDN")
    job = Job("VDN", device, seconds)
    games = ("spread", "spread-7x5", "tag", "reference")
    counts = (64, 4096, 65_536, 1_048_576) if device == "cuda" else (64, 4096, 65_536)
    yardstick = (("batch_size", 32), ("hidden_dim", 64), ("bf16", False))
    return {
        "Stages: environment": [
            (f"{game}, {n:,} environments", replace(job, stage="environment", num_trajectories=n, flags=(("game", game),)))
            for game in games
            for n in counts
        ],
        "Stages: collection": [("38,400 trajectories of spread", replace(job, stage="collection", num_trajectories=38_400))],
        "Stages: training with the default settings (spread)": [
            (f"{stage}, {n} run{'s' * (n > 1)}, {mode}", replace(job, stage=stage, num_runs=n, mode=mode))
            for stage in trained
            for n in (1, 5, 25)
            for mode in (modes if n == 1 or device == "cuda" else ["eager"])
        ],
        "Yardsticks: 32 episodes of 3 agents, float32": [
            (f"VDN, {name}, {mode}", replace(job, mode=mode, flags=(*yardstick, ("network", network))))
            for name, network in (("GRU of 64", "gru"), ("MLP of 3 x 64", "mlp"))
            for mode in modes
        ]
        + [("VDN, torch.nn.GRU of 64, eager", replace(job, flags=(*yardstick, ("network", "gru"), ("run_name", "nn.GRU"))))]
        + [
            (
                f"reward model on own observations, 256 trajectories, MLP of 128, {'bfloat16' if bf16 else 'float32'}",
                replace(job, stage="reward model", flags=(("input", "own"), ("num_layers", 3), ("bf16", bf16))),
            )
            for bf16 in (False, True)
        ],
        "Growth with the number of runs (VDN, the fastest way above)": [
            (f"{n} runs", replace(job, num_runs=n, mode=modes[-1] if device == "cuda" else "eager"))
            for n in (1, 2, 4, 8, 16, 32, 64)
        ],
        "Growth with the number of agents (VDN)": [(f"{n} agents", replace(job, num_agents=n)) for n in range(3, 8)],
        "Growth with the number of trajectories (VDN)": [
            (f"{n:,} trajectories", replace(job, num_trajectories=n)) for n in (1024, 2048, 4096, 9728, 19_456, 38_400)
        ],
    }


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    instructions = [
        name for name, has in getattr(torch.cpu, "get_capabilities", dict)().items() if has is True and "bf16" in name
    ]
    return (
        f"one thread of an {names[0]} with {len(names)} cores ({', '.join(instructions) or 'no bfloat16'}), "
        f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    )


def main(args: Args) -> None:
    seconds = 0.2 if args.quick else 4.0
    groups = tables(args.device, seconds)
    lines = [
        f"# Speed: {machine(args.device)}\n",
        f"`python benchmark/speed.py` on {time.strftime('%d %B %Y')}. A run-update is",
    ]
    lines += ["one gradient step of one run. Memory is the peak of the process (CUDA: of its tensors on the device).\n"]
    context = multiprocessing.get_context("spawn")
    path = Path(f"benchmark/results/speed-{args.device}.md")
    with tqdm(total=sum(map(len, groups.values())), desc="measurements", unit="row") as progress:
        for title, rows in groups.items():
            lines += [f"## {title}\n", "| | rate | unit | peak memory, MiB |\n|---|---|---|---|"]
            for label, job in rows:
                progress.set_postfix_str(label)
                with context.Pool(1) as pool:
                    rate, memory = pool.apply(measure, (job,))
                digits = 0 if rate >= 100 else 1 if rate >= 10 else 2
                lines.append(f"| {label} | {rate:,.{digits}f} | {STAGES[job.stage][1]} | {memory:,.0f} |")
                progress.update()
                if not args.quick:  # after every row, so that nothing measured is lost
                    content = "\n".join(lines).encode()
                    collect_data.save_file(path, lambda file, content=content: file.write(content))
            lines.append("")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
