"""Pieces of a pool read and replaced, so that a TPU need not lay out an array of scales anew.

A TPU keeps the two innermost axes of an array in tiles, 128 lanes wide. Scales have no head_dim to lie along the lanes:
their pages do (or the places of a page, where these fill whole tiles). Asked for a piece that is one page wide, the
compiler copies the whole array into an order in which such pieces are dense, and back. Asked for whole lines of lanes,
it reads and writes them where they lie. So on a TPU a piece of scales is taken out of, and merged into, whole lines.

Axes are named by a layout's `axes`; an array without the last one, head_dim, is one of scales. `start` has an entry for
each axis.
"""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import Any, Final

LANES: Final = 128
"""Width of a TPU's tiles."""


def is_scale(pool: Any, axes: tuple[str, ...]) -> bool:
    """Whether an array of a pool has one number, and no vector, for each place of a head."""
    return pool.ndim < len(axes)


def get(pool: Any, start: tuple[Any, ...], size: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    """The piece of `pool` of this size (an entry for each axis that it has) at `start`."""
    from jax import lax

    def at_once(pool: Any, *start: Any) -> Any:
        return lax.dynamic_slice(pool, start, size)

    def in_lines(pool: Any, *start: Any) -> Any:
        axis = _lane_axis(pool, axes)
        if size[axis] > 1:
            return at_once(pool, *start)
        where, lines = _lines(pool, start, size, axis)
        # A slice of a slice would become one that is too narrow.
        read = lax.optimization_barrier(lax.dynamic_slice(pool, where, lines))
        return lax.dynamic_slice_in_dim(read, start[axis] - where[axis], 1, axis)

    if not is_scale(pool, axes):
        return at_once(pool, *start)
    return lax.platform_dependent(pool, *start[: pool.ndim], tpu=in_lines, default=at_once)


def put(pool: Any, piece: Any, start: tuple[Any, ...], axes: tuple[str, ...]) -> Any:
    """`pool` with `piece` at `start`."""
    import jax.numpy as jnp
    from jax import lax

    def at_once(pool: Any, piece: Any, *start: Any) -> Any:
        return lax.dynamic_update_slice(pool, piece, start)

    def in_lines(pool: Any, piece: Any, *start: Any) -> Any:
        axis = _lane_axis(pool, axes)
        if piece.shape[axis] > 1:
            return at_once(pool, piece, *start)
        where, lines = _lines(pool, start, piece.shape, axis)
        here = lax.broadcasted_iota(jnp.int32, lines, axis) == start[axis] - where[axis]
        return lax.dynamic_update_slice(pool, jnp.where(here, piece, lax.dynamic_slice(pool, where, lines)), where)

    if not is_scale(pool, axes):
        return at_once(pool, piece, *start)
    return lax.platform_dependent(pool, piece, *start[: pool.ndim], tpu=in_lines, default=at_once)


def _lane_axis(pool: Any, axes: tuple[str, ...]) -> int:
    """The axis of scales that lies along the lanes: the pages, or the places of a page that fills whole tiles."""
    page = axes.index("page")
    return page if pool.shape[page] % LANES == 0 else axes.index("pages")


def _lines(pool: Any, start: tuple[Any, ...], size: tuple[int, ...], axis: int) -> tuple[Any, tuple[int, ...]]:
    """Start and size of the whole lines along `axis` that hold a piece which is one wide there.

    The last line of a pool that does not fill it overlaps the one before.
    """
    import jax.numpy as jnp

    lanes = min(LANES, pool.shape[axis])
    first = jnp.minimum(start[axis] // LANES * LANES, pool.shape[axis] - lanes)
    return (*start[:axis], first, *start[axis + 1 :]), (*size[:axis], lanes, *size[axis + 1 :])
