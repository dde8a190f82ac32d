"""S1-S5, S7, P6, T1, T2: each row of a plan, against the books, and the books' step forward.

An ordinary decode row feeds one token at c(r) and yields one. Where all decode rows are ordinary they are compared at
once; else, and for prefill rows, `_judge_row` decides row by row.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.pages import PageJudge
from invariants.records import Admission, Flight, Live
from invariants.tables import TableJudge
from paged_attention.plan import UNKNOWN_TOKEN, StepPlan

ROW_FAMILY = ("S1", "S2", "S3", "S4", "S5", "S8", "P6", "P7", "T1", "T2", "T3", "T6", "S12")
"""What each decode row is evaluated for."""

PREFILL_FAMILY = ("S1", "S2", "S3", "S4", "S5", "S8", "P6", "T1", "T2")
"""What each prefill row is evaluated for."""

NOWHERE = np.zeros(0, np.int64)

IN_PREFILL, RUNNING = frozenset({"prefill"}), frozenset({"running"})
"""In which states a request may have a prefill row, and in which a decode row."""


class RowJudge:
    """Judges rows and moves the ledger one step on."""

    def __init__(self, ledger: Ledger, findings: Findings, tables: TableJudge, pages: PageJudge) -> None:
        self.ledger = ledger
        self.findings = findings
        self.tables = tables
        self.pages = pages
        slots = ledger.policy.batch_size
        self.ones = np.ones(slots, np.int32).tobytes()
        self.unknown = np.full(slots, UNKNOWN_TOKEN, np.int32).tobytes()
        # Under lag a decode's token may still be on the device; a foreign log may leave its tokens out.
        self.unknown_allowed = ledger.policy.lag > 0 or ledger.vocab_size is None
        self.decode_rows = 0
        """Decode rows judged so far: the counters of ROW_FAMILY that no event moves."""
        self.prefill_rows = 0
        self.resumed_rows = 0
        self.in_step: frozenset[int] | None = None
        """The slots that decode in the step at hand; None: every running one."""

    def follow(self, plan: StepPlan, *, judge: bool) -> tuple[Flight, bool]:
        """Judge the rows (unless this is a step that is only followed); the flight, and whether anyone got further."""
        ledger = self.ledger
        rows, first, tokens_at = len(plan.request), 0, 0
        if ledger.stale:
            ledger.refresh()
        running = ledger.running
        flight = Flight(plan, [], 0, running, ledger.start, ledger.at, ledger.joins, [])
        progress = False
        while first < rows and plan.slot.item(first) < 0:
            progress |= self._prefill_row(flight, first, tokens_at)
            tokens_at += plan.count.item(first)
            first += 1
        flight.first = first
        self.in_step = None
        if not self._ordinary(plan, first, tokens_at, flight.start, judge=judge):
            progress |= self._one_by_one(flight, first, tokens_at)
        else:
            progress |= rows > first
            ledger.advance()
            for slot in ledger.ends.take(ledger.turn):
                self._drain(flight, ledger.occupant[slot])
        ledger.odd_sizes = False
        if judge:
            self.decode_rows += rows - first
        return flight, progress

    def settle_counts(self) -> None:
        """Move the bulk counter into the counters."""
        for name in ROW_FAMILY:
            self.findings.counts[name].add(self.decode_rows, self.decode_rows)
        for name in PREFILL_FAMILY:
            self.findings.counts[name].add(self.prefill_rows, self.prefill_rows)
        self.findings.counts["R2"].add(self.resumed_rows, self.resumed_rows)
        self.decode_rows = self.prefill_rows = self.resumed_rows = 0

    # ---- all decodes at once

    def _ordinary(
        self, plan: StepPlan, first: int, tokens_at: int, start: Int32[ndarray, " decodes"], *, judge: bool
    ) -> bool:
        """Whether the decode rows are exactly those of an ordinary step."""
        ledger = self.ledger
        slots, request, admission = ledger.running_key
        if plan.slot[first:].tobytes() != slots or plan.start[first:].tobytes() != start.tobytes():
            return False
        if not judge:
            return True
        ones = self.ones[: len(slots)]
        if (
            plan.request[first:].tobytes() != request
            or plan.admission[first:].tobytes() != admission
            or plan.count[first:].tobytes() != ones
            or plan.samples[first:].tobytes() != ones
        ):
            return False
        fed = plan.tokens[tokens_at:]
        if not self.unknown_allowed or fed.tobytes() != self.unknown[: len(slots)]:
            at, words = ledger.seen
            # What the step before yielded is fed now, unless somebody came or went between.
            if at is not ledger.fed_at or fed.tobytes() != words:
                mine = ledger.flat_tokens[ledger.fed_at]
                if fed.tobytes() != mine.tobytes():
                    seen = fed != UNKNOWN_TOKEN
                    if not self.unknown_allowed or (fed[seen] != mine[seen]).any():
                        return False
        return self.tables.rows_agree(plan, first, start)

    def _drain(self, flight: Flight, live: Live | None) -> None:
        if live is None or live.admission is None:
            return
        flight.draining.append(live)
        self.pages.due_next(live.admission)
        self.ledger.drain(live)

    # ---- one by one

    def _prefill_row(self, flight: Flight, row: int, tokens_at: int) -> bool:
        """Judge and follow a prefill row; whether the request got further than ever."""
        plan, ledger = flight.plan, self.ledger
        start, count = plan.start.item(row), plan.count.item(row)
        found = self._whose(plan, row, IN_PREFILL)
        if found is None:
            return False
        live, admission = found
        self._judge_row(flight, row, live, admission, tokens_at)
        start = admission.position
        end = max(start, min(start + count, admission.feed))
        flight.prefills.append((row, live, admission, start, end - start))
        admission.position = end
        live.prefill_step = plan.step
        progress = end > live.best
        live.best = max(live.best, end)
        if end >= admission.feed:
            if live.last <= admission.feed:
                self._drain(flight, live)
            else:
                live.state = "joining"
                del ledger.prefill[live.id]
                ledger.joining[live.id] = live
        return progress

    def _one_by_one(self, flight: Flight, first: int, tokens_at: int) -> bool:
        """Judge every decode row by itself, and go on from what the plan says where that is possible."""
        plan, ledger = flight.plan, self.ledger
        slots: list[int] = []
        starts: list[int] = []
        progress = False
        for row in range(first, plan.num_rows):
            found = self._whose(plan, row, RUNNING)
            if found is not None:
                live, admission = found
                self._judge_row(flight, row, live, admission, tokens_at)
                slot = admission.slot
                if slot in slots:
                    self.findings.breach(
                        "S1",
                        f"request {live.id} has two rows in step {plan.step}",
                        requests=(live.id,),
                        expected="one row for each request",
                        found="two rows",
                    )
                else:
                    slots.append(slot)
                    starts.append(ledger.position_of(slot))
                    progress = True
            tokens_at += plan.count.item(row)
        if slots != sorted(slots):
            self.findings.breach(
                "S1",
                f"the decode rows of step {plan.step} are not in ascending order of slots",
                expected=sorted(slots),
                found=slots,
            )
        self.in_step = frozenset(slots)
        flight.slots, flight.start = np.array(slots, np.intp), np.array(starts, np.int32)
        if len(slots) != plan.num_rows - first:
            # Rows of strangers: the outcome cannot be told apart by slot any more.
            flight.slots, flight.start = NOWHERE, np.zeros(0, np.int32)
        for slot in slots:
            position = ledger.position_of(slot) + 1
            ledger.move(slot, position)
            live = ledger.occupant[slot]
            if live is not None and live.last == position:
                self._drain(flight, live)
        flight.at = ledger.place_of(flight.slots, flight.start)
        return progress

    def _whose(self, plan: StepPlan, row: int, states: frozenset[str]) -> tuple[Live, Admission] | None:
        """The request and admission of a row that may run; None (and a violation) where it may not."""
        request, number = plan.request.item(row), plan.admission.item(row)
        live = self.ledger.live.get(request)
        admission = live.admission if live is not None else None
        if live is not None and admission is not None and live.state in states and admission.number == number:
            return live, admission
        gone = self.ledger.how_gone(request)
        state = f"{live.state}, admission {live.admissions}" if live is not None else gone
        message = f"row {row} of step {plan.step} runs request {request}, admission {number}, which is {state}"
        ids = ["S7"]
        if live is None:
            ids += ["S6"] + (["R3"] if gone == "cancelled" else ["O3"] if gone == "ended" else [])
        elif live.state == "draining":
            ids += ["S4", "O3"]
        else:
            ids += ["S6"]
        for name in ids:
            self.findings.breach(
                name,
                message,
                requests=(request,),
                expected=f"a request that is {' or '.join(sorted(states))}",
                found=state,
            )
        return None

    def _judge_row(self, flight: Flight, row: int, live: Live, admission: Admission, tokens_at: int) -> None:
        plan, ledger, findings = flight.plan, self.ledger, self.findings
        item = plan.start.item(row), plan.count.item(row), plan.samples.item(row), plan.slot.item(row)
        start, count, samples, slot = item
        done = ledger.computed(admission)
        known = ledger.known_tokens(live)
        if slot < 0:
            self.prefill_rows += 1
            self.resumed_rows += admission.number > 1
        if slot != admission.slot:
            findings.breach(
                "T3",
                f"{admission} runs in slot {slot} of step {plan.step}, but it holds slot {admission.slot}",
                requests=(live.id,),
                expected=f"slot {admission.slot}",
                found=f"slot {slot}",
            )
        if start != done:
            for name in ("S2", "R1") if admission.number > 1 and done == 0 else ("S2",):
                findings.breach(
                    name,
                    f"{admission} starts at position {start} in step {plan.step}, but {done} of its tokens are"
                    " computed",
                    requests=(live.id,),
                    expected=f"start {done}",
                    found=f"start {start}",
                )
        chunk = ledger.policy.prefill_chunk
        if count < 1 or (slot < 0 and count > chunk):
            findings.breach(
                "S1",
                f"the row of {admission} in step {plan.step} has {count} tokens",
                requests=(live.id,),
                expected=f"1 to {chunk} tokens" if slot < 0 else "1 token",
                found=f"{count} tokens",
            )
        if start + count > known or start + count > ledger.policy.max_sequence_length:
            findings.breach(
                "S4",
                f"{admission} runs up to position {start + count - 1} in step {plan.step}, but {known} tokens are known"
                f" and the maximum length is {ledger.policy.max_sequence_length}",
                requests=(live.id,),
                expected=f"at most {min(known, ledger.policy.max_sequence_length)} tokens",
                found=f"{start + count} tokens",
            )
        last = start + count == known
        if samples != int(last):
            self._wrong_sampling(plan, live, admission, last, samples)
        self._judge_tokens(plan, live, admission, row, plan.tokens[tokens_at : tokens_at + max(count, 0)])
        where = f"in step {plan.step}"
        self.tables.judge_size(admission, start + count, plan.num_pages.item(row), where)
        if self.tables.tables_on:
            self.tables.judge_row(admission, plan.table[row], done, where)

    def _wrong_sampling(self, plan: StepPlan, live: Live, admission: Admission, last: bool, samples: int) -> None:
        why = "it does not reach its last known token" if not last else "it reaches its last known token"
        for name in ("S3", "R2") if admission.number > 1 else ("S3",):
            self.findings.breach(
                name,
                f"request {live.id}, admission {admission.number}, yields {samples} tokens in step {plan.step},"
                f" though {why}",
                requests=(live.id,),
                expected=f"{int(last)} tokens",
                found=f"{samples} tokens",
            )

    def _judge_tokens(
        self, plan: StepPlan, live: Live, admission: Admission, row: int, fed: Int32[ndarray, " tokens"]
    ) -> None:
        """The row feeds the request's own tokens; where the host has not seen one yet, UNKNOWN_TOKEN."""
        ledger, start = self.ledger, plan.start.item(row)
        source = ledger.tokens[admission.slot] if admission.slot >= 0 else live.tokens
        if source is None or start < 0:
            return
        mine = source[start : start + len(fed)]
        if fed.tobytes() == mine.tobytes():
            return
        decodes = admission.slot >= 0 or ledger.vocab_size is None
        if self.unknown_allowed and decodes and (fed == UNKNOWN_TOKEN).all():
            return
        wrong = np.flatnonzero(fed[: len(mine)] != mine)
        at = int(wrong[0]) if len(wrong) else len(mine)
        found = int(fed[at]) if at < len(fed) else -1
        expected = int(mine[at]) if at < len(mine) else "none"
        for name in ("S3", "R2") if admission.number > 1 and admission.slot < 0 else ("S3",):
            self.findings.breach(
                name,
                f"request {live.id}, admission {admission.number}, is fed token {found} at position {start + at} in"
                f" step {plan.step}, but its token there is {expected}",
                requests=(live.id,),
                expected=expected,
                found=found,
            )

    # ---- taking back

    def take_back(self, flight: Flight) -> None:
        """The step never ran: counts return; pages, slots and admissions stay."""
        ledger = self.ledger
        for _, live, admission, start, _ in flight.prefills:
            if live.state == "gone" or live.admission is not admission or admission.released:
                continue
            admission.high = max(admission.high, admission.position)
            admission.position = start
            ledger.joining.pop(live.id, None)
            live.state = "prefill"
            live.prefill_step = -1
            ledger.prefill[live.id] = live
            self.pages.not_due(live)
        slots: list[int] = flight.slots.tolist()
        starts: list[int] = flight.start.tolist()
        for slot, start in zip(slots, starts, strict=True):
            live = ledger.occupant[slot]
            if live is None or live.admission is None or ledger.position_of(slot) != start + 1:
                continue
            live.admission.high = max(live.admission.high, start + 1)
            ledger.move(slot, start)
            if live.state == "draining":
                self.pages.not_due(live)
                ledger.undrain(live, live.admission)
