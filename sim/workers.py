"""Processes that share work, and end with the one that began them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import TypeVarTuple

from sim.exit_codes import ExitCode

A = TypeVarTuple("A")


def workers(jobs: int, prepare: Callable[[*A], None], *args: *A) -> ProcessPoolExecutor:
    """A pool of `jobs` spawned processes, each of which calls `prepare(*args)` before its first job."""
    return ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin, initargs=(prepare, args))


def _begin(prepare: Callable[[*A], None], args: tuple[*A]) -> None:
    # Nobody tells the workers of a process that was killed: they would wait for their next job for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*args)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(ExitCode.INTERRUPTED)
