"""Damaged and foreign files end in one line that names file and key, and leave nothing behind."""

import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path

import corruptions
import numpy as np
import pytest
import torch
from conftest import ROOT, made_up_arrays
from corruptions import SAME, Bomb, packed_zeros, unzip, write_zip
from hypothesis import given, settings
from hypothesis import strategies as st

import collect_data
import evaluate
import train_bc
import train_reward
import vdn_rlhf

EXPERT = ROOT / "policies" / "spread" / "expert.pt"


def arrays_with(**changes) -> dict:
    return made_up_arrays() | changes


def with_value(key: str, index: tuple, value) -> dict:
    arrays = made_up_arrays()
    arrays[key] = arrays[key].astype(np.result_type(arrays[key], np.int16) if key != "observations" else np.float32)
    arrays[key][index] = value
    return arrays


def with_meta(**changes) -> dict:
    meta = json.loads(str(made_up_arrays()["meta"])) | changes
    return arrays_with(meta=np.array(json.dumps(meta)))


def lacking(key: str) -> dict:
    return {k: v for k, v in made_up_arrays().items() if k != key}


BAD_DATASETS = {
    "observations are NaN": (with_value("observations", (3, 2, 1, 0), np.nan), "'observations'.*NaN"),
    "observations are infinite": (with_value("observations", (3, 2, 1, 0), np.inf), "'observations'.*infinite"),
    "observations overflow": (arrays_with(observations=np.full((60, 10, 4, 5), 1e300)), "'observations'.*float32"),
    "observations missing": (lacking("observations"), "'observations' is missing"),
    "observations of integers": (arrays_with(observations=np.zeros((60, 10, 4, 5), np.int32)), "'observations'.*int32"),
    "observations too short": (arrays_with(observations=np.zeros((60, 9, 4, 5), np.float32)), "'observations'.*shape"),
    "observations of objects": (arrays_with(observations=np.array([{}])), "'observations' is damaged.*[Oo]bject"),
    "actions missing": (lacking("actions"), "'actions' is missing"),
    "actions too large": (with_value("actions", (0, 0, 0), 7), "'actions' has values from 0 to 7.*7 actions"),
    "actions negative": (with_value("actions", (0, 0, 0), -1), "'actions' has values from -1"),
    "actions of floats": (arrays_with(actions=made_up_arrays()["actions"].astype(np.float32)), "'actions'.*float32"),
    "actions empty": (arrays_with(actions=np.zeros((0, 9, 4), np.uint8)), "'actions' is empty"),
    "pairs too large": (with_value("pairs", (0, 0), 60), "'pairs'.*0 .. 59"),
    "pairs negative": (with_value("pairs", (0, 0), -1), "'pairs'.*0 .. 59"),
    "pairs with themselves": (with_value("pairs", (0,), 5), "'pairs' compares"),
    "pairs of three": (arrays_with(pairs=np.zeros((400, 3), np.int32)), "'pairs'.*shape"),
    "labels of zero": (with_value("labels", (0, 0), 0), "'labels'"),
    "labels too few": (arrays_with(labels=made_up_arrays()["labels"][:-1]), "'labels' has 399 rows"),
    "labels of other agents": (arrays_with(labels=np.ones((400, 3), np.int8)), "'labels'.*shape"),
    "block crossed": (arrays_with(block=np.arange(60, dtype=np.int32)), "'block'"),
    "true rewards NaN": (arrays_with(true_rewards=np.full((60, 9, 4), np.nan, np.float32)), "'true_rewards'.*NaN"),
    "meta missing": (lacking("meta"), "'meta' is missing"),
    "meta no JSON": (arrays_with(meta=np.array("{")), "'meta' is no JSON"),
    "meta nested too deep": (arrays_with(meta=np.array("[" * 100_000)), "'meta' is no JSON"),
    "meta a list": (arrays_with(meta=np.array("[]")), "'meta'"),
    "another format": (with_meta(format=2), "'meta'.*format 2"),
    "another game": (with_meta(env="spread"), "'meta' is of the game 'spread', not made-up; pass that game's --env"),
    "meta of other sizes": (with_meta(num_agents=5), "'meta' has num_agents 5, but 'actions' has 4"),
    "no number of actions": (with_meta(num_actions=None), "'meta'.*num_actions None"),
}


@pytest.mark.parametrize("case", BAD_DATASETS)
def test_bad_dataset(case, tmp_path):
    arrays, message = BAD_DATASETS[case]
    path = tmp_path / "dataset.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserErrors, match=f"dataset.npz: .*{message}") as error:
        train_reward.main(train_reward.Args(env="made-up", data_path=str(path), device="cpu"))
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.npz"]


UserErrors = (collect_data.UserError, train_reward.UserError, train_bc.UserError, vdn_rlhf.UserError, evaluate.UserError)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", pickle.dumps({"a": 1})])
def test_file_that_is_no_dataset(content, tmp_path):
    path = tmp_path / "dataset.npz"
    path.write_bytes(content)
    with pytest.raises(UserErrors, match=r"dataset.npz: damaged, truncated or not a dataset"):
        train_bc.main(train_bc.Args(data_path=str(path), device="cpu"))


def test_truncated_dataset(spread_data, tmp_path):
    path = tmp_path / "dataset.npz"
    path.write_bytes(spread_data.read_bytes()[:100_000])
    with pytest.raises(UserErrors, match=r"dataset.npz: damaged, truncated or not a dataset"):
        train_bc.main(train_bc.Args(data_path=str(path), device="cpu"))


def test_other_byte_orders_and_types_are_the_same_data(made_up_data, tmp_path):
    odd = tmp_path / "odd.npz"
    with np.load(made_up_data) as file:
        arrays = {key: file[key] for key in file.files}
    arrays["observations"] = arrays["observations"].astype(">f8")
    arrays["pairs"], arrays["labels"] = arrays["pairs"].astype(">u4"), arrays["labels"].astype(np.int64)
    np.savez(odd, **arrays)
    names = ("observations", "actions", "pairs", "labels")
    (a, meta_a), (b, meta_b) = (train_reward.load_dataset(path, "made-up", names) for path in (made_up_data, odd))
    assert all(torch.equal(a[key], b[key]) for key in names) and meta_a == meta_b


def test_folder_instead_of_a_file(tmp_path):
    with pytest.raises(UserErrors, match=r"cannot be read \(Is a directory\)"):
        train_bc.main(train_bc.Args(data_path=str(tmp_path), device="cpu"))
    with pytest.raises(evaluate.UserError, match=r"is a folder"):
        evaluate.main(evaluate.Args(str(EXPERT), num_episodes=1, json_path=str(tmp_path), device="cpu"))


def test_spread_dataset_of_other_sizes(tmp_path):
    path = tmp_path / "dataset.npz"
    np.savez(path, **with_meta(env="spread"))
    with pytest.raises(UserErrors, match=r"dataset.npz: .*\(4, 5, 7, 9\) but spread has \(3, 18, 5, 25\)"):
        train_bc.main(train_bc.Args(data_path=str(path), device="cpu"))


def test_bad_policy_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = torch.load(EXPERT, weights_only=True)

    def changed(**changes):
        return lambda path: torch.save(good | changes, path)

    shape = good["meta"]["network"]
    bigger, nan = shape | {"observation_dim": 19}, {k: torch.full_like(v, torch.nan) for k, v in good["state_dict"].items()}
    cases = [
        ("cannot be read", lambda path: None),
        ("truncated or not a checkpoint", lambda path: path.write_bytes(EXPERT.read_bytes()[:5000])),
        ("truncated or not a checkpoint", lambda path: path.write_bytes(b"hello")),
        ("truncated or not a checkpoint", lambda path: path.write_bytes(pickle.dumps(Bomb()))),
        ("truncated or not a checkpoint", lambda path: torch.save(good | {"extra": Bomb()}, path)),
        ("'format' is missing or no int", lambda path: torch.save({"a": 1}, path)),
        ("'format' is missing or no int", lambda path: torch.save([1, 2], path)),
        ("'format' is 9", changed(format=9)),
        ("'kind' is 'reward', expected 'vdn' or 'bc'", changed(kind="reward")),
        ("'state_dict' is missing", changed(state_dict=3)),
        ("'stats' has a wrong value of 'mean'", changed(stats={"mean": torch.zeros(())})),
        ("'stats' has a wrong value of 'std'", changed(stats={"std": float("inf")})),
        ("'state_dict' or 'meta' is damaged", changed(state_dict={})),
        ("'state_dict' or 'meta' is damaged", changed(meta=good["meta"] | {"network": bigger})),
        ("'state_dict' or 'meta' is damaged", changed(meta={})),
        *[
            (f"'meta' is damaged ({name} is {value})", changed(meta=good["meta"] | {"network": shape | {name: value}}))
            for name, value in (("num_layers", 10**9), ("num_layers", 0), ("hidden_dim", 0), ("horizon", 2**40))
        ],
        ("keyword argument '?[2J'", changed(meta=good["meta"] | {"network": shape | {"\x1b[2J": 1}})),  # clears a terminal
        ("'state_dict' has values that are NaN", changed(state_dict=nan)),
        ("'meta' says it plays 'chess'", changed(meta=good["meta"] | {"env": "chess"})),
    ]
    path = tmp_path / "policy.pt"
    for message, write in cases:
        path.unlink(missing_ok=True)
        write(path)
        with pytest.raises(evaluate.UserError) as error:
            evaluate.main(evaluate.Args(str(path), env="spread", num_episodes=1, device="cpu"))
        assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_models_of_other_dimensions(spread_data, made_up_data, tmp_path):
    """A reward model or BC policy of another game, named by the user."""
    small = dict(max_epochs=1, hidden_dim=8, device="cpu")
    paths = {}
    for env, data_path in (("spread", spread_data), ("made-up", made_up_data)):
        paths[env] = dict(reward_path=str(tmp_path / f"{env}-reward.pt"), bc_path=str(tmp_path / f"{env}-bc.pt"))
        common = dict(env=env, data_path=str(data_path), **small)
        train_reward.main(train_reward.Args(reward_path=paths[env]["reward_path"], **common))
        train_bc.main(train_bc.Args(bc_path=paths[env]["bc_path"], **common))
    vdn = dict(data_path=str(spread_data), vdn_path=str(tmp_path / "vdn.pt"), num_updates=1, imitation_updates=1, device="cpu")
    for wrong in ("reward_path", "bc_path"):
        files = paths["spread"] | {wrong: paths["made-up"][wrong]}
        with pytest.raises(vdn_rlhf.UserError, match=rf"{Path(files[wrong]).name}: 'meta' has .*observation_dim"):
            vdn_rlhf.main(vdn_rlhf.Args(**files, **vdn))
    with pytest.raises(vdn_rlhf.UserError, match=r"spread-bc.pt: 'kind' is 'bc', expected 'reward'"):
        vdn_rlhf.main(vdn_rlhf.Args(**paths["spread"] | {"reward_path": paths["spread"]["bc_path"]}, **vdn))
    checkpoint = torch.load(paths["spread"]["reward_path"], weights_only=True)
    for stats in ({}, {"mean": 0.0, "std": float("nan")}):
        torch.save(checkpoint | {"stats": stats}, tmp_path / "no-stats.pt")
        with pytest.raises(vdn_rlhf.UserError, match=r"no-stats.pt: 'stats'"):
            vdn_rlhf.main(vdn_rlhf.Args(**paths["spread"] | {"reward_path": str(tmp_path / "no-stats.pt")}, **vdn))
    assert not (tmp_path / "vdn.pt").exists()


def test_learned_policies_whose_parts_do_not_fit(tmp_path):
    shape = dict(observation_dim=18, num_agents=3, num_actions=5, horizon=25, hidden_dim=8)
    path, args = tmp_path / "vdn.pt", evaluate.Args(policy_path=str(tmp_path / "vdn.pt"), num_episodes=2, device="cpu")

    def save(**changed):
        parts = dict(values=shape, reference=shape, beta=1.0, kl_clip=False) | changed
        weights = {
            f"{name}.{key}": tensor
            for name in ("values", "reference")
            for key, tensor in evaluate.AgentNetwork(**(parts[name] if isinstance(parts[name], dict) else shape))
            .state_dict()
            .items()
        }
        meta = dict(env="spread", network=parts)
        torch.save(dict(format=1, kind="vdn", args={}, meta=meta, state_dict=weights, stats={}, metrics={}), path)

    save()
    evaluate.main(args)
    others = ({"observation_dim": 4}, {"num_actions": 1}, {"horizon": 9})
    for changed in ({"beta": float("nan")}, {"beta": None}, {"values": 3}, *({"reference": shape | other} for other in others)):
        save(**changed)
        with pytest.raises(evaluate.UserError, match=r"vdn.pt: 'state_dict' or 'meta' is damaged"):
            evaluate.main(args)


@pytest.mark.parametrize("named", ["data_path", "reward_path", "bc_path"])
def test_named_files_must_exist(named, spread_data, tmp_path):
    files = dict(data_path=str(spread_data), reward_path=str(EXPERT), bc_path=str(EXPERT))
    with pytest.raises(vdn_rlhf.UserError, match=r"nowhere: no such file"):
        vdn_rlhf.main(vdn_rlhf.Args(**files | {named: str(tmp_path / "nowhere")}, device="cpu"))


def test_unknown_dataset_through_the_pipeline(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        vdn_rlhf.main(vdn_rlhf.Args(dataset="diverse", device="cpu"))
    assert exit.value.code == 2
    assert "--dataset diverse: unknown mixture" in capfd.readouterr().err


def test_full_disk_leaves_the_old_file_and_nothing_else(spread_data, tmp_path):
    path = tmp_path / "bc.pt"
    args = train_bc.Args(data_path=str(spread_data), bc_path=str(path), max_epochs=1, hidden_dim=64, device="cpu")
    train_bc.main(args)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))  # no file may grow beyond half of what is needed
    try:
        with pytest.raises(train_bc.UserError, match=r"bc.training.pt: cannot be written \(File too large\)"):
            train_bc.main(args)
        with pytest.raises(collect_data.UserError, match=r"new.npz: cannot be written"):
            collect_data.main(collect_data.Args(num_trajectories=256, data_path=str(tmp_path / "new.npz"), device="cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["bc.pt"]


def test_folder_that_cannot_be_written(spread_data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(train_bc.UserError, match=r"bc.pt: cannot be written"):
        train_bc.save_file(tmp_path / "file" / "bc.pt", lambda file: file.write(b"x"))


def test_loss_that_explodes_is_named(spread_data, tmp_path):
    args = train_bc.Args(data_path=str(spread_data), bc_path=str(tmp_path / "bc.pt"), device="cpu", hidden_dim=8)
    args.learning_rate, args.max_epochs = 1e30, 2
    problem = r"seed 1: bc/mode_nll is nan after \d+ updates; try a smaller --learning-rate than 1e\+30$"
    with pytest.raises(train_bc.UserError, match=problem):
        train_bc.main(args)
    assert not (tmp_path / "bc.pt").exists()


def test_weights_that_exploded_are_not_saved(tmp_path):
    network = train_bc.AgentNetwork(4, 2, 3, 5, hidden_dim=8)
    with torch.no_grad():
        network.head.bias[0] = float("inf")
    with pytest.raises(train_bc.UserError, match=r"bc.pt: not written.*--learning-rate"):
        train_bc.save_checkpoint(tmp_path / "bc.pt", "bc", train_bc.Args(), {}, network, {}, {})
    assert not (tmp_path / "bc.pt").exists()


def test_dataset_that_is_not_there(tmp_path):
    with pytest.raises(
        UserErrors, match=r"nowhere.npz: cannot be read \(No such file or directory\); collect_data.py makes it"
    ):
        train_reward.main(train_reward.Args(data_path=str(tmp_path / "nowhere.npz"), device="cpu"))


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    """Read in a folder of their own, where nothing may appear."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("empty"))
    yield corruptions.make_good_files(tmp_path_factory.mktemp("good"))
    os.chdir(before)


def test_good_files_are_read(good_files):
    for good in good_files.values():
        assert not corruptions.is_refused(good, good.content, SAME)


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("exploded").exists()


KINDS = [(name, kind) for name in ("reward model", "BC policy", "learned policy") for kind in corruptions.CHECKPOINT]
KINDS += [("dataset", kind) for kind in corruptions.DATASET]


@pytest.mark.parametrize("name, kind", KINDS)
@settings(max_examples=8, deadline=None, derandomize=True, database=None)  # is_refused has the deadline
@given(random=st.randoms(use_true_random=False))
def test_damaged_file_is_refused_or_the_damage_is_harmless(name, kind, random, good_files):
    good = good_files[name]
    corruptions.is_refused(good, *good.damage[kind](good, random))


def test_weights_that_the_zip_directory_calls_a_folder(good_files):
    """torch alone would take whatever the memory holds for them, without an error."""
    for good in (good_files["reward model"], good_files["learned policy"]):
        members = unzip(good.content)
        lies = {name: dict(external_attr=0x10) for name in members if "/data/" in name}
        assert not corruptions.is_refused(good, write_zip(members, **lies), SAME)


def test_dataset_whose_headers_differ_from_its_content(good_files):
    good = good_files["dataset"]
    members = unzip(good.content)
    header, shape = members["observations.npy"], b"(60, 10, 4, 5), }        "
    assert shape in header
    shorter = members | {"observations.npy": header.replace(shape, b"(60, 10, 4, 4), }        ")}
    assert corruptions.is_refused(good, write_zip(shorter), "'observations' is longer than its header says")
    renamed = write_zip(members, **{"true_rewards.npy": dict(filename="true_rewardz.npy")})  # in the directory alone
    assert corruptions.is_refused(good, renamed, "true_rewardz")
    python_2 = members | {"observations.npy": header.replace(shape, b"(60L, 10L, 4L, 5L), }    ")}  # numpy warns, and reads it
    assert not corruptions.is_refused(good, write_zip(python_2), SAME)


def test_packed_datasets_are_read(good_files):
    good = good_files["dataset"]
    buffer = io.BytesIO()
    with np.load(io.BytesIO(good.content)) as file:
        np.savez_compressed(buffer, **file)
    assert len(buffer.getvalue()) < len(good.content) and not corruptions.is_refused(good, buffer.getvalue(), SAME)


def test_bomb_just_below_the_limit(good_files):
    """What may be unpacked at all is unpacked within the limits on time and memory."""
    good, head, size = good_files["dataset"], io.BytesIO(), 255 * 2**20
    np.lib.format.write_array_header_1_0(head, dict(descr="|u1", fortran_order=False, shape=(size,)))
    lies = dict(compress_type=zipfile.ZIP_DEFLATED, file_size=len(head.getvalue()) + size)
    lies["CRC"] = zlib.crc32(bytes(size), zlib.crc32(head.getvalue()))
    members = unzip(good.content) | {"actions.npy": packed_zeros(head.getvalue(), 255)}
    assert corruptions.is_refused(good, write_zip(members, **{"actions.npy": lies}), r"'actions' has the shape \(267386880,\)")


NOT_POSITIVE = {"seed", "imitation_updates"}  # may be 0


@pytest.mark.parametrize("module", [collect_data, train_reward, train_bc, vdn_rlhf, evaluate])
def test_flags_out_of_range(module, tmp_path, monkeypatch):
    """Every number that a script takes, one after another."""
    monkeypatch.chdir(tmp_path)
    required = {"policy_path": "random"} if module is evaluate else {}
    bad = {"int": (-1, -(2**31), 2**31, 2**64, 0), "float": (float("nan"), float("inf"), -float("inf"), -1e-9, -1.0)}
    kinds = {field.name: field.type.removesuffix(" | None") for field in fields(module.Args)}
    numbers = [(name, bad[kind]) for name, kind in kinds.items() if kind in bad]
    assert len(numbers) >= 3
    for name, values in numbers:
        for value in values[: -1 if name in NOT_POSITIVE else None]:
            with pytest.raises(module.UserError, match=rf"^--{name.replace('_', '-')} {re.escape(str(value))}: "):
                module.main(module.Args(**required, **{name: value}))
    assert list(tmp_path.iterdir()) == []


def test_one_line_and_status_2_from_real_processes(good_files, tmp_path):
    bomb = tmp_path / "bomb.pt"
    torch.save(good_files["learned policy"].loaded | {"extra": Bomb()}, bomb)
    zeros, members = tmp_path / "zeros.npz", unzip(good_files["dataset"].content)
    zeros.write_bytes(write_zip(members, **{"labels.npy": dict(file_size=2**42)}))
    commands = {
        f"evaluate.py --policy-path {bomb}": f"{bomb}: damaged, truncated or not a checkpoint (UnpicklingError)",
        f"train_reward.py --env made-up --data-path {zeros}": f"{zeros}: 'labels' unpacks to 4398.0 GB; if it is meant to, "
        "write the file with np.savez",
        "vdn_rlhf.py --beta nan": "--beta nan: must be a finite number and not negative",
    }
    pipes = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = {words: subprocess.Popen([sys.executable, *str(ROOT / words).split()], **pipes) for words in commands}
    for words, process in processes.items():
        printed, errors = process.communicate(timeout=120)
        assert (process.returncode, printed, errors) == (2, "", f"error: {commands[words]}\n"), words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.pt", "zeros.npz"]
