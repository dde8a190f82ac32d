"""The compiled programs of the JAX backend: which there are, what they are keyed on, and how many were compiled."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding, PartitionSpec

from backends import jax_probe as probe
from backends import jax_roads as roads
from backends.jax_compile_cache import use_compilation_cache
from backends.jax_devices import make_mesh
from backends.jax_step import PagedModel, Pools, ScriptedModel, Writer, load_writer, own_writer
from backends.jax_tiny import DecoderModel
from backends.protocol import CacheSpec, DeviceSpec, ModelSpec
from backends.sharded_writer import on_each_device
from paged_attention import pytree
from paged_attention.batch import ActiveSequenceBatch
from paged_attention.cache import PagedAttentionCache, data_movement_options, page_sharding
from paged_attention.layout import LAYOUTS
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.model_io import State, state_of
from paged_attention.quantize import Int8PerTokenHead
from paged_attention.step_news import StepShape

READER_TILE_PAGES = {"cpu": 256}
"""Pages that the reader reads at once; 4096 on accelerators, where a loop's turns cost more."""


class Programs:
    """Everything that JAX compiles for one cache, one model and one mesh.

    Programs that write donate the pools (their first argument) and give them back in the same place.
    """

    def __init__(
        self, cache: CacheSpec, model: ModelSpec, devices: DeviceSpec, present: Sequence[Any] | None = None
    ) -> None:
        """`present` are the devices to choose from, of which nothing but a description need be there."""
        use_compilation_cache()
        self.mesh, self._heads = make_mesh(devices, cache, present)
        pytree.register()
        self._cache, self._layout = cache, LAYOUTS[cache.layout]
        self._metadata = PagedAttentionCacheMetaData(
            batch_size=cache.batch_size,
            num_hidden_layers=cache.layers,
            num_pages_per_layer=cache.num_pages,
            num_pages_per_sequence=-(-cache.max_sequence_length // cache.page_size),
            max_sequences=cache.max_sequence_length,
            page_size=cache.page_size,
            num_kv_heads=cache.kv_heads,
            kv_head_dim_size=cache.head_dim,
            hbm_utilization=1.0,
        )
        shapes, tree = jax.tree.flatten(jax.eval_shape(self._new_cache))
        tile_pages = READER_TILE_PAGES.get(devices.platform, 4096)
        kind = DecoderModel if model.kind == "tiny" else ScriptedModel
        writer = own_writer if cache.writer is None else self._divided(load_writer(cache.writer))
        self.model: PagedModel = kind(cache, model, self._metadata, tree, tile_pages, writer)
        self._options = data_movement_options(devices.platform, cache.dtype)
        self._replicated = NamedSharding(self.mesh, PartitionSpec())
        self._pool_shardings = tuple(
            page_sharding(self.mesh, self._layout, pool.shape, cache.kv_heads, self._heads) for pool in shapes
        )
        self._pool_shapes = shapes
        # Whole, half and quarter batches: a wide page table costs more to hand over than a program to compile.
        halves = [cache.batch_size // part for part in (4, 2) if cache.batch_size // part >= 16]
        self.decode_buckets = [*halves, cache.batch_size]
        self._made: dict[Any, Any] = {}
        self.num_compiled = 0

    @property
    def num_copies(self) -> int:
        """On how many devices each position of the pages lies: the size of the mesh beyond the axes of the heads."""
        axes = self.mesh.shape.items()
        return math.prod(size for axis, size in axes if axis not in self._heads.mesh_axes)

    def new_pools(self) -> Pools:
        """The arrays of a cache of zeros."""
        if self._interprets:
            from backends.pallas_mode import forget_raised

            forget_raised()
        return tuple(jax.tree.leaves(self._new_cache()))

    def pool_shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What `new_pools` would make, without making it."""
        return tuple(
            jax.ShapeDtypeStruct(pool.shape, pool.dtype, sharding=sharding)
            for pool, sharding in zip(self._pool_shapes, self._pool_shardings, strict=True)
        )

    @property
    def vector_sharding(self) -> NamedSharding:
        """Of K and V as a model gives them, (tokens, heads, head_dim): each device has its own heads."""
        return NamedSharding(self.mesh, PartitionSpec(None, self._heads.mesh_axes or None))

    def new_state(self) -> State:
        """The arrays of a device batch of free slots."""
        return state_of(ActiveSequenceBatch.create(self._metadata, self.mesh))

    def native_step(self, shape: StepShape) -> Callable[..., Any]:
        """(pools, state, packed, held, facts) -> (pools, state, prefill output, yielded); also donates the state."""
        return self._made.get(shape) or self._writing(
            shape, partial(roads.native_step, self.model, shape), num_results=3, donate=(0, 1)
        )

    def rows_step(self, chunk_rows: int, num_packed: int) -> Callable[..., Any]:
        """(pools, packed rows[, the chunk's tokens]) -> (pools, yielded)."""
        key = (chunk_rows, num_packed)
        return self._made.get(key) or self._writing(key, partial(roads.rows_step, self.model, chunk_rows), 1)

    def write_part(self, part: roads.PartName) -> Callable[..., Any]:
        """(pools, keys, values, *places) -> (pools,): the writes of one part alone, K and V of each layer given."""
        return self._writing(("write_part", part), partial(roads.write_part, self.model, part), num_results=0)

    def spoil_pages(self, how: Literal["nan", "big"]) -> Callable[..., Any]:
        """(pools, page ids) -> (pools,)."""

        def spoil(pools: Pools, page: Any) -> tuple[Pools]:
            return (probe.spoil_pages(self.model, pools, page, how),)

        return self._writing(("spoil_pages", how), spoil, num_results=0)

    def differing_bits(self, width: int) -> Callable[..., Any]:
        """(pools, packed places) -> each head's differing bits."""
        key = ("differing_bits", width)
        return self._made.get(key) or self._reading(key, partial(probe.differing_bits, self.model))

    def place_words(self, width: int) -> Callable[..., Any]:
        """(pools, pages, offsets) -> (words, scales)."""
        return self._reading(("place_words", width), partial(probe.place_words, self.model))

    def _new_cache(self) -> PagedAttentionCache:
        quantizer = Int8PerTokenHead(self._cache.dtype) if self._cache.quantize else None
        return PagedAttentionCache.init_cache(
            self.mesh, self._cache.dtype, self._metadata, self._heads, quantizer, layout=self._layout
        )

    def _writing(self, key: Any, body: Callable[..., Any], num_results: int, donate: tuple[int, ...] = (0,)) -> Any:
        shardings = (self._pool_shardings, *[self._replicated] * num_results)
        return self._program(key, body, donate_argnums=donate, out_shardings=shardings)

    def _reading(self, key: Any, body: Callable[..., Any]) -> Any:
        # Replicated: each of several processes can fetch only what lies on its own devices.
        return self._program(key, body, out_shardings=self._replicated)

    def _program(self, key: Any, body: Callable[..., Any], **jit_options: Any) -> Any:
        if key not in self._made:

            def counted(*args: Any) -> Any:
                self.num_compiled += 1  # runs while JAX traces, which is once for each program that it compiles
                with self._pallas_mode():
                    return body(*args)

            self._made[key] = jax.jit(counted, compiler_options=self._options, **jit_options)
        return self._made[key]

    def _divided(self, writer: Writer) -> Writer:
        if self.mesh.size == 1:
            return writer
        return on_each_device(writer, self.mesh, self._layout, self._heads.mesh_axes)

    @property
    def _interprets(self) -> bool:
        """Whether a writer may bring Pallas kernels for TPU to a CPU, where they are interpreted, copy by copy."""
        return self._cache.writer is not None and self.mesh.devices.flat[0].platform == "cpu"

    def _pallas_mode(self) -> AbstractContextManager[None]:
        """Under which programs are traced."""
        if not self._interprets:
            return nullcontext()
        from backends.pallas_mode import interpreted

        return interpreted()


@functools.lru_cache(maxsize=32)
def programs_for(
    cache: CacheSpec, model: ModelSpec, platform: Literal["cpu", "gpu", "tpu"], mesh: tuple[tuple[str, int], ...]
) -> Programs:
    """The programs for these specifications; made once in a process, as JAX's own compiled programs are."""
    return Programs(cache, model, DeviceSpec(platform, dict(mesh)))
