"""Finds the devices that a run asks for, and makes JAX's CPU client cheap for small steps."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from backends.protocol import BackendUnavailableError, CacheSpec, DeviceSpec
from paged_attention.metadata import PAGE_AXES, TENSOR_PARALLEL_AXIS

HEAD_MESH_AXES = ("heads", TENSOR_PARALLEL_AXIS)
"""Mesh axes over which heads are spread; over all others the pages are replicated."""


@dataclass(frozen=True, slots=True)
class HeadsOverMesh:
    """A partition manager: heads over these mesh axes, all else replicated."""

    mesh_axes: tuple[str, ...]

    def partition_spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """The spec of an array with these axes."""
        return PartitionSpec(*((self.mesh_axes or None) if axis == PAGE_AXES[0] else None for axis in axes))


@contextmanager
def one_thread() -> Generator[None]:
    """While this is entered, a CPU client that JAX makes gets one thread and runs steps in the caller's.

    At the size of a decode step, handing work to a pool costs more CPU time than it saves. The size of the pool is that
    of the process's CPU affinity when the client is made; the affinity is put back at the end, that of the client's own
    threads too: they compile, and would do so on one CPU, the same for each process. A client that is there already
    stays as it is.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before, older = os.sched_getaffinity(0), _threads()
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        for thread in _threads() - older:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, before)


def _threads() -> set[int]:
    """The threads of this process, where the system tells."""
    try:
        return {int(thread.name) for thread in Path("/proc/self/task").iterdir()}
    except OSError:
        return set()


def make_mesh(
    devices: DeviceSpec, cache: CacheSpec, present: Sequence[Any] | None = None
) -> tuple[Mesh, HeadsOverMesh]:
    """A mesh of the devices asked for, taken from `present` (None: what JAX finds), and how pages are spread over it.

    BackendUnavailableError: the platform is not there, or has too few devices. ValueError: the heads cannot be divided
    by the mesh.
    """
    sizes = dict(devices.mesh) or {HEAD_MESH_AXES[0]: 1}
    wanted = math.prod(sizes.values())
    head_axes = tuple(axis for axis in HEAD_MESH_AXES if axis in sizes)
    shards = math.prod(sizes[axis] for axis in head_axes)
    if cache.kv_heads % shards:
        raise ValueError(f"{cache.kv_heads} kv_heads cannot be spread over {shards} devices (mesh {sizes})")
    if present is None:
        present = _devices(devices.platform, single=wanted == 1)
    if len(present) < wanted:
        advice = f"; start with XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
        raise BackendUnavailableError(
            f"the mesh {sizes} needs {wanted} {devices.platform} devices, found {len(present)}"
            + (advice if devices.platform == "cpu" else "")
        )
    grid = np.array(present[:wanted]).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes)), HeadsOverMesh(head_axes)


def _devices(platform: str, single: bool) -> list[Any]:
    try:
        if platform == "cpu" and single:
            with one_thread():
                return jax.devices(platform)
        return jax.devices(platform)
    except RuntimeError as error:
        there = sorted({device.platform for device in [*jax.devices(), *jax.devices("cpu")]})
        raise BackendUnavailableError(
            f"platform {platform!r} is not there: JAX {jax.__version__} finds {', '.join(there)}"
        ) from error
