"""The two roads to a step on the device: the core's own, through `ModelIOProcessor`, and the neutral rows of a plan.

    native   NextIterationPlan --pack--> [device batch --merge_news--> ModelInputBatch --step--> ModelOutputBatch
             --fed back--> device batch]; pack and merge_news are the two halves of `ModelIOProcessor.build_input`
    rows     StepPlan's rows, packed on the host --step--> what they yield; nothing but the pages stays on the device

The steps here are the bodies of one compiled program each; the host's part is the packing.
"""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from backends.fed_tokens import FedTokens
from backends.jax_step import Fed, PagedModel, Pools, RowFacts
from paged_attention.model_io import (
    ModelIOProcessor,
    PagedAttentionMetadata,
    State,
    batch_of,
    feed_back,
    merge_news,
    query_starts,
    sampled_rows,
    state_of,
)
from paged_attention.plan import ModelRows, StepInput, StepPlan
from paged_attention.sampling import SamplingParams
from paged_attention.step_news import StepShape

PartName = Literal["prefill", "decodes"]
EVERY_ROW = slice(None)
LOGITS_ROW = 8
"""Where the digests of a decoder's logits stand in what a native step yields."""

# The columns of a packed row, before its page table.
_POSITION, _COUNT, _BASE, _SEED, _EOS, _SAMPLES, _TOKEN, _TEMPERATURE, _TOP_P, _TABLE = range(10)


def pack_facts(plan: StepPlan, rows: ModelRows, num_slots: int) -> Int32[np.ndarray, "3 device_rows"]:
    """What the model knows of [prefill][slots], for the native road; num_slots is 0 without decodes."""
    facts = np.empty((3, int(plan.slot[0] < 0) + num_slots), np.int32)
    # A slot without a sequence has position -1: it yields nothing, whatever is said of it here.
    facts.fill(-1)
    at = device_rows(plan)
    facts[0, at] = rows.kv_base.view(np.int32)
    facts[1, at] = rows.eos_position
    facts[2, at] = plan.samples
    return facts


def device_rows(plan: StepPlan) -> Int32[np.ndarray, " rows"]:
    """Where each row of a native plan stands in [prefill][slots]."""
    return plan.slot + 1 if plan.slot[0] < 0 else plan.slot


def native_step(
    model: PagedModel,
    shape: StepShape,
    pools: Pools,
    state: State,
    packed: Int32[Array, " words"],
    held: Any,
    facts: Int32[Array, "3 device_rows"],
) -> tuple[Pools, State, tuple[Any, Any], Int32[Array, "8_or_9 device_rows"]]:
    """`build_input` (its part on the device), one step on what it made, and the output fed back.

    The seeds are those that lie on the device. Also returned: the token and the next position of the prefill. What the
    rows yielded comes with what they ran with (`step_input` reads it): an array of its own would cost more.
    """
    batch = batch_of(state)
    model_input = merge_news(shape, packed, held, batch)
    meta, params = model_input.attn_meta, model_input.sampling_params
    seed = jnp.atleast_1d(params.seed).astype(jnp.uint32)
    base = lax.bitcast_convert_type(facts[0], jnp.uint32)
    fed = Fed(jnp.asarray(model_input.input_ids), params)
    pools, sampled = model.step(pools, meta, RowFacts(base, seed, facts[1], facts[2] != 0), fed)
    output = ModelIOProcessor.prepare_model_output(sampled.token, sampled.complete, meta, params)
    feed_back(batch, output)
    prefill = jnp.asarray(output.prefill_token_id), jnp.asarray(output.prefill_next_position)
    yielded = [sampled.token, sampled.complete.astype(jnp.int32), sampled_rows(meta), query_starts(meta)[1:]]
    digests = [] if sampled.logits is None else [lax.bitcast_convert_type(sampled.logits, jnp.int32)]
    floats = [lax.bitcast_convert_type(jnp.atleast_1d(x), jnp.int32) for x in (params.temperature, params.top_p)]
    words = [*floats, jnp.atleast_1d(params.max_tokens), lax.bitcast_convert_type(seed, jnp.int32)]
    return pools, state_of(batch), prefill, jnp.stack([*yielded, *words, *digests])


def step_input(plan: StepPlan, yielded: Int32[np.ndarray, "8_or_9 device_rows"], chunk: int) -> StepInput:
    """What a native step ran with; `chunk` is the length of its padded chunk, 0 without one."""
    _, _, sampled_row, ends, temperature, top_p, max_tokens, seed = yielded[:LOGITS_ROW].copy()
    num_slots = len(ends) - int(chunk > 0)
    starts = ([0] if chunk else []) + list(range(chunk, chunk + num_slots))
    return StepInput(
        step=plan.step,
        device_row=device_rows(plan),
        query_starts=np.concatenate([np.zeros(1, np.int32), ends]),
        input_start=np.array(starts, np.int32),
        sampled_row=sampled_row,
        temperature=temperature.view(np.float32),
        top_p=top_p.view(np.float32),
        max_tokens=max_tokens,
        seed=seed.view(np.uint32),
    )


def groups(plan: StepPlan) -> list[tuple[Any, int, int]]:
    """Rows that run in one call each, prefill first: (which rows, how many, tokens of the prefill or 0)."""
    prefills = np.flatnonzero((plan.slot < 0) | (plan.count != 1))
    if len(prefills) == 0 or (len(prefills) == 1 and prefills[0] == 0):
        return [(EVERY_ROW, plan.num_rows, int(plan.count[0]) if len(prefills) else 0)]
    decodes = np.flatnonzero((plan.slot >= 0) & (plan.count == 1))
    alone = [prefills[at : at + 1] for at in range(len(prefills))]
    # All decode rows run with the last prefill row.
    alone[-1] = np.concatenate([alone[-1], decodes])
    return [(rows, len(rows), int(plan.count[rows[0]])) for rows in alone]


def packed_shape(num_packed: int, num_pages: int) -> tuple[int, int]:
    """Of that many packed rows with page tables of that width."""
    return num_packed, _TABLE + num_pages


def pack_rows(
    plan: StepPlan, rows: ModelRows, chosen: Any, num_packed: int, num_pages: int
) -> Int32[np.ndarray, "packed columns"]:
    """The chosen rows of a plan, padded to num_packed; a padding row writes and yields nothing."""
    packed = np.zeros(packed_shape(num_packed, num_pages), np.int32)
    start = plan.start[chosen]
    count = len(start)
    used = packed[:count]
    used[:, _POSITION] = start
    used[:, _COUNT] = plan.count[chosen]
    used[:, _BASE] = rows.kv_base.view(np.int32)[chosen]
    used[:, _SEED] = rows.token_seed.view(np.int32)[chosen]
    used[:, _EOS] = rows.eos_position[chosen]
    used[:, _SAMPLES] = plan.samples[chosen]
    if len(rows.temperature):
        used[:, _TEMPERATURE] = rows.temperature.view(np.int32)[chosen]
        used[:, _TOP_P] = rows.top_p.view(np.int32)[chosen]
    width = min(plan.table.shape[1], num_pages)
    used[:, _TABLE : _TABLE + width] = plan.table[chosen, :width]
    packed[count:, _POSITION] = -1
    return packed


def pack_fed(
    plan: StepPlan, tokens: FedTokens, chosen: Any, packed: Int32[np.ndarray, "packed columns"], num_chunk_rows: int
) -> Int32[np.ndarray, " chunk_rows"]:
    """Put the decodes' tokens into their packed rows, and rows that have ended to rest; return the chunk's tokens."""
    known = tokens.tokens(plan)
    end = plan.count.cumsum()
    first = (end - plan.count)[chosen]
    used = packed[: len(first)]
    used[:, _TOKEN] = known[first]
    used[:, _EOS] = np.where(tokens.ended(plan)[chosen], 0, -1)
    chunk = np.zeros(num_chunk_rows, np.int32)
    if num_chunk_rows:
        length = int(plan.count[chosen][0])
        chunk[:length] = known[first[0] : first[0] + length]
    return chunk


def rows_step(
    model: PagedModel,
    num_chunk_rows: int,
    pools: Pools,
    packed: Int32[Array, "packed columns"],
    chunk: Int32[Array, " chunk_rows"] | None = None,
) -> tuple[Pools, Int32[Array, "2_or_3 packed"]]:
    """One step on packed rows: a prefill row first where num_chunk_rows is not 0, all others decodes.

    A dead row, whose EOS stands at or before its first position, is as good as padding. `chunk` are the prefill's
    tokens, for a model that is fed any.
    """
    eos = packed[:, _EOS]
    dead = (eos >= 0) & (packed[:, _POSITION] >= eos)
    position, count = jnp.where(dead, -1, packed[:, _POSITION]), jnp.where(dead, 0, packed[:, _COUNT])
    first_decode = int(num_chunk_rows > 0)
    meta = PagedAttentionMetadata.init_empty()
    if num_chunk_rows:
        meta = meta.replace(
            prefill_length=position[0] + count[0],
            prefill_position=position[0] + jnp.arange(num_chunk_rows, dtype=jnp.int32),
            prefill_page_table=packed[0, _TABLE:],
        )
    if packed.shape[0] > first_decode:
        meta = meta.replace(decodes_position=position[first_decode:], decodes_page_table=packed[first_decode:, _TABLE:])
    base, seed = (lax.bitcast_convert_type(packed[:, column], jnp.uint32) for column in (_BASE, _SEED))
    temperature, top_p = (lax.bitcast_convert_type(packed[:, column], jnp.float32) for column in (_TEMPERATURE, _TOP_P))
    params = SamplingParams(top_p=top_p, temperature=temperature, seed=seed)
    token = packed[first_decode:, _TOKEN]
    fed = Fed(token if chunk is None else jnp.concatenate([chunk, token]), params)
    pools, sampled = model.step(pools, meta, RowFacts(base, seed, eos, packed[:, _SAMPLES] != 0), fed)
    return pools, sampled.stacked()


def write_part(
    model: PagedModel,
    part: PartName,
    pools: Pools,
    keys: list[Any],
    values: list[Any],
    position: Int32[Array, " rows"],
    length: Int32[Array, ""],
    table: Int32[Array, "..."],
) -> tuple[Pools]:
    """The pools with K and V of every layer written, and nothing else done; `length` is the prefill's."""
    meta = PagedAttentionMetadata.init_empty()
    if part == "prefill":
        meta = meta.replace(prefill_length=length, prefill_position=position, prefill_page_table=table)
    else:
        meta = meta.replace(decodes_position=position, decodes_page_table=table)
    rows = zip(model.views(pools), keys, values, strict=True)
    return (tuple(jax.tree.leaves([model.writer(view, key, value, meta) for view, key, value in rows])),)
