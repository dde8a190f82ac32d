"""T: the page table of a step says what the books say, on the host and on the device (with P6, P7 and S5)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32
from numpy import ndarray
from numpy.typing import NDArray

from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.records import Admission
from paged_attention.plan import DUMMY_PAGE, Evidence, Ints, StepPlan

SMALL_TABLE = 1024
"""Tables of up to so many entries are compared whole in every step: that is as fast as a part of one."""

WHOLE_TABLE_EVERY = 8
"""Larger ones are compared whole each n-th step; in the others the page that each row writes is compared."""


class TableJudge:
    """Compares rows of any table (plan, host batch, device) with the ledger's."""

    def __init__(self, ledger: Ledger, findings: Findings) -> None:
        self.ledger = ledger
        self.findings = findings
        # Arrays without axes: NumPy converts a Python integer anew at each use, which costs more than the division.
        self.page_size, self.one = np.array(ledger.page_size, np.int32), np.array(1, np.int32)
        self.shape = (0, 0, 0)
        """Rows, width and first decode row of the newest table that was large."""
        self.before: NDArray[np.intp] = np.zeros(0, np.intp)
        """Which entry comes before each decode row of such a table."""
        self.tables_on = findings.any_on(("T1", "T2", "P7"))

    # ---- one row

    def judge_size(self, admission: Admission, end: int, rows_pages: int | None, where: str) -> None:
        """P6, S5: the admission holds pages for exactly `end` tokens; T1: the row says how many."""
        ledger, findings = self.ledger, self.findings
        held = len(admission.pages)
        need = ledger.pages_for(max(end, admission.high))
        most = ledger.pages_for(max(end, admission.high) + ledger.policy.lookahead)
        if not need <= held <= most:
            findings.breach(
                "P6",
                f"{admission} holds {held} pages for {end} tokens {where}",
                requests=(admission.request,),
                pages=admission.pages,
                expected=f"{need} pages" if need == most else f"{need} to {most} pages",
                found=f"{held} pages",
            )
        if held * ledger.page_size < end or (rows_pages is not None and rows_pages * ledger.page_size < end):
            findings.breach(
                "S5",
                f"{admission} writes up to position {end - 1} {where}, beyond its {held} pages",
                requests=(admission.request,),
                pages=admission.pages,
                expected=f"{ledger.pages_for(end)} pages",
                found=f"{held} pages held, {rows_pages} in its row",
            )
        if rows_pages is not None and rows_pages != held:
            findings.breach(
                "T1",
                f"{admission} holds {held} pages, but its row {where} counts {rows_pages}",
                requests=(admission.request,),
                pages=admission.pages,
                expected=held,
                found=rows_pages,
            )

    def judge_row(self, admission: Admission, row: Int32[ndarray, " pages"], written: int, where: str) -> None:
        """T1: the row begins with the admission's pages; T2: dummies follow; P7: what is written did not move."""
        held = len(admission.pages)
        head: list[int] = row[:held].tolist()
        if head != admission.pages:
            at = next((i for i, (a, b) in enumerate(zip(head, admission.pages, strict=False)) if a != b), len(head))
            found = head[at] if at < len(head) else "nothing"
            self.findings.breach(
                "T1",
                f"logical page {at} of {admission} is page {found} {where}, but the page it was given is"
                f" {admission.pages[at]}",
                requests=(admission.request,),
                pages=(admission.pages[at],),
                expected=f"page {admission.pages[at]}",
                found=f"page {found}",
            )
            if at * self.ledger.page_size < written:
                self.findings.breach(
                    "P7",
                    f"logical page {at} of {admission}, already written, became page {found} {where}",
                    requests=(admission.request,),
                    pages=(admission.pages[at],),
                    expected=f"page {admission.pages[at]}",
                    found=f"page {found}",
                )
            if DUMMY_PAGE in head:
                self.findings.breach(
                    "P3",
                    f"the dummy page lies within the used part of the row of {admission} {where}",
                    requests=(admission.request,),
                    pages=(DUMMY_PAGE,),
                    expected=admission.pages,
                    found=head,
                )
        self._judge_tail(row[held:], held, admission, admission.request, where)

    def _judge_tail(
        self, rest: Int32[ndarray, " pages"], held: int, who: Admission | str, request: int, where: str
    ) -> None:
        if np.count_nonzero(rest):
            tail: list[int] = rest.tolist()
            at = next(i for i, page in enumerate(tail) if page)
            self.findings.breach(
                "T2",
                f"entry {held + at} of the row of {who} {where}, past its {held} pages, is page {tail[at]}",
                requests=(request,) if request >= 0 else (),
                pages=(tail[at],) if tail[at] > 0 else (),
                expected=f"page {DUMMY_PAGE}",
                found=f"page {tail[at]}",
            )

    # ---- a step at once

    def rows_agree(self, plan: StepPlan, first: int, start: Int32[ndarray, " decodes"]) -> bool:
        """Whether all decode rows have exactly the pages that they need, and the table shows the ledger's."""
        ledger = self.ledger
        if ledger.odd_sizes or ledger.full.due(ledger.turn):
            return False
        counts = ledger.num_pages[ledger.running]
        if counts.tobytes() != plan.num_pages[first:].tobytes():
            return False
        if plan.step % WHOLE_TABLE_EVERY == 0 and (start // self.page_size + self.one).tobytes() != counts.tobytes():
            return False
        return not self.tables_on or self._pages_agree(plan, first, counts)

    def _pages_agree(self, plan: StepPlan, first: int, counts: Int32[ndarray, " decodes"]) -> bool:
        ledger, slots, width = self.ledger, self.ledger.running, plan.table.shape[1]
        if width > ledger.table.shape[1]:
            return False
        if len(slots) * width <= SMALL_TABLE or plan.step % WHOLE_TABLE_EVERY == 0:
            return ledger.table.take(slots, axis=0)[:, :width].tobytes() == plan.table[first:].tobytes()
        shape = (len(plan.table), width, first)
        if self.shape != shape:
            self.shape = shape
            self.before = np.arange(first * width - 1, len(plan.table) * width - 1, width, dtype=np.intp)
        # Clipped: a table too narrow for its own num_pages shows another page, and is then judged row by row.
        told = plan.table.take(self.before + counts, mode="clip")
        return told.tobytes() == ledger.newest_page[slots].tobytes()

    # ---- the batch on the host or on the device

    def judge_batch(
        self,
        slots: Ints,
        rows: Int32[ndarray, "slots max_num_pages"],
        positions: Int32[ndarray, " slots"],
        in_step: frozenset[int],
        *,
        device: bool,
        changed: frozenset[int] = frozenset(),
    ) -> None:
        """T1, T2, T5, T6 of batch rows against the ledger; `changed` are slots whose row is new in this step.

        On the host every slot is judged, and a position may be that of the step just planned or the next one. On the
        device only slots of this step (`in_step`) and free ones are: what a stalled or finished slot holds there is the
        device's own business until it is told.
        """
        ledger, counts = self.ledger, self.findings.counts
        where = "on the device" if device else "in the host batch"
        each: list[int] = slots.tolist()
        stands: list[int] = positions.tolist()
        for i, slot in enumerate(each):
            live, position = ledger.occupant[slot], stands[i]
            if live is None or live.admission is None:
                counts["T2"].add(1, 1)
                if device and self._is_stale(slot, [], rows[i], slot in changed):
                    continue
                self._judge_tail(rows[i], 0, f"slot {slot}, which is free,", -1, where)
                self._judge_position(slot, -1, position, {-1}, where)
                continue
            if live.state != "running" or (device and slot not in in_step):
                continue
            admission = live.admission
            counts["T1"].add(1, 1)
            if not device or not self._is_stale(slot, admission.pages, rows[i], slot in changed):
                self.judge_row(admission, rows[i], ledger.computed(admission), where)
            done = ledger.position_of(slot)
            if not device:
                allowed = {done, done - 1}
            elif 0 <= live.eos_position <= done:
                # The step that samples the EOS may leave the slot at the EOS's position or already without one.
                allowed = {-1} if live.eos_position < done else {-1, done}
            else:
                allowed = {done}
            self._judge_position(slot, live.id, position, allowed, where)

    def _is_stale(self, slot: int, pages: list[int], row: Int32[ndarray, " pages"], changed: bool) -> bool:
        """T5: whether a device row still shows the slot as it was before: without its newest pages, or the holder's."""
        self.findings.counts["T5"].add(1, int(changed))
        used = row.nonzero()[0]
        told: list[int] = row[: used[-1] + 1].tolist() if len(used) else []
        older = len(told) < len(pages) and told == pages[: len(told)]
        if told == pages or not (older or told == self.ledger.before[slot]):
            return False
        live = self.ledger.occupant[slot]
        who = f"request {live.id}" if live is not None else "nobody"
        self.findings.breach(
            "T5",
            f"step {self.findings.step} ran with a row of slot {slot} from before its last change: held by {who}, it"
            f" has pages {pages}, and {told} stood on the device",
            requests=() if live is None else (live.id,),
            pages=pages,
            expected=pages,
            found=told,
        )
        return True

    def _judge_position(self, slot: int, request: int, position: int, allowed: set[int], where: str) -> None:
        self.findings.counts["T6"].add(1, 1)
        if position not in allowed:
            who = f"request {request}" if request >= 0 else "nobody"
            self.findings.breach(
                "T6",
                f"slot {slot}, held by {who}, is at position {position} {where}",
                requests=(request,) if request >= 0 else (),
                expected=" or ".join(str(p) for p in sorted(allowed)),
                found=position,
            )

    def judge_evidence(self, evidence: Evidence, in_step: frozenset[int], changed: frozenset[int]) -> None:
        """The rows and positions that lie on the device."""
        self.judge_batch(evidence.slots, evidence.rows, evidence.positions, in_step, device=True, changed=changed)
