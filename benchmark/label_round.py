"""A simulated annotator, which prefers the team's true return as in collect_data.py, presses the keys of
label.py's page in headless Chromium: a round of labels without people.
Usage: python benchmark/label_round.py --env spread --num-pairs 300"""

import importlib.util
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from train_reward import UserError, load_dataset, run_command_line


@dataclass
class Args:
    env: str = "spread"
    """the game; its dataset is runs/<game>/diversified/dataset.npz"""
    num_pairs: int = 300
    """pairs to answer"""


def open_browser():
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if None in paths or not importlib.util.find_spec("selenium"):
        raise UserError("needs `apt-get install chromium chromium-driver` and `pip install selenium`")
    webdriver = importlib.import_module("selenium.webdriver")
    options, no_network = webdriver.ChromeOptions(), "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    options.binary_location = paths[0]
    for name in ("headless=new", "no-sandbox", "disable-dev-shm-usage", no_network):
        options.add_argument(f"--{name}")
    return webdriver.Chrome(options, webdriver.ChromeService(paths[1]))


def wait_for_pair(browser, before: str = "") -> str:
    """The pair that the page shows, "12,40" or "done", as soon as it is another than `before`."""
    look = "const now = document.body.dataset.pair; now && now !== before ? tell(now) : setTimeout(look, 5);"
    script = f"const [before, tell] = arguments, look = () => {{ {look} }}; look();"
    return browser.execute_async_script(script, before)


def main(args: Args) -> None:
    path, draw, pair = Path(f"runs/{args.env}/diversified/dataset.npz"), random.Random(1).random, ""
    rewards = load_dataset(path, args.env, ("actions", "true_rewards"))[0]["true_rewards"]
    logits, browser = 5 * (x := rewards.sum(dim=1).mean(dim=1)) / x.std(correction=0), open_browser()
    words = f"--env={args.env} --num-pairs={args.num_pairs} --annotator=simulated --port=0".split()
    command = [sys.executable, Path(__file__).with_name("label.py"), *words]
    with browser, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            browser.get(server.stdout.readline().split()[0])
            while (pair := wait_for_pair(browser, pair)) != "done":
                first, second = logits[[int(n) for n in pair.split(",")]]
                key = "\ue012" if draw() < (first - second).sigmoid() else "\ue014"  # left or right
                browser.find_element("tag name", "body").send_keys(key)
        finally:
            server.terminate()


if __name__ == "__main__":
    run_command_line(main, Args, presets={})
