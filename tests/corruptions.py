"""Damage to good files, by the hundred. A script that reads a damaged file must end within 5 seconds in a UserError, which the
command line turns into exit status 2 and one line; nothing that the file brings along is executed, no file is written, and
no memory is taken beyond what the file's size warrants. tests/test_bad_input.py draws from the same damage.

python tests/corruptions.py --num 1000 --seed 1   writes benchmark/results/corruptions.md
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import os
import pickle
import platform
import random
import re
import resource
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from conftest import ROOT, made_up_arrays
from tqdm import tqdm

import evaluate
import train_bc
import train_reward
import vdn_rlhf

USER_ERRORS = (evaluate.UserError, train_bc.UserError, train_reward.UserError, vdn_rlhf.UserError)
SECONDS, MEMORY = 5, 2**30  # limits of one refusal, on one core
ARRAYS = (("observations", "actions", "pairs", "labels"), ("block", "true_rewards"))  # needed, optional


@dataclass
class GoodFile:
    """A file that a script reads without complaint."""

    path: Path
    read: Callable[[], None]  # as the script does, up to where it begins to compute
    load: Callable[[], dict]  # what is in it
    damage: dict[str, Callable]  # {kind: function of GoodFile and random.Random -> content, expected}

    def __post_init__(self):
        self.content, self.loaded = self.path.read_bytes(), self.load()


# `expected` is SAME where the damage may go unnoticed if nothing that is read has changed, VALID where the file may hold other
# data that pass all checks, and otherwise what the refusal has to name.
SAME, VALID, ANYTHING = "the same content", "valid content", ""


class Bomb:
    """Unpickling it leaves a file behind."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def is_same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    return a == b


def unzip(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def write_zip(members: dict[str, bytes], **lies: dict) -> bytes:
    """lies: {member: {attribute: value}} replace what the directory says about members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
        for name, attributes in lies.items():
            for attribute, value in attributes.items():
                setattr(file.getinfo(name), attribute, value)
    return buffer.getvalue()


@functools.cache
def packed_zeros(head: bytes, num_mebibytes: int) -> bytes:
    """A deflate stream of `head` and zeros, a thousandth of their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
    return start + block * num_mebibytes + packer.flush()


def bomb_in(members: dict[str, bytes], name: str, head: bytes, rng) -> bytes:
    """Member `name` unpacks to gigabytes, or its directory entry says that it holds terabytes."""
    if rng.random() < 0.5:
        return write_zip(members, **{name: dict(file_size=2**42)})
    lies = dict(compress_type=zipfile.ZIP_DEFLATED, file_size=len(head) + 2**30)
    return write_zip(members | {name: packed_zeros(head, 1024)}, **{name: lies})


# --- Bytes, of any file ---


def flip_bits(content: bytes, rng, end: int | None = None) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[rng.randrange(min(len(content), end or len(content)))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def change_bytes(good: GoodFile, rng):
    content = good.content
    start = rng.randrange(len(content))
    end = min(start + rng.choice((1, 4, 100, 10_000)), len(content))
    middle = rng.choice((b"", bytes(end - start), b"\xff" * (end - start), 2 * content[start:end]))
    return content[:start] + middle + content[end:], SAME


def append_bytes(good: GoodFile, rng):
    return good.content + rng.choice((b"\0", b"PK\x05\x06", good.content[-50:], bytes(100_000))), SAME


def mend_checksum(good: GoodFile, rng):
    """Bits flipped where a member begins, or anywhere in it, in a file that fits together otherwise."""
    members = unzip(good.content)
    name = rng.choice(sorted(members))
    return write_zip(members | {name: flip_bits(members[name], rng, rng.choice((128, None)))}), VALID


BYTES = {
    "bits flipped": lambda good, rng: (flip_bits(good.content, rng), SAME),
    "bits flipped, checksum mended": mend_checksum,
    "bytes overwritten, cut out or repeated": change_bytes,
    "bytes appended": append_bytes,
    "truncated": lambda good, rng: (good.content[: rng.randrange(len(good.content))], ANYTHING),
    "a pickle instead": lambda good, rng: (pickle.dumps(Bomb(), protocol=rng.choice((0, 2, 4))), ANYTHING),
}


# --- Datasets ---


def of_arrays(damage: Callable) -> Callable:
    """A damage to arrays {key: array}, which names the key at fault, as one to the file."""

    def change(good: GoodFile, rng):
        with np.load(io.BytesIO(good.content)) as file:
            arrays = dict(file)
        key = damage(arrays, rng)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue(), key

    return change


def any_index(array, rng) -> tuple:
    return tuple(rng.randrange(size) for size in array.shape)


def lack_array(arrays, rng):
    key = rng.choice(("meta", *ARRAYS[0]))
    del arrays[key]
    return key


def change_type(arrays, rng):
    key = rng.choice((*ARRAYS[0], *ARRAYS[1]))
    others = ("c8", "?", "U5", "S3", "M8[s]", "f4,i4", "i2" if arrays[key].dtype.kind == "f" else "f4")
    arrays[key] = np.zeros(arrays[key].shape, rng.choice(others))
    return key


def change_shape(arrays, rng):
    key = rng.choice((*ARRAYS[0], *ARRAYS[1]))
    x = arrays[key]
    shapes = [x[:-1], x[:0], x[None], x[..., None], np.concatenate([x, x[:1]])]
    arrays[key] = rng.choice(shapes if x.ndim == 1 else [*shapes, x.ravel(), x.T, x[..., :0]])
    return key


def make_infinite(arrays, rng):
    key = rng.choice(("observations", "true_rewards"))
    arrays[key][any_index(arrays[key], rng)] = rng.choice((np.nan, np.inf, -np.inf))
    return key


def leave_range(arrays, rng):
    N, num_actions = len(arrays["actions"]), json.loads(str(arrays["meta"]))["num_actions"]
    key = rng.choice(("actions", "pairs", "labels", "block"))
    if key == "block":  # a pair that crosses blocks
        arrays[key][arrays["pairs"][0, 0]] += 1
        return key
    values = dict(actions=(num_actions, 255, -1), pairs=(N, -1, 2**31 - 1, -(2**31)), labels=(0, 2, -2, 127))
    arrays[key] = arrays[key].astype(np.int64)
    arrays[key][any_index(arrays[key], rng)] = rng.choice(values[key])
    if key == "pairs" and rng.random() < 0.2:
        arrays[key][rng.randrange(len(arrays[key]))] = rng.randrange(N)  # with itself
    return key


def change_meta(arrays, rng):
    meta = json.loads(str(arrays["meta"]))
    changes = dict(format=(2, "1", None, [1]), env=("spread", "", None, 3, "made-up\n"), horizon=(8, "9", None))
    changes |= dict(num_agents=(5, -4, {}), num_actions=(0, 257, -7, 7.5, "7\n7", None, 10**30, float("nan")))
    name = rng.choice(sorted(changes))
    text = json.dumps(meta | {name: rng.choice(changes[name])})
    lacking = json.dumps({key: value for key, value in meta.items() if key != rng.choice(("format", "env", "num_actions"))})
    others = ("", "{", "[]", "7", lacking.replace("{", "[", 1), "[" * 100_000, '{"a":' * 100_000, "\0", "1" * 10_000)
    arrays["meta"] = rng.choice(
        (np.array(text), np.array(text), np.array(rng.choice(others)), np.array([text, text]), np.ones(3))
    )
    return "meta"


def pickle_in_array(arrays, rng):
    key = rng.choice(("meta", *ARRAYS[0], *ARRAYS[1]))
    arrays[key] = np.full(rng.choice(((), (1,), arrays[key].shape)), Bomb(), dtype=object)
    return key


def bomb_of_zeros(good: GoodFile, rng):
    key, members = rng.choice((*ARRAYS[0], *ARRAYS[1])), unzip(good.content)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr="|u1", fortran_order=False, shape=(2 ** rng.choice((30, 40, 62)),)))
    if rng.random() < 0.3:  # only the array's own header boasts
        return write_zip(members | {f"{key}.npy": head.getvalue()}), key
    return bomb_in(members, f"{key}.npy", head.getvalue(), rng), key


DATASET = BYTES | {
    "key missing": of_arrays(lack_array),
    "wrong dtype": of_arrays(change_type),
    "wrong shape": of_arrays(change_shape),
    "NaN or infinite": of_arrays(make_infinite),
    "index out of range": of_arrays(leave_range),
    "other game, format or sizes": of_arrays(change_meta),
    "pickle bomb": of_arrays(pickle_in_array),
    "decompression bomb": bomb_of_zeros,
}


# --- Checkpoints ---


def save(checkpoint: dict, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, **options)
    return buffer.getvalue()


def of_checkpoint(damage: Callable) -> Callable:
    """A damage to a checkpoint's dict, which names what is at fault, as one to the file."""

    def change(good: GoodFile, rng):
        checkpoint = copy.deepcopy(good.loaded)
        expected = damage(checkpoint, rng)
        return save(checkpoint), expected

    return change


KEYS = ("format", "kind", "args", "meta", "state_dict", "stats", "metrics")
NONSENSE = (None, -1, "\n", [], [1], 1.5, torch.zeros(3, 3, 3), float("nan"))


def lack_key(checkpoint, rng):
    key = rng.choice(KEYS)
    if rng.random() < 0.5:
        del checkpoint[key]
    else:
        checkpoint[key] = rng.choice(NONSENSE)
    return f"'{key}'"


def change_tensor(checkpoint, rng):
    """Returns before anything is loaded, whatever the tensor."""
    state_dict = checkpoint["state_dict"]
    name = rng.choice(sorted(state_dict))
    x = state_dict[name]
    changes = dict(
        missing=lambda: state_dict.pop(name),
        extra=lambda: state_dict.update({rng.choice(("extra", "", 3)): x}),
        shape=lambda: state_dict.update({name: rng.choice((x[:-1], x[None], x.new_zeros(0), torch.cat([x, x[:1]])))}),
        dtype=lambda: state_dict.update(
            {name: x.to(rng.choice((torch.float64, torch.bfloat16, torch.int32, torch.complex64)))}
        ),
        layout=lambda: state_dict.update({name: rng.choice((x.to_sparse(), x[:1].expand(2, *x.shape[1:]), x.to("meta")))}),
        nothing=lambda: state_dict.update({name: rng.choice(NONSENSE)}),
    )
    changes[rng.choice(sorted(changes))]()
    return "'state_dict'"


def make_weight_infinite(checkpoint, rng):
    x = checkpoint["state_dict"][rng.choice(sorted(checkpoint["state_dict"]))]
    x[any_index(x, rng)] = rng.choice((np.nan, np.inf, -np.inf))
    return "'state_dict'"


def change_network(checkpoint, rng):
    """Sizes that are missing, absurd or no sizes."""
    network = checkpoint["meta"]["network"]
    network = network.get(rng.choice(("values", "reference")), network)  # of a learned policy: two networks
    name = rng.choice(
        [name for name in ("observation_dim", "num_agents", "num_actions", "horizon", "hidden_dim") if name in network]
    )
    name = rng.choice((name, name, "num_layers", "unknown"))
    if name in network and rng.random() < 0.2:
        del network[name]
    else:
        network[name] = rng.choice((0, -1, 1_000, 10**9, 10**18, 10**30, 2.5, "8", None, [8], {}, float("nan")))
    return "'meta'|agents, observation size"


def change_settings(checkpoint, rng):
    """Other game or format, statistics and settings that are none."""
    key, name, values = rng.choice(
        (
            ("format", None, (0, 2, 10**9)),
            ("kind", None, ("prey", "", "training", "vdn\n")),
            ("meta", "env", ("reference", "chess", "", None, 3, [])),
            ("meta", "horizon", ("9", None, 2.5)),
            ("meta", "network", (None, {}, [], 3)),
            ("meta", "sources", (None, [], "dataset")),
            ("stats", "mean", (float("nan"), float("inf"), None, "0", torch.zeros(()))),
            ("metrics", "reward/accuracy", ("high", None, {})),
            ("args", "alpha", ([], {}, torch.ones(1), b"1")),
        )
    )
    if name is None:
        checkpoint[key] = rng.choice(values)
    else:
        checkpoint[key][name] = rng.choice(values)
    return f"'{key}'|--env" if name == "env" else f"'{key}'"


def pickle_in_checkpoint(good: GoodFile, rng):
    checkpoint = copy.deepcopy(good.loaded)
    place = rng.choice((checkpoint, checkpoint["state_dict"], checkpoint["meta"], checkpoint["args"]))
    place[rng.choice(("extra", *sorted(place)))] = Bomb()
    members = unzip(good.content)
    (name,) = (name for name in members if name.endswith("/data.pkl"))
    replaced = write_zip(members | {name: pickle.dumps(Bomb(), protocol=2)})
    return rng.choice((save(checkpoint), save(checkpoint, _use_new_zipfile_serialization=False), replaced)), ANYTHING


def bomb_in_checkpoint(good: GoodFile, rng):
    members = unzip(good.content)
    if rng.random() < 0.5:
        return bomb_in(members, rng.choice([name for name in members if "/data/" in name]), b"", rng), ANYTHING
    # Networks of 10 GB whose weights all are the same few numbers of the file.
    checkpoint = copy.deepcopy(good.loaded)
    network = checkpoint["meta"]["network"]
    for part in [network[name] for name in ("values", "reference") if name in network] or [network]:
        part["hidden_dim"] = 50_000
    old, new = checkpoint["state_dict"], {}
    for name, x in old.items():
        new[name] = torch.zeros(1).expand([50_000 if size == HIDDEN_DIM else size for size in x.shape])
    return save(checkpoint | {"state_dict": new}), "'state_dict'"


CHECKPOINT = BYTES | {
    "key missing or of another type": of_checkpoint(lack_key),
    "wrong tensor": of_checkpoint(change_tensor),
    "NaN or infinite": of_checkpoint(make_weight_infinite),
    "wrong network": of_checkpoint(change_network),
    "other game, format, kind or settings": of_checkpoint(change_settings),
    "pickle bomb": pickle_in_checkpoint,
    "decompression bomb": bomb_in_checkpoint,
}


# --- Good files, and what becomes of them ---

HIDDEN_DIM = 8


class StartsToCompute(Exception):
    """All that was to be read has been read."""


def make_good_files(folder: Path) -> dict[str, GoodFile]:
    """A dataset of the made-up game, its reward model and BC policy, and a learned policy of spread, all untrained."""
    arrays = made_up_arrays() | {"block": np.zeros(60, np.int32)}
    np.savez(folder / "dataset.npz", **arrays)
    A, D, T, num_actions = 4, 5, 9, 7
    sizes = dict(observation_dim=D, num_agents=A, num_actions=num_actions, hidden_dim=HIDDEN_DIM)
    shapes = dict(reward=sizes | dict(num_layers=2), bc=sizes | dict(horizon=T, num_layers=2, num_modes=2))
    spread = dict(observation_dim=18, num_agents=3, num_actions=5, horizon=25, hidden_dim=HIDDEN_DIM, num_layers=2)
    shapes["vdn"] = dict(values=spread, reference=spread, beta=1.0, kl_clip=False)
    classes = dict(reward=train_reward.RewardNetwork, bc=train_bc.AgentNetwork, vdn=vdn_rlhf.RegularizedPolicy)
    for kind, shape in shapes.items():
        network = classes[kind](**shape)
        meta = dict(env="spread" if kind == "vdn" else "made-up", network=shape, sources={"dataset": "0" * 16})
        meta |= dict(horizon=T) if kind == "reward" else {}
        args = train_reward.Args() if kind == "reward" else train_bc.Args()
        metrics = {"reward/accuracy": 0.5, "history": [[1, 0.5]]}
        stats = {"mean": 0.0, "std": 1.0} if kind == "reward" else {}
        vdn_rlhf.save_checkpoint(folder / f"{kind}.pt", kind, args, meta, network, stats, metrics)

    def read_models() -> None:
        paths = dict(data_path=folder / "dataset.npz", reward_path=folder / "reward.pt", bc_path=folder / "bc.pt")
        args = vdn_rlhf.Args(
            env="made-up", vdn_path=str(folder / "out.pt"), device="cpu", **{k: str(v) for k, v in paths.items()}
        )
        original = vdn_rlhf.start_tracking
        vdn_rlhf.start_tracking = stop
        try:
            vdn_rlhf.main(args)
        except StartsToCompute:
            return
        finally:
            vdn_rlhf.start_tracking = original

    def stop(*_):
        raise StartsToCompute

    def read_policy() -> None:
        report = evaluate.main(evaluate.Args(str(folder / "vdn.pt"), env="spread", num_episodes=2, device="cpu"))
        assert all(map(math.isfinite, report["episode_returns"]))

    def load_dataset() -> dict:
        tensors, meta = train_reward.load_dataset(folder / "dataset.npz", "made-up", *ARRAYS)
        check_dataset(tensors, meta["num_actions"])
        return tensors | {"meta": meta}

    def checkpoint(kind: str, read: Callable) -> GoodFile:
        path = folder / f"{kind}.pt"
        return GoodFile(path, read, lambda: vdn_rlhf.load_checkpoint(path, (kind,)), CHECKPOINT)

    return {
        "dataset": GoodFile(folder / "dataset.npz", load_dataset, load_dataset, DATASET),
        "reward model": checkpoint("reward", read_models),
        "BC policy": checkpoint("bc", read_models),
        "learned policy": checkpoint("vdn", read_policy),
    }


def check_dataset(tensors: dict, num_actions: int) -> None:
    """What the trainers rely on."""
    observations, actions, pairs, labels = (tensors[key] for key in ARRAYS[0])
    (N, T, A), M = actions.shape, len(pairs)
    assert observations.shape[:3] == (N, T + 1, A) and pairs.shape == (M, 2) and labels.shape == (M, A)
    assert observations.isfinite().all() and actions.max() < num_actions and labels.abs().eq(1).all()
    assert pairs.min() >= 0 and pairs.max() < N and (pairs[:, 0] != pairs[:, 1]).all()
    if "block" in tensors:
        assert (tensors["block"][pairs[:, 0]] == tensors["block"][pairs[:, 1]]).all()
    if "true_rewards" in tensors:
        assert tensors["true_rewards"].shape == (N, T, A) and tensors["true_rewards"].isfinite().all()


def is_refused(good: GoodFile, content: bytes, expected: str) -> bool:
    """Put the damaged file in the place of the good one and read it; AssertionError where a promise is broken."""
    folder = good.path.parent
    before = sorted(folder.iterdir()), sorted(Path().iterdir())
    good.path.write_bytes(content)
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            good.read()
            loaded = good.load()
    except USER_ERRORS as error:
        message = str(error)
        assert message.startswith(f"{good.path}: ") and message.isprintable(), f"not one line that names the file: {message}"
        assert expected in (SAME, VALID) or re.search(expected, message.replace(str(folder), "")), (
            f"{expected} not in: {message}"
        )
        refused = True
    else:
        assert expected in (SAME, VALID), "accepted"
        assert expected == VALID or is_same(loaded, good.loaded), "accepted with other content"
        refused = False
    finally:
        good.path.write_bytes(good.content)
        torch.set_flush_denormal(False)  # as it was before a script ran; hypothesis draws such numbers
    assert not caught, f"a warning beside the one line: {caught[0].message}"
    assert time.process_time() - start < SECONDS, "took too long"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < MEMORY, "took too much memory"
    assert (sorted(folder.iterdir()), sorted(Path().iterdir())) == before, "left a file behind"
    return refused


def write_report(args, files: dict[str, GoodFile], counts: Counter, failures: list[str], seconds: float) -> None:
    path = ROOT / "benchmark" / "results" / "corruptions.md"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    outcomes = Counter()
    for (_, _, outcome), count in counts.items():
        outcomes[outcome] += count
    lines = [
        "# Damaged files",
        "",
        f"`python tests/corruptions.py --num {args.num} --seed {args.seed}`, {versions}, {seconds:.0f} seconds.",
        "",
        f"{outcomes['refused']:,} of {args.num:,} damaged files were refused as promised: one line that names the file and",
        f"what is at fault, within {SECONDS} seconds, nothing executed, no file written, less than 1 GiB of memory taken.",
        f"In {outcomes[SAME]} the damage hit nothing that is read: their content was the same. {outcomes[VALID]} with mended",
        f"checksums held other data, which pass every check. {len(failures)} broke a promise.",
        "",
        "Refused of all:",
        "",
        f"| damage | {' | '.join(files)} |",
        f"|---|{'---|' * len(files)}",
    ]
    for kind in dict.fromkeys(kind for good in files.values() for kind in good.damage):
        cells = []
        for name in files:
            total = sum(count for (k, n, _), count in counts.items() if (k, n) == (kind, name))
            cells.append(f"{counts[kind, name, 'refused']} of {total}" if total else "")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    path.write_text("\n".join([*lines, *(["", *failures] if failures else []), ""]))
    print(f"{path}: {dict(outcomes)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1000, help="damaged files")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng, counts, failures = random.Random(args.seed), Counter(), []
    start = time.time()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        (Path(folder) / "files").mkdir()
        files = make_good_files(Path(folder) / "files")
        kinds = [(name, kind) for name, good in files.items() for kind in good.damage]
        for i in tqdm(range(args.num), unit="file", mininterval=1):
            name, kind = kinds[i % len(kinds)]
            content, expected = files[name].damage[kind](files[name], rng)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    outcome = "refused" if is_refused(files[name], content, expected) else expected
                except Exception as error:
                    outcome = "failed"
                    failures.append(f"{name}, {kind}, file {i}: {type(error).__name__}: {error}")
            counts[kind, name, outcome] += 1
    print(*failures, sep="\n")
    write_report(args, files, counts, failures, time.time() - start)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
