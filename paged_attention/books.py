"""The engine's books: every unfinished request, who sits in which slot, what is fenced, which steps are in flight."""

from __future__ import annotations

import copy
import threading
from collections import deque
from typing import cast

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from paged_attention.batch import ActiveSequenceBatch
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.pages import HBMPageManager
from paged_attention.plan import Effect, EndReason, Request, StepOutcome
from paged_attention.pytree import Fifo
from paged_attention.requests import GenerationStepTask, InitialSequenceRequest
from paged_attention.sampling import SamplingParams
from paged_attention.scheduler import InferenceScheduler, SchedulingPolicy, release_slot
from paged_attention.sequences import Flight, Sequence, Untold
from paged_attention.slots import NOBODY, SlotTable


class Books:
    """What the engine knows, and the moves that keep it true: enter, admit, join, preempt, end, give back."""

    def __init__(
        self,
        metadata: PagedAttentionCacheMetaData,
        prefill_chunk: int,
        policy: SchedulingPolicy | None,
        free_pages: tuple[int, ...] = (),
        free_slots: tuple[int, ...] = (),
    ) -> None:
        self.metadata = metadata
        self.prefill_chunk = prefill_chunk
        self.manager = HBMPageManager(metadata)
        if free_pages:
            self.manager.order_free_pages(free_pages)
        self.first_pages = free_pages
        self.scheduler = InferenceScheduler(self.manager, policy)
        self.batch = ActiveSequenceBatch.init_numpy(metadata)
        if free_slots:
            if sorted(free_slots) != list(range(metadata.batch_size)):
                raise ValueError(f"free_slots must name each of the slots 0 .. {metadata.batch_size - 1} once")
            self.batch.available_slots = Fifo(free_slots)
        self.slots = SlotTable(metadata.batch_size, metadata.max_sequences, metadata.num_pages_per_sequence)
        self._bind()
        self.sequences: dict[int, Sequence] = {}
        """By request id: those that have not ended."""
        self.in_slot: list[Sequence | None] = [None] * metadata.batch_size
        self.prefilling: Sequence | None = None
        self.prefilled: list[Sequence] = []
        """Sequences whose last chunk is planned and that are not yet queued for a slot."""
        self.spent: list[Sequence] = []
        """Sequences whose last row is planned and that still hold their pages."""
        self.flights: deque[Flight] = deque()
        """Steps planned and not yet applied, oldest first."""
        self.fences: dict[int, list[Effect]] = {}
        """By the last step that may touch them: what was freed while in flight."""
        self.untold = Untold()
        self._next_key = 0
        self._next_order = 0

    def fork(self) -> Books:
        """Independent books in the same state."""
        other = copy.deepcopy(self, {id(self.batch.context_lock): threading.Lock()})
        other.slots.bind()
        other._bind()
        return other

    def _bind(self) -> None:
        """The host batch's positions and pages are those of the slots."""
        self.batch.positions, self.batch.page_table = self.slots.position, self.slots.pages[:-1]

    def enter(self, request: Request) -> None:
        """Queue a request that is known to fit."""
        order, self._next_order = self._next_order, self._next_order + 1
        limit = min(request.max_tokens, self.metadata.max_sequences - len(request.prompt) + 1)
        prefill = self._initial(request, request.prompt, order)
        self.sequences[request.id] = Sequence(request, order, limit, prefill)
        self.scheduler.enqueue_prefill_request(prefill)

    @property
    def page_table(self) -> Int32[np.ndarray, "slots max_num_pages"]:
        """The host batch's page table: NumPy, since no mesh holds it."""
        return cast("NDArray[np.int32]", self.batch.page_table)

    def _initial(self, request: Request, tokens: Int32[np.ndarray, " tokens"], order: int) -> InitialSequenceRequest:
        params = SamplingParams(
            top_p=request.top_p, max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed
        )
        initial = InitialSequenceRequest.create(
            id=request.id,
            mesh=None,
            metadata=self.metadata,
            chunk_size=self.prefill_chunk,
            prompt_token_ids=tokens,
            # Only its chunks go to the device, so a prompt needs no padding beyond its last chunk.
            max_prefill_length=len(tokens),
            sampling_params=params,
        )
        initial.order = order
        return initial

    def is_alive(self, sequence: Sequence) -> bool:
        """Whether the sequence has not ended and its id has not been given to another."""
        return self.sequences.get(sequence.request.id) is sequence

    def sequence_of(self, flight: Flight, row: int) -> Sequence | None:
        """Whose row it was, if that sequence is still unfinished."""
        first = flight.plan.num_rows - len(flight.seated.slots)
        if row < first:
            sequence = flight.prefilling
            return sequence if sequence is not None and self.is_alive(sequence) else None
        sequence = self.sequences.get(int(flight.plan.request[row]))
        return sequence if sequence is not None and sequence.key == flight.seated.key[row - first] else None

    def admit(self, prefill: InitialSequenceRequest) -> Effect:
        """Start the prefill of the request that the scheduler took from the queue."""
        assert prefill.id is not None
        sequence = self.prefilling = self.sequences[int(prefill.id)]
        sequence.state, sequence.fed = "prefill", 0
        sequence.admission += 1
        sequence.key, self._next_key = self._next_key, self._next_key + 1
        return Effect("admitted", sequence.request.id, sequence.admission)

    def queue_decode(self, sequence: Sequence, token: int) -> None:
        """Queue a prefilled sequence for a slot; `token` may be UNKNOWN_TOKEN."""
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

    def join(self, sequence: Sequence, task: GenerationStepTask) -> Effect:
        """Seat a sequence in the slot that the scheduler chose."""
        slot, table = task.slot, self.slots
        sequence.state, sequence.slot = "running", slot
        self.in_slot[slot] = sequence
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

    def preempt(self, sequence: Sequence) -> list[Effect]:
        """Send a sequence back to the head of the queue; the scheduler has already taken its pages and its slot."""
        slot, table = sequence.slot, self.slots
        if slot != NOBODY:
            sequence.planned = sequence.limit - table.remaining(slot)
            num_new = sequence.planned - len(sequence.generated)
            first = sequence.num_fed_tokens + 1
            sequence.generated += table.history[slot, first : first + num_new].tolist()
            self._empty_slot(slot)
        elif sequence is self.prefilling:
            self.prefilling = None
        effects = [
            Effect("preempted", sequence.request.id, sequence.admission, slot=slot, reason="pages"),
            Effect("freed", sequence.request.id, sequence.admission, slot=slot, pages=tuple(sequence.pages)),
        ]
        sequence.state, sequence.slot, sequence.task, sequence.pages = "waiting", NOBODY, None, []
        tokens = np.concatenate((sequence.request.prompt, np.array(sequence.generated, np.int32)))
        sequence.prefill = self._initial(sequence.request, tokens, sequence.order)
        self.scheduler.requeue_prefill_request(sequence.prefill)
        return effects

    def note_tokens(self, flight: Flight, outcome: StepOutcome) -> None:
        """Take in what a step yielded."""
        table, seated, sequence = self.slots, flight.seated, flight.prefilling
        positions, tokens = flight.plan.start, outcome.token
        if sequence is not None:
            if flight.plan.samples.item(0) and self.is_alive(sequence):
                self._note_first_token(sequence, tokens.item(0), bool(outcome.eos.item(0)), outcome.step)
            positions, tokens = positions[1:], tokens[1:]
        slots, places = seated.slots, seated.next_place + positions
        newest = slots
        if self.flights or not table.still_seats(seated):
            # A slot may have changed hands since the step was planned: its tokens belong to who was there then.
            kept = (table.key[slots] == seated.key).nonzero()[0]
            slots, places, tokens = slots[kept], places[kept], tokens[kept]
            newest = slots[table.last_step[slots] == outcome.step]
        table.tokens[places] = tokens
        table.token[newest] = tokens if newest is slots else table.history[newest, table.position[newest]]

    def _note_first_token(self, sequence: Sequence, token: int, is_eos: bool, step: int) -> None:
        """Take in what a prefill's last chunk yielded, wherever the sequence has got to meanwhile."""
        sequence.generated.append(token)
        if sequence.slot != NOBODY:
            self.slots.history[sequence.slot, sequence.num_fed_tokens] = token
            if self.slots.last_step[sequence.slot] == step:
                self.slots.token[sequence.slot] = token
        elif sequence.task is not None:
            sequence.task.prefill_token_id = np.int32(token)
        elif sequence in self.prefilled and not is_eos:
            self.prefilled.remove(sequence)
            self.queue_decode(sequence, token)

    def end(self, sequence: Sequence, reason: EndReason) -> list[Effect]:
        """Finish a sequence; give back what it still holds."""
        del self.sequences[sequence.request.id]
        effects = [Effect("ended", sequence.request.id, sequence.admission, slot=sequence.slot, reason=reason)]
        if not sequence.gave_back:
            self.leave(sequence)
            effects += self.give_back(sequence)
        return effects

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the stage it is in; its slot and pages go with `give_back`."""
        if sequence is self.prefilling:
            self.prefilling = None
        elif sequence in self.prefilled:
            self.prefilled.remove(sequence)
        elif sequence.state == "joining":
            assert sequence.task is not None
            self.scheduler.decodes_queue.remove(sequence.task)

    def give_back(self, sequence: Sequence) -> list[Effect]:
        """Give back the slot and the pages: to the fence while a step in flight may touch them."""
        slot, last_step = sequence.slot, sequence.last_step
        if slot != NOBODY:
            if sequence.state == "running":
                last_step = int(self.slots.last_step[slot])
            release_slot(self.batch, slot)
            self._empty_slot(slot)
            if slot not in self.untold.releases:
                self.untold.releases.append(slot)
        sequence.slot, sequence.gave_back = NOBODY, True
        freed = Effect("freed", sequence.request.id, sequence.admission, slot=slot, pages=tuple(sequence.pages))
        sequence.pages = []
        if self.flights and last_step >= self.flights[0].plan.step:
            self.fences.setdefault(last_step, []).append(freed)
        else:
            self.manager.free_hbm_pages(freed.pages)
        return [freed]

    def _empty_slot(self, slot: int) -> None:
        self.slots.clear(slot)
        self.in_slot[slot] = None

    def unfence(self, step: int) -> list[Effect]:
        """Free what waited for `step` or an earlier one."""
        effects: list[Effect] = []
        for waited_for in sorted(due for due in self.fences if due <= step):
            for freed in self.fences.pop(waited_for):
                self.manager.free_hbm_pages(freed.pages)
                effects.append(freed._replace(kind="unfenced", slot=NOBODY))
        return effects
