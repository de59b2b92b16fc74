"""Draw docs/dashboard.png anew: the overview of the dashboard over real traffic of a real gateway.

An experiment splits the traffic between the default model and a run of the quick start; three
clients ask both for sums and say of most answers whether they are right. Needs Debian's chromium
and playwright.

    gmpo train quickstart
    python -m scripts.dashboard_picture
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
from playwright.sync_api import sync_playwright

from gmpo.cli import app
from gmpo.dashboard.serving_page import dashboard_process, free_port
from gmpo.dashboard.settings import DashboardSettings
from gmpo.grading import extract_answer

CHROMIUM = Path("/usr/bin/chromium")
WIDTH, HEIGHT = 1120, 1290
CLIENTS, JUDGED = 3, 0.7
"""Clients at once, and the share of answers that they give a thumb for."""
NAME = "sums"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--control", default="smollm2-135m", help="the model beside the run's")
    parser.add_argument("--out", type=Path, default=Path("docs/dashboard.png"))
    parser.add_argument("--minutes", type=float, default=2.5)
    arguments = parser.parse_args(words)
    if not (arguments.run / "recipe.toml").is_file():
        parser.error(f"{arguments.run} is no run folder; make it with gmpo train quickstart")
    if not CHROMIUM.is_file():
        parser.error(f"there is no {CHROMIUM}; apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store.db")
        begin_experiment(store, arguments.control, arguments.run)
        with gateway(store, arguments.control) as url:
            said = ask_for(60 * arguments.minutes, url, Path(arguments.control).name)
            # Events are written beside the answers, within moments.
            time.sleep(1)
            take_picture(store, arguments.run, arguments.out)
    print(f"{arguments.out}: {said}")
    return 0


def begin_experiment(store: str, control: str, run: Path) -> None:
    """Put the experiment into a new store."""
    command = ["ab", "start", NAME, "--store", store, "--control", control, "--candidate", str(run)]
    app(command, standalone_mode=False)


@contextmanager
def gateway(store: str, control: str) -> Iterator[str]:
    """`gmpo serve` with the experiment, while the block runs; its address."""
    options = ["--store", store, "--experiment", NAME, "--port", "0"]
    command = [sys.executable, "-m", "gmpo.cli", "serve", control, *options]
    # Leaving the block waits for the process and closes the pipe that its first line came through.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said.startswith("serving "):
                raise SystemExit("gmpo serve did not start")
            yield said.split()[-1]
        finally:
            process.terminate()


def ask_for(seconds: float, url: str, model: str) -> str:
    """Have all clients ask for so long; what came of it, in words."""
    until = time.monotonic() + seconds
    judged: list[bool | None] = []
    clients = [
        threading.Thread(target=ask_until, args=(until, url, model, seed, judged))
        for seed in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    thumbs = [one for one in judged if one is not None]
    return (
        f"{CLIENTS} clients asked for {seconds / 60:.1f} minutes; {len(judged)} answers, of which "
        f"{len(thumbs)} were judged and {sum(thumbs)} of those right"
    )


def ask_until(until: float, url: str, model: str, seed: int, judged: list[bool | None]) -> None:
    """One client: a sum, the answer, most of the time a thumb for it, a moment's rest."""
    chance = random.Random(seed)
    with httpx2.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < until:
            left, right = chance.randint(1, 12), chance.randint(1, 12)
            question = f"What is {left} + {right}? Answer with just the number."
            asked = {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 32,
                "temperature": 0.7,
                "user": f"user-{chance.randrange(1000)}",
            }
            answer = client.post("/chat/completions", json=asked).raise_for_status().json()
            is_right = None
            if chance.random() < JUDGED:
                said = answer["choices"][0]["message"]["content"]
                is_right = extract_answer(said, wants_number=True) == str(left + right)
                told = {"request_id": answer["id"], "thumbs": "up" if is_right else "down"}
                client.post("/feedback", json=told).raise_for_status()
            judged.append(is_right)
            time.sleep(chance.expovariate(1.0))


def take_picture(store: str, run: Path, path: Path) -> None:
    """The overview of the last five minutes, in a window of the picture's size."""
    port = free_port("127.0.0.1", 0)
    settings = DashboardSettings(store=store, runs=(str(run),))
    with dashboard_process(settings, host="127.0.0.1", port=port), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_text("5 minutes", exact=True).click()
        page.locator(".js-plotly-plot .main-svg").nth(3).wait_for(timeout=60_000)
        page.locator('[data-testid="stDataFrame"]').first.wait_for(timeout=60_000)
        page.wait_for_timeout(3_000)  # charts move into place
        page.screenshot(path=str(path))
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
