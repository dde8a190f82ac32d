"""What travels between the stages: a prompt to prefill, a sequence to decode, and the plan of the next iteration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from paged_attention import pytree
from paged_attention.arrays import is_present, place
from paged_attention.pytree import Fifo, SerializableTree
from paged_attention.sampling import DTYPES, SamplingParams

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jaxtyping import Int32

    from paged_attention.arrays import Array
    from paged_attention.metadata import PagedAttentionCacheMetaData

__all__ = [
    "AllocatedPrefillPages",
    "Fifo",
    "GenerationStepTask",
    "InitialSequenceRequest",
    "NextIterationPlan",
    "SlotPageAssignment",
]


@dataclass(eq=False)
class InitialSequenceRequest(SerializableTree):
    """A prompt on its way through the prefill, chunk by chunk.

    token_ids          int32, the prompt padded to a multiple of chunk_size
    positions          int32, the position of each of them; padding is past the end
    page_indices       int32, the page table row of the sequence: its pages in logical order, then dummy pages
    sampling_params    scalars
    id                 of the request
    chunk_idx          the chunk that runs next
    chunk_size         tokens per chunk
    prompt_token_ids   the prompt as it came
    length             int32 scalar, the prompt's length without padding
    order              submission order, for whoever picks a victim

    The first four and `length` are arrays (pytree leaves); the others are the scheduler's.
    """

    tree_leaves: ClassVar[tuple[str, ...]] = ("token_ids", "positions", "page_indices", "sampling_params", "length")

    token_ids: Int32[Array, " padded_tokens"]
    positions: Int32[Array, " padded_tokens"]
    page_indices: Int32[Array, " pages"]
    sampling_params: SamplingParams
    id: str | int | None
    chunk_idx: int | None
    chunk_size: int | None
    prompt_token_ids: list[int] | Int32[np.ndarray, " tokens"] | None
    length: Int32[Array, ""] | None = None
    order: int | None = None

    @classmethod
    def create(
        cls,
        id: str | int,  # noqa: A002 the documented name
        mesh: Mesh | None,
        metadata: PagedAttentionCacheMetaData,
        chunk_size: int,
        prompt_token_ids: list[int] | Int32[np.ndarray, " tokens"],
        max_prefill_length: int | None = None,
        prefill_lengths: list[int] | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> InitialSequenceRequest:
        """A request at its first chunk, without pages; NumPy arrays where mesh is None, else replicated over it.

        The prompt is padded to the smallest of prefill_lengths and max_prefill_length (default: max_sequences) that
        holds it, and on to a multiple of chunk_size, so that every chunk is whole.

        ValueError: the prompt is empty, longer than max_sequences or than max_prefill_length, or chunk_size < 1.
        """
        largest = metadata.max_sequences if max_prefill_length is None else max_prefill_length
        length = len(prompt_token_ids)
        _refuse(id, length, largest, metadata.max_sequences, chunk_size)
        padded = (
            min(bucket for bucket in (*prefill_lengths, largest) if bucket >= length) if prefill_lengths else largest
        )
        padded = -(-padded // chunk_size) * chunk_size
        tokens = np.zeros(padded, np.int32)
        tokens[:length] = prompt_token_ids
        params = sampling_params or SamplingParams()
        names = SamplingParams.tree_leaves
        token_ids, positions, page_indices, length_array, *scalars = place(
            mesh,
            tokens,
            np.arange(padded, dtype=np.int32),
            np.zeros(metadata.num_pages_per_sequence, np.int32),
            np.int32(length),
            *[DTYPES[name](getattr(params, name)) for name in names],
        )
        if mesh is not None:
            pytree.register()
        return cls(
            token_ids=token_ids,
            positions=positions,
            page_indices=page_indices,
            sampling_params=SamplingParams(*scalars),
            id=id,
            chunk_idx=0,
            chunk_size=chunk_size,
            prompt_token_ids=prompt_token_ids if isinstance(prompt_token_ids, np.ndarray) else list(prompt_token_ids),
            length=length_array,
        )

    @classmethod
    def init_empty(cls) -> InitialSequenceRequest:
        """A placeholder: no request, arrays of shape ()."""
        nothing = np.zeros((), np.int32)
        return cls(
            token_ids=nothing,
            positions=nothing,
            page_indices=nothing,
            sampling_params=SamplingParams.init_empty(),
            id=None,
            chunk_idx=None,
            chunk_size=None,
            prompt_token_ids=None,
            length=nothing,
        )

    @property
    def is_active(self) -> bool:
        """Whether there is a prompt: token_ids is a non-empty array."""
        return is_present(self.token_ids)

    def as_planned(self) -> InitialSequenceRequest:
        """What a plan keeps of it: chunk and pages as they are now, the rest shared."""
        return InitialSequenceRequest(
            self.token_ids,
            self.positions,
            own_copy(self.page_indices),
            self.sampling_params,
            self.id,
            self.chunk_idx,
            self.chunk_size,
            self.prompt_token_ids,
            self.length,
            self.order,
        )

    def copy_prefill(self, prefill: InitialSequenceRequest) -> None:
        """Take over the arrays of `prefill` (never by reference), in place; id, chunk and prompt stay."""
        for name in ("token_ids", "positions", "page_indices", "length"):
            setattr(self, name, own_copy(getattr(prefill, name)))
        params = prefill.sampling_params
        self.sampling_params = SamplingParams(**{n: own_copy(getattr(params, n)) for n in params.tree_leaves})


def _refuse(name: str | int, length: int, largest: int, max_sequences: int, chunk_size: int) -> None:
    """Raise the ValueErrors of `InitialSequenceRequest.create`."""
    if chunk_size < 1:
        raise ValueError(f"request {name!r}: chunk_size must be at least 1 token: found {chunk_size}")
    if length == 0:
        raise ValueError(
            f"request {name!r}: the prompt is empty (0 tokens); expected 1 to max_sequences={max_sequences} tokens"
        )
    if length > max_sequences:
        raise ValueError(
            f"request {name!r}: the prompt has {length} tokens, more than max_sequences={max_sequences}; shorten it"
        )
    if length > largest:
        raise ValueError(
            f"request {name!r}: the prompt has {length} tokens, more than max_prefill_length={largest}; "
            f"shorten it or raise max_prefill_length"
        )


def own_copy(value: Any) -> Any:
    """A NumPy array's copy; a JAX array or a Python scalar cannot change, so it is its own copy."""
    array: Any = value
    return array.copy() if isinstance(value, np.ndarray) else array


@dataclass(eq=False)
class GenerationStepTask(SerializableTree):
    """A sequence that decodes, or waits for a slot to do so.

    id                 of the request
    slot               its row of the decode batch; -1: none yet
    position           of the token that is fed next: the number of tokens whose K/V lie in the cache
    page_indices       its pages in logical order
    prefill_token_id   int32 scalar, the token that is fed next (its first one may still be on the device: a JAX scalar,
                       or -1 where `build_input` is given the prefill's output)
    sampling_params    scalars
    order              submission order, for whoever picks a victim
    """

    tree_leaves: ClassVar[tuple[str, ...]] = ("prefill_token_id", "sampling_params")
    tree_static: ClassVar[tuple[str, ...]] = ("id", "slot", "position", "page_indices", "order")

    id: str | int
    slot: int
    position: int
    page_indices: list[int]
    prefill_token_id: Array | np.int32 | int
    sampling_params: SamplingParams
    order: int | None = None

    def as_planned(self) -> GenerationStepTask:
        """What a plan keeps of it: position and pages as they are now, the rest shared."""
        pages, token, params = list(self.page_indices), self.prefill_token_id, self.sampling_params
        return GenerationStepTask(self.id, self.slot, self.position, pages, token, params, self.order)


@dataclass
class SlotPageAssignment(SerializableTree):
    """The page `mapped_idx` becomes logical page `page_idx` of the sequence in `slot`."""

    tree_static: ClassVar[tuple[str, ...]] = ("slot", "page_idx", "mapped_idx")

    slot: int
    page_idx: int
    mapped_idx: int


@dataclass
class AllocatedPrefillPages(SerializableTree):
    """The pages newly given to a prefill, in logical order."""

    tree_static: ClassVar[tuple[str, ...]] = ("page_indices",)

    page_indices: list[int]


@dataclass(eq=False)
class NextIterationPlan(SerializableTree):
    """What the next step runs, and what the device must be told first.

    prefill_request              whose chunk number chunk_idx runs; `init_empty()` where none does
    schedule_prefill             whether a chunk runs
    schedule_decodes             whether the decode batch runs
    prefill_pages_update         pages newly given to prefill_request; they already stand in its page_indices
    new_decodes_requests         sequences that enter the decode batch, each at its `slot`
    decodes_state_page_updates   pages newly given to sequences in the decode batch
    preempted                    ids of the requests that lost their pages to this plan
    released_slots               slots given back since the last plan: position -1, an all-dummy row

    The device applies released_slots first, then new_decodes_requests, then decodes_state_page_updates.
    """

    tree_leaves: ClassVar[tuple[str, ...]] = (
        "prefill_request",
        "prefill_pages_update",
        "new_decodes_requests",
        "decodes_state_page_updates",
    )
    tree_static: ClassVar[tuple[str, ...]] = ("schedule_prefill", "schedule_decodes", "preempted", "released_slots")

    prefill_request: InitialSequenceRequest
    schedule_prefill: bool
    schedule_decodes: bool
    prefill_pages_update: AllocatedPrefillPages
    new_decodes_requests: list[GenerationStepTask]
    decodes_state_page_updates: list[SlotPageAssignment]
    preempted: list[str | int] = field(default_factory=list[str | int])
    released_slots: list[int] = field(default_factory=list[int])
