"""Waiting for other calls ends once nothing comes of what they hold."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gmpo.errors import StillHeld
from gmpo.locks import Holder, holder_of, take_lock
from gmpo.study.wait import Held, Patience, signs_of_runs

HOLDER = Holder(pid=12, host="box", since="2026-01-02 03:04:05 UTC")


class Waiting:
    """A call whose minutes pass when the test says so."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 100.0
        self.said: list[str] = []
        self.patience = Patience(
            minutes=minutes, say=self.said.append, go_on="Go on", clock=lambda: self.seconds
        )

    def look(self, *held: Held, after: float = 0.0) -> None:
        self.seconds += after
        self.patience.wait_for(held)


def trial(folder: Path, holder: Holder | None = HOLDER) -> Held:
    signs = signs_of_runs(folder, folder / "trials", "0003")
    return Held(what="trial 3", holder=holder, signs=signs)


def test_it_says_at_once_and_then_every_minute_for_whom_it_waits(tmp_path: Path):
    waiting = Waiting(minutes=60)
    for _ in range(1000):
        waiting.look(trial(tmp_path), after=0.2)
    who = "waiting for other calls: trial 3 (process 12 on box since 2026-01-02 03:04:05 UTC)"
    assert waiting.said == [
        f"{who}; nothing new for {minute} of at most 60 minutes" for minute in range(4)
    ]
    waiting.look(after=1)  # they are over, and some time later others are held
    waiting.look(trial(tmp_path, holder=None), after=5)
    assert waiting.said[4:] == [
        "waiting for other calls: trial 3 (of a process that is not known); nothing new for 0 of "
        "at most 60 minutes"
    ]


def test_it_gives_up_after_so_many_minutes_without_a_sign(tmp_path: Path):
    waiting = Waiting(minutes=2)
    waiting.look(trial(tmp_path))
    waiting.look(trial(tmp_path), after=119)
    with pytest.raises(StillHeld, match=r"trial 3 \(process 12 on box .* for 2 minutes, as long"):
        waiting.look(trial(tmp_path), after=1)


@pytest.mark.parametrize("sign", ["logs/0003.log", "trials/0003/metrics.jsonl"])
def test_a_run_that_gets_on_is_waited_for(sign: str, tmp_path: Path):
    waiting = Waiting(minutes=2)
    file = tmp_path / sign
    file.parent.mkdir(parents=True)
    for size in range(5):
        file.write_text("x" * size)
        waiting.look(trial(tmp_path), after=119)
    # What another run writes says nothing of this one.
    (tmp_path / "logs").mkdir(exist_ok=True)
    (tmp_path / "logs" / "0004.log").write_text("on and on")
    with pytest.raises(StillHeld):
        waiting.look(trial(tmp_path), after=120)


def test_0_minutes_do_not_wait(tmp_path: Path):
    waiting = Waiting(minutes=0)
    waiting.look()
    with pytest.raises(StillHeld):
        waiting.look(trial(tmp_path))
    assert waiting.said == []


def test_a_lock_names_its_last_holder(tmp_path: Path):
    path = tmp_path / "trial.lock"
    assert holder_of(path) is None
    path.write_text("what was there before, and longer than what is written now" * 9)
    assert holder_of(path) is None
    with path.open("a") as first, path.open("a") as second:
        assert take_lock(first)
        assert not take_lock(second)
        found = holder_of(path)
    assert found is not None
    assert (found.pid, found.host) == (os.getpid(), socket.gethostname())
