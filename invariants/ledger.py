"""The auditor's own books: who holds which page and slot, how far each request is, what is in flight.

The ledger only follows; it judges nothing. It is built from effects, plans and outcomes alone. Rows of the decode batch
are arrays over slots, so that a whole step is compared at once; what changes hands is kept in Python, event by event.
A turn moves every running slot on by one token, so that `lead` = position - turn stands still while a slot runs, and
what must happen to it at a position (its end, its next page) happens in a turn that is known beforehand.

    waiting -> prefill -> joining -> running -> draining -> (gone)

`position` of an admission is c(r): how many of its tokens have K/V, counting the steps in flight.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from invariants.calendar import Calendar
from invariants.decoder_oracle import DecoderOracle
from invariants.pool import Pool
from invariants.records import Admission, Flight, Live
from paged_attention import fingerprint
from paged_attention.plan import EOS_TOKEN, DeclaredPolicy, Request

_ONE, _ONE_PLACE = np.array(1, np.int32), np.array(1, np.int64)
"""NumPy converts an integer of another type anew at each use, which costs more than the addition."""


class Ledger:
    """The shadow state. Every method changes the books in one documented way."""

    def __init__(self, policy: DeclaredPolicy, vocab_size: int | None, oracle: DecoderOracle | None = None) -> None:
        """`oracle` knows the tokens of a decoder; without one they are those of the scripted models."""
        self.policy, self.vocab_size, self.oracle = policy, vocab_size, oracle
        slots, self.page_size = policy.batch_size, policy.page_size
        self.pool = Pool(policy.num_pages, policy.free_list, policy.free_pages)
        self.live: dict[int, Live] = {}
        self.waiting: deque[Live] = deque()
        self.joining: dict[int, Live] = {}
        self.prefill: dict[int, Live] = {}
        self.flights: dict[int, Flight] = {}
        self.departed: deque[tuple[int, str]] = deque(maxlen=256)
        self.submissions = 0
        self.released_tokens = 0
        """Sum of c(r) over all admissions that gave back what they held."""
        self.occupant: list[Live | None] = [None] * slots
        self.num_free_slots = slots
        self.before: list[list[int]] = [[] for _ in range(slots)]
        """The pages of whoever was in each slot last."""
        self.width = max(-(-(policy.max_sequence_length + policy.lookahead) // self.page_size), 1)
        self.active = np.zeros(slots, np.int32)
        self.request = np.full(slots, -1, np.int32)
        self.admission = np.zeros(slots, np.int32)
        self.turn = 0
        self.lead = np.zeros(slots, np.int32)
        """c(r) - turn of a slot that runs, c(r) of any other."""
        self.ends, self.full = Calendar(), Calendar()
        """When a running slot has had its last row, and when its pages are full: at its next row it needs another."""
        self.odd_sizes = False
        """In the plan at hand a slot was given pages that its next row does not need."""
        self.num_pages = np.zeros(slots, np.int32)
        self.newest_page = np.zeros(slots, np.int32)
        self.eos = np.full(slots, -1, np.int32)
        self.table = np.zeros((slots, self.width), np.int32)
        # Lazily backed by the system: only rows that are used cost memory.
        self.tokens = np.zeros((slots, policy.max_sequence_length + 2), np.int32)
        self.flat_tokens, self.flat_table = self.tokens.reshape(-1), self.table.reshape(-1)
        self._first_place = np.arange(slots) * self.tokens.shape[1] + 1
        """Where in flat_tokens the token lies that a row at position 0 of each slot yields."""
        self.running = np.zeros(0, np.intp)
        self.running_key = (b"", b"", b"")
        self.start = np.zeros(0, np.int32)
        """The position of each running slot."""
        self.at = np.zeros(0, np.int64)
        """Where in flat_tokens the token lies that the next row of each running slot yields."""
        self.fed_at = self.at
        """Where the one lies that it is fed."""
        self.seen: tuple[NDArray[np.int64], bytes] = (self.at, b"")
        """The newest outcome that was as expected: where its tokens lie, and what they are."""
        self.joins = 0
        """How often any slot was taken: while it stands still, slots keep their occupants' rows."""
        self.stale = False
        """Somebody began or ceased to run since `refresh`."""

    # ---- reading

    def computed(self, admission: Admission) -> int:
        """c(r): tokens of the admission with K/V, steps in flight included."""
        return self.position_of(admission.slot) if admission.slot >= 0 else admission.position

    def position_of(self, slot: int) -> int:
        """c(r) of whoever holds the slot."""
        return self.lead.item(slot) + (self.turn if self.active.item(slot) else 0)

    def known_tokens(self, live: Live) -> int:
        """Tokens that exist (prompt and sampled), steps in flight included."""
        admission = live.admission
        if admission is None or live.state == "waiting":
            return live.known
        done = self.computed(admission)
        return admission.feed if done < admission.feed else done + 1

    def applied_tokens(self, live: Live) -> int:
        """Tokens that the host has seen of a request."""
        in_flight = 0
        for flight in self.flights.values():
            mine = flight.plan.request == live.id
            in_flight += int(flight.plan.samples[mine].sum())
        return self.known_tokens(live) - live.prompt - in_flight

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def touched_in_flight(self, admission: Admission) -> bool:
        """Whether a step that was planned with this admission is not yet applied or abandoned."""
        for flight in self.flights.values():
            mine = flight.plan.request == admission.request
            if bool((flight.plan.admission[mine] == admission.number).any()):
                return True
        return False

    def how_gone(self, request: int) -> str:
        """ "ended" or "cancelled" where it is remembered, else "unknown"."""
        return next((how for who, how in self.departed if who == request), "unknown")

    def refresh(self) -> None:
        """Bring `running` (the slots that decode, ascending) and its identity up to date."""
        self.running = self.active.nonzero()[0]
        self.running_key = (
            self.running.astype(np.int32).tobytes(),
            self.request[self.running].tobytes(),
            self.admission[self.running].tobytes(),
        )
        self.start = self.lead[self.running] + np.array(self.turn, np.int32)
        self.at = self.place_of(self.running, self.start)
        self.fed_at = self.at - _ONE_PLACE
        self.stale = False

    def place_of(self, slots: NDArray[np.intp], start: NDArray[np.int32]) -> NDArray[np.int64]:
        """Where in flat_tokens the tokens lie that rows at `start` yield."""
        return self._first_place[slots] + start

    # ---- following

    def move(self, slot: int, position: int) -> None:
        """The sequence in a slot stands at `position`."""
        self.lead[slot] = position
        if self.active.item(slot):
            self.run(slot, position)

    def run(self, slot: int, position: int) -> None:
        """The sequence in a slot runs from `position` on."""
        live = self.occupant[slot]
        assert live is not None
        self.active[slot] = 1
        self.lead[slot] = lead = position - self.turn
        self.ends.note(slot, live.last - lead)
        self._note_full(slot, self.num_pages.item(slot))
        self.stale = True

    def halt(self, slot: int) -> None:
        """The sequence in a slot runs no further."""
        if self.active.item(slot):
            self.lead[slot] = self.position_of(slot)
            self.active[slot] = 0
            self.ends.drop(slot)
            self.full.drop(slot)
            self.stale = True

    def _note_full(self, slot: int, pages: int) -> None:
        now, turn = self.turn, pages * self.page_size - self.lead.item(slot)
        if not now <= turn <= now + self.page_size:
            self.odd_sizes = True
            # Whoever lacks a page already lacks it in each turn that comes.
            turn = max(turn, now)
        self.full.note(slot, turn)

    def advance(self) -> None:
        """Every running sequence is one token further."""
        for slot in self.full.take(self.turn):
            self.full.note(slot, self.turn + 1)
        self.turn += 1
        self.start, self.fed_at, self.at = self.start + _ONE, self.at, self.at + _ONE_PLACE

    def submit(self, request: Request, now_ns: int) -> Live:
        """Put a new request at the tail of the waiting queue."""
        prompt = len(request.prompt)
        # One that is too long and was accepted all the same is followed too: the auditor outlives what it reports.
        limit = max(1, min(request.max_tokens, self.policy.max_sequence_length - prompt + 1))
        live = Live(request, self.submissions, prompt + limit - 1, now_ns, known=prompt)
        self.submissions += 1
        self.live[request.id] = live
        self.waiting.append(live)
        return live

    def admit(self, live: Live, number: int, now_ns: int) -> Admission:
        """Start a prefill; wherever the request stood in the waiting queue, it leaves it."""
        if self.waiting and self.waiting[0] is live:
            self.waiting.popleft()
        elif live in self.waiting:
            self.waiting.remove(live)
        if live.tokens is None:
            live.tokens = self._script(live)
        live.admissions = number
        live.state = "prefill"
        live.admitted_ns = now_ns if live.admitted_ns is None else live.admitted_ns
        live.admission = Admission(live.id, number, live.known)
        self.prefill[live.id] = live
        return live.admission

    def _script(self, live: Live) -> NDArray[np.int32]:
        """The prompt and, where a vocabulary is declared, every token that the request must yield."""
        tokens = np.zeros(live.last + 1, np.int32)
        tokens[: live.prompt] = live.request.prompt
        if self.oracle is not None:
            answer = self.oracle.answer(live.request, live.last)
            tokens[live.prompt :] = answer.tokens
            live.eos_position = answer.eos_position
        elif self.vocab_size is not None:
            positions = np.arange(live.prompt, live.last + 1, dtype=np.uint32)
            tokens[live.prompt :] = fingerprint.token(live.request.seed, positions, self.vocab_size)
        return tokens

    def learn_eos(self, live: Live, position: int) -> None:
        """The request's EOS stands at `position`; rows after it yield -1."""
        live.eos_position = position
        if live.tokens is not None and self.vocab_size is not None and 0 <= position <= live.last:
            live.tokens[position] = EOS_TOKEN
            live.tokens[position + 1 :] = -1

    def join(self, live: Live, admission: Admission, slot: int) -> None:
        """The request decodes in `slot`: its books move from the objects to the arrays."""
        self.joining.pop(live.id, None)
        self.prefill.pop(live.id, None)
        if self.occupant[slot] is None:
            self.num_free_slots -= 1
        self.occupant[slot] = live
        live.state = "running"
        admission.slot = slot
        self.joins += 1
        self.request[slot], self.admission[slot] = live.id, admission.number
        self.eos[slot] = live.eos_position
        count = len(admission.pages)
        self.num_pages[slot] = count
        self.table[slot] = 0
        self.table[slot, :count] = admission.pages
        self.newest_page[slot] = admission.pages[-1] if admission.pages else 0
        assert live.tokens is not None
        self.tokens[slot, : len(live.tokens)] = live.tokens
        self.run(slot, admission.position)

    def grow(self, admission: Admission, pages: tuple[int, ...]) -> None:
        """Append pages to an admission's list, and to its row."""
        mine, slot = admission.pages, admission.slot
        count = len(mine)
        mine += pages
        if slot < 0 or not pages:
            return
        if len(pages) == 1 and count < self.width:
            self.flat_table[slot * self.width + count] = pages[0]
        else:
            self.table[slot, count : count + len(pages)] = pages[: max(self.width - count, 0)]
        self.num_pages[slot] = count = len(mine)
        self.newest_page[slot] = mine[-1]
        if self.active.item(slot):
            self._note_full(slot, count)

    def drain(self, live: Live) -> None:
        """The request's last row is planned: nothing more may run for it."""
        live.state = "draining"
        self.prefill.pop(live.id, None)
        self.joining.pop(live.id, None)
        admission = live.admission
        if admission is not None and admission.slot >= 0:
            self.halt(admission.slot)

    def undrain(self, live: Live, admission: Admission) -> None:
        """The last row was taken back: the request runs on."""
        if admission.slot >= 0:
            live.state = "running"
            self.run(admission.slot, self.position_of(admission.slot))

    def leave_slot(self, admission: Admission) -> None:
        """The slot is free; its array row keeps what it said until the slot is used again."""
        slot = admission.slot
        if slot < 0:
            return
        admission.position = self.position_of(slot)
        admission.slot = -1
        self.before[slot] = admission.pages
        live = self.occupant[slot]
        if live is not None and live.admission is admission:
            if live.tokens is not None and self.vocab_size is None:
                live.tokens[:] = self.tokens[slot, : len(live.tokens)]
            self.occupant[slot] = None
            self.num_free_slots += 1
            self.halt(slot)

    def preempt(self, live: Live, admission: Admission) -> None:
        """Back to the head of the waiting queue, with every token it has; its pages follow with `freed`."""
        live.known = self.known_tokens(live)
        live.best = max(live.best, self.computed(admission))
        self.prefill.pop(live.id, None)
        self.joining.pop(live.id, None)
        if admission.slot >= 0:
            self.halt(admission.slot)
        live.state = "waiting"
        self.waiting.appendleft(live)

    def retire(self, live: Live, how: str) -> None:
        """The request is finished or cancelled; the books forget it."""
        if live.state == "waiting":
            self.waiting.remove(live)
        self.prefill.pop(live.id, None)
        self.joining.pop(live.id, None)
        admission = live.admission
        if admission is not None and admission.slot >= 0:
            self.halt(admission.slot)
        live.state = "gone"
        self.live.pop(live.id, None)
        self.departed.appendleft((live.id, how))
