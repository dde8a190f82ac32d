"""Measures the write paths on one CPU device: pages written beside a plain memcpy of as many bytes, in one process."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np

from backends.jax_devices import one_thread
from paged_attention import writes
from paged_attention.cache import data_movement_options
from paged_attention.layout import LAYOUTS

LAYERS: Final = 2
HEADS: Final = 8
HEAD_DIM: Final = 128
PAGE_SIZE: Final = 64
NUM_PAGES: Final = 160
CALLS: Final = 4
"""Calls in a row that are timed as one."""

Dtype = Literal["bfloat16", "float32", "float16", "float8_e4m3fn", "float8_e5m2", "int8_scales"]


@dataclass(frozen=True, slots=True)
class WriteCase:
    """One write path: K and V of every layer in one jit with donated pools, at places that change from call to call."""

    layout: str
    dtype: Dtype
    """int8_scales: int8 vectors and a float32 scale for each, both written."""
    part: Literal["decode", "prefill"]
    rows: int
    """Slots of a decode; tokens of a chunk that begins and ends with a page."""


@dataclass(frozen=True, slots=True)
class WriteTimes:
    """The least time of each, in seconds a call."""

    num_bytes: int
    """What one call writes."""
    write: float
    call: float
    """A jit with the same arguments that gives the pools back as they are: what calling costs by itself."""
    memcpy: float
    """np.copyto of num_bytes to a place that changes in a buffer of the size of the pools."""


def measure_write(case: WriteCase, seconds: float, seed: int = 0) -> WriteTimes:
    """Write, call and copy in turn for `seconds`, on a client of one thread (if nobody has made another one yet)."""
    with one_thread():
        jax.devices("cpu")
    random = np.random.default_rng(seed)
    pools, tokens = _arrays(case)
    write, call = _programs(case)
    num_bytes = sum(array.nbytes for array in tokens)
    pool = np.ones(sum(array.nbytes for array in pools), np.uint8)
    piece = np.ones(num_bytes, np.uint8)
    least: dict[str, float] = {"write": np.inf, "call": np.inf, "memcpy": np.inf}
    end, warm = time.perf_counter() + seconds, False
    while not warm or time.perf_counter() < end:
        places = [_places(case, random) for _ in range(CALLS)]
        starts = random.integers(0, pool.size - num_bytes, CALLS).tolist()
        for name, program in (("write", write), ("call", call)):
            start = time.perf_counter()
            for where in places:
                pools = program(pools, tokens, *where)
            jax.block_until_ready(pools)
            taken = (time.perf_counter() - start) / CALLS
            # The first turn compiles.
            least[name] = min(least[name], taken) if warm else np.inf
        start = time.perf_counter()
        for at in starts:
            np.copyto(pool[at : at + num_bytes], piece)
        least["memcpy"] = min(least["memcpy"], (time.perf_counter() - start) / CALLS)
        end, warm = (end if warm else time.perf_counter() + seconds), True
    for array in pools:
        array.delete()
    return WriteTimes(num_bytes, **least)


def _arrays(case: WriteCase) -> tuple[list[Any], list[Any]]:
    """The pools of every layer, K before V and values before scales, and the tokens of one call."""
    shape = LAYOUTS[case.layout].shape(HEADS, NUM_PAGES, PAGE_SIZE, HEAD_DIM)
    rows = (case.rows, HEADS, HEAD_DIM)
    kinds: list[tuple[Any, int]] = [(jnp.dtype("int8" if case.dtype == "int8_scales" else case.dtype), 4)]
    if case.dtype == "int8_scales":
        kinds.append((jnp.dtype("float32"), 3))
    layer = [kind for _ in "KV" for kind in kinds]
    pools = [jnp.zeros(shape[:ndim], dtype) for _ in range(LAYERS) for dtype, ndim in layer]
    return pools, [jnp.ones(rows[: ndim - 1], dtype) for _ in range(LAYERS) for dtype, ndim in layer]


def _programs(case: WriteCase) -> tuple[Callable[..., list[Any]], Callable[..., list[Any]]]:
    layout, part = LAYOUTS[case.layout], writes.DECODES if case.part == "decode" else writes.PREFILL

    def write(pools: list[Any], tokens: list[Any], *where: Any) -> list[Any]:
        num = len(pools) // LAYERS
        layers = [slice(at, at + num) for at in range(0, len(pools), num)]
        return [pool for one in layers for pool in part.jax(layout, pools[one], tokens[one], *where, PAGE_SIZE)]

    def call(pools: list[Any], tokens: list[Any], *where: Any) -> list[Any]:
        return pools

    options = data_movement_options("cpu", "int8" if case.dtype == "int8_scales" else case.dtype)
    jitted = [jax.jit(body, donate_argnums=0, keep_unused=True, compiler_options=options) for body in (write, call)]
    return jitted[0], jitted[1]


def _places(case: WriteCase, random: np.random.Generator) -> tuple[Any, ...]:
    """(positions, page tables) of a decode, (positions, length, page table) of a chunk; pages in random order."""
    pages = random.permutation(np.arange(1, NUM_PAGES, dtype=np.int32))
    if case.part == "decode":
        return random.integers(0, PAGE_SIZE, case.rows).astype(np.int32), pages[: case.rows, None].copy()
    return np.arange(case.rows, dtype=np.int32), np.int32(case.rows), pages[: case.rows // PAGE_SIZE].copy()
