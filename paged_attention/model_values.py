"""The values around one model step: where its rows stand, what goes in, what comes out, what the host takes from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paged_attention.arrays import is_present
from paged_attention.batch import FREE_POSITION
from paged_attention.plan import UNKNOWN_TOKEN
from paged_attention.pytree import SerializableTree, Tree
from paged_attention.requests import own_copy
from paged_attention.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxtyping import Bool, Int32

    from paged_attention.arrays import Array


@dataclass(frozen=True, eq=False)
class PagedAttentionMetadata(SerializableTree):
    """Where the rows of a step stand: of the prefill chunk, then of the decode slots. An absent part has shape ().

    prefill_length       prompt tokens whose K/V lie in the cache after this step; 0 without a prefill
    prefill_position     position of each row of the chunk; a row is real iff it is below prefill_length
    prefill_page_table   the whole sequence's pages in logical order, then dummy pages
    decodes_position     position that each slot writes in this step; -1: no live sequence
    decodes_page_table   each slot's pages in logical order, then dummy pages
    """

    tree_leaves: ClassVar[tuple[str, ...]] = (
        "prefill_length",
        "prefill_position",
        "prefill_page_table",
        "decodes_position",
        "decodes_page_table",
    )

    prefill_length: Int32[Array, ""]
    prefill_position: Int32[Array, " chunk"]
    prefill_page_table: Int32[Array, " pages"]
    decodes_position: Int32[Array, " slots"]
    decodes_page_table: Int32[Array, "slots pages"]

    @classmethod
    def init_empty(cls) -> PagedAttentionMetadata:
        """Metadata of a step with neither part."""
        nothing = np.zeros((), np.int32)
        return cls(nothing, nothing, nothing, nothing, nothing)

    def is_prefill_mode(self) -> bool:
        """Whether the step has a prefill chunk and no decodes."""
        return is_present(self.prefill_position) and not is_present(self.decodes_position)

    def is_decode_mode(self) -> bool:
        """Whether the step has decodes and no prefill chunk."""
        return is_present(self.decodes_position) and not is_present(self.prefill_position)


@dataclass(frozen=True, eq=False)
class ModelInputBatch(Tree):
    """The rows of one forward pass: [prefill chunk tokens][one token per decode slot].

    `sampling_params` has a row for each token that is sampled: [the prefill's one][one per slot].
    """

    tree_leaves: ClassVar[tuple[str, ...]] = ("input_ids", "positions", "attn_meta", "sampling_params")

    input_ids: Int32[Array, " tokens"]
    positions: Int32[Array, " tokens"]
    attn_meta: PagedAttentionMetadata
    sampling_params: SamplingParams


@dataclass(frozen=True, eq=False)
class ModelOutputBatch(SerializableTree):
    """What a step yielded, prefill and slots apart; the slots' arrays are empty where the step had no decodes.

    A slot without a live sequence has token -1, complete False, next position -1, and so has an absent prefill. The
    next position is -1 for whatever has just completed, too. `next_sampling_params` are the slots'.
    """

    tree_leaves: ClassVar[tuple[str, ...]] = (
        "prefill_complete",
        "decodes_completes",
        "prefill_token_id",
        "decodes_token_ids",
        "prefill_next_position",
        "decodes_next_position",
        "next_sampling_params",
    )

    prefill_complete: Bool[Array, ""]
    decodes_completes: Bool[Array, " slots"]
    prefill_token_id: Int32[Array, ""]
    decodes_token_ids: Int32[Array, " slots"]
    prefill_next_position: Int32[Array, ""]
    decodes_next_position: Int32[Array, " slots"]
    next_sampling_params: SamplingParams

    @classmethod
    def init_empty(cls) -> ModelOutputBatch:
        """The output of a step with neither part."""
        return cls(
            prefill_complete=np.zeros((), np.bool_),
            decodes_completes=np.zeros(0, np.bool_),
            prefill_token_id=np.array(UNKNOWN_TOKEN, np.int32),
            decodes_token_ids=np.zeros(0, np.int32),
            prefill_next_position=np.array(FREE_POSITION, np.int32),
            decodes_next_position=np.zeros(0, np.int32),
            next_sampling_params=SamplingParams.init_empty(),
        )


@dataclass(eq=False)
class ModelOutputSummary(SerializableTree):
    """What the host takes from a step; its arrays cover the whole batch and are indexed by slot.

    `decodes_active_slots` and `decodes_active_request_ids` say which slots count, and whose they were in that step.
    """

    tree_leaves: ClassVar[tuple[str, ...]] = (
        "prefill_token_id",
        "prefill_complete",
        "decodes_token_ids",
        "decodes_completes",
    )
    tree_static: ClassVar[tuple[str, ...]] = (
        "prefill_request_id",
        "decodes_active_slots",
        "decodes_active_request_ids",
    )

    prefill_request_id: str | int | None
    prefill_token_id: Int32[Array, ""]
    prefill_complete: Bool[Array, ""]
    decodes_active_slots: list[int]
    decodes_active_request_ids: list[str | int]
    decodes_token_ids: Int32[Array, " slots"]
    decodes_completes: Bool[Array, " slots"]

    @classmethod
    def from_output(cls, output: ModelOutputBatch) -> ModelOutputSummary:
        """A summary that names no request yet: that is for the scheduler to fill in. Waits for no device."""
        return cls(
            prefill_request_id=None,
            prefill_token_id=own_copy(output.prefill_token_id),
            prefill_complete=own_copy(output.prefill_complete),
            decodes_active_slots=[],
            decodes_active_request_ids=[],
            decodes_token_ids=own_copy(output.decodes_token_ids),
            decodes_completes=own_copy(output.decodes_completes),
        )
