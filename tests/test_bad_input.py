"""Damaged, foreign and malicious files end in one line that names the file, with exit status 2; nothing is
executed, and what was there before stays. So do outputs that cannot be written and learning that blows up."""

import functools
import io
import json
import os
import pickle
import re
import resource
import signal
import sys
import zipfile
import zlib
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made_up_arrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import train_bc
import train_reward
import vdn_rlhf

ARRAYS, OPTIONAL = ("observations", "actions", "pairs", "labels"), ("block", "true_rewards")
COMMON = "--data-path=dataset.npz --env=made-up --device=cpu --hidden-dim=8"
PLAYER = "--num-episodes=2 --device=cpu --env=spread --policies random"
REWARD, BC, TRAINING = "reward-alpha1-seed1.pt", "bc-seed1.pt", "bc-keep0.5-seed1.training.pt"
FINISHED, VDN, CLONE, KEEP = "vdn-beta3-alpha1-seed1.pt", "vdn-spread.pt", "bc-spread.pt", f"keep/{REWARD}"
FILES = {  # every kind of file: who reads it, with which words
    "dataset.npz": (train_reward, f"{COMMON} --reward-path=out.pt --max-epochs=1"),
    REWARD: (vdn_rlhf, f"{COMMON} --vdn-path=out.pt --num-updates=2"),
    KEEP: (train_bc, f"{COMMON} --bc-path=out.pt --num-updates=2 --keep=0.5"),
    BC: (vdn_rlhf, f"{COMMON} --vdn-path=out.pt --num-updates=2"),
    TRAINING: (train_bc, f"{COMMON} --num-updates=2 --keep=0.5 --resume"),
    FINISHED: (vdn_rlhf, f"{COMMON} --num-updates=2"),
    VDN: (evaluate, f"{PLAYER} {VDN}"),
    CLONE: (evaluate, f"{PLAYER} {CLONE}"),
}
LONG = "x" * 300 + ".pt"


class Bomb:
    """Unpickling it leaves a file behind."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with one file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    arrays = made_up_arrays(40, 100)
    arrays["pairs"] = arrays["pairs"][:, :1] // 2 * 2 + [0, 1]
    np.savez(folder / "dataset.npz", **arrays, block=np.arange(40) // 2)
    flags = {"data_path": str(folder / "dataset.npz"), "env": "made-up", "device": "cpu", "hidden_dim": 8}
    train_reward.main(train_reward.Args(max_epochs=1, **flags))
    train_bc.main(train_bc.Args(num_updates=2, **flags))
    vdn_rlhf.main(vdn_rlhf.Args(num_updates=2, **flags))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_bc, "bc_loss", lambda *_: 1 / 0)  # after the first checkpoint
        train_bc.main(train_bc.Args(keep=0.5, num_updates=2, **flags))
    shape = {"sizes": (18, 3, 5, 25), "hidden_dim": 4}
    vdn = {"values": shape, "reference": shape, "beta": 1.0}
    for path, network, kind in ((VDN, vdn, evaluate.VDNPolicy), (CLONE, shape, evaluate.AgentNetwork)):
        meta, weights = {"env": "spread", "network": network, "sources": {}}, kind(**network).state_dict()
        train_bc.save_checkpoint(folder / path, path.split("-")[0], train_bc.Args(), meta, weights, {}, {})
    return folder


@pytest.fixture
def attempt(good, tmp_path, monkeypatch, capsys):
    """attempt(name, write) runs the reader of a file, in a copy of `good` where write(path) made that file ->
    exit status, the lines on stderr."""
    monkeypatch.chdir(tmp_path)
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def attempt(name: str, write=None, words="") -> tuple[int, list[str]]:
        if write:
            os.remove(Path(name).name)
            write(Path(Path(name).name))
        module = FILES[name][0]
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *(words or FILES[name][1]).split()])
        status = 0
        try:
            module.run_command_line(module.main, module.Args, getattr(module, "PRESETS", {}))
        except SystemExit as exit:
            status = exit.code
        lines = re.split(r"[\r\n]+", capsys.readouterr().err)
        return status, [line for line in lines if line and not re.match(r"[\w .,-]+:\s+\d+%\|", line)]

    return attempt


def assert_refused(result: tuple[int, list[str]], name="", what="") -> None:
    status, lines = result
    assert status == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"error: {Path(name).name}") and re.search(what, lines[0]), lines
    assert lines[0].isprintable() and len(lines[0].replace(LONG, "")) < 350


@pytest.mark.parametrize("name", FILES)
def test_good_files_are_read(name, attempt):
    assert attempt(name) == (0, [])


def with_meta(**changes) -> np.ndarray:
    return np.array(json.dumps(json.loads(str(made_up_arrays()["meta"])) | changes))


LOUD, SEVERAL = "\x1b[2J\n" * 10**5, torch.zeros(3)
DATASETS = {  # arrays, or what makes them of the good ones
    "observations": [lambda x: x * np.nan, lambda x: x * np.float32(np.inf), lambda x: x + np.float64(1e300)],
    "actions": [lambda x: x.astype(int) - 1, lambda x: x / np.float32(1), lambda x: x[:0], np.array([3])],
    "pairs": [lambda x: x + 20, lambda x: x - 20, lambda x: x[:, [0, 1, 1]], lambda x: x[:0]],
    "labels": [lambda x: x * 2, lambda x: x[1:], lambda x: x[:, 1:], lambda x: x.astype(str)],
    "block": [np.array(3), np.zeros(39, int), np.zeros(40)],
    "true_rewards": [lambda x: x * np.nan],
    "meta": [np.array(text) for text in ("{", "3", "[" * 100_000, '"\x1b[2J"')],
}
DATASETS["observations"] += [lambda x: x.astype(int), lambda x: x[:, 1:], lambda x: x[..., :0]]
DATASETS["observations"] += [np.array([{}])]
DATASETS["meta"] += [with_meta(num_actions=n) for n in (None, 0, 257, 7.0, True, [7], "7", 1e300)]
DATASETS["meta"] += [with_meta(format=2), with_meta(env=LOUD)]
# The shape of actions, where that is wrong, is what observations do not fit.
BAD_ARRAYS = [(key, x, f"'({key}|observations)'|no dataset") for key in DATASETS for x in DATASETS[key]]
BAD_ARRAYS += [(key, None, f"'{key}' is missing|no dataset") for key in (*ARRAYS, "meta")]
BAD_ARRAYS += [
    ("actions", lambda x: x + 1, "'actions' .* 7.*--env"),
    ("pairs", lambda x: x // 2, "'pairs' compares a trajectory with itself"),
    ("block", np.arange(40), "'block' has pairs that cross blocks"),
    ("meta", with_meta(env="spread"), "'meta' is of the game 'spread', not made-up; name it with --env"),
]


@pytest.mark.parametrize(("key", "change", "what"), BAD_ARRAYS)
def test_structurally_wrong_dataset(key, change, what, attempt):
    with np.load("dataset.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays[key] = change(arrays[key]) if callable(change) else change
    arrays = {name: array for name, array in arrays.items() if array is not None}
    assert_refused(attempt("dataset.npz", lambda path: np.savez(path, **arrays)), "dataset.npz: ", what)
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize("meta", [{"steepness": "five"}, {"return_std": "x"}, {"return_std": [1.0]}])
def test_odd_statistics_of_labels_do_no_harm(meta, attempt):
    """They only serve to tell what the truth would have predicted."""
    arrays = made_up_arrays(40, 100)
    arrays["meta"] = with_meta(**{"steepness": 5.0, "return_std": [1.0] * 4} | meta)
    status, lines = attempt("dataset.npz", lambda path: np.savez(path, **arrays))
    assert (status, len(lines)) in ((0, 0), (2, 1))


def test_other_byte_orders_and_types_are_the_same_data(good, tmp_path):
    with np.load(good / "dataset.npz") as file:
        arrays = {key: file[key] for key in file.files}
    types = {"observations": ">f8", "pairs": ">u4", "labels": np.int64}
    arrays |= {key: arrays[key].astype(dtype) for key, dtype in types.items()}
    np.savez_compressed(tmp_path / "dataset.npz", **arrays)
    assert read("dataset.npz", tmp_path) == read("dataset.npz", good)


# What stands where (/ between keys, * for any key, ... for nothing at all) in every checkpoint,
EVERY = {"kind": [..., LOUD, SEVERAL], "format": [9, SEVERAL], "args": [..., 3], "meta": [3]}
EVERY |= {"state_dict": [...], "stats": [{"x": Bomb()}]}
# in one that is compared with the settings,
COMPARED = {"meta/sources": [3, ["meta"]], "args/seed": [SEVERAL, 9, LOUD, ...]}
# in every model: the last weights repeat one number, and if larger would take any memory,
MODEL = {"meta/network": [..., 3], f"meta/network/{LOUD}": [3], "state_dict": [{}]}
MODEL |= {"state_dict/*": ["x", SEVERAL, lambda x: x * torch.nan, lambda x: torch.zeros(1).expand(x.shape)]}
# in every description of a network,
SHAPE = {"hidden_dim": [10**9, 2**62, -1, "x"], "sizes": [None, (18, 3, 5), tuple("5479"), (18, 3, 5, 9)]}
NETWORK = {f"meta/network/{key}": values for key, values in SHAPE.items()}
PARTS = {f"meta/network/{x}/{key}": values for x in ("values", "reference") for key, values in SHAPE.items()}
# and in single files.
STATS = {f"stats/{name}": [..., "x", SEVERAL, torch.nan] for name in ("mean", "std")}
RETURNS = {"stats/team_returns": [..., 3, "x", SEVERAL, lambda x: x * torch.nan, lambda x: x[:, None]]}
STATES = {f"stats/{name}": [..., 3] for name in ("policy", "optimizer")}
WRONG = {
    REWARD: EVERY | COMPARED | MODEL | NETWORK | STATS,
    KEEP: RETURNS,
    BC: EVERY | COMPARED | MODEL | NETWORK,
    TRAINING: EVERY | COMPARED | STATES | {"meta/update": [..., "x"]},
    FINISHED: EVERY | COMPARED,
    VDN: EVERY | MODEL | PARTS | {"meta/network/beta": [..., "x", SEVERAL, torch.nan]},
    CLONE: EVERY | MODEL | NETWORK | {"meta/env": ["tag", 5, LOUD]},
}
CASES = [(name, place, x) for name in WRONG for place, values in WRONG[name].items() for x in values]


@pytest.mark.parametrize("name, place, value", CASES, ids=lambda x: None if callable(x) else f"{x!r:.40}")
def test_structurally_wrong_checkpoint(name, place, value, attempt):
    content = torch.load(Path(name).name, weights_only=True)
    *outer, last = place.split("/")
    inner = functools.reduce(getitem, outer, content)
    last = next(iter(inner)) if last == "*" else last
    if value is ...:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    assert_refused(attempt(name, lambda path: torch.save(content, path)), name)
    assert not Path("exploded").exists() and not list(Path().glob("out*"))


def read(name: str, folder: Path) -> bytes:
    """The content of a file as the scripts see it."""
    if name == "dataset.npz":
        content = train_reward.load_dataset(folder / name, "made-up", ARRAYS, OPTIONAL)[:2]
    else:
        content = vdn_rlhf.load_checkpoint(folder / name, "reward", "bc", "vdn", "training")
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


KINDS = [name for name in FILES if name not in (CLONE, KEEP)]
OPERATIONS = st.sampled_from(["flip", "cut", "insert", "zeros"])
DAMAGE = st.tuples(OPERATIONS, st.integers(0, 2**32), st.integers(1, 255))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(damages=st.lists(DAMAGE, min_size=1, max_size=3))
def test_damaged_bytes_are_told_or_change_nothing(name, good, damages):
    content, folder = bytearray((good / name).read_bytes()), good.with_name("damaged")
    for operation, place, value in damages:
        at = place % max(len(content), 1)
        if operation == "flip":
            content[at : at + 1] = bytes(byte ^ value for byte in content[at : at + 1])
        elif operation == "insert":
            content[at:at] = bytes([value]) * (place % 5 + 1)
        else:  # the rest of the file, or a piece of it
            end = at + (value if value > 50 else len(content))
            content[at:end] = b"" if operation == "cut" else bytes(len(content[at:end]))
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    try:
        assert read(name, folder) == read(name, good)
    except (train_reward.UserError, vdn_rlhf.UserError) as error:
        assert str(error).isprintable() and len(str(error)) < 300 + len(str(folder / name))


@functools.cache
def packed_zeros() -> bytes:
    """A deflate stream of 2 MB that unpacks to 2 GiB of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
    return block * 2**11 + packer.flush()


@pytest.mark.parametrize("claimed", [2**31, 1000])
@pytest.mark.parametrize("name", KINDS)
def test_bombs_take_no_memory(name, claimed, good, attempt):
    """Whether the directory tells what a member unpacks to or hides it."""
    with zipfile.ZipFile(good / name) as file:
        members = {member: file.read(member) for member in file.namelist()}
    victim = max(members, key=lambda member: len(members[member]))

    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            for member, content in members.items():
                file.writestr(member, packed_zeros() if member == victim else content)
            info = file.getinfo(victim)
            info.file_size, info.compress_type = claimed, zipfile.ZIP_DEFLATED

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(attempt(name, write), name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # in KiB


@pytest.mark.parametrize("name", FILES)
def test_foreign_files(name, attempt):
    for content in (b"", b"PK\x03\x04", b"hello", pickle.dumps(Bomb())):
        assert_refused(attempt(name, lambda path, content=content: path.write_bytes(content)), name)
    assert_refused(attempt(name, lambda path: torch.save([1, 2], path)), name)
    assert_refused(attempt(name, lambda path: path.mkdir()), name)
    assert not Path("exploded").exists()


OUTPUTS = [  # whose work, a file that it reads, the words before a path to write
    (train_reward, "reward_loss", "dataset.npz", f"{COMMON} --reward-path"),
    (train_bc, "bc_loss", TRAINING, f"{COMMON} --bc-path"),
    (vdn_rlhf, "vdn_loss", BC, f"{COMMON} --vdn-path"),
]


@pytest.mark.parametrize("path", [LONG, "dataset.npz/out.pt", "dataset.npz", ".", "folder"])
@pytest.mark.parametrize(("module", "work", "name", "words"), OUTPUTS)
def test_outputs_are_tried_before_the_work(module, work, name, words, path, attempt, monkeypatch):
    monkeypatch.setattr(module, work, lambda *_, **__: 1 / 0)
    Path("folder").mkdir()
    before = sorted(os.listdir())
    assert_refused(attempt(name, words=f"{words}={path}"), what=re.escape(path[:9]))
    assert sorted(os.listdir()) == before


INPUTS = [("dataset.npz", "--data-path"), (BC, f"{COMMON} --reward-path"), (CLONE, "--device=cpu --policies")]


@pytest.mark.parametrize(("name", "words"), INPUTS)
def test_inputs_that_cannot_be_read(name, words, attempt):
    assert_refused(attempt(name, words=f"{words} {LONG}"), what="(?i)too long|no such file")
    if os.geteuid():  # nothing is forbidden to root
        Path("closed").mkdir(mode=0)
        assert_refused(attempt(name, words=f"{words} closed/x"), what="closed/x")


def test_a_full_disk_leaves_what_was_there_and_nothing_else(attempt):
    """As good as full: no file may grow beyond 4 KiB."""
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        result = attempt("dataset.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_refused(result, "out.training.pt: cannot be written")
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize(("module", "work", "name", "words"), OUTPUTS)
def test_learning_that_blows_up_is_one_line(module, work, name, words, attempt):
    """And leaves no output that another stage would take."""
    result = attempt(name, words=f"{words}=out.pt --learning-rate=1e9")
    assert_refused(result, what=r"[a-z_/]+ is (nan|inf) after \d+ updates; try a smaller --learning-rate$")
    assert not Path("out.pt").exists()
