"""What one step tells the device, packed into a single int32 array.

Each array handed to a compiled program costs microseconds, and a NumPy array made a JAX array first costs ten times as
much; one array of fixed shape costs one transfer and never recompiles.

    plan --pack--> StepShape (static), one int32 array, scalars still on the device
    array --StepShape.unpack--> {name: array}, inside the compiled program (or views of it, in NumPy)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paged_attention.arrays import is_jax_array
from paged_attention.batch import ActiveSequenceBatch
from paged_attention.plan import DUMMY_PAGE
from paged_attention.sampling import DTYPES, SamplingParams

if TYPE_CHECKING:
    from jaxtyping import Int32

    from paged_attention.metadata import PagedAttentionCacheMetaData
    from paged_attention.model_values import ModelOutputBatch
    from paged_attention.requests import GenerationStepTask, InitialSequenceRequest, NextIterationPlan

SAMPLING = SamplingParams.tree_leaves


class Part(NamedTuple):
    """Where one array lies in the packed one."""

    start: int
    shape: tuple[int, ...]
    dtype: type[np.generic]

    @property
    def stop(self) -> int:
        """One past its last word."""
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class StepShape:
    """Everything about a step that a compiled program is keyed on: sizes, and which parts are there.

    A part of size 0 is absent. `num_held` is 0 or num_inserts: rows whose first token is still on the device.
    """

    batch_size: int
    num_pages: int
    num_inserts: int
    num_held: int
    num_updates: int
    chunk_size: int
    has_decodes: bool

    def parts(self) -> Mapping[str, Part]:
        """The arrays by name; those with page ids lie side by side."""
        return _parts(self)

    def unpack(self, packed: Any) -> dict[str, Any]:
        """The arrays, as views of a NumPy array or slices of a JAX one."""
        return {name: view(packed, part) for name, part in _parts(self).items()}


@functools.lru_cache(maxsize=256)
def _parts(shape: StepShape) -> Mapping[str, Part]:
    rows, chunk, whole = (shape.num_inserts,), (shape.chunk_size,), np.int32
    layout: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "released": ((shape.batch_size,), whole),
        "update_slots": ((shape.num_updates,), whole),
        "update_page_idxs": ((shape.num_updates,), whole),
        "insert_slots": (rows, whole),
        "held_rows": ((shape.num_held,), whole),
        "token_ids": (rows, whole),
        "positions": (rows, whole),
        **{name: (rows, DTYPES[name]) for name in SAMPLING},
        "chunk_token_ids": (chunk, whole),
        "chunk_positions": (chunk, whole),
        "prefill_length": ((min(1, shape.chunk_size),), whole),
        **{f"prefill_{name}": ((min(1, shape.chunk_size),), DTYPES[name]) for name in SAMPLING},
        "update_mapped_idxs": ((shape.num_updates,), whole),
        "page_table": ((shape.num_inserts, shape.num_pages), whole),
        "page_indices": ((shape.num_pages if shape.chunk_size else 0,), whole),
    }
    parts: dict[str, Part] = {}
    start = 0
    for name, (dims, dtype) in layout.items():
        parts[name] = Part(start, dims, dtype)
        start = parts[name].stop
    return parts


@functools.lru_cache(maxsize=256)
def _nothing_new(shape: StepShape) -> Int32[np.ndarray, " words"]:
    """The packed array of a step without news: all padding, which the device drops."""
    parts = shape.parts()
    packed = np.full(parts["page_indices"].stop, 0, np.int32)
    view(packed, parts["update_slots"])[:] = shape.batch_size
    view(packed, parts["insert_slots"])[:] = shape.batch_size
    view(packed, parts["held_rows"])[:] = shape.num_inserts
    packed.setflags(write=False)
    return packed


def view(packed: Any, part: Part) -> Any:
    """One array out of the packed one; its words are the same bits."""
    words = packed[part.start : part.stop].reshape(part.shape)
    if part.dtype is np.int32:
        return words
    if is_jax_array(words):
        from jax import lax

        return lax.bitcast_convert_type(words, part.dtype)
    return words.view(part.dtype)


def bucket(count: int, limit: int) -> int:
    """The width that `count` rows are padded to: 0, 1, 8, 64, ..., at most `limit` (or count, where that is more)."""
    width = min(count, 1)
    while width < count:
        width *= 8
    return min(width, max(limit, count))


class StepNews(NamedTuple):
    """A packed step; `held` are tokens and positions that the host has not seen, one scalar each."""

    shape: StepShape
    packed: Int32[np.ndarray, " words"]
    held: tuple[tuple[Any, ...], tuple[Any, ...]]


def pack(
    plan: NextIterationPlan,
    metadata: PagedAttentionCacheMetaData,
    prefill_outputs: Mapping[str | int, ModelOutputBatch],
) -> StepNews:
    """Pack what `plan` tells the device. ValueError: a slot or page outside the batch or pool, or an unknown token."""
    tasks, updates = plan.new_decodes_requests, plan.decodes_state_page_updates
    held = {row: _held(task, prefill_outputs) for row, task in enumerate(tasks) if _is_held(task)}
    # One row of padding costs less than a program of its own for steps in which nobody joins.
    num_inserts = bucket(max(len(tasks), 1), metadata.batch_size)
    shape = StepShape(
        batch_size=metadata.batch_size,
        num_pages=metadata.num_pages_per_sequence,
        num_inserts=num_inserts,
        num_held=num_inserts if held else 0,
        num_updates=-(-max(len(updates), 1) // metadata.batch_size) * metadata.batch_size,
        chunk_size=_chunk_size(plan.prefill_request) if plan.schedule_prefill else 0,
        has_decodes=plan.schedule_decodes,
    )
    packed = _nothing_new(shape).copy()
    parts = shape.parts()
    changed = [task.slot for task in tasks] + [update.slot for update in updates] + plan.released_slots
    if changed and not 0 <= min(changed) <= max(changed) < shape.batch_size:
        raise ValueError(f"slots must lie in 0..{shape.batch_size - 1}: found {sorted(changed)}")
    if plan.released_slots:
        view(packed, parts["released"])[plan.released_slots] = 1
    if updates:
        for name in ("slot", "page_idx", "mapped_idx"):
            view(packed, parts[f"update_{name}s"])[: len(updates)] = [getattr(update, name) for update in updates]
    if tasks:
        _pack_tasks(shape, packed, tasks)
        for at, row in enumerate(held):
            view(packed, parts["held_rows"])[at] = row
    if shape.chunk_size:
        _pack_chunk(shape, packed, plan.prefill_request)
    _check_pages(shape, packed, metadata.num_pages_per_layer)
    padding = (np.int32(0),) * (shape.num_held - len(held))
    tokens, positions = zip(*held.values(), strict=True) if held else ((), ())
    return StepNews(shape, packed, (tokens + padding, positions + padding))


def update_batch(news: Mapping[str, Any]) -> ActiveSequenceBatch:
    """The rows to insert and the page updates, as the batch that `insert_decode_state` takes."""
    return ActiveSequenceBatch(
        token_ids=news["token_ids"],
        positions=news["positions"],
        page_table=news["page_table"],
        sampling_params=SamplingParams(**{name: news[name] for name in SAMPLING}),
        available_slots=None,
        active_slot_requests_map=None,
        context_lock=None,
        page_update_slots=news["update_slots"],
        page_update_page_idxs=news["update_page_idxs"],
        page_update_mapped_idxs=news["update_mapped_idxs"],
    )


def _pack_tasks(shape: StepShape, packed: Any, tasks: list[GenerationStepTask]) -> None:
    news = shape.unpack(packed)
    rows = update_batch(news)
    for row, task in enumerate(tasks):
        host_token = -1 if _is_held(task) else task.prefill_token_id
        rows.insert_from_task(row, task.replace(prefill_token_id=host_token))
        news["insert_slots"][row] = task.slot


def _pack_chunk(shape: StepShape, packed: Any, request: InitialSequenceRequest) -> None:
    assert request.chunk_idx is not None
    parts, length = shape.parts(), _length(request)
    start = request.chunk_idx * shape.chunk_size
    tokens, positions = np.asarray(request.token_ids), np.asarray(request.positions)
    if not 0 <= start < length or start + shape.chunk_size > len(tokens):
        raise ValueError(
            f"request {request.id!r}: chunk {request.chunk_idx} of {shape.chunk_size} tokens lies outside its prompt "
            f"of {length} tokens, padded to {len(tokens)}"
        )
    view(packed, parts["chunk_token_ids"])[:] = tokens[start : start + shape.chunk_size]
    view(packed, parts["chunk_positions"])[:] = positions[start : start + shape.chunk_size]
    view(packed, parts["page_indices"])[:] = np.asarray(request.page_indices)
    view(packed, parts["prefill_length"])[:] = length
    for name in SAMPLING:
        view(packed, parts[f"prefill_{name}"])[:] = getattr(request.sampling_params, name)


def _chunk_size(request: InitialSequenceRequest) -> int:
    if request.chunk_size is None or request.chunk_idx is None:
        raise ValueError("the plan schedules a prefill, but its prefill_request is a placeholder")
    return request.chunk_size


def _length(request: InitialSequenceRequest) -> int:
    """Tokens of the whole prompt."""
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    return int(np.asarray(request.length))


def _is_held(task: GenerationStepTask) -> bool:
    """Whether the host does not know the token that the task feeds first."""
    token: Any = task.prefill_token_id
    return is_jax_array(token) or int(token) < 0


def _held(task: GenerationStepTask, prefill_outputs: Mapping[str | int, ModelOutputBatch]) -> tuple[Any, Any]:
    """The token that a task feeds first and its position, both wherever they are."""
    if task.id in prefill_outputs:
        output = prefill_outputs[task.id]
        return output.prefill_token_id, output.prefill_next_position
    if is_jax_array(task.prefill_token_id):
        return task.prefill_token_id, np.int32(task.position)
    raise ValueError(
        f"request {task.id!r}: its first token is unknown to the host; give the output of its last prefill step in "
        f"prefill_outputs"
    )


def _check_pages(shape: StepShape, packed: Int32[np.ndarray, " words"], num_pages: int) -> None:
    """Page ids lie side by side at the end: as unsigned words, a negative one is too large as well."""
    pages = packed[shape.parts()["update_mapped_idxs"].start :]
    if pages.view(np.uint32).max(initial=DUMMY_PAGE) >= num_pages:
        wrong = sorted({int(page) for page in pages if not 0 <= page < num_pages})
        raise ValueError(f"page ids must lie in 0..{num_pages - 1}: found {wrong[:8]}; nothing was written")
