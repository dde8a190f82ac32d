"""The host state machine around the scheduler: submit, plan, apply, cancel, abandon.

    submit -> waiting -> prefill -> joining -> running -> draining -> (ended)
                 ^                     |          |
                 +----- preempted -----+----------+

The engine keeps no array on a device and reads no clock. It counts the tokens it plans, so it knows the last row of a
sequence when it plans it; only an EOS comes late, by `lag` steps. Steps that are planned and not yet applied are "in
flight": pages that one of them may touch are fenced until its outcome is applied.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from paged_attention.batch import ActiveSequenceBatch
from paged_attention.books import Books
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.plan import (
    UNKNOWN_TOKEN,
    CoreSnapshot,
    DeclaredPolicy,
    Effect,
    Ints,
    Request,
    StepOutcome,
    StepPlan,
)
from paged_attention.planning import next_step, take_back
from paged_attention.scheduler import SchedulingPolicy
from paged_attention.sequences import STATES, refusal
from paged_attention.slots import NOBODY


class PagedAttentionEngine:
    """A serving core: the classes of this package behind submit, plan, apply, cancel and abandon.

    `submit` and `cancel` may be called from other threads while a loop plans and applies; each engine has its own lock.
    """

    def __init__(
        self,
        metadata: PagedAttentionCacheMetaData,
        *,
        prefill_chunk: int,
        policy: SchedulingPolicy | None = None,
        lag: int = 0,
        free_pages: tuple[int, ...] = (),
        free_slots: tuple[int, ...] = (),
    ) -> None:
        """`free_pages` and `free_slots` are the first free lists, in hand-out order; (): ascending.

        ValueError: a size is out of range, or a free list does not name each page or slot once.
        """
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1 token: found {prefill_chunk}")
        if not 0 <= lag <= 2:
            raise ValueError(f"lag must be 0, 1 or 2 steps: found {lag}")
        self.lag = lag
        self.books = Books(metadata, prefill_chunk, policy, free_pages, free_slots)
        self._lock = threading.RLock()
        self._newest_can_go = False
        """Nothing was applied since the newest plan, so it can still be abandoned."""
        self._next_step = 0
        self._shut = False

    @property
    def metadata(self) -> PagedAttentionCacheMetaData:
        """The cache's static configuration."""
        return self.books.metadata

    @property
    def batch(self) -> ActiveSequenceBatch:
        """The host's decode batch."""
        return self.books.batch

    @property
    def policy(self) -> DeclaredPolicy:
        """What this engine declares of itself."""
        meta, own = self.books.metadata, self.books.scheduler.policy
        return DeclaredPolicy(
            batch_size=meta.batch_size,
            page_size=meta.page_size,
            num_pages=meta.num_pages_per_layer,
            max_sequence_length=meta.max_sequences,
            prefill_chunk=self.books.prefill_chunk,
            lag=self.lag,
            preemption=own.preemption,
            mix=own.mix,
            max_decode_wait=own.max_decode_wait,
            max_prefill_wait=own.max_prefill_wait,
            free_pages=self.books.first_pages,
        )

    # Requests come and go.

    def submit(self, request: Request) -> tuple[Effect, ...]:
        """Queue a request.

        ValueError: the prompt is empty or longer than max_sequences, max_tokens is below 1, the request can never fit
        into the pool, or its id is in use; nothing changed.
        """
        books = self.books
        with self._lock:
            if self._shut:
                raise ValueError(f"request {request.id}: the engine is shut down and takes no more requests")
            if request.id in books.sequences:
                raise ValueError(f"request {request.id}: that id belongs to an unfinished request")
            reason = refusal(request, books.metadata)
            if reason is not None:
                raise ValueError(f"request {request.id}: {reason}")
            books.enter(request)
            return (Effect("submitted", request.id, 0),)

    def cancel(self, request: int) -> tuple[Effect, ...]:
        """Drop a request in whatever state it is; its tokens in flight are discarded. Unknown or ended: ()."""
        books = self.books
        with self._lock:
            sequence = books.sequences.pop(request, None)
            if sequence is None:
                return ()
            effects = [Effect("cancelled", request, sequence.admission, slot=sequence.slot)]
            if sequence.state == "waiting":
                books.scheduler.prefill_queue.remove(sequence.prefill)
            elif not sequence.gave_back:
                books.leave(sequence)
                effects += books.give_back(sequence)
            return tuple(effects)

    def shutdown(self) -> tuple[Effect, ...]:
        """Cancel everything and take no more requests; fenced pages come back as steps in flight are applied."""
        with self._lock:
            self._shut = True
            return tuple(effect for request in list(self.books.sequences) for effect in self.cancel(request))

    # One step.

    def plan(self) -> StepPlan | None:
        """Plan the next step; None where nothing can run now: nobody's pages, slot or place in line changed then.

        NotImplementedError: decodes are short of pages and the policy's preemption is "none"; nothing changed.
        """
        books = self.books
        with self._lock:
            if len(books.flights) > self.lag:
                return None
            # What a prefill yields may still be on the device; the decode that takes it up need not wait for the host.
            while books.prefilled:
                books.queue_decode(books.prefilled.pop(0), UNKNOWN_TOKEN)
            plan = next_step(books, self._next_step)
            if plan is not None:
                self._next_step += 1
                self._newest_can_go = True
            return plan

    # Outcomes.

    def apply(self, outcome: StepOutcome) -> tuple[Effect, ...]:
        """Take in what the oldest step in flight yielded: tokens, ends, and what is given back.

        ValueError: the outcome is not that of the oldest step in flight; nothing changed.
        """
        books = self.books
        with self._lock:
            plan = books.flights[0].plan if books.flights else None
            if (
                plan is None
                or outcome.step != plan.step
                or not len(outcome.token) == len(outcome.eos) == len(plan.request)
            ):
                _refuse(outcome, plan)
            flight = books.flights.popleft()
            self._newest_can_go = False
            books.note_tokens(flight, outcome)
            effects: list[Effect] = []
            for row in outcome.eos.nonzero()[0].tolist():
                sequence = books.sequence_of(flight, row)
                if sequence is not None:
                    effects += books.end(sequence, "eos")
            for sequence in flight.last_rows:
                if books.is_alive(sequence):
                    cut_short = sequence.limit < sequence.request.max_tokens
                    effects += books.end(sequence, "length" if cut_short else "max_tokens")
            if books.spent:
                for sequence in books.spent:
                    if not sequence.gave_back:
                        effects += books.give_back(sequence)
                books.spent.clear()
            if books.fences:
                effects += books.unfence(outcome.step)
            return tuple(effects)

    # A step that never ran.

    def abandon(self, step: int) -> tuple[Effect, ...]:
        """Take back the newest plan: positions and counts return; pages, slots and admissions stay where they are.

        ValueError: `step` is not the newest plan, or an outcome was applied since; nothing changed.
        """
        books = self.books
        with self._lock:
            if not books.flights or books.flights[-1].plan.step != step or not self._newest_can_go:
                raise ValueError(
                    f"step {step} cannot be abandoned: it is not the newest plan with nothing applied since"
                )
            self._newest_can_go = False
            take_back(books, books.flights.pop())
            if step not in books.fences:
                return ()
            # Whoever was cancelled meanwhile may still be touched by an earlier step in flight.
            if books.flights:
                books.fences.setdefault(books.flights[-1].plan.step, []).extend(books.fences.pop(step))
                return ()
            return tuple(books.unfence(step))

    # What it says of itself.

    def pending(self) -> Mapping[int, str]:
        """Each unfinished request, with the reason why it is not finished."""
        with self._lock:
            reasons = {
                "waiting": "waits for a slot and for the pages of its prompt",
                "prefill": "its prompt is being fed",
                "joining": "prefilled; waits for a slot of the decode batch",
                "running": "decodes",
                "draining": "its last token is in flight",
            }
            return {request: reasons[sequence.state] for request, sequence in self.books.sequences.items()}

    def snapshot(self) -> CoreSnapshot:
        """A copy of the whole host state."""
        books = self.books
        with self._lock:
            queues: dict[str, list[int]] = {state: [] for state in STATES}
            slot_of: dict[int, int] = {}
            pages: dict[tuple[int, int], Ints] = {}
            for request, sequence in books.sequences.items():
                queues[sequence.state].append(request)
                if sequence.slot != NOBODY:
                    slot_of[request] = sequence.slot
                if sequence.pages:
                    pages[request, sequence.admission] = _ints(sequence.pages)
            order = {prefill.id: at for at, prefill in enumerate(books.scheduler.prefill_queue)}
            queues["waiting"].sort(key=order.__getitem__)
            fenced = [page for due in sorted(books.fences) for freed in books.fences[due] for page in freed.pages]
            return CoreSnapshot(
                free=_ints(books.manager.free_pages),
                fenced=_ints(fenced),
                rows=books.page_table.copy(),
                positions=books.slots.position.copy(),
                slot_of=slot_of,
                pages=pages,
                queues={state: _ints(requests) for state, requests in queues.items()},
            )

    def hidden_state(self) -> Mapping[str, tuple[int, ...]]:
        """What planning depends on and a snapshot leaves out; names that end in _requests list request ids."""
        books = self.books
        with self._lock:
            scheduler, slots = books.scheduler, books.batch.available_slots
            return {
                "free_slots": tuple(slots or ()),
                "waits": (scheduler.decode_wait, scheduler.prefill_wait),
                "prefilled_requests": tuple(s.request.id for s in books.prefilled),
                "spent_requests": tuple(s.request.id for s in books.spent),
                "newest_can_go": (int(self._newest_can_go),),
            }

    def fork(self) -> PagedAttentionEngine:
        """Return an independent engine in the same state."""
        with self._lock:
            other = copy.copy(self)
            other.books = self.books.fork()
            other._lock = threading.RLock()
            return other


def _refuse(outcome: StepOutcome, oldest: StepPlan | None) -> NoReturn:
    """Raise the ValueErrors of `apply`; `oldest` is the oldest plan in flight."""
    if oldest is None:
        raise ValueError(f"outcome of step {outcome.step}: no step is in flight")
    if outcome.step != oldest.step:
        raise ValueError(f"outcome of step {outcome.step}: the oldest step in flight is {oldest.step}; apply it first")
    raise ValueError(
        f"outcome of step {outcome.step}: {oldest.num_rows} rows were planned, found {len(outcome.token)} tokens and "
        f"{len(outcome.eos)} eos flags"
    )


def _ints(values: list[int]) -> Ints:
    array = np.array(values, np.int32)
    array.setflags(write=False)
    return array
