"""Compiles a cache's write and step functions for TPUs ahead of time, and reads off what they do with the pools.

Nothing of the size of a pool is allocated: every argument is a shape.
"""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from backends import hlo_text
from backends.hlo_text import HloText, Shape
from backends.jax_programs import Programs
from backends.jax_roads import packed_shape
from backends.protocol import CacheSpec
from paged_attention.sampling import DTYPES
from paged_attention.step_news import SAMPLING, StepShape

_HLO_DTYPES: Final = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "s8", "uint8": "u8"}


@dataclass(frozen=True, slots=True)
class AuditedFunction:
    """One of the programs that a run compiles, with the shapes that it is called with."""

    name: str
    only_writes: bool
    """Whether it does nothing but write: then no device has anything to tell another."""
    function: Any
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler says of one function, per device; sizes in bytes."""

    name: str
    only_writes: bool
    alias_bytes: int = 0
    pool_bytes: int = 0
    pool_array_bytes: int = 0
    """Of the largest array of the pools."""
    unaliased_pools: int = 0
    """Arrays of the pools that come back in other memory than they came in."""
    argument_bytes: int = 0
    temp_bytes: int = 0
    hbm_bytes: int = 0
    """Arguments, temporaries, and results that lie in no argument's memory."""
    pool_copies: tuple[str, ...] = ()
    collectives: tuple[str, ...] = ()
    largest_collective_bytes: int = 0
    cycles: int | None = None
    seconds: float = 0.0
    refused: str = ""
    """Why there is no program: the first line of what tracing or the compiler raised."""


def functions_of(programs: Programs, cache: CacheSpec) -> list[AuditedFunction]:
    """The writes of each part alone, the native step with a chunk and decodes and with decodes only, the rows step."""
    replicated = NamedSharding(programs.mesh, PartitionSpec())

    def whole(shape: tuple[int, ...], dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    pools, slots, chunk = programs.pool_shapes(), cache.batch_size, cache.prefill_chunk
    num_pages = programs.model.metadata.num_pages_per_sequence
    state = (whole((slots,)), whole((slots,)), whole((slots, num_pages)))
    state += tuple(whole((slots,), DTYPES[name]) for name in SAMPLING)

    def native(name: str, chunk_size: int) -> AuditedFunction:
        shape = StepShape(slots, num_pages, 1, 0, slots, chunk_size, True)
        packed, facts = whole((shape.parts()["page_indices"].stop,)), whole((3, int(chunk_size > 0) + slots))
        return AuditedFunction(name, False, programs.native_step(shape), (pools, state, packed, ((), ()), facts))

    def write(name: str, part: Any, rows: int, table: tuple[int, ...]) -> AuditedFunction:
        vectors = [
            jax.ShapeDtypeStruct(
                (rows, cache.kv_heads, cache.head_dim), np.dtype(cache.dtype), sharding=programs.vector_sharding
            )
        ] * cache.layers
        places = (whole((rows,)), whole(()), whole(table))
        return AuditedFunction(name, True, programs.write_part(part), (pools, vectors, vectors, *places))

    packed = whole(packed_shape(1 + slots, num_pages))
    fed = whole((chunk,)) if programs.model.model.kind == "tiny" else None
    return [
        write("write_prefill", "prefill", chunk, (num_pages,)),
        write("write_decodes", "decodes", slots, (slots, num_pages)),
        native("native_step", chunk),
        native("native_step_decodes", 0),
        AuditedFunction("rows_step", False, programs.rows_step(chunk, 1 + slots), (pools, packed, fed)),
    ]


def compile_ahead(programs: Programs, audited: AuditedFunction) -> Compiled:
    """Compile one function for the devices of the programs' mesh; a refusal is a result, not an error."""
    pools = programs.pool_shapes()
    shards = [Shape(_hlo_dtype(pool.dtype), math.prod(pool.sharding.shard_shape(pool.shape))) for pool in pools]
    sizes = [shard.num_bytes for shard in shards]
    start = time.perf_counter()
    try:
        compiled = audited.function.lower(*audited.arguments).compile()
    except Exception as error:
        refused = f"{type(error).__name__}: {str(error).strip().split(chr(10), 1)[0]}"
        seconds = time.perf_counter() - start
        return Compiled(
            audited.name, audited.only_writes, 0, sum(sizes), max(sizes), len(sizes), seconds=seconds, refused=refused
        )
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    hlo = hlo_text.parse(compiled.as_text())
    talks = hlo_text.collectives(hlo)
    return Compiled(
        name=audited.name,
        only_writes=audited.only_writes,
        alias_bytes=memory.alias_size_in_bytes,
        pool_bytes=sum(sizes),
        pool_array_bytes=max(sizes),
        unaliased_pools=_unaliased(hlo, len(pools)),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        hbm_bytes=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        pool_copies=tuple(str(each) for each in hlo_text.whole_pool_copies(hlo, shards)),
        collectives=tuple(str(each) for each in talks),
        largest_collective_bytes=max((shape.num_bytes for each in talks for shape in each.shapes), default=0),
        cycles=hlo.cycles(),
        seconds=seconds,
    )


def _unaliased(hlo: HloText, num_pools: int) -> int:
    """How many of the pools, the first results, lie in no argument's memory."""
    return len(set(range(num_pools)) - hlo.aliased_outputs)


def _hlo_dtype(dtype: Any) -> str:
    name = np.dtype(dtype).name
    return _HLO_DTYPES.get(name, name.replace("float8_", "f8"))
