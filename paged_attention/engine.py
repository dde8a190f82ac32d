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
from collections import deque
from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from paged_attention.batch import ActiveSequenceBatch
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.pages import HBMPageManager
from paged_attention.plan import (
    UNKNOWN_TOKEN,
    CoreSnapshot,
    DeclaredPolicy,
    Effect,
    EndReason,
    Ints,
    Request,
    StepOutcome,
    StepPlan,
)
from paged_attention.requests import GenerationStepTask, InitialSequenceRequest, NextIterationPlan
from paged_attention.rows import make_plan
from paged_attention.sampling import SamplingParams
from paged_attention.scheduler import InferenceScheduler, SchedulingPolicy, release_slot, resume_slot, stop_slot
from paged_attention.sequences import STATES, Flight, Sequence, Untold, grant, refusal
from paged_attention.slots import KEY, NOBODY, POSITION, SlotTable

_NO_SLOTS = np.empty(0, np.intp)


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
        prefill_lengths: list[int] | None = None,
    ) -> None:
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1 token: found {prefill_chunk}")
        if not 0 <= lag <= 2:
            raise ValueError(f"lag must be 0, 1 or 2 steps: found {lag}")
        self.metadata = metadata
        self.prefill_chunk = prefill_chunk
        self.prefill_lengths = prefill_lengths
        self.lag = lag
        self.manager = HBMPageManager(metadata)
        self.scheduler = InferenceScheduler(self.manager, policy)
        self.batch = ActiveSequenceBatch.init_numpy(metadata)
        self._slots = SlotTable(metadata.batch_size, metadata.max_sequences)
        self.batch.positions = self._slots.position
        self._lock = threading.RLock()
        self._sequences: dict[int, Sequence] = {}
        self._in_slot: list[Sequence | None] = [None] * metadata.batch_size
        self._prefilling: Sequence | None = None
        self._prefilled: list[Sequence] = []
        self._spent: list[Sequence] = []
        """Sequences whose last row is planned and that still hold their pages."""
        self._flights: deque[Flight] = deque()
        self._fences: dict[int, list[Effect]] = {}
        """By the last step that may touch them: what was freed while in flight."""
        self._untold = Untold()
        self._newest_can_go = False
        """Nothing was applied since the newest plan, so it can still be abandoned."""
        self._next_step = 0
        self._next_key = 0
        self._next_order = 0
        self._shut = False

    @property
    def policy(self) -> DeclaredPolicy:
        """What this engine declares of itself."""
        meta, own = self.metadata, self.scheduler.policy
        return DeclaredPolicy(
            batch_size=meta.batch_size,
            page_size=meta.page_size,
            num_pages=meta.num_pages_per_layer,
            max_sequence_length=meta.max_sequences,
            prefill_chunk=self.prefill_chunk,
            lag=self.lag,
            preemption=own.preemption,
            mix=own.mix,
            max_decode_wait=own.max_decode_wait,
            max_prefill_wait=own.max_prefill_wait,
        )

    @property
    def _page_table(self) -> Int32[np.ndarray, "slots max_num_pages"]:
        """The host batch's page table: NumPy, since no mesh holds it."""
        return cast("NDArray[np.int32]", self.batch.page_table)

    # Requests come and go.

    def submit(self, request: Request) -> tuple[Effect, ...]:
        """Queue a request.

        ValueError: the prompt is empty or longer than max_sequences, max_tokens is below 1, the request can never fit
        into the pool, or its id is in use; nothing changed.
        """
        with self._lock:
            if self._shut:
                raise ValueError(f"request {request.id}: the engine is shut down and takes no more requests")
            if request.id in self._sequences:
                raise ValueError(f"request {request.id}: that id belongs to an unfinished request")
            reason = refusal(request, self.metadata)
            if reason is not None:
                raise ValueError(f"request {request.id}: {reason}")
            order, self._next_order = self._next_order, self._next_order + 1
            limit = min(request.max_tokens, self.metadata.max_sequences - len(request.prompt) + 1)
            prefill = self._initial(request, request.prompt.tolist(), order)
            sequence = Sequence(request, order, limit, prefill)
            self._sequences[request.id] = sequence
            self.scheduler.enqueue_prefill_request(prefill)
            return (Effect("submitted", request.id, 0),)

    def _initial(self, request: Request, tokens: list[int], order: int) -> InitialSequenceRequest:
        params = SamplingParams(
            top_p=request.top_p, max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed
        )
        initial = InitialSequenceRequest.create(
            id=request.id,
            mesh=None,
            metadata=self.metadata,
            chunk_size=self.prefill_chunk,
            prompt_token_ids=tokens,
            prefill_lengths=self.prefill_lengths,
            sampling_params=params,
        )
        initial.order = order
        return initial

    def cancel(self, request: int) -> tuple[Effect, ...]:
        """Drop a request in whatever state it is; its tokens in flight are discarded. Unknown or ended: ()."""
        with self._lock:
            sequence = self._sequences.pop(request, None)
            if sequence is None:
                return ()
            effects = [Effect("cancelled", request, sequence.admission, slot=sequence.slot)]
            if sequence.state == "waiting":
                self.scheduler.prefill_queue.remove(sequence.prefill)
            elif not sequence.gave_back:
                self._leave(sequence)
                effects += self._give_back(sequence)
            return tuple(effects)

    def shutdown(self) -> tuple[Effect, ...]:
        """Cancel everything and take no more requests; fenced pages come back as steps in flight are applied."""
        with self._lock:
            self._shut = True
            return tuple(effect for request in list(self._sequences) for effect in self.cancel(request))

    # One step.

    def plan(self) -> StepPlan | None:
        """Plan the next step; None where nothing can run now, and then nothing changed.

        NotImplementedError: decodes are short of pages and the policy's preemption is "none"; nothing changed.
        """
        with self._lock:
            if len(self._flights) > self.lag:
                return None
            # What a prefill yields may still be on the device; the decode that takes it up need not wait for the host.
            while self._prefilled:
                self._queue_decode(self._prefilled.pop(0), UNKNOWN_TOKEN)
            waits = (self.scheduler.decode_wait, self.scheduler.prefill_wait)
            active = self._prefilling.prefill if self._prefilling else None
            native = self.scheduler.create_plan(active, self.batch, may_preempt=not self._flights)
            if native is None:
                return None
            effects = self._take_in(native)
            flight = self._dispatch(native, tuple(effects), waits)
            self._flights.append(flight)
            self._newest_can_go = True
            return flight.plan

    def _queue_decode(self, sequence: Sequence, token: int) -> None:
        sequence.task = GenerationStepTask(
            id=sequence.request.id,
            slot=NOBODY,
            position=sequence.num_fed_tokens,
            page_indices=list(sequence.pages),
            prefill_token_id=np.int32(token),
            sampling_params=sequence.prefill.sampling_params,
            order=sequence.order,
        )
        self.scheduler.enqueue_decodes_request(sequence.task)

    def _take_in(self, native: NextIterationPlan) -> list[Effect]:
        """Follow what the scheduler decided; return the changes in the order in which it made them."""
        effects: list[Effect] = []
        for request in native.preempted:
            effects += self._preempt(self._sequences[int(request)])
        for update in native.decodes_state_page_updates:
            sequence = self._in_slot[update.slot]
            assert sequence is not None
            self._slots.num_pages[update.slot] += 1
            effects.append(grant(sequence, [update.mapped_idx]))
        for task in native.new_decodes_requests:
            sequence = self._sequences[int(task.id)]
            effects.append(self._join(sequence, task))
            if len(task.page_indices) > len(sequence.pages):
                effects.append(grant(sequence, task.page_indices[len(sequence.pages) :]))
        if native.schedule_prefill:
            if self._prefilling is None:
                effects.append(self._admit(native.prefill_request))
            assert self._prefilling is not None
            if native.prefill_pages_update.page_indices:
                effects.append(grant(self._prefilling, native.prefill_pages_update.page_indices))
        return effects

    def _admit(self, prefill: InitialSequenceRequest) -> Effect:
        assert prefill.id is not None
        sequence = self._prefilling = self._sequences[int(prefill.id)]
        sequence.state, sequence.fed = "prefill", 0
        sequence.admission += 1
        sequence.key, self._next_key = self._next_key, self._next_key + 1
        return Effect("admitted", sequence.request.id, sequence.admission)

    def _join(self, sequence: Sequence, task: GenerationStepTask) -> Effect:
        slot, table = task.slot, self._slots
        sequence.state, sequence.slot = "running", slot
        self._in_slot[slot] = sequence
        table.join(
            slot,
            request=sequence.request.id,
            admission=sequence.admission,
            position=task.position,
            num_pages=len(task.page_indices),
            token=int(task.prefill_token_id),
            key=sequence.key,
            remaining=sequence.limit - sequence.planned,
            last_step=sequence.last_step,
        )
        return Effect("joined", sequence.request.id, sequence.admission, slot=slot)

    def _preempt(self, sequence: Sequence) -> list[Effect]:
        """Send a sequence back to the head of the queue; the scheduler has already taken its pages and its slot."""
        slot, table = sequence.slot, self._slots
        if slot != NOBODY:
            sequence.planned = sequence.limit - int(table.remaining[slot])
            num_new = sequence.planned - len(sequence.generated)
            first = sequence.num_fed_tokens + 1
            sequence.generated += table.history[slot, first : first + num_new].tolist()
            self._empty_slot(slot)
        elif sequence is self._prefilling:
            self._prefilling = None
        effects = [
            Effect("preempted", sequence.request.id, sequence.admission, slot=slot, reason="pages"),
            Effect("freed", sequence.request.id, sequence.admission, slot=slot, pages=tuple(sequence.pages)),
        ]
        sequence.state, sequence.slot, sequence.task, sequence.pages = "waiting", NOBODY, None, []
        tokens = sequence.request.prompt.tolist() + sequence.generated
        sequence.prefill = self._initial(sequence.request, tokens, sequence.order)
        self.scheduler.requeue_prefill_request(sequence.prefill)
        return effects

    def _dispatch(self, native: NextIterationPlan, effects: tuple[Effect, ...], waits: tuple[int, int]) -> Flight:
        """Make the plan's rows, and count them as run."""
        step, self._next_step = self._next_step, self._next_step + 1
        table = self._slots
        slots = table.running() if native.schedule_decodes else _NO_SLOTS
        columns = table.columns.take(slots, axis=1)
        self._tell(native)
        prefilling = self._prefilling if native.schedule_prefill else None
        plan = make_plan(step, slots, columns, self._page_table, prefilling, self.prefill_chunk, effects, native)
        before = prefilling.last_step if prefilling else NOBODY
        last_rows = self._count_decodes(step) if native.schedule_decodes else []
        if prefilling and self._count_prefill(step, prefilling, int(plan.count[0])):
            last_rows.append(prefilling)
        self._spent += last_rows
        return Flight(plan, native, slots, columns, table.num_changes, prefilling, before, last_rows, waits)

    def _tell(self, native: NextIterationPlan) -> None:
        """Add to a plan, which nobody else has seen yet, what the device has not been told before."""
        if not self._untold:
            return
        untold, self._untold = self._untold, Untold()
        key, token = self._slots.key, self._slots.token
        native.released_slots[:0] = untold.releases
        native.new_decodes_requests[:0] = [
            task.replace(prefill_token_id=token[task.slot]) for owner, task in untold.joins if key[task.slot] == owner
        ]
        native.decodes_state_page_updates[:0] = [update for owner, update in untold.pages if key[update.slot] == owner]

    def _count_decodes(self, step: int) -> list[Sequence]:
        """Move every decode on by one token; return those whose last row this is."""
        last: list[Sequence] = []
        for slot in self._slots.advance(step):
            sequence = self._in_slot[slot]
            assert sequence is not None
            sequence.state, sequence.planned, sequence.last_step = "draining", sequence.limit, step
            stop_slot(self.batch, slot)
            self._untold.releases.append(slot)
            last.append(sequence)
        return last

    def _count_prefill(self, step: int, sequence: Sequence, count: int) -> bool:
        """Move a prefill on by one chunk; return whether that was the sequence's last row of all."""
        assert sequence.prefill.chunk_idx is not None
        sequence.prefill.chunk_idx += 1
        sequence.fed += count
        sequence.last_step = step
        if sequence.fed < sequence.num_fed_tokens:
            return False
        self._prefilling = None
        sequence.planned += 1
        if sequence.planned == sequence.limit:
            sequence.state = "draining"
            return True
        sequence.state = "joining"
        self._prefilled.append(sequence)
        return False

    # Outcomes.

    def apply(self, outcome: StepOutcome) -> tuple[Effect, ...]:
        """Take in what the oldest step in flight yielded: tokens, ends, and what is given back.

        ValueError: the outcome is not that of the oldest step in flight; nothing changed.
        """
        with self._lock:
            self._check_is_oldest(outcome)
            flight = self._flights.popleft()
            self._newest_can_go = False
            self._note_tokens(flight, outcome)
            effects: list[Effect] = []
            for row in outcome.eos.nonzero()[0].tolist():
                sequence = self._sequence_of(flight, row)
                if sequence is not None:
                    effects += self._end(sequence, "eos")
            for sequence in flight.last_rows:
                if self._is_alive(sequence):
                    cut_short = sequence.limit < sequence.request.max_tokens
                    effects += self._end(sequence, "length" if cut_short else "max_tokens")
            for sequence in self._spent:
                if not sequence.gave_back:
                    effects += self._give_back(sequence)
            self._spent.clear()
            if self._fences:
                effects += self._unfence(outcome.step)
            return tuple(effects)

    def _check_is_oldest(self, outcome: StepOutcome) -> None:
        if not self._flights:
            raise ValueError(f"outcome of step {outcome.step}: no step is in flight")
        plan = self._flights[0].plan
        if outcome.step != plan.step:
            raise ValueError(
                f"outcome of step {outcome.step}: the oldest step in flight is {plan.step}; apply it first"
            )
        if len(outcome.token) != plan.num_rows or len(outcome.eos) != plan.num_rows:
            raise ValueError(
                f"outcome of step {outcome.step}: {plan.num_rows} rows were planned, found {len(outcome.token)} tokens "
                f"and {len(outcome.eos)} eos flags"
            )

    def _is_alive(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.request.id) is sequence

    def _sequence_of(self, flight: Flight, row: int) -> Sequence | None:
        """Whose row it was, if that sequence is still unfinished."""
        first = flight.plan.num_rows - len(flight.slots)
        if row < first:
            sequence = flight.prefilling
            return sequence if sequence is not None and self._is_alive(sequence) else None
        sequence = self._sequences.get(int(flight.plan.request[row]))
        return sequence if sequence is not None and sequence.key == flight.columns[KEY, row - first] else None

    def _note_tokens(self, flight: Flight, outcome: StepOutcome) -> None:
        table, slots, positions = self._slots, flight.slots, flight.columns[POSITION]
        tokens = outcome.token[flight.plan.num_rows - len(slots) :]
        newest = slots
        if self._flights or table.num_changes != flight.num_changes:
            # A slot may have changed hands since the step was planned: its tokens belong to who was there then.
            kept = (table.key[slots] == flight.columns[KEY]).nonzero()[0]
            slots, positions, tokens = slots[kept], positions[kept], tokens[kept]
            newest = slots[table.last_step[slots] == outcome.step]
        positions = positions + 1
        table.history[slots, positions] = tokens
        table.token[newest] = tokens if newest is slots else table.history[newest, table.position[newest]]
        sequence = flight.prefilling
        if sequence is not None and flight.plan.samples[0] and self._is_alive(sequence):
            self._note_first_token(sequence, int(outcome.token[0]), bool(outcome.eos[0]), outcome.step)

    def _note_first_token(self, sequence: Sequence, token: int, is_eos: bool, step: int) -> None:
        """Take in what a prefill's last chunk yielded, wherever the sequence has got to meanwhile."""
        sequence.generated.append(token)
        if sequence.slot != NOBODY:
            self._slots.history[sequence.slot, sequence.num_fed_tokens] = token
            if self._slots.last_step[sequence.slot] == step:
                self._slots.token[sequence.slot] = token
        elif sequence.task is not None:
            sequence.task.prefill_token_id = np.int32(token)
        elif sequence in self._prefilled and not is_eos:
            self._prefilled.remove(sequence)
            self._queue_decode(sequence, token)

    def _end(self, sequence: Sequence, reason: EndReason) -> list[Effect]:
        del self._sequences[sequence.request.id]
        effects = [Effect("ended", sequence.request.id, sequence.admission, slot=sequence.slot, reason=reason)]
        if not sequence.gave_back:
            self._leave(sequence)
            effects += self._give_back(sequence)
        return effects

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the stage it is in; its slot and pages go with `_give_back`."""
        if sequence is self._prefilling:
            self._prefilling = None
        elif sequence in self._prefilled:
            self._prefilled.remove(sequence)
        elif sequence.state == "joining":
            assert sequence.task is not None
            self.scheduler.decodes_queue.remove(sequence.task)

    def _give_back(self, sequence: Sequence) -> list[Effect]:
        """Give back the slot and the pages: to the fence while a step in flight may touch them."""
        slot, last_step = sequence.slot, sequence.last_step
        if slot != NOBODY:
            if sequence.state == "running":
                last_step = int(self._slots.last_step[slot])
            release_slot(self.batch, slot)
            self._empty_slot(slot)
            if slot not in self._untold.releases:
                self._untold.releases.append(slot)
        sequence.slot, sequence.gave_back = NOBODY, True
        freed = Effect("freed", sequence.request.id, sequence.admission, slot=slot, pages=tuple(sequence.pages))
        sequence.pages = []
        if self._flights and last_step >= self._flights[0].plan.step:
            self._fences.setdefault(last_step, []).append(freed)
        else:
            self.manager.free_hbm_pages(freed.pages)
        return [freed]

    def _empty_slot(self, slot: int) -> None:
        self._slots.clear(slot)
        self._in_slot[slot] = None

    def _unfence(self, step: int) -> list[Effect]:
        """Free what waited for `step` or an earlier one."""
        effects: list[Effect] = []
        for waited_for in sorted(due for due in self._fences if due <= step):
            for freed in self._fences.pop(waited_for):
                self.manager.free_hbm_pages(freed.pages)
                effects.append(freed._replace(kind="unfenced", slot=NOBODY))
        return effects

    # A step that never ran.

    def abandon(self, step: int) -> tuple[Effect, ...]:
        """Take back the newest plan: positions and counts return; pages, slots and admissions stay where they are.

        ValueError: `step` is not the newest plan, or an outcome was applied since; nothing changed.
        """
        with self._lock:
            if not self._flights or self._flights[-1].plan.step != step or not self._newest_can_go:
                raise ValueError(
                    f"step {step} cannot be abandoned: it is not the newest plan with nothing applied since"
                )
            flight = self._flights.pop()
            self._newest_can_go = bool(self._flights)
            self.scheduler.decode_wait, self.scheduler.prefill_wait = flight.waits
            self._uncount_decodes(flight)
            self._uncount_prefill(flight)
            self._spent = [sequence for sequence in self._spent if sequence not in flight.last_rows]
            self._keep_untold(flight)
            if step not in self._fences:
                return ()
            # Whoever was cancelled meanwhile may still be touched by an earlier step in flight.
            if self._flights:
                self._fences.setdefault(self._flights[-1].plan.step, []).extend(self._fences.pop(step))
                return ()
            return tuple(self._unfence(step))

    def _uncount_decodes(self, flight: Flight) -> None:
        self._slots.restore(flight.slots, flight.columns)
        for sequence in flight.last_rows:
            if sequence.slot != NOBODY:
                assert sequence.task is not None
                sequence.state = "running"
                resume_slot(self.batch, sequence.task)
                self._untold.releases.remove(sequence.slot)

    def _uncount_prefill(self, flight: Flight) -> None:
        sequence = flight.prefilling
        if sequence is None or not self._is_alive(sequence):
            return
        assert sequence.prefill.chunk_idx is not None
        sequence.prefill.chunk_idx -= 1
        sequence.fed = int(flight.plan.start[0])
        sequence.last_step = flight.prefilled_before
        sequence.planned -= int(flight.plan.samples[0])
        if sequence in self._prefilled:
            self._prefilled.remove(sequence)
        sequence.state = "prefill"
        self._prefilling = sequence

    def _keep_untold(self, flight: Flight) -> None:
        """Keep what the plan was to tell the device, for the next plan to tell."""
        native, key = flight.native, self._slots.key
        self._untold.releases[:0] = native.released_slots
        for task in native.new_decodes_requests:
            if key[task.slot] != NOBODY:
                self._untold.joins.append((int(key[task.slot]), task))
        for update in native.decodes_state_page_updates:
            if key[update.slot] != NOBODY:
                self._untold.pages.append((int(key[update.slot]), update))

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
            return {request: reasons[sequence.state] for request, sequence in self._sequences.items()}

    def snapshot(self) -> CoreSnapshot:
        """A copy of the whole host state."""
        with self._lock:
            alive = list(self._sequences.values())
            order = {id(request): at for at, request in enumerate(self.scheduler.prefill_queue)}
            queued = {state: [s for s in alive if s.state == state] for state in STATES}
            queued["waiting"].sort(key=lambda s: order[id(s.prefill)])
            return CoreSnapshot(
                free=_ints(self.manager.free_pages),
                fenced=_ints(p for due in sorted(self._fences) for freed in self._fences[due] for p in freed.pages),
                rows=self._page_table.copy(),
                positions=self._slots.position.copy(),
                slot_of={s.request.id: s.slot for s in alive if s.slot != NOBODY},
                pages={(s.request.id, s.admission): _ints(s.pages) for s in alive if s.pages},
                queues={state: _ints(s.request.id for s in queued[state]) for state in STATES},
            )

    def fork(self) -> PagedAttentionEngine:
        """Return an independent engine in the same state."""
        with self._lock:
            locks = {id(self._lock): threading.RLock(), id(self.batch.context_lock): threading.Lock()}
            other = copy.copy(self)
            other.__dict__.update(copy.deepcopy(self.__dict__, locks))
            other._slots.bind()
            other.batch.positions = other._slots.position
            return other


def _ints(values: Iterable[int]) -> Ints:
    array = np.fromiter(values, np.int32)
    array.setflags(write=False)
    return array
