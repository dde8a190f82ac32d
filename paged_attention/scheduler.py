"""Decides what the next step runs, from the queues, the free pages and the host's decode batch.

`create_plan` first drafts a step by reading only, then commits it: where the draft raises, nothing has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from paged_attention.batch import ActiveSequenceBatch
from paged_attention.pages import HBMPageManager
from paged_attention.plan import DUMMY_PAGE
from paged_attention.pytree import Fifo
from paged_attention.requests import (
    AllocatedPrefillPages,
    GenerationStepTask,
    InitialSequenceRequest,
    NextIterationPlan,
    SlotPageAssignment,
)


@dataclass(frozen=True, slots=True)
class SchedulingPolicy:
    """How prefills and decodes share the steps, and what happens when pages run out.

    mix             a step runs                                                      who may wait, and how long
    mixed           all decodes and, where one can run, a prefill chunk             nobody waits for the other
    prefill_first   a prefill chunk alone, where one can run                        decodes: max_decode_wait steps
    decode_first    all decodes alone, where there are any                          a prefill: max_prefill_wait steps
    """

    preemption: Literal["none", "recompute"] = "none"
    mix: Literal["mixed", "prefill_first", "decode_first"] = "mixed"
    max_decode_wait: int = 4
    max_prefill_wait: int = 4

    def __post_init__(self) -> None:
        if self.max_decode_wait < 0 or self.max_prefill_wait < 0:
            raise ValueError(
                f"waits are numbers of steps and must not be negative: found max_decode_wait="
                f"{self.max_decode_wait}, max_prefill_wait={self.max_prefill_wait}"
            )


_NO_PAGES = AllocatedPrefillPages([])

Holder = GenerationStepTask | InitialSequenceRequest
"""Somebody who holds pages: a running or queued decode, or the active prefill."""


class _Draft:
    """What a step would do, made by reading only; nothing, where nothing is set."""

    run_decodes: bool = False
    growing_slots: Sequence[int] = ()
    num_joins: int = 0
    num_join_pages: int = 0
    prefill: InitialSequenceRequest | None = None
    prefill_is_new: bool = False
    num_prefill_pages: int = 0
    victims: Sequence[Holder] = ()
    decodes_wait: bool = False
    """Decodes that could run are left out for the prefill."""
    prefill_waits: bool = False
    """A prefill that could run is left out for the decodes."""


class InferenceScheduler:
    """Plans steps: all decodes plus at most one prefill chunk, within the declared policy.

    Requests are prefilled first come, first served; a prefill starts only where a slot can be reserved for it and the
    pages of its whole prompt are free, though it is given them chunk by chunk. Running decodes come first in line for
    pages. Where they are short, the newest holder is preempted until the rest fits (preemption "recompute").
    """

    def __init__(self, manager: HBMPageManager, policy: SchedulingPolicy | None = None) -> None:
        self.manager = manager
        self.policy = policy or SchedulingPolicy()
        self.batch_size = manager.metadata.batch_size
        self.max_seq_len = manager.metadata.max_sequences
        self.prefill_queue: Fifo[InitialSequenceRequest] = Fifo()
        self.decodes_queue: Fifo[GenerationStepTask] = Fifo()
        self.decode_wait = 0
        """Steps in a row in which decodes that could run were left out for a prefill."""
        self.prefill_wait = 0
        """Steps in a row in which a prefill that could run was left out for decodes."""
        self._page_size = manager.page_size
        self._no_prefill = InitialSequenceRequest.init_empty()
        self._seen: ActiveSequenceBatch | None = None
        self._capacity = np.zeros(self.batch_size, np.int32)
        """Tokens that the pages of each slot of the batch last seen can hold."""

    def enqueue_prefill_request(self, request: InitialSequenceRequest) -> None:
        """Add a request at the tail of the prefill queue."""
        self.prefill_queue.put(request)

    def requeue_prefill_request(self, request: InitialSequenceRequest) -> None:
        """Put a preempted request back at the head of the prefill queue."""
        self.prefill_queue.put_first(request)

    def enqueue_decodes_request(self, request: GenerationStepTask) -> None:
        """Add a prefilled request to those that wait for a slot of the decode batch."""
        self.decodes_queue.put(request)

    def create_plan(
        self,
        active_prefill: InitialSequenceRequest | None,
        decodes_state: ActiveSequenceBatch,
        *,
        may_preempt: bool = True,
    ) -> NextIterationPlan | None:
        """Plan the next step, change the host state accordingly, and say what the device must be told.

        `active_prefill` is the prefill whose chunk number chunk_idx comes next, or None. With may_preempt False (steps
        are in flight, which may yet free pages) a want of pages gives None instead of a preemption. Between plans only
        this module's functions may seat or release rows of `decodes_state`.

        None: nothing can run now; nothing changed. NotImplementedError: decodes are short of pages and the policy's
        preemption is "none"; nothing changed. The preempted requests are named in the plan; putting them back into the
        prefill queue is the caller's part, who knows their tokens.
        """
        draft = self._draft(active_prefill, decodes_state, may_preempt)
        if draft is None or not (draft.run_decodes or draft.prefill):
            return None
        return self._commit(draft, decodes_state)

    # Drafting: reads only.

    def _draft(
        self, active: InitialSequenceRequest | None, batch: ActiveSequenceBatch, may_preempt: bool
    ) -> _Draft | None:
        free, mix = self.manager.num_available_pages, self.policy.mix
        if mix == "prefill_first" and self.decode_wait < self.policy.max_decode_wait:
            draft = self._draft_prefill(_Draft(), active, batch, free)
            if draft.prefill is not None:
                draft.decodes_wait = bool(self.decodes_queue or _map(batch))
                return draft
        draft = self._draft_decodes(active, batch, free, may_preempt)
        if draft is None or draft.victims:
            return draft
        free -= len(draft.growing_slots)
        free -= draft.num_join_pages
        if active is not None or self.prefill_queue:
            self._draft_prefill(draft, active, batch, free)
            first = mix == "decode_first" and self.prefill_wait < self.policy.max_prefill_wait
            if first and draft.run_decodes and draft.prefill is not None:
                draft.prefill, draft.prefill_waits = None, True
        return draft

    def _draft_decodes(
        self, active: InitialSequenceRequest | None, batch: ActiveSequenceBatch, free: int, may_preempt: bool
    ) -> _Draft | None:
        draft = _Draft()
        draft.growing_slots = self._growing_slots(batch)
        draft.run_decodes = bool(batch.active_slot_requests_map)
        spare = free - len(draft.growing_slots)
        if spare >= 0:
            if self.decodes_queue:
                self._draft_joins(draft, batch, spare)
                draft.run_decodes = draft.run_decodes or draft.num_joins > 0
            if draft.run_decodes or not self.decodes_queue or not _slots(batch):
                return draft
        if not may_preempt:
            return None
        if self.policy.preemption == "none":
            raise NotImplementedError(
                f"decodes need {max(len(draft.growing_slots), 1)} pages and {free} of "
                f"{self.manager.metadata.num_pages_per_layer - 1} are free: evicting a sequence needs "
                f"preemption 'recompute'; this policy says 'none'"
            )
        return self._draft_preemption(active, batch, free)

    def _draft_preemption(self, active: InitialSequenceRequest | None, batch: ActiveSequenceBatch, free: int) -> _Draft:
        """Choose the newest holders, one by one, until the decodes that are left have the pages they need."""
        draft = _Draft()
        draft.run_decodes, draft.victims = True, (victims := [])
        growing = set(self._growing_slots(batch))
        running = [task for _, task in sorted(_map(batch).items())]
        queued = list(self.decodes_queue)
        holders: list[Holder] = [*running, *queued]
        if active is not None:
            holders.append(active)
        for victim in sorted(holders, key=_order, reverse=True):
            victims.append(victim)
            free += len(_pages_of(victim))
            if isinstance(victim, GenerationStepTask):
                (running if victim in running else queued).remove(victim)
                growing.discard(victim.slot)
            # Something must be left to run: a running decode, or a queued one that a page now lets in.
            if free >= len(growing) and (running or (queued and free > 0)):
                break
        else:
            raise RuntimeError(f"no sequence can run: {free} free pages and nobody left to preempt")
        draft.growing_slots = sorted(growing)
        if not running:
            draft.num_joins = 1
        return draft

    def _growing_slots(self, batch: ActiveSequenceBatch) -> list[int]:
        """Slots whose next token falls on a logical page that they do not have yet, ascending."""
        if batch is not self._seen:
            self._seen = batch
            self._capacity = np.count_nonzero(batch.page_table, axis=1).astype(np.int32) * self.manager.page_size
        positions: Any = batch.positions
        return (self._capacity <= positions).nonzero()[0].tolist()

    def _draft_joins(self, draft: _Draft, batch: ActiveSequenceBatch, spare: int) -> None:
        """Add as many queued decodes, first come first served, as find a slot and the page that they may need."""
        for task, _ in zip(self.decodes_queue, _slots(batch), strict=False):
            pages = draft.num_join_pages + self._lacks_page(task)
            if pages > spare:
                break
            draft.num_joins, draft.num_join_pages = draft.num_joins + 1, pages

    def _lacks_page(self, task: GenerationStepTask) -> bool:
        return task.position >= len(task.page_indices) * self._page_size

    def _draft_prefill(
        self, draft: _Draft, active: InitialSequenceRequest | None, batch: ActiveSequenceBatch, free: int
    ) -> _Draft:
        """Add the next prefill chunk to the draft, where its pages and a slot to come are free."""
        if active is not None:
            missing = self._chunk_pages(active) - int(np.count_nonzero(active.page_indices))
            if missing <= free:
                draft.prefill, draft.num_prefill_pages = active, missing
        elif self.prefill_queue and len(_slots(batch)) > len(self.decodes_queue):
            head = self.prefill_queue.peek()
            if self.manager.pages_for(_num_prompt_tokens(head)) <= free:
                draft.prefill, draft.prefill_is_new, draft.num_prefill_pages = head, True, self._chunk_pages(head)
        return draft

    def _chunk_pages(self, request: InitialSequenceRequest) -> int:
        """Pages that the request holds once its next chunk has run."""
        assert request.chunk_idx is not None
        assert request.chunk_size is not None
        end = (request.chunk_idx + 1) * request.chunk_size
        return self.manager.pages_for(min(end, _num_prompt_tokens(request)))

    # Committing: cannot fail.

    def _commit(self, draft: _Draft, batch: ActiveSequenceBatch) -> NextIterationPlan:
        self.decode_wait = self.decode_wait + 1 if draft.decodes_wait else 0
        # Whoever waits while others are preempted goes on waiting.
        if not draft.victims:
            self.prefill_wait = self.prefill_wait + 1 if draft.prefill_waits else 0
        preempted, released = self._evict(draft.victims, batch) if draft.victims else ([], [])
        updates = self._grow(draft.growing_slots, batch) if draft.run_decodes and draft.growing_slots else []
        joined = self._join(draft.num_joins, batch) if draft.run_decodes and draft.num_joins else []
        prefill, new_pages = self._no_prefill, _NO_PAGES
        runs_prefill = draft.prefill is not None
        if draft.prefill is not None:
            request = self.prefill_queue.get_nowait() if draft.prefill_is_new else draft.prefill
            pages = self.manager.alloc_hbm_pages(draft.num_prefill_pages)
            first = np.count_nonzero(request.page_indices)
            request.page_indices[first : first + len(pages)] = pages
            prefill, new_pages = request.as_planned(), AllocatedPrefillPages(pages)
        return NextIterationPlan(
            prefill, runs_prefill, draft.run_decodes, new_pages, joined, updates, preempted, released
        )

    def _evict(self, victims: Sequence[Holder], batch: ActiveSequenceBatch) -> tuple[list[str | int], list[int]]:
        """Take the pages and slots of the victims; return their ids and the slots, newest victim first."""
        slots: list[int] = []
        for victim in victims:
            if isinstance(victim, GenerationStepTask):
                if _map(batch).get(victim.slot) is victim:
                    slots.append(victim.slot)
                    release_slot(batch, victim.slot)
                else:
                    self.decodes_queue.remove(victim)
            self.manager.free_hbm_pages(_pages_of(victim))
        return [_id(victim) for victim in victims], slots

    def _grow(self, slots: Sequence[int], batch: ActiveSequenceBatch) -> list[SlotPageAssignment]:
        tasks, page_size = _map(batch), self._page_size
        updates: list[SlotPageAssignment] = []
        for slot, page in zip(slots, self.manager.alloc_hbm_pages(len(slots)), strict=True):
            held = tasks[slot].page_indices
            logical = len(held)
            held.append(page)
            batch.page_table[slot, logical] = page
            self._capacity[slot] = (logical + 1) * page_size
            updates.append(SlotPageAssignment(slot, logical, page))
        return updates

    def _join(self, count: int, batch: ActiveSequenceBatch) -> list[GenerationStepTask]:
        joined: list[GenerationStepTask] = []
        for _ in range(count):
            task = self.decodes_queue.get_nowait()
            if self._lacks_page(task):
                task.page_indices.extend(self.manager.alloc_hbm_pages(1))
            task.slot = _slots(batch).get_nowait()
            batch.insert_from_task(task.slot, task)
            _map(batch)[task.slot] = task
            self._capacity[task.slot] = len(task.page_indices) * self._page_size
            joined.append(task.as_planned())
        return joined


def stop_slot(batch: ActiveSequenceBatch, slot: int) -> None:
    """Let a slot of the host batch run no further; its row stays until `release_slot`."""
    batch.positions[slot] = -1
    del _map(batch)[slot]


def resume_slot(batch: ActiveSequenceBatch, task: GenerationStepTask) -> None:
    """Let a stopped slot run on; its position is the caller's to restore."""
    _map(batch)[task.slot] = task


def release_slot(batch: ActiveSequenceBatch, slot: int) -> None:
    """Give a slot of the host batch back: no position, an all-dummy row, free for the next decode."""
    batch.positions[slot] = -1
    batch.page_table[slot] = DUMMY_PAGE
    _map(batch).pop(slot, None)
    _slots(batch).put(slot)


def _slots(batch: ActiveSequenceBatch) -> Fifo[int]:
    assert batch.available_slots is not None, "the scheduler needs a host batch: ActiveSequenceBatch.init_numpy"
    return batch.available_slots


def _map(batch: ActiveSequenceBatch) -> dict[int, GenerationStepTask]:
    assert batch.active_slot_requests_map is not None, (
        "the scheduler needs a host batch: ActiveSequenceBatch.init_numpy"
    )
    return batch.active_slot_requests_map


def _id(holder: Holder) -> str | int:
    assert holder.id is not None
    return holder.id


def _order(holder: Holder) -> int:
    assert holder.order is not None, f"request {holder.id!r} carries no submission order, so no victim can be chosen"
    return holder.order


def _num_prompt_tokens(request: InitialSequenceRequest) -> int:
    assert request.prompt_token_ids is not None
    return len(request.prompt_token_ids)


def _pages_of(holder: Holder) -> list[int]:
    if isinstance(holder, GenerationStepTask):
        return holder.page_indices
    return holder.page_indices[holder.page_indices != DUMMY_PAGE].tolist()
