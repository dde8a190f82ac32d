"""A user's write kernel where heads are spread over a mesh: it runs on each device, with the heads of that device."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from backends.jax_step import Writer
from paged_attention.cache import PagedAttentionCacheView
from paged_attention.layout import Layout


def on_each_device(writer: Writer, mesh: Mesh, layout: Layout, head_axes: tuple[str, ...]) -> Writer:
    """The writer as it must be called for arrays whose heads lie on these axes of the mesh.

    No device needs anything of another one, and the compiler divides no kernel by itself.
    """
    pages = PartitionSpec(*(head_axes if axis == "heads" else None for axis in layout.axes[:-1]))
    vectors, everywhere = PartitionSpec(None, head_axes), PartitionSpec()

    def write(view: PagedAttentionCacheView, key: Any, value: Any, attn_meta: Any) -> PagedAttentionCacheView:
        divided = jax.shard_map(
            writer,
            mesh=mesh,
            in_specs=(pages, vectors, vectors, everywhere),
            out_specs=pages,
            check_vma=False,
        )
        return divided(view, key, value, attn_meta)

    return write
