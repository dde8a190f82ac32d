"""The values that every room shares: what was asked, what was planned, what came out, what was found.

A serving core makes a `StepPlan`, a backend executes it, an auditor judges it. All of them are values: frozen, with
read-only arrays that are never a view of anybody's own state. Two plans may share an array that says the same in both.

Axis names used throughout:

    rows    one entry for each request that runs in the step (prefill rows first, then decode rows by ascending slot)
    tokens  one entry for each token whose K/V the step writes, row after row
    pages   the logical pages of a sequence, first to last
    slots   the rows of the decode batch
    places  (page, offset) pairs of the cache
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar, dataclass_transform

import numpy as np
from jaxtyping import Float32, Int32, UInt32
from numpy.typing import NDArray

Ints = NDArray[np.int32]
"""A read-only one-dimensional int32 array."""

DUMMY_PAGE = 0
"""The page that nobody owns: padding may write to it, no live sequence reads it."""

UNKNOWN_TOKEN = -1
"""A token that the host has not seen yet: it is still on the device."""

EOS_TOKEN = 0
"""The end-of-sequence token of the scripted models; ordinary tokens start at 1."""

EffectKind = Literal[
    "submitted", "admitted", "allocated", "joined", "preempted", "ended", "cancelled", "freed", "unfenced"
]
EFFECT_KINDS: tuple[EffectKind, ...] = (
    "submitted",
    "admitted",
    "allocated",
    "joined",
    "preempted",
    "ended",
    "cancelled",
    "freed",
    "unfenced",
)
EndReason = Literal["eos", "max_tokens", "length"]


Value = TypeVar("Value")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def _step_value(cls: type[Value]) -> type[Value]:
    """Make a value that each step has one of. Type checkers hold it frozen; at run time that would cost 6 us a step."""
    return dataclass(slots=True)(cls)


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks of a serving core.

    `id` is unique within a run and orders requests by submission; `prompt` are token ids; `max_tokens` counts
    generated tokens, the first one included; `seed` is the request's sampling seed (uint32 range).
    """

    id: int
    prompt: Int32[np.ndarray, " prompt_tokens"]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Effect(NamedTuple):
    """One change of ownership or state, in the order in which it happened.

    kind        fields that mean something beside `request` and `admission`
    ----        ---------------------------------------------------------------------------------------------
    submitted   none: the request waits (admission 0)
    admitted    the request starts its `admission`-th prefill (counted from 1)
    allocated   `pages` now belong to the request, at logical pages first_page, first_page + 1, ...
    joined      the request decodes in `slot` from this step on
    preempted   the request waits again; `slot` is the slot it held, or -1; `reason` says why
    ended       the request is finished; `reason` is an EndReason; its last token is the newest one applied
    cancelled   the request is gone; `slot` is the slot it held, or -1
    freed       every page of the admission (`pages`, in logical order) and its `slot` (-1: it held none) are given
                back. Pages that a dispatched and not yet completed step may touch are fenced, the others are free
    unfenced    `pages` left the fence and are free (request and admission: who held them)
    """

    kind: EffectKind
    request: int
    admission: int
    slot: int = -1
    first_page: int = 0
    pages: tuple[int, ...] = ()
    reason: str = ""


@_step_value
class StepPlan:
    """What one step runs, where it writes, and what changed hands so that it can.

    A row writes K/V at positions start .. start + count - 1 of its sequence; the token at position p lies in page
    table[row, p // page_size] at offset p % page_size. A row with samples == 1 also yields the token at position
    start + count. `native` belongs to the core's own backend path: never hashed, never audited.
    """

    step: int
    request: Int32[np.ndarray, " rows"]
    admission: Int32[np.ndarray, " rows"]
    slot: Int32[np.ndarray, " rows"]
    """-1: a prefill row."""
    start: Int32[np.ndarray, " rows"]
    count: Int32[np.ndarray, " rows"]
    samples: Int32[np.ndarray, " rows"]
    """1 where the row yields a token, else 0."""
    tokens: Int32[np.ndarray, " tokens"]
    """Input token ids; UNKNOWN_TOKEN: the request's latest sampled token, not yet seen by the host."""
    num_pages: Int32[np.ndarray, " rows"]
    """How many entries of each table row are in use."""
    table: Int32[np.ndarray, "rows max_num_pages"]
    """Each row's whole page list, padded with DUMMY_PAGE; max_num_pages is at least the largest num_pages."""
    effects: tuple[Effect, ...]
    """Made by plan() itself, before the step runs."""
    native: object = field(default=None, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.request)

    @property
    def num_tokens(self) -> int:
        """Number of tokens whose K/V the step writes."""
        return len(self.tokens)


@_step_value
class StepOutcome:
    """What a step yielded, in the order of the plan's rows: -1 and 0 where nothing was sampled.

    A row whose sequence had already ended on the device (an EOS the host has not seen yet) yields -1 and 0 too.
    """

    step: int
    token: Int32[np.ndarray, " rows"]
    eos: Int32[np.ndarray, " rows"]
    logits: UInt32[np.ndarray, " rows"] | None = field(default=None, compare=False)
    """`fingerprint.logits_digest` of each row's logits; None: the model has none. Never hashed."""


@_step_value
class ModelRows:
    """What the model computes for each row of a plan; made by the simulator, never by the core.

    `kv_base` identifies (request, admission); `token_seed` is the request's sampling seed; `eos_position` is the
    position at which the request's EOS token stands, or -1 where no EOS ends it.
    """

    kv_base: UInt32[np.ndarray, " rows"]
    token_seed: UInt32[np.ndarray, " rows"]
    eos_position: Int32[np.ndarray, " rows"]
    temperature: Float32[np.ndarray, " rows"] = field(default_factory=lambda: np.zeros(0, np.float32))
    """Of the request; none at all where the model draws nothing."""
    top_p: Float32[np.ndarray, " rows"] = field(default_factory=lambda: np.zeros(0, np.float32))


@dataclass(frozen=True, slots=True)
class CoreSnapshot:
    """A copy of the core's whole host state, for the auditor's full checks.

    `free` is in hand-out order. `rows` and `positions` are the host batch: a slot without a live sequence has
    position -1 and an all-dummy row. `slot_of` maps request to slot. `pages` maps (request, admission) to the pages
    it owns. `queues` maps a state name to the requests in it, in order: waiting, prefill, joining, running, draining
    (nothing left to plan, last outcome still in flight); each unfinished request is in exactly one.
    """

    free: Ints
    fenced: Ints
    rows: Int32[np.ndarray, "slots max_num_pages"]
    positions: Int32[np.ndarray, " slots"]
    slot_of: Mapping[int, int]
    pages: Mapping[tuple[int, int], Ints]
    queues: Mapping[str, Ints]


@dataclass(frozen=True, slots=True)
class DeclaredPolicy:
    """What a core says of itself; the auditor holds it to that and to nothing more.

    "any" declares that a choice is the core's own business: it is then not checked.
    """

    batch_size: int
    page_size: int
    num_pages: int
    max_sequence_length: int
    prefill_chunk: int
    lag: int = 0
    preemption: Literal["none", "recompute"] = "none"
    free_list: Literal["fifo", "lifo", "lowest", "any"] = "fifo"
    free_pages: tuple[int, ...] = ()
    """The free pages at first, in hand-out order; (): ascending."""
    mix: Literal["mixed", "prefill_first", "decode_first", "any"] = "mixed"
    victim: Literal["newest", "any"] = "newest"
    admission: Literal["fcfs", "any"] = "fcfs"
    admission_pages: Literal["prompt", "chunk", "all", "any"] = "prompt"
    """For what pages must be free before a prefill starts: prompt, first chunk, or all that may ever get K/V."""
    max_prefill_rows: int = 1
    max_step_tokens: int = 0
    """0: prefill_chunk * max_prefill_rows + batch_size."""
    max_decode_wait: int = 4
    """Steps in a row that a running decode may wait for prefills (mix prefill_first)."""
    max_prefill_wait: int = 4
    """Steps in a row that a prefill that could run may wait for decodes (mix decode_first)."""
    lookahead: int = 0
    """Tokens beyond the scheduled ones for which pages may be held."""
    fence: bool = True
    """Pages of an ended admission wait until the last step dispatched with it has completed."""


@dataclass(frozen=True, slots=True)
class WrongPlace:
    """A place of the cache that does not hold what it should: `found` and `expected` are one token's raw words."""

    layer: int
    kind: Literal["K", "V"]
    head: int
    page: int
    offset: int
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepInput:
    """What the newest step ran with, as it stood on the device.

    A backend has its own rows: those of the plan at `device_row`, all others padding or idle. `query_starts` says where
    the tokens of each begin, padding left out, and where the last ones end; `input_start` where they begin in the
    input, padding counted; `sampled_row` at which row of the input its token is sampled.
    """

    step: int
    device_row: Int32[np.ndarray, " rows"]
    query_starts: Int32[np.ndarray, " device_rows_and_end"]
    input_start: Int32[np.ndarray, " device_rows"]
    sampled_row: Int32[np.ndarray, " device_rows"]
    temperature: Float32[np.ndarray, " device_rows"]
    top_p: Float32[np.ndarray, " device_rows"]
    max_tokens: Int32[np.ndarray, " device_rows"]
    seed: UInt32[np.ndarray, " device_rows"]


@dataclass(frozen=True, slots=True)
class ShardedArray:
    """One array of the cache: where each device's part of it lies, as (start, stop) along each axis."""

    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, int], ...], ...]
    num_copies: int = 1
    """How many devices are meant to hold each position."""


@dataclass(frozen=True, slots=True)
class CacheBuffers:
    """The arrays that hold the cache now, and what the newest step left of those before it."""

    num_buffers: int
    num_bytes: int
    num_not_donated: int
    """Arrays given to the newest step that are still alive though others took their place."""
    arrays: tuple[ShardedArray, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Copies of what lies on the device: the batch rows of `slots` and the raw K/V bits of `pages`."""

    slots: Ints
    positions: Int32[np.ndarray, " slots"]
    rows: Int32[np.ndarray, "slots max_num_pages"]
    pages: Ints
    keys: NDArray[np.unsignedinteger]
    """Raw words, axes (layers, heads, pages, page_size, head_dim)."""
    values: NDArray[np.unsignedinteger]
    ran: StepInput | None = None
    """None: no step has run, or the newest one had no input of that kind (it ran from neutral rows)."""
