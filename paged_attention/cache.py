"""The paged K/V cache: one view per layer, which writes a step's keys and values into their pages."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from numpy.typing import DTypeLike

from paged_attention import writes
from paged_attention.layout import HEADS_FIRST, LAYOUTS, Layout
from paged_attention.metadata import (
    PAGE_AXES,
    TENSOR_PARALLEL_AXIS,
    PagedAttentionCacheMetaData,
    PartitionManager,
    head_shards,
)
from paged_attention.pytree import SerializableTree, register
from paged_attention.quantize import Quantizer

if TYPE_CHECKING:
    from jax.sharding import Mesh, NamedSharding

    from paged_attention.model_io import PagedAttentionMetadata


def data_movement_options(platform: str, dtype: DTypeLike) -> dict[str, str] | None:
    """Compiler options for a jit that only moves cache words about.

    On the CPU XLA rewrites every bf16 and fp8 write as a conversion of the whole pool to float32 and back, which costs
    the size of the pool and changes the bits of NaNs that nobody wrote. A jit that does no arithmetic in those types
    does without the pass that does so. (A bf16 dot does not compile without it.)
    """
    passes = {
        np.dtype(ml_dtypes.bfloat16): "float-normalization-bf16",
        np.dtype(ml_dtypes.float8_e4m3fn): "float-normalization-f8e4m3fn,float-normalization-f8e5m2",
        np.dtype(ml_dtypes.float8_e5m2): "float-normalization-f8e4m3fn,float-normalization-f8e5m2",
    }
    name = passes.get(np.dtype(dtype)) if platform == "cpu" else None
    return None if name is None else {"xla_disable_hlo_passes": name}


@dataclass(frozen=True)
class PagedAttentionCacheView(SerializableTree):
    """The pages of one layer.

    `key_pages` and `value_pages` are NumPy or JAX arrays whose axes are those of `layout` (heads_first: num_kv_heads,
    num_pages_per_layer, page_size, kv_head_dim_size), or the pytree that `quantizer` made of such an array. A view is
    a value: writing gives a new one and leaves the old one as it was (donate it to `jax.jit` to write in place).
    """

    tree_leaves: ClassVar[tuple[str, ...]] = ("key_pages", "value_pages")
    tree_static: ClassVar[tuple[str, ...]] = ("metadata", "layer_index", "layout", "quantizer")

    metadata: PagedAttentionCacheMetaData
    layer_index: int
    key_pages: Any
    value_pages: Any
    layout: str = HEADS_FIRST.name
    """A key of paged_attention.layout.LAYOUTS."""
    quantizer: Quantizer | None = None

    @classmethod
    def init(
        cls,
        mesh: Mesh | None,
        dtype: DTypeLike,
        metadata: PagedAttentionCacheMetaData,
        layer_index: int,
        partition_manager: PartitionManager | None = None,
        quantizer: Quantizer | None = None,
        *,
        layout: Layout = HEADS_FIRST,
    ) -> PagedAttentionCacheView:
        """A view of zeros for one layer: NumPy arrays where `mesh` is None, else arrays sharded over it.

        Without a partition manager the heads lie on the tensor-parallel axis ("tp", where the mesh has it and its size
        divides them) and all else is replicated. Each array of a quantised pool is asked for on its own, with as many
        of the axes as it has.
        """
        shape = layout.shape(
            metadata.num_kv_heads, metadata.num_pages_per_layer, metadata.page_size, metadata.kv_head_dim_size
        )
        pages = [_zeros(shape, dtype, mesh, layout, partition_manager, quantizer) for _ in ("key", "value")]
        return cls(metadata, layer_index, *pages, layout=layout.name, quantizer=quantizer)

    def write_prefill_to_cache(
        self,
        key: Shaped[np.ndarray, "chunk heads head_dim"],
        value: Shaped[np.ndarray, "chunk heads head_dim"],
        metadata: PagedAttentionMetadata,
    ) -> PagedAttentionCacheView:
        """A view with each real row of a prefill chunk at its own place; see `writes` for what real means.

        A chunk that starts in the middle of a page leaves the tokens before it alone. Without prefill information in
        `metadata` it gives this view. ValueError (outside `jax.jit`): a page id outside the pool, or a table too short;
        under `jax.jit` such rows are dropped, and checking is the caller's part.
        """
        position, table = metadata.prefill_position, metadata.prefill_page_table
        length: Any = metadata.prefill_length
        if position.ndim == 0 or position.shape[0] == 0:
            return self
        return self._write(key, value, writes.PREFILL, (position, length, table))

    def write_decodes_to_cache(
        self,
        key: Shaped[np.ndarray, "slots heads head_dim"],
        value: Shaped[np.ndarray, "slots heads head_dim"],
        metadata: PagedAttentionMetadata,
    ) -> PagedAttentionCacheView:
        """A view with the token of each live slot at its place; a slot at position -1 writes nothing.

        Without decode information in `metadata` it gives this view. ValueError: as for `write_prefill_to_cache`.
        """
        position, table = metadata.decodes_position, metadata.decodes_page_table
        if position.ndim == 0 or position.shape[0] == 0:
            return self
        return self._write(key, value, writes.DECODES, (position, table))

    def concatenate_to_cache(self, *args: Any, **kwargs: Any) -> None:
        """NotImplementedError: pages are written in place, nothing is ever concatenated to them."""
        raise NotImplementedError(
            "a paged cache is not concatenated to: use write_prefill_to_cache and write_decodes_to_cache"
        )

    def _write(self, key: Any, value: Any, part: writes.Part, where: tuple[Any, ...]) -> PagedAttentionCacheView:
        layout, page_size = LAYOUTS[self.layout], self.metadata.page_size
        pools, tree = _flatten((self.key_pages, self.value_pages), self.quantizer)
        tokens, _ = _flatten((self._stored(key), self._stored(value)), self.quantizer)
        if all(isinstance(array, np.ndarray) for array in (*pools, *tokens)):
            where = tuple(np.asarray(array) for array in where)
            part.check(*where, page_size, layout.num_pages(pools[0]))
            written = part.numpy(layout, pools, tokens, *where, page_size)
        else:
            if not _traced(*where):
                part.check(*(np.asarray(array) for array in where), page_size, layout.num_pages(pools[0]))
            written = part.jax(layout, pools, tokens, *where, page_size)
        keys, values = tree(written)
        return self.replace(key_pages=keys, value_pages=values)

    def _stored(self, tokens: Any) -> Any:
        if self.quantizer is not None:
            return self.quantizer.quantize(tokens)
        return tokens.astype(self.key_pages.dtype)


@dataclass(frozen=True)
class PagedAttentionCache(SerializableTree):
    """The pages of every layer of a model, first layer first."""

    tree_leaves: ClassVar[tuple[str, ...]] = ("views",)

    views: list[PagedAttentionCacheView]

    @classmethod
    def init_cache(
        cls,
        mesh: Mesh | None,
        dtype: DTypeLike,
        metadata: PagedAttentionCacheMetaData,
        partition_manager: PartitionManager | None = None,
        quantizer: Quantizer | None = None,
        *,
        layout: Layout = HEADS_FIRST,
    ) -> PagedAttentionCache:
        """A cache of zeros: `PagedAttentionCacheView.init` for each of metadata.num_hidden_layers layers."""
        layers = range(metadata.num_hidden_layers)
        return cls(
            [
                PagedAttentionCacheView.init(mesh, dtype, metadata, n, partition_manager, quantizer, layout=layout)
                for n in layers
            ]
        )

    def init_empty(self, *args: Any, **kwargs: Any) -> None:
        """None: a paged cache without pages is of no use."""
        return


def page_sharding(
    mesh: Mesh,
    layout: Layout,
    shape: tuple[int, ...],
    num_kv_heads: int,
    partition_manager: PartitionManager | None = None,
) -> NamedSharding:
    """How an array of a pool (its axes the first ones of `layout`) is spread over `mesh`."""
    from jax.sharding import NamedSharding, PartitionSpec

    axes = layout.axes[: len(shape)]
    if partition_manager is not None:
        return NamedSharding(mesh, partition_manager.partition_spec(axes, shape))
    sharded = TENSOR_PARALLEL_AXIS if head_shards(mesh, num_kv_heads) > 1 else None
    return NamedSharding(mesh, PartitionSpec(*(sharded if axis == PAGE_AXES[0] else None for axis in axes)))


def _zeros(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    mesh: Mesh | None,
    layout: Layout,
    partition_manager: PartitionManager | None,
    quantizer: Quantizer | None,
) -> Any:
    if mesh is None:
        zeros = np.zeros(shape, dtype)
        return zeros if quantizer is None else quantizer.quantize(zeros)
    import jax
    import jax.numpy as jnp

    register()
    element = np.dtype(dtype)
    heads = shape[layout.axes.index(PAGE_AXES[0])]

    def place(array: Any) -> NamedSharding:
        return page_sharding(mesh, layout, array.shape, heads, partition_manager)

    if quantizer is None:
        return jnp.zeros(shape, element, device=place(jax.ShapeDtypeStruct(shape, element)))

    def pages() -> Any:
        return quantizer.quantize(jnp.zeros(shape, element))

    return jax.jit(pages, out_shardings=jax.tree.map(place, jax.eval_shape(pages)))()


def _flatten(pages: tuple[Any, Any], quantizer: Quantizer | None) -> tuple[list[Any], Any]:
    """The arrays in a pair of pages or token vectors, and the function that puts such arrays back in their place."""
    if quantizer is None:
        return list(pages), tuple
    import jax

    register()
    leaves, treedef = jax.tree.flatten(pages)
    return leaves, treedef.unflatten


def _traced(*arrays: Any) -> bool:
    from jax.core import Tracer

    return any(isinstance(array, Tracer) for array in arrays)
