"""benchmark/label.py: what people answer on its page, in a real browser, is what is exported."""

import http.client
import json
import resource
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import benchmark.label as label
import collect_data
import train_reward
from benchmark.label_round import open_browser, wait_for_pair

KEYS = {"ArrowLeft": "\ue012", "ArrowDown": "\ue015", "ArrowRight": "\ue014", "Backspace": "\ue003", "s": "s"}
VALUES = {"ArrowLeft": 1, "ArrowDown": 0, "ArrowRight": -1, "s": None}


@pytest.fixture(scope="module")
def browser():
    try:
        browser = open_browser()
    except train_reward.UserError as error:
        pytest.skip(str(error))
    yield browser
    browser.quit()


@pytest.fixture
def serve():
    """serve(words) starts the server in a process of its own -> the process and the address of the page."""
    started = []

    def serve(*words):
        command = [sys.executable, str(ROOT / "benchmark/label.py"), "--port=0", *map(str, words)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1], started[-1].stdout.readline().split()[0]

    yield serve
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("env", ["spread-4x5", "tag", "reference"])
def test_the_page_draws_what_happened(env, serve, browser, tmp_path):
    """Four episodes of random play, on a phone: positions as in the environment, whatever agents observe."""
    game, path, generator = collect_data.make_game(env), tmp_path / "x.npz", torch.Generator().manual_seed(0)
    world, bodies = collect_data.ParticleEnv(game, 4), []

    def act(observations, step):
        bodies.append(world.positions.clone())
        return torch.randint(game.num_actions, observations.shape[:2], generator=generator)

    observations, actions, _ = collect_data.rollout(world, act, world.reset(generator))
    meta = json.dumps({"format": 1, "env": env, "num_actions": game.num_actions})
    np.savez(path, observations=observations, actions=actions, meta=meta)
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(serve(f"--env={env}", f"--data-path={path}", "--agent=1")[1])
    n = int(wait_for_pair(browser).split(",")[0])
    scene = browser.execute_script(f"return load({n})")
    bodies, landmarks = torch.stack(bodies)[..., n], world.landmarks[..., n]
    if env == "reference":  # nobody sees the origin; goals and words are known to the partner
        bodies, landmarks = bodies - landmarks.mean(dim=0), landmarks - landmarks.mean(dim=0)
        assert scene["goals"] == world.goals[:, n].flip(0).tolist()
        assert scene["words"] == [[-1, -1], *(actions[n] // 5).tolist()]
    seen = np.array(scene["agents"])
    if env == "tag":
        seen = np.concatenate([seen, np.array(scene["prey"])[:, None]], axis=1)
    np.testing.assert_allclose(seen[:25], bodies, atol=2e-3)
    np.testing.assert_allclose(scene["landmarks"], landmarks, atol=2e-3)
    drawn = "$$('canvas'), (c) => c.getContext('2d').getImageData(0, 0, c.width, c.width).data.some(Boolean)"
    assert browser.execute_script(f"return Array.from({drawn})") == [True, True]
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390


def test_answers_by_keys_and_mouse_survive_a_kill(serve, browser, spread_data, tmp_path):
    path, new = tmp_path / "a.jsonl", tmp_path / "new.npz"
    words = [f"--data-path={spread_data}", "--num-pairs=10", f"--labels-path={path}"]
    server, url = serve(*words, "--annotator=anna")
    browser.get(url)
    pair, expected = wait_for_pair(browser), {}

    def press(key, mouse=False):
        nonlocal pair
        if mouse:
            browser.find_element("css selector", f'[data-key="{key}"]').click()
        else:
            browser.find_element("tag name", "body").send_keys(KEYS[key])
        before, pair = pair, wait_for_pair(browser, pair)
        if key in VALUES:
            expected[before] = VALUES[key]

    for index, key in enumerate(("ArrowLeft", "ArrowDown", "ArrowRight", "s", "Backspace", "ArrowRight")):
        press(key, mouse=index % 2)
    assert list(expected.values()) == [1, 0, -1, -1] and path.read_text().count("\n") == 6
    browser.refresh()
    assert wait_for_pair(browser) == pair
    server.kill()
    server.wait()
    browser.find_element("tag name", "body").send_keys(KEYS["ArrowLeft"])
    while not (message := browser.find_element("id", "message").text):
        pass
    assert message.startswith("Not saved") and path.read_text().count("\n") == 6
    path.write_bytes(path.read_bytes() + b'{"half')  # of an answer whose server was killed
    browser.get(serve(*words, "--annotator=anna")[1])
    assert wait_for_pair(browser) == pair
    while pair != "done":
        press("ArrowLeft")
    assert "10 of 10" in browser.find_element("id", "progress").text
    press("Backspace")  # also after the last
    press("s")
    browser.get(serve(*words, "--annotator=bert")[1])
    assert wait_for_pair(browser) == next(iter(expected))  # everybody is asked the same
    browser.find_element("tag name", "body").send_keys(KEYS["ArrowDown"])
    wait_for_pair(browser, next(iter(expected)))
    label.main(label.Args(data_path=str(spread_data), labels_path=(str(path),), export=str(new)))
    data, meta, _ = train_reward.load_dataset(new, "spread", ("actions", "pairs", "labels"))
    rows = [([int(n) for n in pair.split(",")], [x]) for pair, x in expected.items() if x is not None]
    rows.insert(1, (rows[0][0], [0]))  # the second annotator
    assert list(zip(data["pairs"].tolist(), data["labels"].tolist(), strict=True)) == rows and len(rows) == 10
    assert meta["labels"]["answers"] == {"anna": 9, "bert": 1} and meta["labels"]["skipped"] == 1
    assert meta["labels"]["agreement"] == 0 and "steepness" not in meta


def send(host, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(host, timeout=20)
    connection.request(method, path, body, headers)
    return connection.getresponse().status


@pytest.mark.skipif(sys.platform != "linux", reason="limits the files of another process")
def test_an_answer_is_taken_when_it_is_on_the_disk(serve, spread_data, tmp_path, monkeypatch):
    """First fsync fails, then the disk is full after half of the second answer."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.fsync = lambda _: os.stat('synced')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    data, path = train_reward.load_dataset(spread_data, "spread", ("actions", "block"))[0], tmp_path / "a"
    one, two, *_ = label.choose_pairs(label.Args(), data, ())
    server, url = serve(f"--data-path={spread_data}", f"--labels-path={path}")

    def answer(pair):
        body, (host, root) = json.dumps({"pair": pair, "answer": 1, "milliseconds": 5}), url.split("/")[2:4]
        return send(host, "POST", f"/{root}/answer", body)

    assert answer(one) == 500
    Path("synced").touch()
    assert answer(one) == 200
    before, endless = path.stat().st_size, resource.RLIM_INFINITY
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (before + 50, endless))
    assert answer(two) == 500 and path.stat().st_size == before
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (endless, endless))
    assert answer(two) == 200
    assert [tuple(json.loads(x)["pair"]) for x in path.read_text().splitlines()] == [one, one, two]


def test_pictures_of_an_unknown_game_and_who_may_ask(serve, made_up_data, browser, tmp_path):
    Image, path = pytest.importorskip("PIL.Image"), tmp_path / "labels.jsonl"
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    red.save(tmp_path / "7.gif", save_all=True, append_images=[blue])
    (tmp_path / "11").mkdir()
    red.save(tmp_path / "11/9.png")
    blue.save(tmp_path / "11/10.png")
    words = ["--env=made-up", f"--data-path={made_up_data}", f"--frames={tmp_path}", f"--labels-path={path}"]
    url = serve(*words)[1]
    browser.get(url)
    pair = [int(n) for n in wait_for_pair(browser).split(",")]
    assert sorted(pair) == [7, 11]
    loaded = "Array.from($$('img'), (x) => x.decode().then(() => x.naturalWidth))"
    assert browser.execute_script(f"return Promise.all({loaded})") == [8, 8]

    _, _, host, token, _ = url.split("/")
    body, ask = json.dumps({"pair": pair, "answer": 1, "milliseconds": 5}), partial(send, host)
    for headers in ({"Origin": "http://example.org"}, {"Origin": "null"}, {"Host": "example.org"}):
        assert ask("POST", f"/{token}/answer", body, **headers) == ask("GET", f"/{token}/", **headers) == 403
    for place in ("/", "/answer", "answer", "/other/answer", f"/{token}/../label.py", f"/{token}//answer"):
        assert ask("POST", place, body) == ask("GET", place) == 403
    assert ask("GET", f"/{token}/label.py") == ask("GET", f"/{token}/answer") == 500
    for bad in ("{", "[]", body.replace(" 1,", " 2,"), body.replace("[", "[0, ")):
        assert ask("POST", f"/{token}/answer", bad) == 500
    assert path.read_bytes() == b""
    own = {"Origin": f"http://{host}"}
    assert [ask("POST", f"/{token}/answer", body, **own) for _ in range(2)] == [200, 500]  # of two windows
    assert path.read_text().count("\n") == 1


LINE = {"dataset": "c", "annotator": "a", "agent": None, "pair": [0, 1], "answer": 1, "milliseconds": 9}
BROKEN = [{"dataset": "d"}, {"agent": 2}, {"pair": [0, 3]}, {"pair": 0}, {"answer": 2}, {"answer": [1]}]


@pytest.mark.parametrize("line", ["{", "3", "\udcff", *BROKEN])
def test_files_are_merged_and_a_broken_line_is_told_with_its_number(line, tmp_path):
    changes = [{}, {"pair": [1, 0], "answer": None}, {"answer": "undo"}, {"annotator": "b"}, {"agent": 1}]
    lines = [json.dumps(LINE | change).encode() for change in changes]
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    paths[0].write_bytes(b"\n".join([*lines[:3], b""]))
    paths[1].write_bytes(b"\n".join(lines[3:] + lines[:1]))  # the last one has no end
    merged = {("a", None, 1, 0): None, ("b", None, 0, 1): 1, ("a", 1, 0, 1): 1}
    assert label.read_labels(paths, "c", 3, 2) == merged
    text = line if isinstance(line, str) else json.dumps(LINE | line)
    paths[1].write_bytes(b"\n".join([*lines[:2], text.encode(errors="surrogateescape"), *lines]))
    with pytest.raises(label.UserError, match=r"b.jsonl, line 3: no answer about this dataset \(.+\)$"):
        label.read_labels(paths, "c", 3, 2)


def test_agreement_by_hand():
    """Values 1 1, 1 -1, 0 0, -1 -1: observed 2 * 2 ** 2 / 8, expected 2 * (8 * 6 - 0) / (8 * 7)."""
    assert label.krippendorff_alpha([[1, 1], [1, -1], [0], [0, 0], [-1, -1]]) == pytest.approx(1 - 56 / 96)
    assert label.krippendorff_alpha([[1], [-1]]) is label.krippendorff_alpha([[1, 1]]) is None


def test_answers_about_single_agents_are_exported_where_all_are_judged(made_up_data, tmp_path):
    labels = {("a", i, 0, 1): answer for i, answer in enumerate((1, 0, -1, 0))}
    labels |= {("b", 0, 0, 1): -1, ("a", 0, 2, 3): 1, ("a", 1, 2, 3): None}
    meta = {"format": 1, "env": "made-up", "num_actions": 7}
    for name, team, rows in (("a", {}, [[1, 0, -1, 0]]), ("b", {("a", None, 4, 5): 0}, [[0]])):
        label.export(tmp_path / name, made_up_data, labels | team, "c", meta)
        data, new, _ = train_reward.load_dataset(tmp_path / name, "made-up", ("actions", "pairs", "labels"))
        assert data["labels"].tolist() == rows and data["pairs"].tolist() == [[4, 5] if team else [0, 1]]
        assert new["labels"]["unused"] == (6 if team else 2)
    for path, given, problem in (("a", labels, "a: is there"), ("c", {}, "no pair is judged for the team")):
        with pytest.raises(label.UserError, match=problem):
            label.export(tmp_path / path, made_up_data, given, "c", meta)


def test_pairs_stay_in_their_block_and_uncertain_ones_come_first(spread_data, tmp_path):
    data = train_reward.load_dataset(spread_data, "spread", ("observations", "actions", "block"))[0]
    sizes, path = (18, 3, 5), tmp_path / "reward.pt"
    pairs = label.choose_pairs(label.Args(num_pairs=400), data, sizes)
    assert label.choose_pairs(label.Args(num_pairs=300), data, sizes) == pairs[:300]
    assert all(data["block"][a] == data["block"][b] and a != b for a, b in pairs) and len({*pairs}) == 400
    shape = {"sizes": sizes, "hidden_dim": 8}
    model, meta = train_reward.RewardNetwork(**shape), {"network": shape, "sources": {}}
    train_reward.save_checkpoint(path, "reward", train_reward.Args(), meta, model.state_dict(), {}, {})
    args = label.Args(select="uncertain", reward_path=str(path), agent=1)
    returns = model(data["observations"][:, :-1], data["actions"]).sum(dim=1)[:, 1].detach()
    gaps = [(returns[a] - returns[b]).abs().item() for a, b in label.choose_pairs(args, data, sizes)]
    assert gaps == pytest.approx(sorted(gaps), abs=1e-4) and gaps[-1] < returns.std() / 10


MISTAKES = [
    ({"frames": ""}, "made-up: no positions in observations; give --frames FOLDER"),
    ({"agent": 4}, "--agent is from 0 to 3"),
    ({"frames": "0"}, "0: no two trajectories of one block"),
    ({"labels_path": ("0",)}, "Is a directory: '0'"),
    ({"labels_path": ("old",)}, r"old, line 1: .*its checksum is 'c', not \w+: did it change\?"),
    ({}, r"--port \d+: cannot be used .*in use.*; give another"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_told(flags, message, made_up_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old").write_text(json.dumps(LINE) + "\n")
    for name in "01":
        Path(name).mkdir()
        Path(name, "1.png").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Exception, match=message) as error:
        flags = {"frames": ".", "port": taken.getsockname()[1]} | flags
        label.main(label.Args(env="made-up", data_path=str(made_up_data), **flags))
    assert error.type is label.UserError or issubclass(error.type, OSError)  # one line, status 2
