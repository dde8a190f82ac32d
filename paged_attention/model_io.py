"""What goes into a model step and what comes out of it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from paged_attention import pytree
from paged_attention.arrays import array_module, is_jax_array, is_present, put_rows
from paged_attention.batch import FREE_POSITION, ActiveSequenceBatch
from paged_attention.model_values import (
    ModelInputBatch,
    ModelOutputBatch,
    ModelOutputSummary,
    PagedAttentionMetadata,
)
from paged_attention.plan import DUMMY_PAGE, UNKNOWN_TOKEN
from paged_attention.requests import InitialSequenceRequest, NextIterationPlan
from paged_attention.sampling import SamplingParams
from paged_attention.step_news import SAMPLING, StepShape, pack, update_batch

if TYPE_CHECKING:
    from jaxtyping import Bool, Int32

    from paged_attention.arrays import Array
    from paged_attention.metadata import PagedAttentionCacheMetaData


__all__ = [
    "ModelIOProcessor",
    "ModelInputBatch",
    "ModelOutputBatch",
    "ModelOutputSummary",
    "PagedAttentionMetadata",
    "State",
    "batch_of",
    "feed_back",
    "merge_news",
    "query_starts",
    "sampled_positions",
    "sampled_rows",
    "state_of",
]


class ModelIOProcessor:
    """Makes a step's input out of a plan and the device batch, and takes its output apart."""

    @classmethod
    def build_input(
        cls,
        iteration_plan: NextIterationPlan,
        metadata: PagedAttentionCacheMetaData,
        decodes_state: ActiveSequenceBatch,
        *,
        prefill_outputs: Mapping[str | int, ModelOutputBatch] | None = None,
    ) -> ModelInputBatch:
        """Tell the device batch what the plan changed, and make the input of the step.

        `decodes_state` (from `ActiveSequenceBatch.create`) gets new arrays, in this order: released slots, new decodes,
        page updates. Its arrays are shared with the input's, so they are never donated. A NumPy batch gives a NumPy
        input. Without schedule_decodes the input has no decode part.

        A new decode whose prefill_token_id is -1 takes token and position from `prefill_outputs[id]`, the output of its
        last prefill step, without waiting for it: where that says -1 (the first token was an EOS), the slot stays
        without a live sequence. A JAX scalar as prefill_token_id is taken as it is, at the task's own position.

        ValueError: a page outside the pool, a slot outside the batch, a chunk outside its prompt, a new decode whose
        token is not known anywhere; nothing has changed then.
        """
        news = pack(iteration_plan, metadata, prefill_outputs or {})
        merge = _compiled_merge() if is_jax_array(decodes_state.page_table) else _merge
        return merge_news(news.shape, news.packed, news.held, decodes_state, merge)

    @staticmethod
    def prepare_model_input(
        attn_meta: PagedAttentionMetadata,
        ongoing_prefill: InitialSequenceRequest,
        chunk_id: Int32[Array, ""] | int,
        chunk_size: int,
        ongoing_decodes: ActiveSequenceBatch,
        ongoing_updates: ActiveSequenceBatch,
        insert_slots: Int32[Array, " inserts"],
    ) -> tuple[Int32[Array, " tokens"], Int32[Array, " slots"], Int32[Array, " tokens"], PagedAttentionMetadata]:
        """Cut chunk number chunk_id out of the prompt, insert `ongoing_updates` into the decodes, and join both.

        Returns (input_ids, decodes_token_ids, positions, attn_meta), `attn_meta` with the parts that are there filled
        in; a placeholder (`init_empty`) for prefill or decodes leaves its part out. Under `jax.jit` chunk_size must be
        static. ValueError: the padded prompt is no multiple of chunk_size.
        """
        size = operator.index(chunk_size)
        xp = array_module(ongoing_prefill.token_ids, ongoing_decodes.page_table, insert_slots)
        tokens: list[Any] = []
        positions: list[Any] = []
        decodes_token_ids: Any = xp.zeros((), xp.int32)
        if ongoing_prefill.is_active:
            tokens.append(_chunk(ongoing_prefill.token_ids, chunk_id, size))
            positions.append(_chunk(ongoing_prefill.positions, chunk_id, size))
            attn_meta = attn_meta.replace(
                prefill_length=xp.asarray(xp.minimum(ongoing_prefill.length, positions[0][-1] + 1)),
                prefill_position=positions[0],
                prefill_page_table=ongoing_prefill.page_indices,
            )
        if ongoing_decodes.is_active:
            decodes = ongoing_decodes.insert_decode_state(insert_slots, ongoing_updates)
            decodes_token_ids = decodes.token_ids
            tokens.append(decodes_token_ids)
            positions.append(decodes.positions)
            attn_meta = attn_meta.replace(decodes_position=decodes.positions, decodes_page_table=decodes.page_table)
        nothing = [xp.zeros(0, xp.int32)]
        return xp.concatenate(tokens or nothing), decodes_token_ids, xp.concatenate(positions or nothing), attn_meta

    @staticmethod
    def prepare_model_output(
        next_token: Int32[Array, " samples"],
        complete: Bool[Array, " samples"],
        attn_meta: PagedAttentionMetadata,
        sampling_params: SamplingParams,
    ) -> ModelOutputBatch:
        """Take the sampled tokens [prefill][slots] apart and say where each sequence goes on.

        `complete` marks end-of-sequence tokens; `sampling_params` has the same rows. A slot without a live sequence
        yields -1 and False whatever was sampled for it. ValueError: the rows are not those of `attn_meta`.
        """
        xp = array_module(next_token, complete, attn_meta.decodes_position, attn_meta.prefill_position)
        first = int(is_present(attn_meta.prefill_position))
        slots = attn_meta.decodes_position.shape[0] if is_present(attn_meta.decodes_position) else 0
        if next_token.shape != (first + slots,) or complete.shape != next_token.shape:
            raise ValueError(
                f"next_token and complete must have {first} + {slots} rows, [prefill][slots]: "
                f"found shapes {next_token.shape} and {complete.shape}"
            )
        output = ModelOutputBatch.init_empty()
        if first:
            output = output.replace(
                prefill_complete=xp.asarray(complete[0]),
                prefill_token_id=xp.asarray(next_token[0]),
                prefill_next_position=xp.where(complete[0], FREE_POSITION, attn_meta.prefill_length),
            )
        if slots:
            live = attn_meta.decodes_position >= 0
            completes = complete[first:] & live
            output = output.replace(
                decodes_completes=completes,
                decodes_token_ids=xp.where(live, next_token[first:], UNKNOWN_TOKEN),
                decodes_next_position=xp.where(live & ~completes, attn_meta.decodes_position + 1, FREE_POSITION),
                next_sampling_params=SamplingParams(*(getattr(sampling_params, name)[first:] for name in SAMPLING)),
            )
        return output


def feed_back(decodes_state: ActiveSequenceBatch, output: ModelOutputBatch) -> None:
    """Move the device batch on by one step: each slot's token and next position, in place. Waits for no device."""
    if is_present(output.decodes_token_ids):
        decodes_state.token_ids = output.decodes_token_ids
        decodes_state.positions = output.decodes_next_position


def sampled_rows(attn_meta: PagedAttentionMetadata) -> Int32[Array, " samples"]:
    """The rows of the input whose logits are sampled: the chunk's last real token, then every slot's."""
    xp = array_module(attn_meta.prefill_position, attn_meta.decodes_position)
    rows: list[Any] = []
    chunk = 0
    if is_present(attn_meta.prefill_position):
        chunk = attn_meta.prefill_position.shape[0]
        rows.append((attn_meta.prefill_length - 1 - attn_meta.prefill_position[0]).reshape(1))
    if is_present(attn_meta.decodes_position):
        rows.append(chunk + xp.arange(attn_meta.decodes_position.shape[0], dtype=xp.int32))
    return xp.concatenate(rows or [xp.zeros(0, xp.int32)])


def query_starts(attn_meta: PagedAttentionMetadata) -> Int32[Array, " rows_and_end"]:
    """Where the tokens of [prefill][slots] begin, padding left out, and where the last ones end.

    A slot without a live sequence has none: its entry repeats. Kernels over ragged rows call this cu_q_lens.
    """
    xp = array_module(attn_meta.prefill_position, attn_meta.decodes_position)
    counts: list[Any] = [xp.zeros(1, xp.int32)]
    if is_present(attn_meta.prefill_position):
        counts.append((attn_meta.prefill_length - attn_meta.prefill_position[0]).reshape(1))
    if is_present(attn_meta.decodes_position):
        counts.append((attn_meta.decodes_position >= 0).astype(xp.int32))
    return xp.cumsum(xp.concatenate(counts), dtype=xp.int32)


def sampled_positions(attn_meta: PagedAttentionMetadata) -> Int32[Array, " samples"]:
    """The position at which each sampled token will stand, in the order of `sampled_rows`."""
    xp = array_module(attn_meta.prefill_position, attn_meta.decodes_position)
    positions: list[Any] = []
    if is_present(attn_meta.prefill_position):
        positions.append(attn_meta.prefill_length.reshape(1))
    if is_present(attn_meta.decodes_position):
        positions.append(attn_meta.decodes_position + 1)
    return xp.concatenate(positions or [xp.zeros(0, xp.int32)])


State = tuple[Any, ...]
"""The arrays of a decode batch: token_ids, positions, page_table, and those of the sampling parameters."""


def merge_news(
    shape: StepShape,
    packed: Any,
    held: Any,
    decodes_state: ActiveSequenceBatch,
    merge: Callable[..., Any] | None = None,
) -> ModelInputBatch:
    """The second half of `build_input`: from what `step_news.pack` made, also within a compiled program.

    `decodes_state` gets new arrays.
    """
    state, chunk = (merge or _merge)(shape, packed, state_of(decodes_state), held)
    decodes_state.token_ids, decodes_state.positions, decodes_state.page_table, *params = state
    decodes_state.sampling_params = SamplingParams(*params)
    return _input_of(shape.has_decodes, decodes_state, chunk)


@functools.cache
def _compiled_merge() -> Callable[..., Any]:
    import jax

    pytree.register()
    return jax.jit(_merge, static_argnums=0)


def _merge(shape: StepShape, packed: Any, state: tuple[Any, ...], held: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Apply a step's news to the arrays of the batch, and join the chunk (where there is one) to it.

    Returns the arrays of the new batch, and with a chunk (input_ids, positions, prefill_length, prefill_position,
    prefill_page_table, *parameters of the sampled rows). Whatever equals the batch is left out: every array that a
    compiled program returns twice is copied.
    """
    news = shape.unpack(packed)
    batch = _released(batch_of(state), news["released"])
    update = _with_held(update_batch(news), news["held_rows"], held)
    new = batch.insert_decode_state(news["insert_slots"], update)
    if not shape.chunk_size:
        return state_of(new), ()
    prefill = _chunk_request(news)
    input_ids, _, positions, meta = ModelIOProcessor.prepare_model_input(
        PagedAttentionMetadata.init_empty(),
        prefill,
        0,
        shape.chunk_size,
        batch if shape.has_decodes else ActiveSequenceBatch.init_empty(),
        update,
        news["insert_slots"],
    )
    params = _joined([prefill.sampling_params] + [new.sampling_params] * shape.has_decodes)
    chunk = (input_ids, positions, meta.prefill_length, meta.prefill_position, meta.prefill_page_table)
    return state_of(new), (*chunk, *params)


def _input_of(has_decodes: bool, batch: ActiveSequenceBatch, chunk: tuple[Any, ...]) -> ModelInputBatch:
    """The step's input: what `_merge` made of the chunk, and the batch's own arrays."""
    tokens: Any = batch.token_ids
    nothing = np.zeros((), np.int32)
    decodes = (batch.positions, batch.page_table) if has_decodes else (nothing, nothing)
    if chunk:
        input_ids, positions, length, prefill_position, prefill_page_table, *params = chunk
        meta = PagedAttentionMetadata(length, prefill_position, prefill_page_table, *decodes)
        return ModelInputBatch(input_ids, positions, meta, SamplingParams(*params))
    meta = PagedAttentionMetadata(nothing, nothing, nothing, *decodes)
    if has_decodes:
        return ModelInputBatch(tokens, batch.positions, meta, batch.sampling_params)
    return ModelInputBatch(tokens[:0], batch.positions[:0], meta, SamplingParams.init_empty())


def state_of(batch: ActiveSequenceBatch) -> State:
    """The arrays of a batch, without its names and lists."""
    params = batch.sampling_params
    return (batch.token_ids, batch.positions, batch.page_table, *(getattr(params, name) for name in SAMPLING))


def batch_of(state: State) -> ActiveSequenceBatch:
    """A batch over these arrays that knows no requests."""
    token_ids, positions, page_table, *params = state
    return ActiveSequenceBatch(token_ids, positions, page_table, SamplingParams(*params), None, None, None)


def _released(batch: ActiveSequenceBatch, released: Int32[Array, " slots"]) -> ActiveSequenceBatch:
    """The batch with position -1 and an all-dummy row where `released` is 1."""
    xp, gone = array_module(released), released > 0
    return batch.replace(
        positions=xp.where(gone, FREE_POSITION, batch.positions),
        page_table=xp.where(gone[:, None], DUMMY_PAGE, batch.page_table),
    )


def _with_held(update: ActiveSequenceBatch, rows: Int32[Array, " held"], held: Any) -> ActiveSequenceBatch:
    """The rows to insert, with the tokens and positions that only the device knows."""
    tokens, positions = held
    if not tokens:
        return update
    xp = array_module(rows)
    return update.replace(
        token_ids=put_rows(update.token_ids, rows, xp.stack(tokens)),
        positions=put_rows(update.positions, rows, xp.stack(positions)),
    )


def _chunk_request(news: Mapping[str, Any]) -> InitialSequenceRequest:
    """The chunk that runs, as a request of one chunk whose positions are those in the prompt."""
    return InitialSequenceRequest(
        token_ids=news["chunk_token_ids"],
        positions=news["chunk_positions"],
        page_indices=news["page_indices"],
        sampling_params=SamplingParams(*(news[f"prefill_{name}"] for name in SAMPLING)),
        id=None,
        chunk_idx=None,
        chunk_size=None,
        prompt_token_ids=None,
        length=news["prefill_length"][0],
    )


def _joined(params: list[SamplingParams]) -> list[Any]:
    """The columns of all of them, one after another."""
    columns = [[getattr(rows, name) for rows in params] for name in SAMPLING]
    return [array_module(*column).concatenate(column) for column in columns]


def _chunk(array: Any, chunk_id: Any, size: int) -> Any:
    """Rows chunk_id * size .. of a padded prompt. ValueError: its length is no multiple of the size."""
    if size < 1 or len(array) % size:
        raise ValueError(f"a padded prompt of {len(array)} tokens is no multiple of chunk_size={size}; pad it further")
    if len(array) == size:
        return array
    if not is_jax_array(array) and not is_jax_array(chunk_id):
        return array[chunk_id * size : (chunk_id + 1) * size]
    from jax import lax

    return lax.dynamic_slice_in_dim(array, chunk_id * size, size)
