"""What NumPy and JAX arrays have in common here: which library an array belongs to, and rows put into it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    Array: TypeAlias = jax.Array | NDArray[Any]


def is_jax_array(value: object) -> bool:
    """Whether the value is a JAX array (a tracer included); imports nothing."""
    return "jax" in sys.modules and isinstance(value, sys.modules["jax"].Array)


def array_module(*values: object) -> ModuleType:
    """jax.numpy where one of the values is a JAX array, else numpy."""
    if any(is_jax_array(value) for value in values):
        import jax.numpy as jnp

        return jnp
    return np


def put_rows(target: Any, index: Any, rows: Any) -> Any:
    """A copy of `target` with target[index[i]] = rows[i]; an index past the end is dropped.

    `index` is an int32 array or a tuple of them, one per axis. A negative index is the caller's mistake: both
    libraries would count it from the end.
    """
    axes = cast("tuple[Any, ...]", index) if isinstance(index, tuple) else (index,)
    if is_jax_array(target):
        return target.at[axes].set(rows, mode="drop")
    inside = np.all([np.asarray(a) < size for a, size in zip(axes, target.shape, strict=False)], axis=0)
    result = np.array(target)
    result[tuple(np.asarray(a)[inside] for a in axes)] = np.asarray(rows)[inside]
    return result


def place(mesh: Mesh | None, *arrays: NDArray[Any] | np.generic) -> tuple[Any, ...]:
    """The arrays as they are where mesh is None, else replicated over the mesh."""
    if mesh is None:
        return arrays
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return tuple(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())))


def is_present(array: Any) -> bool:
    """Whether an array holds anything: placeholders for absent parts have shape ()."""
    return array.ndim > 0 and array.size > 0
