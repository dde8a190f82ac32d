"""The two roads to a step on the device: the core's own, through `ModelIOProcessor`, and the neutral rows of a plan.

    native   NextIterationPlan --build_input--> ModelInputBatch --step--> ModelOutputBatch --fed back--> device batch
    rows     StepPlan's rows, packed on the host --step--> what they yield; nothing but the pages stays on the device

Each function here is the body of one compiled program; the host's part is the packing.
"""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from backends.jax_step import Pools, RowFacts, ScriptedModel
from backends.scripted import dead_rows
from paged_attention.model_io import ModelInputBatch, ModelIOProcessor, ModelOutputBatch, PagedAttentionMetadata
from paged_attention.plan import ModelRows, StepPlan

# The columns of a packed row, before its page table.
_POSITION, _COUNT, _BASE, _SEED, _EOS, _SAMPLES, _TABLE = range(7)


def pack_facts(plan: StepPlan, rows: ModelRows, num_slots: int) -> Int32[np.ndarray, "3 device_rows"]:
    """What the scripted model knows of [prefill][slots], for the native road; num_slots is 0 without decodes."""
    facts = np.full((3, int(plan.slot[0] < 0) + num_slots), -1, np.int32)
    at = device_rows(plan)
    facts[0, at] = rows.kv_base.view(np.int32)
    facts[1, at] = rows.eos_position
    facts[2] = 1
    facts[2, at] = plan.samples
    return facts


def device_rows(plan: StepPlan) -> Int32[np.ndarray, " rows"]:
    """Where each row of a native plan stands in [prefill][slots]."""
    return plan.slot + 1 if plan.slot[0] < 0 else plan.slot


def native_step(
    model: ScriptedModel, pools: Pools, model_input: ModelInputBatch, facts: Int32[Array, "3 device_rows"]
) -> tuple[Pools, ModelOutputBatch, Int32[Array, "2 device_rows"]]:
    """One step on what `build_input` made; the seeds are those that lie on the device."""
    meta, params = model_input.attn_meta, model_input.sampling_params
    seed = jnp.atleast_1d(params.seed).astype(jnp.uint32)
    base = lax.bitcast_convert_type(facts[0], jnp.uint32)
    pools, sampled = model.step(pools, meta, RowFacts(base, seed, facts[1], facts[2] != 0))
    output = ModelIOProcessor.prepare_model_output(sampled.token, sampled.complete, meta, params)
    return pools, output, jnp.stack([sampled.token, sampled.complete.astype(jnp.int32)])


def pack_rows(
    plan: StepPlan, rows: ModelRows, chosen: Int32[np.ndarray, " n"], num_packed: int, num_pages: int
) -> Int32[np.ndarray, "packed columns"]:
    """The chosen rows of a plan, padded to num_packed; a padding row and a dead one write and yield nothing."""
    packed = np.zeros((num_packed, _TABLE + num_pages), np.int32)
    packed[:, _POSITION] = -1
    used = packed[: len(chosen)]
    used[:, _POSITION] = plan.start[chosen]
    used[:, _COUNT] = plan.count[chosen]
    used[:, _BASE] = rows.kv_base.view(np.int32)[chosen]
    used[:, _SEED] = rows.token_seed.view(np.int32)[chosen]
    used[:, _EOS] = rows.eos_position[chosen]
    used[:, _SAMPLES] = plan.samples[chosen]
    width = min(plan.table.shape[1], num_pages)
    used[:, _TABLE : _TABLE + width] = plan.table[chosen, :width]
    dead = dead_rows(plan, rows)[chosen]
    if np.count_nonzero(dead):
        used[dead, _POSITION], used[dead, _COUNT] = -1, 0
    return packed


def rows_step(
    model: ScriptedModel, num_chunk_rows: int, pools: Pools, packed: Int32[Array, "packed columns"]
) -> tuple[Pools, Int32[Array, "2 packed"]]:
    """One step on packed rows: a prefill row first where num_chunk_rows is not 0, all others decodes."""
    meta = PagedAttentionMetadata.init_empty()
    decodes = packed
    if num_chunk_rows:
        first, decodes = packed[0], packed[1:]
        start = first[_POSITION]
        meta = meta.replace(
            prefill_length=start + first[_COUNT],
            prefill_position=start + jnp.arange(num_chunk_rows, dtype=jnp.int32),
            prefill_page_table=first[_TABLE:],
        )
    if decodes.shape[0]:
        meta = meta.replace(decodes_position=decodes[:, _POSITION], decodes_page_table=decodes[:, _TABLE:])
    base, seed = (lax.bitcast_convert_type(packed[:, column], jnp.uint32) for column in (_BASE, _SEED))
    facts = RowFacts(base, seed, packed[:, _EOS], packed[:, _SAMPLES] != 0)
    pools, sampled = model.step(pools, meta, facts)
    return pools, jnp.stack([sampled.token, sampled.complete.astype(jnp.int32)])
