"""How many host devices JAX shows is fixed once it has started: who wants another count gets a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from math import prod
from typing import Final

from sim.scenario import Scenario

FLAG: Final = "--xla_force_host_platform_device_count"


def wanted_count(scenario: Scenario) -> int:
    """Host devices that the scenario's mesh needs; 1 where it runs on no CPU mesh."""
    backend = scenario.backend
    return prod(backend.mesh.values()) if backend.platform == "cpu" else 1


def forced_count() -> int:
    """Host devices that this process was told to show."""
    found = re.findall(rf"{FLAG}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(found[-1]) if found else 1


def run_with_devices(count: int, arguments: list[str]) -> tuple[str, int]:
    """Run `kvproof ARGUMENTS` with `count` host devices; what it wrote to stdout, and its exit status.

    A KeyboardInterrupt reaches the child too; what it saved and said counts.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}={count}".strip()
    command = [sys.executable, "-m", "sim.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "XLA_FLAGS": flags}) as child:
        while True:
            try:
                output, _ = child.communicate()
            except KeyboardInterrupt:
                continue
            return output, child.returncode
