"""The decode batch: one row (slot) for each sequence that generates tokens."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from paged_attention import pytree
from paged_attention.arrays import is_present, place, put_rows
from paged_attention.plan import DUMMY_PAGE
from paged_attention.pytree import Fifo, SerializableTree
from paged_attention.requests import GenerationStepTask, SlotPageAssignment, own_copy
from paged_attention.sampling import SamplingParams

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jaxtyping import Int32

    from paged_attention.arrays import Array
    from paged_attention.metadata import PagedAttentionCacheMetaData

FREE_POSITION = -1
"""The position of a slot without a live sequence."""


@dataclass(eq=False)
class ActiveSequenceBatch(SerializableTree):
    """The state of all slots: on the host for the scheduler, on the device for the model.

    token_ids                  int32, the token that each slot feeds next; a list while rows are gathered on the host
    positions                  int32, the position of that token; -1: no live sequence
    page_table                 int32, each slot's pages in logical order, then dummy pages
    sampling_params            arrays of width batch_size
    available_slots            free slots, handed out first in, first out
    active_slot_requests_map   slot to task
    context_lock               guards the two above; every batch has its own
    page_update_slots, page_update_page_idxs, page_update_mapped_idxs
                               int32, pending page table updates: page_table[slot, page_idx] = mapped_idx; a slot of
                               batch_size is padding

    Queue, map and lock are the scheduler's and no part of the pytree.
    """

    tree_leaves: ClassVar[tuple[str, ...]] = (
        "token_ids",
        "positions",
        "page_table",
        "sampling_params",
        "page_update_slots",
        "page_update_page_idxs",
        "page_update_mapped_idxs",
    )

    token_ids: Int32[Array, " slots"] | list[Any]
    positions: Int32[Array, " slots"]
    page_table: Int32[Array, "slots pages"]
    sampling_params: SamplingParams
    available_slots: Fifo[int] | None
    active_slot_requests_map: dict[int, GenerationStepTask] | None
    context_lock: threading.Lock | None = field(default_factory=threading.Lock)
    page_update_slots: Int32[Array, " updates"] | None = None
    page_update_page_idxs: Int32[Array, " updates"] | None = None
    page_update_mapped_idxs: Int32[Array, " updates"] | None = None

    @classmethod
    def create(cls, metadata: PagedAttentionCacheMetaData, mesh: Mesh | None) -> ActiveSequenceBatch:
        """A batch of free slots for the device, replicated over the mesh (NumPy arrays where mesh is None)."""
        slots = metadata.batch_size
        params = SamplingParams.init_numpy(metadata)
        token_ids, positions, page_table, *sampling = place(
            mesh,
            np.zeros(slots, np.int32),
            np.full(slots, FREE_POSITION, np.int32),
            np.full((slots, metadata.num_pages_per_sequence), DUMMY_PAGE, np.int32),
            *(getattr(params, name) for name in params.tree_leaves),
        )
        if mesh is not None:
            pytree.register()
        return cls(
            token_ids=token_ids,
            positions=positions,
            page_table=page_table,
            sampling_params=SamplingParams(**dict(zip(params.tree_leaves, sampling, strict=True))),
            available_slots=Fifo(range(slots)),
            active_slot_requests_map={},
        )

    @classmethod
    def init_numpy(cls, metadata: PagedAttentionCacheMetaData) -> ActiveSequenceBatch:
        """A batch of free slots for the host: NumPy arrays, token_ids an empty list, room for batch_size updates."""
        batch = cls.create(metadata, None)
        batch.token_ids = []
        batch.page_update_slots = np.full(metadata.batch_size, metadata.batch_size, np.int32)
        batch.page_update_page_idxs = np.zeros(metadata.batch_size, np.int32)
        batch.page_update_mapped_idxs = np.full(metadata.batch_size, DUMMY_PAGE, np.int32)
        return batch

    @classmethod
    def init_empty(cls) -> ActiveSequenceBatch:
        """A placeholder: no slots, arrays of shape ()."""
        nothing = np.zeros((), np.int32)
        return cls(
            token_ids=nothing,
            positions=nothing,
            page_table=nothing,
            sampling_params=SamplingParams.init_empty(),
            available_slots=None,
            active_slot_requests_map=None,
        )

    @property
    def is_active(self) -> bool:
        """Whether there are slots: token_ids is a non-empty array (or list)."""
        return bool(self.token_ids) if isinstance(self.token_ids, list) else is_present(self.token_ids)

    # On the host: in place.

    def insert_from_task(self, slot: int, task: GenerationStepTask) -> None:
        """Write a task into row `slot` of this batch, in place (NumPy arrays; a list of tokens grows as needed).

        ValueError: the row is outside the batch, or the task has more pages than a row of the page table.
        """
        slots, width = self.page_table.shape
        if not 0 <= slot < slots:
            raise ValueError(f"request {task.id!r}: slot {slot} is outside the batch of {slots} slots")
        if len(task.page_indices) > width:
            raise ValueError(f"request {task.id!r}: {len(task.page_indices)} pages, but a page table row holds {width}")
        if isinstance(self.token_ids, list) and len(self.token_ids) <= slot:
            self.pad_tokens(slot + 1)
        positions: Any = self.positions
        table: Any = self.page_table
        tokens: Any = self.token_ids
        tokens[slot] = task.prefill_token_id
        positions[slot] = task.position
        table[slot, : len(task.page_indices)] = task.page_indices
        table[slot, len(task.page_indices) :] = DUMMY_PAGE
        self.sampling_params.insert_from_task(slot, task)

    def apply_assignment(self, assignment: list[SlotPageAssignment]) -> None:
        """Note page table updates in the page_update arrays, in place, in the place of what stood there.

        ValueError: there are more of them than the arrays hold.
        """
        slots: Any = self.page_update_slots
        pages: Any = self.page_update_page_idxs
        mapped: Any = self.page_update_mapped_idxs
        count = len(assignment)
        if slots is None or count > len(slots):
            held = 0 if slots is None else len(slots)
            raise ValueError(f"{count} page updates, but the batch holds {held}; make it with init_numpy")
        slots[:count] = [item.slot for item in assignment]
        pages[:count] = [item.page_idx for item in assignment]
        mapped[:count] = [item.mapped_idx for item in assignment]
        slots[count:] = len(self.positions)

    def pad_tokens(self, pad_length: int) -> None:
        """Append placeholder scalars to the token list until it has pad_length entries, in place.

        TypeError: token_ids is an array, which has its length already.
        """
        if not isinstance(self.token_ids, list):
            raise TypeError(f"pad_tokens needs a list of token ids: found {type(self.token_ids).__name__}")
        self.token_ids.extend(np.zeros((), np.int32) for _ in range(pad_length - len(self.token_ids)))

    def copy_decode(self, decode: ActiveSequenceBatch) -> None:
        """Take over tokens, positions, page table and sampling parameters (never by reference), in place."""
        tokens = decode.token_ids
        self.token_ids = list(tokens) if isinstance(tokens, list) else own_copy(tokens)
        self.positions = own_copy(decode.positions)
        self.page_table = own_copy(decode.page_table)
        params = decode.sampling_params
        self.sampling_params = SamplingParams(**{n: own_copy(getattr(params, n)) for n in params.tree_leaves})

    def __deepcopy__(self, memo: dict[int, Any]) -> ActiveSequenceBatch:
        names = [f.name for f in fields(self) if f.name != "context_lock"]
        return ActiveSequenceBatch(**{name: copy.deepcopy(getattr(self, name), memo) for name in names})

    # On the device: a new batch.

    def insert_decode_state(
        self, insert_slots: Int32[Array, " rows"], update: ActiveSequenceBatch
    ) -> ActiveSequenceBatch:
        """A new batch: row i of `update` at slot insert_slots[i], then the page updates of `update`.

        Slots of batch_size are padding and dropped, in inserts and updates alike. This batch stays as it is.
        """
        table = put_rows(self.page_table, insert_slots, update.page_table)
        if update.page_update_slots is not None:
            places = (update.page_update_slots, update.page_update_page_idxs)
            table = put_rows(table, places, update.page_update_mapped_idxs)
        return self.replace(
            token_ids=put_rows(self.token_ids, insert_slots, update.token_ids),
            positions=put_rows(self.positions, insert_slots, update.positions),
            page_table=table,
            sampling_params=self.sampling_params.insert_decode_state(insert_slots, update),
        )
