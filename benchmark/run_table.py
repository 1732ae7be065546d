"""The runs behind the paper's tables and figures: makes the results that are missing; benchmark/report.py prints them. Can be
stopped and started again at any time. table1.sh and its sisters call both.

Usage: python benchmark/run_table.py table2 --scale cpu
       python benchmark/run_table.py table2 --scale cpu --print-commands | xargs -P 8 -I{} sh -c {}     (README: many machines)
"""

import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))

import tyro
from run_cell import PRESETS, ROOT, SCALES, STAGES, Cell, run_cell
from tqdm import tqdm

GAMES = ("spread", "tag", "reference")
MIXTURES = ("diversified", "mix-unilateral", "mix-expert", "pure-expert")
STANDARD_BETA = {game: STAGES["vdn_rlhf"].PRESETS["default"].get(game, {}).get("beta", 1.0) for game in GAMES}  # section 5.3
BETAS = (0.0, 0.1, 1.0, 10.0, 100.0)  # Table 3; for tag also the standard 3
ALPHAS = (0.0, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # Table 7
MANY_AGENTS = ("spread-4x5", "spread-5x5", "spread-6x5", "spread-7x5")  # Table 6


def standard(env: str, dataset: str = "diversified", **changes) -> Cell:
    """The standard pipeline on that dataset, but for the changes."""
    return Cell(**dict(env=env, dataset=dataset, beta=STANDARD_BETA[env.split("-")[0]]) | changes)


def betas(env: str) -> tuple[float, ...]:
    return tuple(sorted({*BETAS, STANDARD_BETA[env]}))


def reward_cell(env: str, dataset: str = "diversified", **changes) -> Cell:
    return Cell(**dict(kind="reward", env=env, dataset=dataset) | changes)


TABLES = {  # by name: its cells for one seed and preset
    "table1": lambda: [Cell("dataset", game, mixture) for game in GAMES for mixture in MIXTURES],
    "table2": lambda: [standard(game, mixture) for mixture in MIXTURES for game in GAMES],
    "table3": lambda: (
        [standard(game, beta=beta) for game in GAMES for beta in betas(game)] + [standard(game, alpha=0.0) for game in GAMES]
    ),
    "table5": lambda: [],  # is read from the code
    "table6": lambda: [standard(env, mixture) for env in MANY_AGENTS for mixture in ("mix-unilateral", "pure-expert")],
    "table7": lambda: [reward_cell(game, alpha=alpha) for game in GAMES for alpha in ALPHAS],
    "figure2": lambda: (
        [reward_cell("spread", alpha=alpha) for alpha in (0.0, 1.0)]
        + [reward_cell("reference", "pure-expert"), reward_cell("reference", alpha=0.0), reward_cell("reference")]
    ),
    "figure3": lambda: [reward_cell("spread", alpha=alpha) for alpha in ALPHAS],
    "figure4": lambda: [
        reward_cell(game, mixture, alpha=alpha)
        for game in GAMES
        for mixture, alpha in (("pure-expert", 1.0), ("diversified", 0.0), ("diversified", 1.0))
    ],
}
ONE_SEED = ("figure2", "figure3", "figure4")  # their first


def list_cells(table: str, scale: str) -> list[Cell]:
    """All cells of a table; the first seed of every cell comes before the second of any."""
    if table == "table1":
        return [Cell(**vars(cell) | dict(scale=scale)) for cell in TABLES[table]()]
    seeds = SCALES[scale].seeds
    seeds = seeds if table == "table2" else seeds[: 1 if table in ONE_SEED else SCALES[scale].num_other_seeds]
    return [
        Cell(**vars(cell) | dict(scale=scale, seed=seed, preset=preset))
        for seed in seeds
        for preset in PRESETS
        for cell in TABLES[table]()
    ]


@dataclass
class Args:
    tables: Annotated[tuple[str, ...], tyro.conf.Positional]
    """table1, table2, ..., figure4, or all"""
    scale: str = "cpu"
    """smoke (minutes), cpu (ten core-hours for all tables) or paper (its sizes)"""
    print_commands: bool = False
    """only print the commands that are missing, one a line; they may run in any order and at once"""
    num_processes: int = 1
    """runs at once, one thread each"""


def main(args: Args) -> int:
    names = list(TABLES) if args.tables == ("all",) else args.tables
    unknown = [name for name in names if name not in TABLES]
    if unknown or not names or args.scale not in SCALES or args.num_processes < 1:
        choices = f"{', '.join(TABLES)}, or all alone; --scale {', '.join(SCALES)}; --num-processes at least 1"
        given = f"{' '.join(names)} --scale {args.scale} --num-processes {args.num_processes}"
        print(f"error: {given}: choose from {choices}", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    cells = dict.fromkeys(cell for name in names for cell in list_cells(name, args.scale))
    cells = sorted(cells, key=lambda cell: cell.seed)  # the first seed of every table before the second of any
    missing = [cell for cell in cells if not cell.result_path.exists()]
    if args.print_commands:
        for cell in missing:
            print(cell.command())
        return 0

    failed, start = [], time.time()
    # Ctrl-C reaches all processes at once, and only this one is to act on it
    quiet = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with ProcessPoolExecutor(args.num_processes, get_context("spawn"), **quiet) as pool:
        jobs = {pool.submit(run_cell, cell): cell for cell in missing}
        title = f"{' '.join(names)}, scale {args.scale}"
        try:
            for job in tqdm(as_completed(jobs), total=len(cells), initial=len(cells) - len(missing), desc=title, unit="run"):
                error, cell = job.exception(), jobs[job]
                if isinstance(error, BrokenProcessPool):
                    logs = {cell: cell.log_path for cell in missing if cell not in failed and not cell.result_path.exists()}
                    begun = [cell for cell, log in logs.items() if log.exists() and log.stat().st_mtime >= start]
                    names = "; ".join(f"{cell.command()} (see {cell.log_path})" for cell in begun)
                    message = f"failed: a process was killed from outside, perhaps for its memory, one of {names}"
                    tqdm.write(message, file=sys.stderr)
                    return 1
                if error is not None:
                    failed.append(cell)
                    tqdm.write(f"failed: {cell.command()} (see {cell.log_path}): {error}", file=sys.stderr)
        except BaseException:  # stopped: what has begun goes on from its checkpoints the next time
            for process in active_children():
                process.terminate()
            raise
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(tyro.cli(Args)))
    except KeyboardInterrupt:
        sys.exit(130)
