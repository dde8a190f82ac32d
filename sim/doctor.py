"""What is installed and which devices are there: what `kvproof doctor` tells."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, Final

from sim.cores.registry import core_names
from sim.run import package_versions

EXTRAS: Final = {
    "tpu": ("libtpu", "runs on TPUs, and compiles for them ahead of time on machines that have none"),
    "cuda": ("jax_cuda13_plugin", "runs the jax backend on NVIDIA GPUs (platform: gpu)"),
}
"""Extra: (module that it brings, what it gives)."""


def diagnose() -> dict[str, Any]:
    """Versions, devices, backends, cores and extras, as JSON values."""
    devices, problem = _devices()
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": package_versions(),
        "devices": devices,
        "device_problem": problem,
        "backends": sorted(entry.name for entry in entry_points(group="kvproof.backends")),
        "cores": sorted(core_names()),
        "extras": {
            extra: {"installed": find_spec(module) is not None, "gives": gives}
            for extra, (module, gives) in EXTRAS.items()
        },
    }


def _devices() -> tuple[list[dict[str, Any]], str | None]:
    """Every device that JAX shows, and what keeps it from showing any."""
    try:
        from backends.present import present_devices

        return present_devices(), None
    except Exception as error:
        return [], f"{type(error).__name__}: {error}"


def diagnosis_lines(found: dict[str, Any]) -> list[str]:
    """The diagnosis for the console."""
    lines = [f"python {found['python']} ({sys.executable}), {found['machine']}"]
    lines += [f"{package} {version}" for package, version in found["versions"].items()]
    if found["device_problem"]:
        lines.append(f"devices: none, JAX did not start: {found['device_problem']}")
    for device in found["devices"]:
        lines.append(f"device {device['platform']}:{device['id']} {device['kind']}")
    lines.append(f"backends: {', '.join(found['backends']) or 'none (is kvproof installed? pip install -e .)'}")
    lines.append(f"cores: {', '.join(found['cores'])}")
    for extra, state in found["extras"].items():
        word = "installed" if state["installed"] else f"not installed (uv sync --extra {extra})"
        lines.append(f"extra {extra}: {word}; {state['gives']}")
    return lines
