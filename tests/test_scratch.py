"""Folders of temporary weights: none outlives its process, whatever ends it."""

from __future__ import annotations

import signal
import subprocess
import sys

from lxt.scratch import Scratch, remove_abandoned

HOLDS = """
import sys, time
from pathlib import Path
from lxt.scratch import Scratch
scratch = [Scratch(Path(sys.argv[1]), 0) for _ in range(2)]
for one in scratch:
    (one.path / "weights").write_text("w")
print("ready", flush=True)
if len(sys.argv) < 3:
    time.sleep(60)
"""


def holding(parent, *more):
    child = subprocess.Popen([sys.executable, "-c", HOLDS, str(parent), *more], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def test_nothing_is_left_at_exit_and_after_sigterm(tmp_path):
    assert holding(tmp_path, "exit").wait(30) == 0
    assert list(tmp_path.iterdir()) == []
    child = holding(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    child.terminate()
    assert child.wait(30) == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next_and_no_other(tmp_path):
    killed, alive = holding(tmp_path), None
    theirs = set(tmp_path.iterdir())
    killed.kill()
    killed.wait(30)
    try:
        assert set(tmp_path.iterdir()) == theirs
        alive = holding(tmp_path)  # removes them
        assert not theirs & set(tmp_path.iterdir())
        (tmp_path / "somebody's").mkdir()
        assert remove_abandoned(tmp_path) == []
        assert len(list(tmp_path.iterdir())) == 3
    finally:
        if alive is not None:
            alive.kill()
            alive.wait(30)


def test_a_programs_own_sigterm_handler_is_left_alone(tmp_path):
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        handler = signal.getsignal(signal.SIGTERM)
        scratch = Scratch(tmp_path, 0)
        assert signal.getsignal(signal.SIGTERM) is handler
        scratch.remove()
        scratch.remove()
        assert list(tmp_path.iterdir()) == []
    finally:
        signal.signal(signal.SIGTERM, mine)
