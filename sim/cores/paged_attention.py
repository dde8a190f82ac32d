"""The adapter to our own core."""

from __future__ import annotations

from paged_attention.engine import PagedAttentionEngine
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.scheduler import SchedulingPolicy
from sim.cores.protocol import CoreConfig, ServingCore


def build(config: CoreConfig) -> ServingCore:
    """A PagedAttentionEngine of this geometry and policy. ValueError: an option unknown to it, or a bad size."""
    if config.options:
        raise ValueError(f"core.options: the core 'paged_attention' knows none, found {', '.join(config.options)}")
    # Not PagedAttentionCacheMetaData.create: a pool smaller than the longest sequence is a scenario worth running.
    metadata = PagedAttentionCacheMetaData(
        batch_size=config.batch_size,
        num_hidden_layers=config.layers,
        num_pages_per_layer=config.num_pages,
        num_pages_per_sequence=-(-config.max_sequence_length // config.page_size),
        max_sequences=config.max_sequence_length,
        page_size=config.page_size,
        num_kv_heads=config.kv_heads,
        kv_head_dim_size=config.head_dim,
        hbm_utilization=1.0,
    )
    policy = SchedulingPolicy(
        preemption=config.preemption,
        mix=config.mix,
        max_decode_wait=config.max_decode_wait,
        max_prefill_wait=config.max_prefill_wait,
    )
    return PagedAttentionEngine(
        metadata,
        prefill_chunk=config.prefill_chunk,
        policy=policy,
        lag=config.lag,
        free_pages=config.free_pages,
        free_slots=config.free_slots,
    )
