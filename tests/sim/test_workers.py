"""Pools of processes: whoever began them may be killed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from tests.sim.page_parts import ROOT

PROGRAM = """
import fcntl, sys, time
from sim.workers import workers

def hold(path):
    global held
    held = open(path, "w")
    fcntl.flock(held, fcntl.LOCK_EX)

if __name__ == "__main__":
    with workers(1, hold, sys.argv[1]) as pool:
        print(pool.submit(abs, -1).result(), flush=True)
        time.sleep(600)
"""


def test_a_worker_ends_when_the_process_that_began_it_is_killed(tmp_path: Path) -> None:
    program, lock = tmp_path / "program.py", tmp_path / "lock"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(lock)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Python's tracker of semaphores, which outlives a killed process, complains of those that it left.
    streams: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=environment, **streams) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        process.kill()
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # returns once the worker is gone
