"""Preferences by people: a page on this machine plays two episodes of a dataset side by side, asks which is
better, for the team or for one agent. Every answer is a line of NAME.labels.jsonl beside the dataset, on the
disk before the next pair shows: whatever is killed, nothing is lost, and the same command goes on.
Usage: python benchmark/label.py --env spread --annotator anna, in the end with --export PATH"""

import io
import json
import os
import secrets
import sys
import threading
from base64 import b64encode as encode
from collections import Counter, defaultdict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import vdn_rlhf
from vdn_rlhf import RewardNetwork, UserError, build_network, load_checkpoint, load_dataset

ANSWERS = [1, 0, -1, None, "undo"]  # first better, equally good, second better, cannot tell, withdrawn


@dataclass
class Args:
    env: str = "spread"
    """the game; must be the dataset's"""
    data_path: str = ""
    """dataset, instead of runs/<game>/diversified/dataset.npz"""
    labels_path: tuple[str, ...] = ()
    """answers are read from all of these and appended to the first, instead of NAME.labels.jsonl"""
    annotator: str = "anonymous"
    """whose answers these are; everybody is asked about the same pairs"""
    num_pairs: int = 300
    """pairs to ask about; with more of them later the first ones stay"""
    agent: int | None = None
    """judge this agent alone (0, 1, ...) instead of the team"""
    select: Literal["random", "uncertain"] = "random"
    """uncertain: those of up to 10,000 random pairs whose returns under the reward model are nearest"""
    reward_path: str = ""
    """reward model of --select uncertain"""
    frames: str = ""
    """folder with N.gif or N/*.png for trajectory N, of a game that the page cannot draw"""
    export: str = ""
    """write a dataset with the answers so far instead of showing the page"""
    port: int = 8000
    """of the page on 127.0.0.1; 0: any that is free"""


def choose_pairs(args: Args, data: dict, sizes: tuple) -> list[tuple[int, int]]:
    """Pairs of trajectories of one block (with --frames: that have pictures), in the order of asking."""
    N, block = len(data["actions"]), data.get("block", torch.zeros(len(data["actions"]))).numpy()
    files = Path(args.frames).iterdir() if args.frames else ()
    shown = {x.stem for x in files if x.suffix == ".gif" or any(x.glob("*.png"))}
    order = np.array([n for n in block.argsort(kind="stable") if not args.frames or str(n) in shown] or [0])
    blocks, rng = block[order], np.random.default_rng(1)
    first = rng.integers(len(order), size=20_000)
    second = rng.integers(*(np.searchsorted(blocks, blocks[first], side) for side in ("left", "right")))
    drawn = [pair for pair in order[np.stack([first, second], axis=1)].tolist() if pair[0] != pair[1]]
    pairs = list({frozenset(pair): tuple(pair) for pair in drawn}.values())[:10_000]
    if not pairs:
        raise UserError(f"{args.frames or args.env}: no two trajectories of one block (N.gif or N/*.png)")
    if args.select == "uncertain":
        path, returns = Path(args.reward_path or "--reward-path"), torch.zeros(N, sizes[1])
        model = build_network(RewardNetwork, path, load_checkpoint(path, "reward"), "cpu", sizes)
        for n in torch.tensor(pairs).unique().split(256):
            returns[n] = model(data["observations"][n, :-1], data["actions"][n]).sum(dim=1)
        returns = (returns.mean(dim=1) if args.agent is None else returns[:, args.agent]).tolist()
        pairs.sort(key=lambda pair: abs(returns[pair[0]] - returns[pair[1]]))
    return pairs[: args.num_pairs]


def read_labels(paths: list[Path], checksum: str, num_trajectories: int, num_agents: int) -> dict:
    """{(annotator, agent or None, first, second): answer}, the last answer last. What follows the last end of
    a line is half an answer that was never confirmed: its pair is asked about again."""
    labels, trajectories, agents = {}, range(num_trajectories), [None, *range(num_agents)]
    for path in paths:
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                x = json.loads(line)
                if x["dataset"] != checksum:
                    raise ValueError(f"its checksum is {x['dataset']!r:.20}, not {checksum}: did it change?")
                first, second = (trajectories.index(n) for n in x["pair"])  # ValueError where it is none
                key = (str(x["annotator"]), agents[agents.index(x["agent"])], first, second)
                labels.pop(key, None)
                labels[key] = ANSWERS[ANSWERS.index(x["answer"])]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: no answer about this dataset ({error})") from None
    return {key: answer for key, answer in labels.items() if answer != "undo"}


def krippendorff_alpha(units: list[list[int]]) -> float | None:
    """Agreement: 1 - observed / expected squared difference of two answers, the former within a unit."""
    units = [np.array(unit) for unit in units if len(unit) > 1]
    if not units or np.ptp(answers := np.concatenate(units)) == 0:
        return None
    return float(1 - sum(len(x) * x.var(ddof=1) for x in units) / len(answers) / answers.var(ddof=1))


def export(path: Path, data_path: Path, labels: dict, checksum: str, meta: dict) -> None:
    """Labels (M, 1) of the team or, if nobody judged it, (M, A) of pairs judged for every agent, by whomever:
    no value says that an agent was not judged. A pair has a row for each annotator."""
    arrays, told = dict(np.load(data_path)), {key: x for key, x in labels.items() if x is not None}
    given = defaultdict(lambda: defaultdict(list))  # {pair: {agent: answers}}
    for (_, agent, *pair), answer in told.items():
        given[tuple(pair)][agent].append(answer)
    agents = [None] if any(None in x for x in given.values()) else range(arrays["actions"].shape[2])
    rows = [(pair, x) for pair, by in given.items() for x in zip(*(by[i] for i in agents), strict=False)]
    if not rows or path.exists():
        raise UserError(f"{path}: is there" if rows else "no pair is judged for the team or for every agent")
    about = {"dataset": checksum, "rows": len(rows), "answers": dict(Counter(x for x, *_ in told))}
    about |= {"skipped": len(labels) - len(told), "unused": len(told) - len(rows) * len(agents)}
    about["agreement"] = krippendorff_alpha([answers for by in given.values() for answers in by.values()])
    meta = {key: meta[key] for key in ("format", "env", "num_actions")} | {"labels": about}
    pairs, labels = zip(*rows, strict=True)
    arrays |= {"pairs": np.array(pairs, np.int32), "labels": np.array(labels, np.int8)}
    np.savez(buffer := io.BytesIO(), **arrays | {"meta": json.dumps(meta)})
    vdn_rlhf.save_file(path, buffer.getbuffer())
    print(f"{path}: {', '.join(f'{name} {value}' for name, value in about.items())}")


def serve(args: Args, observations: np.ndarray, pairs: list, labels: dict, checksum: str, path: Path) -> None:
    """Show the page and take its answers, for those who know the token in the address and no other page."""
    root, lock, me = f"/{secrets.token_urlsafe(16)}", threading.Lock(), (args.annotator, args.agent)

    def take(x: dict) -> None:
        key, answer = (*me, *x["pair"]), ANSWERS[ANSWERS.index(x["answer"])]
        record = dict(dataset=checksum, annotator=me[0], agent=me[1], pair=key[2:], answer=answer)
        line = json.dumps(record | {"milliseconds": int(x["milliseconds"])}).encode() + b"\n"
        with lock, path.open("ab", buffering=0) as file:
            if key[2:] not in pairs or (key in labels) != (answer == "undo"):
                raise ValueError("answered in another window")
            if (written := file.write(line)) < len(line):
                file.truncate(file.tell() - written)
                raise OSError("no space left")
            os.fsync(file.fileno())
            labels.pop(key) if answer == "undo" else labels.update({key: answer})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            (start, _, name), own = self.path.rpartition("/"), f"127.0.0.1:{self.server.server_port}"
            asked = start, self.headers["Host"], self.headers.get("Origin", "http://" + own)
            if asked != (root, own, "http://" + own):
                return self.send_error(403)
            try:
                if name == "answer" and self.command == "POST":
                    content = take(json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), 999))))
                elif name == "":
                    done = [key[2:] for key in [*labels] if key[:2] == me]
                    state = json.dumps(vars(args) | {"pairs": pairs, "done": done}).replace("<", "\\u003c")
                    content = Path(__file__).with_suffix(".html").read_text().replace("STATE", state)
                elif args.frames and name.isdecimal():
                    files = [x for end in (".gif", "/*.png") for x in Path(args.frames).glob(name + end)]
                    files.sort(key=lambda x: (len(x.name), x.name))  # 9.png before 10.png
                    content = [f"data:image/*;base64,{encode(x.read_bytes()).decode()}" for x in files]
                else:
                    content = observations[int(name)].round(3).tolist()
            except Exception as error:  # of whatever is asked the answer is what went wrong
                return self.send_error(500, f"{error!r:.99}")
            self.send_response(200)
            self.send_header("Content-Type", "application/json" if name else "text/html")
            self.end_headers()
            self.wfile.write((json.dumps(content) if name else content).encode())

        do_POST, log_message = do_GET, lambda *_: None  # the terminal keeps the address in sight

    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {args.port}: cannot be used ({error}); give another") from None
    print(f"http://127.0.0.1:{server.server_port}{root}/ has {len(pairs)} pairs; Ctrl-C stops it", flush=True)
    server.serve_forever()


def main(args: Args) -> None:
    data_path = Path(args.data_path or f"runs/{args.env}/diversified/dataset.npz")
    data, meta, checksums = load_dataset(data_path, args.env, ("observations", "actions"), ("block",))
    (N, _, A, D), checksum = data["observations"].shape, checksums["observations"] + checksums["actions"]
    paths = [Path(path) for path in args.labels_path] or [data_path.with_suffix(".labels.jsonl")]
    if args.agent not in (None, *range(A)) or args.num_pairs < 1:
        raise UserError(f"--agent is from 0 to {A - 1}, --num-pairs at least 1")
    if args.export:
        return export(Path(args.export), data_path, read_labels(paths, checksum, N, A), checksum, meta)
    drawn = {"spread": D > 4 * A, "tag": (A, D) == (3, 16), "reference": (A, D) == (2, 21)}
    if not (args.frames or drawn.get(args.env.split("-")[0])):
        raise UserError(f"{args.env}: no positions in observations; give --frames FOLDER of N.gif or N/*.png")
    with paths[0].open("ab") as file:  # raises where it cannot be written
        file.truncate(paths[0].read_bytes().rfind(b"\n") + 1)  # half an answer, see read_labels
    labels, pairs = read_labels(paths, checksum, N, A), choose_pairs(args, data, (D, A, meta["num_actions"]))
    serve(args, data["observations"].numpy(), pairs, labels, checksum, paths[0])


if __name__ == "__main__":
    vdn_rlhf.run_command_line(main, Args, presets={})
