"""Compiles the write and step functions of a scenario for a TPU that is not there, and judges what they do.

    scenario --cache_spec, mesh--> Programs --functions_of--> compile_ahead --> Compiled --faults--> FunctionReport

The functions are those that a run of the scenario compiles, at its pool size and on its mesh; nothing is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from backends.protocol import DeviceSpec
from backends.tpu_targets import FUNCTIONS, Target, UnknownTargetError
from sim.build import SetupError, cache_spec, model_spec
from sim.mutants import find_mutant, planted
from sim.scenario import Scenario

if TYPE_CHECKING:
    from backends.tpu_audit import Compiled

LANES: Final = 128
"""Words of one row of a TPU's tiles."""

SMALL_ARRAY: Final = 16 * 2**20
"""Bytes. What a step needs besides may outweigh a smaller array of the pools: temporaries then tell nothing."""

MIB: Final = 2**20
GIB: Final = 2**30
FOR_TPU: Final = ("backend.kind=jax", "backend.platform=tpu")
"""Overrides under which a scenario is audited, so that no machine's memory limits its pools."""


@dataclass(frozen=True, slots=True)
class FunctionReport:
    """One function and the verdict on it."""

    compiled: Compiled
    why: tuple[str, ...]
    """What is wrong with it; nothing: it passes."""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.why

    def to_json(self) -> dict[str, Any]:
        """Counts and sizes (bytes, of one device) as JSON values."""
        found = self.compiled
        return {
            "name": found.name,
            "passed": self.passed,
            "why": list(self.why),
            "alias_bytes": found.alias_bytes,
            "pool_bytes": found.pool_bytes,
            "temp_bytes": found.temp_bytes,
            "pool_copies": len(found.pool_copies),
            "collectives": len(found.collectives),
            "hbm_bytes": found.hbm_bytes,
            "cycles": found.cycles,
            "seconds": round(found.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class TargetReport:
    """Every function of a scenario on one target."""

    target: Target
    mesh: dict[str, int]
    functions: tuple[FunctionReport, ...]

    @property
    def passed(self) -> bool:
        """Whether every function passes."""
        return all(function.passed for function in self.functions)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "target": self.target.name,
            "passed": self.passed,
            "mesh": self.mesh,
            "hbm_limit_bytes": self.target.hbm_bytes,
            "functions": [function.to_json() for function in self.functions],
        }


def audit(
    scenario: Scenario,
    target: Target,
    progress: Callable[[str], None] = lambda _: None,
    only: Collection[str] = FUNCTIONS,
) -> TargetReport:
    """Compile and judge a scenario's functions on one target; `progress` is told what comes next.

    BackendUnavailableError: libtpu is not installed. UnknownTargetError: there is no such slice, or it is smaller than
    the scenario's mesh. SetupError: the cache, its mesh or its writer make no sense. UnknownMutantError: see `plant`.
    """
    devices = target.devices()
    from backends.jax_programs import Programs
    from backends.tpu_audit import compile_ahead, functions_of

    mesh, cache = mesh_of(scenario, target, len(devices)), cache_spec(scenario)
    with planted(find_mutant(scenario.plant) if scenario.plant else None):
        try:
            programs = Programs(cache, model_spec(scenario), DeviceSpec("tpu", mesh), devices)
        except ValueError as error:
            raise SetupError(f"backend: {error}") from error
        reports: list[FunctionReport] = []
        functions = [function for function in functions_of(programs, cache) if function.name in only]
        for nth, function in enumerate(functions, 1):
            progress(f"{target.name}: compiling {function.name} ({nth} of {len(functions)})")
            compiled = compile_ahead(programs, function)
            reports.append(FunctionReport(compiled, tuple(faults(compiled, target.hbm_bytes, cache.head_dim))))
    return TargetReport(target, mesh, tuple(reports))


def mesh_of(scenario: Scenario, target: Target, num_devices: int) -> dict[str, int]:
    """The scenario's mesh; without one, the heads over all devices where they divide, else one device.

    UnknownTargetError: the target has fewer devices than the mesh.
    """
    mesh = scenario.backend.mesh
    wanted = math.prod(mesh.values())
    if wanted > num_devices:
        raise UnknownTargetError(
            f"{target.name} has {num_devices} devices, backend.mesh {dict(mesh)} needs {wanted}: choose a larger one"
        )
    if mesh:
        return {str(axis): size for axis, size in mesh.items()}
    return {"heads": num_devices if scenario.cache.kv_heads % num_devices == 0 else 1}


def faults(found: Compiled, hbm_limit: int, head_dim: int) -> list[str]:
    """What is wrong with a function: sentences, none where it passes."""
    why: list[str] = []
    if head_dim % LANES:
        why.append(
            f"cache.head_dim {head_dim} is no multiple of {LANES}, the width of a TPU's tiles: whole pools are padded "
            f"or copied; pad it to {-(-head_dim // LANES) * LANES}"
        )
    if found.refused:
        return [*why, f"there is no program: {found.refused}"]
    if found.pool_copies:
        why.append(f"{_count(len(found.pool_copies), 'copy')} of a whole pool: {found.pool_copies[0]}")
    if found.unaliased_pools or found.alias_bytes < found.pool_bytes:
        why.append(
            f"donation is lost for {_count(found.unaliased_pools, 'array')} of the pools: "
            f"{_mib(found.alias_bytes)} of {_mib(found.pool_bytes)} are written in place"
        )
    if found.temp_bytes >= found.pool_array_bytes >= SMALL_ARRAY:
        why.append(f"temporaries of {_mib(found.temp_bytes)}: an array of the pools has {_mib(found.pool_array_bytes)}")
    if found.only_writes and found.collectives:
        why.append(
            f"{_count(len(found.collectives), 'collective')} in a function that only writes: {found.collectives[0]}"
        )
    elif found.largest_collective_bytes >= found.pool_array_bytes:
        why.append(f"a collective moves {_mib(found.largest_collective_bytes)}, as much as an array of the pools")
    if found.hbm_bytes > hbm_limit:
        why.append(f"needs {found.hbm_bytes / GIB:.2f} GiB of each device's {hbm_limit / GIB:.2f} GiB of HBM")
    return why


def _count(number: int, noun: str) -> str:
    plural = "copies" if noun == "copy" else noun + "s"
    return f"{number} {noun if number == 1 else plural}"


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
