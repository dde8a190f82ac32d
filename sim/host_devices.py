"""What JAX fixes once it has started: how many host devices it shows, and how hard its compiler tries."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from math import prod
from typing import Final

from backends.protocol import BackendUnavailableError, ProcessShare
from sim.exit_codes import ExitCode
from sim.scenario import Scenario

FLAG: Final = "--xla_force_host_platform_device_count"


QUICK_COMPILE: Final = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Whoever compiles many programs and runs each a few times pays for compiling."""
QUICKER_IN: Final = {"0.10": "--xla_cpu_use_fusion_emitters=false"}
"""By release of jaxlib: what halves it again. XLA ends a process whose flags it does not know."""


def compile_quickly() -> None:
    """Have the compiler try less hard in this process and its children; of no effect once JAX has started."""
    release = ".".join(version("jaxlib").split(".")[:2])
    flags = os.environ.get("XLA_FLAGS", ""), QUICK_COMPILE, QUICKER_IN.get(release, "")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))


def wanted_count(scenario: Scenario, share: ProcessShare | None = None) -> int:
    """Host devices that this process needs for the scenario's mesh; 1 where it runs on no CPU mesh.

    BackendUnavailableError: the processes cannot share the mesh evenly.
    """
    backend, processes = scenario.backend, 1 if share is None else share.count
    devices = prod(backend.mesh.values())
    if devices % processes:
        raise BackendUnavailableError(
            f"{processes} processes cannot share the {devices} devices of backend.mesh evenly; change one of them"
        )
    return devices // processes if backend.platform == "cpu" else 1


def needs_own_process(scenario: Scenario, share: ProcessShare | None = None) -> bool:
    """Whether the scenario wants more CPU devices than this process was told to have, or shares its mesh with others.

    JAX aborts a process whose partners don't come: somebody has to be left to say so.
    """
    return wanted_count(scenario, share) > forced_count() or (share is not None and not _forced())


def forced_count() -> int:
    """Host devices that this process was told to show."""
    return int((_forced() or ["1"])[-1])


def _forced() -> list[str]:
    return re.findall(rf"{FLAG}=(\d+)", os.environ.get("XLA_FLAGS", ""))


class ChildEndedError(RuntimeError):
    """A signal ended the process of a sharded run; the message names it."""


def run_with_devices(count: int, arguments: list[str]) -> tuple[str, int]:
    """Run `kvproof ARGUMENTS` with `count` host devices; what it wrote to stdout, and its exit status.

    A Ctrl-C is handed on to the child, and what the child saved and said then counts. ChildEndedError: another signal
    ended the child.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}={count}".strip()
    # In a process group of its own: a terminal sends Ctrl-C to the whole group, and two of them end a run unsaved.
    with subprocess.Popen(
        [sys.executable, "-m", "sim.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
        process_group=0,
    ) as child:
        while True:
            try:
                output, _ = child.communicate()
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
                continue
            return output, _exit_status(child.returncode)


def _exit_status(code: int) -> int:
    """The status of a child that ended by itself, or of a Ctrl-C before it could catch one."""
    if code == -signal.SIGINT:
        return ExitCode.INTERRUPTED
    if code < 0:
        raise ChildEndedError(f"the process of the sharded run was ended by {signal.Signals(-code).name}")
    return code
