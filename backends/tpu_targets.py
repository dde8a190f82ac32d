"""The TPUs that programs can be compiled for without having one: their names, their memory, their topologies.

Needs libtpu (the `tpu` extra) once a topology is asked for; importing this file needs nothing.
"""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from backends.protocol import BackendUnavailableError

GIB: Final = 2**30
MAX_CHIPS: Final = 16_384
"""More than any slice has."""


@dataclass(frozen=True, slots=True)
class Family:
    """One generation of TPUs."""

    hbm_bytes: int
    """Of one device, as its compiler counts them when it refuses a program: a little less than the data sheet says."""
    dims: int
    """Dimensions of its topologies."""
    example: str
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    """What `get_topology_desc` is told besides."""


FAMILIES: Final = {
    # Cloud TPUs of this generation show both cores of a chip as one device; the compiler's default is one core.
    "v4": Family(int(30.75 * GIB), 3, "2x2x1", {"chip_config_name": "megacore"}),
    "v5e": Family(int(15.75 * GIB), 2, "2x2"),
    "v5p": Family(int(95.74 * GIB), 3, "2x2x1"),
    "v6e": Family(int(31.25 * GIB), 2, "2x2"),
    # Two devices a chip.
    "tpu7x": Family(int(94.75 * GIB), 3, "2x2x1"),
}

FUNCTIONS: Final = ("write_prefill", "write_decodes", "native_step", "native_step_decodes", "rows_step")
"""Names of what `backends.tpu_audit` compiles for a scenario."""

ENVIRONMENT: Final = {
    # Without these, libtpu asks a metadata server of Google's cloud what it runs on, and complains.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Compiling touches no chip: several processes may do so at once, beside one that uses a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu is told before it is loaded; what the user has set stays."""


class UnknownTargetError(Exception):
    """There is no such target; the message lists those that are known."""


@dataclass(frozen=True, slots=True)
class Target:
    """A slice of TPUs: a family and how many chips along each axis."""

    name: str
    family: str
    topology: tuple[int, ...]

    @property
    def hbm_bytes(self) -> int:
        """Memory of one device."""
        return FAMILIES[self.family].hbm_bytes

    def devices(self) -> list[Any]:
        """Its devices, which programs can be compiled for and nothing can be put on.

        BackendUnavailableError: libtpu is not installed. UnknownTargetError: there is no slice of that shape.
        """
        prepare()
        from jax.experimental import topologies

        sizes = (*self.topology, 1, 1)[:3]
        # A host has 2x2 chips; where that does not divide the slice, less.
        host = [1 if axis == 2 or size % 2 else 2 for axis, size in enumerate(sizes)]
        bounds = {} if host == [2, 2, 1] else {"chips_per_host_bounds": host}
        name = f"{self.family}:{'x'.join(map(str, self.topology))}"
        options = {**FAMILIES[self.family].options, **bounds}
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
        except Exception as error:
            raise UnknownTargetError(f"{self.name}: libtpu knows no such slice: {_first_line(error)}") from error


def find_target(name: str) -> Target:
    """The target that "tpu-v5e:2x2" names; "tpu-" may be left out. UnknownTargetError: there is none."""
    match = re.fullmatch(r"(?:tpu-)?([a-z0-9]+):([1-9]\d*(?:x[1-9]\d*){1,2})", name)
    family = FAMILIES.get(match[1]) if match else None
    topology = tuple(int(size) for size in match[2].split("x")) if match else ()
    if match is None or family is None or len(topology) > family.dims or math.prod(topology) > MAX_CHIPS:
        known = ", ".join(known_targets())
        raise UnknownTargetError(f"no target is named {name!r}; known are {known}, and other sizes of these")
    return Target(name, match[1], topology)


def known_targets() -> list[str]:
    """An example of each family."""
    return [f"{name if name.startswith('tpu') else f'tpu-{name}'}:{it.example}" for name, it in FAMILIES.items()]


def prepare() -> None:
    """Tell libtpu and JAX what they must know. BackendUnavailableError: libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise BackendUnavailableError(
            "compiling for TPUs needs libtpu (but no TPU), which is not installed: uv sync --extra tpu, or "
            "pip install 'kvproof[tpu]'"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax

    # Tracing puts constants on a device, and a TPU that is there may be in use.
    jax.config.update("jax_platforms", "cpu")
    # Programs for devices that are not there can be written to the cache, and not read back.
    jax.config.update("jax_enable_compilation_cache", False)


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
