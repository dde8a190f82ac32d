"""The static configuration of a paged K/V cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from paged_attention.pytree import SerializableTree

if TYPE_CHECKING:
    from jax.sharding import Mesh, PartitionSpec

PAGE_AXES = ("heads", "pages", "page", "head_dim")
"""The axes of key_pages and value_pages, as a partition manager is asked about them."""

TENSOR_PARALLEL_AXIS = "tp"
"""The mesh axis over which heads are sharded where no partition manager says otherwise."""


class PartitionManager(Protocol):
    """Whatever maps the axes of an array to a PartitionSpec."""

    def partition_spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """The PartitionSpec of an array with these axes, of this shape."""
        ...


@dataclass(frozen=True)
class PagedAttentionCacheMetaData(SerializableTree):
    """The sizes of a paged cache; hashable, so that compiled programs can be keyed on it.

    batch_size               slots of the decode batch
    num_hidden_layers        layers, each with pages of its own
    num_pages_per_layer      pages of one layer, page 0 (the dummy) included
    num_pages_per_sequence   ceil(max_sequences / page_size): the width of a page table row
    max_sequences            the maximum *length* of a sequence, in tokens with K/V
    page_size                tokens per page
    num_kv_heads             key/value heads
    kv_head_dim_size         words of one head's key or value
    hbm_utilization          the share of the device memory that the cache may take, in (0, 1]

    ValueError: a size is not a positive integer, fewer than 2 pages, num_pages_per_sequence is not what it must be, or
    hbm_utilization is out of range.
    """

    tree_static: ClassVar[tuple[str, ...]] = (
        "batch_size",
        "num_hidden_layers",
        "num_pages_per_layer",
        "num_pages_per_sequence",
        "max_sequences",
        "page_size",
        "num_kv_heads",
        "kv_head_dim_size",
        "hbm_utilization",
    )

    batch_size: int
    num_hidden_layers: int
    num_pages_per_layer: int
    num_pages_per_sequence: int
    max_sequences: int
    page_size: int
    num_kv_heads: int
    kv_head_dim_size: int
    hbm_utilization: float

    def __post_init__(self) -> None:
        for name in self.tree_static[:-1]:
            _require_positive(name, getattr(self, name))
        _require_share(self.hbm_utilization)
        if self.num_pages_per_layer < 2:
            raise ValueError(
                f"num_pages_per_layer must be at least 2 (the dummy page and one to hand out): "
                f"found {self.num_pages_per_layer}"
            )
        expected = -(-self.max_sequences // self.page_size)
        if self.num_pages_per_sequence != expected:
            raise ValueError(
                f"num_pages_per_sequence must be ceil(max_sequences / page_size) = "
                f"ceil({self.max_sequences} / {self.page_size}) = {expected}: found {self.num_pages_per_sequence}"
            )

    @classmethod
    def create(
        cls,
        mesh: Mesh | None,
        batch_size: int,
        num_hidden_layers: int,
        max_sequences: int,
        page_size: int,
        num_kv_heads: int,
        kv_head_dim_size: int,
        hbm_utilization: float,
        dtype: DTypeLike = ml_dtypes.bfloat16,
        *,
        num_pages: int | None = None,
        memory_budget_bytes: int | None = None,
        partition_manager: PartitionManager | None = None,
    ) -> PagedAttentionCacheMetaData:
        """Metadata with as many pages as the memory of the mesh's devices holds.

        pages = floor(usable bytes / layers / bytes per page), where a page holds K and V of page_size tokens in
        `dtype`, and usable = (limit * hbm_utilization - bytes in use) of the fullest device, times the number of
        devices over which heads are really sharded. `memory_budget_bytes` (per device) takes the place of limit, with
        nothing in use; `num_pages` (per layer, the dummy included) is taken as it is.

        ValueError: a parameter is invalid, fewer than num_pages_per_sequence + 1 pages result, or the platform has no
        memory statistics and neither a budget nor num_pages is given.
        """
        sizes = {
            "batch_size": batch_size,
            "num_hidden_layers": num_hidden_layers,
            "max_sequences": max_sequences,
            "page_size": page_size,
            "num_kv_heads": num_kv_heads,
            "kv_head_dim_size": kv_head_dim_size,
        }
        for name, value in sizes.items():
            _require_positive(name, value)
        _require_share(hbm_utilization)
        if num_pages is None:
            page_bytes = 2 * page_size * num_kv_heads * kv_head_dim_size * np.dtype(dtype).itemsize
            usable = _usable_bytes(mesh, hbm_utilization, memory_budget_bytes)
            usable *= head_shards(mesh, num_kv_heads, partition_manager)
            num_pages = usable // num_hidden_layers // page_bytes
        num_pages_per_sequence = -(-max_sequences // page_size)
        if num_pages < num_pages_per_sequence + 1:
            raise ValueError(
                f"a sequence of max_sequences={max_sequences} tokens needs {num_pages_per_sequence} pages of "
                f"{page_size} and the dummy page one more: found {num_pages} pages; "
                f"give more memory or lower max_sequences"
            )
        return cls(
            num_pages_per_layer=num_pages,
            num_pages_per_sequence=num_pages_per_sequence,
            hbm_utilization=hbm_utilization,
            **sizes,
        )


def head_shards(mesh: Mesh | None, num_kv_heads: int, partition_manager: PartitionManager | None = None) -> int:
    """The number of devices over which the heads axis of the pages is really sharded; 1 where it is replicated."""
    if mesh is None:
        return 1
    sizes: dict[str, int] = dict(mesh.shape)
    if partition_manager is None:
        shards = sizes.get(TENSOR_PARALLEL_AXIS, 1)
        return shards if num_kv_heads % shards == 0 else 1
    spec: tuple[Any, ...] = tuple(partition_manager.partition_spec(PAGE_AXES, (num_kv_heads, 2, 1, 1)))
    axes = spec[0] if spec else None
    shards = 1
    for axis in () if axes is None else (axes,) if isinstance(axes, str) else axes:
        shards *= sizes[axis]
    return shards


def _usable_bytes(mesh: Mesh | None, hbm_utilization: float, budget: int | None) -> int:
    """Bytes that each device of the mesh can give to the cache."""
    if budget is not None:
        _require_positive("memory_budget_bytes", budget)
        return int(budget * hbm_utilization)
    usable: list[int] = []
    devices: list[Any] = [] if mesh is None else list(mesh.devices.flat)
    for device in devices:
        stats: dict[str, int] | None = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            usable.clear()
            break
        usable.append(int(stats["bytes_limit"] * hbm_utilization) - stats.get("bytes_in_use", 0))
    if not usable:
        where = "no mesh is given" if mesh is None else f"platform {devices[0].platform!r} reports no memory"
        raise ValueError(f"cannot size the cache: {where}; give num_pages or memory_budget_bytes")
    return max(0, min(usable))


def _require_positive(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer: found {value!r}")


def _require_share(value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"hbm_utilization must be in (0, 1]: found {value!r}")
