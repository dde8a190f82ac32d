"""P: pages change hands one at a time, each has one owner, and each comes back once."""

from __future__ import annotations

from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.records import Admission, Live
from paged_attention.plan import DUMMY_PAGE, Effect


class PageJudge:
    """Judges `allocated`, `freed` and `unfenced` before the ledger follows them.

    Declared rules: pages are handed out in the order of the free list, page by page as the effects tell; a release
    gives back the whole list of the admission, in logical order; it is fenced iff the policy fences and a step planned
    with the admission is not yet applied or abandoned; the fence opens in the very call that closes the last such step.
    """

    def __init__(self, ledger: Ledger, findings: Findings) -> None:
        self.ledger = ledger
        self.pool = ledger.pool
        self.findings = findings
        self.granted_pages = self.fence_pages = self.grants = self.growths = 0
        self.due: dict[int, Admission] = {}
        """Admissions that must be given back by the end of the call, by request."""
        self.next_due: dict[int, Admission] = {}
        """Admissions whose last row is planned: due at the next apply."""

    def allocated(self, effect: Effect, admission: Admission) -> None:
        """`pages` go to an admission that may hold pages."""
        pool, pages = self.pool, effect.pages
        size, held = len(pages), len(admission.pages)
        self.granted_pages += size
        self.grants += 1
        if pool.fences:
            self.fence_pages += size
        if held:
            self.growths += 1
        # Whatever stands in the queue of free pages is free, once, and in range: only its order is left to compare.
        if effect.first_page == held and pool.take_next(admission, pages):
            self.ledger.grow(admission, pages)
        elif size:
            self._judge_grant(effect, admission)

    def _judge_grant(self, effect: Effect, admission: Admission) -> None:
        """A grant that is not simply the next pages in turn."""
        pool, pages = self.pool, effect.pages
        size = len(pages)
        who = f"request {effect.request}, admission {effect.admission}"
        in_range = min(pages) > 0 and max(pages) < pool.num_pages
        if not in_range:
            self._out_of_range("allocated to", who, effect)
            pages = tuple(p for p in pages if 0 < p < pool.num_pages)
        in_turn = in_range
        if not pool.holder.keys().isdisjoint(pages) or len(set(pages)) != size:
            in_turn = False
            self._not_free(pages, who, effect)
        if effect.first_page != len(admission.pages):
            self.findings.breach(
                "P7",
                f"pages were put at logical page {effect.first_page} of {who}, whose list has {len(admission.pages)}",
                requests=(effect.request,),
                pages=effect.pages,
                expected=f"first_page {len(admission.pages)}",
                found=f"first_page {effect.first_page}",
            )
        wrong = pool.order.take_all(pages)
        if wrong is not None and in_turn:
            self.findings.breach(
                "P13",
                f"page {wrong[1]} was handed to {who} before page {wrong[0]}, against the declared order"
                f" {pool.order.order!r}",
                requests=(effect.request,),
                pages=wrong,
                expected=f"page {wrong[0]}",
                found=f"page {wrong[1]}",
            )
        pool.hold(admission, pages)
        self.ledger.grow(admission, effect.pages)

    def settle_counts(self) -> None:
        """Move the bulk counters into the counters."""
        count, size = self.findings.counts, self.granted_pages
        for name in ("P1", "P3", "P8"):
            count[name].add(size, size)
        count["P13"].add(size, size)
        count["P11"].add(self.fence_pages, self.fence_pages)
        count["P7"].add(self.grants, self.growths)
        self.granted_pages = self.fence_pages = self.grants = self.growths = 0

    def _out_of_range(self, verb: str, who: str, effect: Effect) -> None:
        if DUMMY_PAGE in effect.pages:
            self.findings.breach(
                "P3",
                f"page 0, the dummy, was {verb} {who}",
                requests=(effect.request,),
                pages=(0,),
                expected="pages from 1 on",
                found="page 0",
            )
        limit = self.pool.num_pages
        outside = [p for p in effect.pages if not 0 <= p < limit]
        if outside:
            self.findings.breach(
                "P8",
                f"page {outside[0]} was {verb} {who}, but the pool has pages 1 to {limit - 1}",
                requests=(effect.request,),
                pages=outside,
                expected=f"1 .. {limit - 1}",
                found=outside[0],
            )

    def _not_free(self, pages: tuple[int, ...], who: str, effect: Effect) -> None:
        pool = self.pool
        seen: set[int] = set()
        for page in pages:
            owner = pool.holder.get(page)
            if page in seen:
                self.findings.breach(
                    "P1",
                    f"page {page} was handed to {who} twice in one grant",
                    requests=(effect.request,),
                    pages=(page,),
                    expected="each page once",
                    found=f"page {page} twice",
                )
            elif owner is not None:
                state = "fenced after" if owner.released else "owned by"
                message = (
                    f"page {page} was handed to {who} while it is {state} request {owner.request},"
                    f" admission {owner.number}"
                )
                for name in ("P11", "P1") if owner.released else ("P1",):
                    self.findings.breach(
                        name,
                        message,
                        requests=(effect.request, owner.request),
                        pages=(page,),
                        expected=f"page {page} is free",
                        found=f"{state} request {owner.request}",
                    )
                pool.steal(page)
            seen.add(page)

    def freed(self, effect: Effect, admission: Admission | None) -> None:
        """An admission gives back every page and its slot."""
        count, pool = self.findings.counts, self.pool
        size = len(effect.pages)
        count["P5"].add(size, size)
        count["P10"].add(1, 1)
        if admission is None or admission.released:
            why = "which gave them back before" if admission is not None else "which holds none"
            self._not_owner(effect.pages, effect, why)
            return
        if admission.request not in self.due and admission.request not in self.next_due:
            self.findings.breach(
                "S7",
                f"{admission} gave back its pages although it was neither preempted, cancelled nor at its end",
                requests=(effect.request,),
                pages=effect.pages,
                expected="a release only after an end, a preemption or a cancel",
                found="freed",
            )
        if list(effect.pages) != admission.pages:
            self._wrong_list(effect, admission)
        pool.release(
            admission,
            effect.pages,
            fenced=self.ledger.policy.fence and self.ledger.touched_in_flight(admission),
        )
        self.due.pop(admission.request, None)
        self.next_due.pop(admission.request, None)

    def _wrong_list(self, effect: Effect, admission: Admission) -> None:
        mine, told = set(admission.pages), set(effect.pages)
        if not all(0 < p < self.pool.num_pages for p in told):
            self._out_of_range("given back by", str(admission), effect)
        if told - mine:
            self._not_owner(sorted(told - mine), effect, "which does not hold them")
        if len(told) != len(effect.pages):
            twice = sorted(p for p in told if effect.pages.count(p) > 1)
            self._not_owner(twice, effect, "in one release twice")
        forgotten = sorted(mine - told)
        if forgotten:
            self.findings.breach(
                "P10",
                f"{admission} ended its stay without giving back page {forgotten[0]}"
                + (f" and {len(forgotten) - 1} more" if len(forgotten) > 1 else ""),
                requests=(effect.request,),
                pages=forgotten,
                expected=f"{len(mine)} pages back",
                found=f"{len(told & mine)} pages back",
            )
        elif told == mine and len(told) == len(effect.pages):
            self.findings.breach(
                "P13",
                f"{admission} gave back its pages out of logical order",
                requests=(effect.request,),
                pages=effect.pages,
                expected=admission.pages,
                found=list(effect.pages),
            )

    def _not_owner(self, pages: tuple[int, ...] | list[int], effect: Effect, why: str) -> None:
        who = f"request {effect.request}, admission {effect.admission}"
        owner = self.pool.holder.get(pages[0]) if pages else None
        now = f"request {owner.request}, admission {owner.number}" if owner is not None else "nobody"
        self.findings.breach(
            "P5",
            f"pages {list(pages)} were given back by {who}, {why}"
            + (f"; page {pages[0]} is held by {now}" if pages else ""),
            requests=(effect.request,),
            pages=pages,
            expected="each page given back once, by its owner",
            found=f"held by {now}",
        )

    def unfenced(self, effect: Effect) -> None:
        """Pages leave the fence of a released admission."""
        pool, count = self.pool, self.findings.counts
        key = (effect.request, effect.admission)
        size = len(effect.pages)
        count["P11"].add(size, size)
        if key not in pool.fences:
            self._not_owner(effect.pages, effect, "which has no fenced pages")
            return
        admission, behind = pool.fences[key]
        if self.ledger.touched_in_flight(admission):
            self.findings.breach(
                "P11",
                f"pages of request {effect.request}, admission {effect.admission}, left the fence while a step planned"
                f" with it is in flight",
                requests=(effect.request,),
                pages=effect.pages,
                expected="fenced until its last step is applied",
                found="unfenced",
            )
        strangers = sorted(set(effect.pages) - set(behind))
        if strangers:
            self._not_owner(strangers, effect, "which has not fenced them")
        elif list(effect.pages) != behind:
            short = len(effect.pages) != len(behind)
            self.findings.breach(
                "P10" if short else "P13",
                f"request {effect.request}, admission {effect.admission}, opened its fence for other pages, or in"
                f" another order, than it had fenced",
                requests=(effect.request,),
                pages=behind,
                expected=behind,
                found=list(effect.pages),
            )
        pool.unfence(key, effect.pages)

    def settled(self, *, fences: bool) -> None:
        """The end of a call: what is due has been given back, and (`fences`) no fence stays closed without cause."""
        for admission in list(self.due.values()):
            self.findings.breach(
                "P10",
                f"request {admission.request}, admission {admission.number}, is done but still holds"
                f" {len(admission.pages)} pages" + (f" and slot {admission.slot}" if admission.slot >= 0 else ""),
                requests=(admission.request,),
                pages=admission.pages,
                expected="pages and slot given back in this call",
                found="nothing given back",
            )
        self.due.clear()
        if not fences:
            return
        for (request, number), (admission, pages) in list(self.pool.fences.items()):
            if not self.ledger.touched_in_flight(admission):
                self.findings.breach(
                    "P10",
                    f"pages of request {request}, admission {number}, stay fenced though no step of it is in flight",
                    requests=(request,),
                    pages=pages,
                    expected="unfenced in this call",
                    found="fenced",
                )
                self.pool.unfence((request, number), list(pages))

    def due_next(self, admission: Admission) -> None:
        """The last row of an admission is planned: it gives back what it holds at the next apply."""
        self.next_due[admission.request] = admission

    def not_due(self, live: Live) -> None:
        """That row was taken back."""
        self.next_due.pop(live.id, None)

    def begin_apply(self, ended: list[Live]) -> None:
        """What became due since the last apply is due in this one, and what an EOS ended."""
        for live in ended:
            if live.state != "gone" and live.admission is not None and not live.admission.released:
                self.due[live.id] = live.admission
        for request, admission in self.next_due.items():
            if not admission.released:
                self.due[request] = admission
        self.next_due.clear()
