"""P1, P2, P9, P11, P12, P13, S6, T1, T2, T3, T6: the core's whole host state, against the books."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.records import Live
from invariants.tables import TableJudge
from paged_attention.plan import CoreSnapshot

PageLists = dict[tuple[int, int], list[int]]
"""By (request, admission)."""


class SnapshotJudge:
    """Compares a snapshot with the ledger, page by page, slot by slot, request by request."""

    def __init__(self, ledger: Ledger, findings: Findings, tables: TableJudge) -> None:
        self.ledger = ledger
        self.findings = findings
        self.tables = tables
        self._every_page = np.arange(1, ledger.pool.num_pages)

    def judge(self, snapshot: CoreSnapshot, *, after_failure: bool) -> None:
        """Everything; `after_failure`: an allocation has just failed, so that a difference is also a breach of P9."""
        differences = self._pages(snapshot)
        if after_failure:
            self.findings.counts["P9"].add(1, 1)
            if differences:
                self.findings.breach(
                    "P9",
                    f"after a failed allocation the core's pages are not what they were: {differences[0]}",
                    expected="nothing changed",
                    found="; ".join(differences),
                )
        self._order(snapshot)
        self._slots(snapshot)
        self._queues(snapshot)

    # ---- pages

    def _pages(self, snapshot: CoreSnapshot) -> list[str]:
        pool, findings = self.ledger.pool, self.findings
        size = pool.num_pages
        owned = {key: pages.tolist() for key, pages in snapshot.pages.items() if len(pages)}
        free, fenced = snapshot.free.tolist(), snapshot.fenced.tolist()
        everywhere = np.concatenate((snapshot.free, snapshot.fenced, *snapshot.pages.values()))
        findings.counts["P1"].add(size - 1, size - 1)
        findings.counts["P2"].add(1, 1)
        findings.counts["P3"].add(1, 1)
        findings.counts["P8"].add(len(everywhere), len(everywhere))
        each_once = np.array_equal(np.sort(everywhere), self._every_page)
        if not each_once:
            self._judge_partition(free, fenced, [*free, *fenced, *chain.from_iterable(owned.values())])
        fences = pool.fenced_pages()
        early = sorted(fences.intersection(free)) if fences else []
        if early:
            self._breach("P11", f"page {early[0]} can be handed out while a step in flight may touch it", early[:16])
        differences: list[str] = []
        # As many different pages as nobody holds, and nobody holds one of them: no sets need be built.
        if not (each_once and len(free) == pool.num_free and pool.holder.keys().isdisjoint(free)):
            differences += self._compare("free", set(free), pool.free_pages())
        differences += self._compare("fenced", set(fenced), fences)
        mine = {
            (a.request, a.number): a.pages
            for live in self.ledger.live.values()
            if (a := live.admission) is not None and not a.released and a.pages
        }
        return differences + self._wrong_lists(mine, owned) if mine != owned else differences

    def _judge_partition(self, free: list[int], fenced: list[int], everywhere: list[int]) -> None:
        """P1, P2, P3, P8: which page is not exactly one of free, fenced and owned."""
        size = self.ledger.pool.num_pages
        outside = [p for p in everywhere if not 0 <= p < size]
        if outside:
            self._breach("P8", f"the core's books have page {outside[0]}, but the pool ends at {size - 1}", outside)
        if 0 in everywhere:
            self._breach("P3", "page 0, the dummy, is in the core's books as a page to hand out or to hold", [0])
        inside = np.array([p for p in everywhere if 0 < p < size], np.int32)
        times = np.bincount(inside, minlength=size)[1:]
        lost, twice = np.flatnonzero(times == 0) + 1, np.flatnonzero(times > 1) + 1
        if len(everywhere) != size - 1:
            self.findings.breach(
                "P2",
                f"{len(free)} free, {len(fenced)} fenced and {len(everywhere) - len(free) - len(fenced)} owned pages do"
                f" not make {size - 1}",
                pages=lost.tolist()[:16],
                expected=size - 1,
                found=len(everywhere),
            )
        if len(lost):
            self._breach("P1", f"page {lost[0]} is neither free nor fenced nor owned", lost.tolist()[:16])
        if len(twice):
            self._breach("P1", f"page {twice[0]} is in more than one of free, fenced and owned", twice.tolist()[:16])

    def _wrong_lists(self, mine: PageLists, owned: PageLists) -> list[str]:
        """T1: the page lists of the core that are not those that it was seen to give."""
        differences: list[str] = []
        for key in sorted(mine.keys() | owned.keys()):
            if mine.get(key) != owned.get(key):
                text = (
                    f"request {key[0]}, admission {key[1]}, was given pages {mine.get(key, [])}, but the core's list is"
                    f" {owned.get(key, [])}"
                )
                self.findings.breach(
                    "T1",
                    text,
                    requests=(key[0],),
                    pages=mine.get(key, []),
                    expected=mine.get(key, []),
                    found=owned.get(key, []),
                )
                differences.append(text)
        return differences

    def _compare(self, state: str, found: set[int], expected: set[int]) -> list[str]:
        if found == expected:
            return []
        missing, extra = sorted(expected - found), sorted(found - expected)
        text = f"pages {(missing or extra)[:8]} are {'not ' if missing else ''}{state} in the core"
        self._breach("P1", text + ("" if missing else ", but nobody gave them back"), (missing or extra)[:16])
        return [text]

    def _breach(self, name: str, message: str, pages: list[int]) -> None:
        self.findings.breach(
            name, message, pages=pages, expected="each page from 1 on is exactly one of free, fenced and owned"
        )

    def _order(self, snapshot: CoreSnapshot) -> None:
        expected, found = self.ledger.pool.order.listing(), snapshot.free.tolist()
        if expected is None or (expected != found and set(expected) != set(found)):
            return
        self.findings.counts["P13"].add(1, 1 if len(expected) > 1 else 0)
        if expected != found:
            at = next(i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
            self.findings.breach(
                "P13",
                f"free page number {at} is {found[at]}, but {expected[at]} by the declared order"
                f" {self.ledger.pool.order.order!r}",
                pages=(expected[at], found[at]),
                expected=expected[at : at + 8],
                found=found[at : at + 8],
            )

    # ---- slots

    def _slots(self, snapshot: CoreSnapshot) -> None:
        ledger, findings = self.ledger, self.findings
        held = {live.id: slot for slot, live in enumerate(ledger.occupant) if live is not None}
        found = dict(snapshot.slot_of)
        findings.counts["T3"].add(len(ledger.occupant), len(held))
        if held != found:
            wrong = sorted(r for r in held.keys() | found.keys() if held.get(r) != found.get(r))
            findings.breach(
                "T3",
                f"request {wrong[0]} holds {_slot(held.get(wrong[0]))}, but {_slot(found.get(wrong[0]))} in the core",
                requests=wrong,
                expected=held,
                found=found,
            )
        self.tables.judge_batch(
            np.arange(len(ledger.occupant), dtype=np.int32),
            snapshot.rows,
            snapshot.positions,
            frozenset(),
            device=False,
        )

    # ---- queues

    def _queues(self, snapshot: CoreSnapshot) -> None:
        """S6: each live request is in exactly one queue, the one of its state; S9: waiting is in declared order."""
        ledger, findings = self.ledger, self.findings
        findings.counts["S6"].add(len(ledger.live), len(ledger.live))
        queued = {name: requests.tolist() for name, requests in snapshot.queues.items()}
        each = list(chain.from_iterable(queued.values()))
        at_home = all(
            (live := ledger.live.get(request)) is not None and live.state == name
            for name, requests in queued.items()
            for request in requests
        )
        if not at_home or len(each) != len(ledger.live) or len(set(each)) != len(each):
            self._judge_queues(queued)
        if ledger.policy.admission == "fcfs" and "waiting" in snapshot.queues:
            expected, found = [live.id for live in ledger.waiting], queued["waiting"]
            if expected != found and set(expected) == set(found):
                findings.breach(
                    "S9",
                    "the waiting queue is not in order of submission",
                    requests=found,
                    expected=expected,
                    found=found,
                )

    def _judge_queues(self, queued: Mapping[str, list[int]]) -> None:
        """Request by request: some states have two queues that are right."""
        ledger = self.ledger
        where: dict[int, list[str]] = {}
        for name, requests in queued.items():
            for request in requests:
                where.setdefault(request, []).append(name)
        for request in sorted(where.keys() | ledger.live.keys()):
            live, names = ledger.live.get(request), where.get(request, [])
            allowed = _names(live) if live is not None else frozenset[str]()
            if live is None or len(names) != 1 or names[0] not in allowed:
                state = live.state if live is not None else ledger.how_gone(request)
                self.findings.breach(
                    "S6",
                    f"request {request}, which is {state}, is in the queues {names}",
                    requests=(request,),
                    expected=" or ".join(sorted(allowed)) or "no queue",
                    found=names,
                )

    def judge_pending(self, pending: Mapping[int, str]) -> None:
        """S6: the requests that the core says are unfinished are those that are."""
        live = self.ledger.live
        self.findings.counts["S6"].add(len(live), len(live))
        if wrong := sorted(live.keys() ^ pending.keys()):
            state = live[wrong[0]].state if wrong[0] in live else self.ledger.how_gone(wrong[0])
            self.findings.breach(
                "S6",
                f"request {wrong[0]} is {state}, but {'' if wrong[0] in pending else 'not '}among the pending ones",
                requests=wrong,
                expected=sorted(live),
                found=dict(pending),
            )

    # ---- the end

    def judge_empty(self, snapshot: CoreSnapshot) -> None:
        """P12: after everybody has gone the core is as it was at first."""
        self.findings.counts["P12"].add(1, 1 if self.ledger.submissions else 0)
        size = self.ledger.pool.num_pages
        leaks: list[str] = []
        missing = sorted(set(range(1, size)) - set(snapshot.free.tolist()))
        if missing or len(snapshot.free) != size - 1:
            leaks.append(f"pages {missing[:8]} are not free ({len(snapshot.free)} of {size - 1} are)")
        if len(snapshot.fenced):
            leaks.append(f"pages {snapshot.fenced.tolist()[:8]} are still fenced")
        leaks += _rows_left(snapshot.rows, snapshot.positions)
        if snapshot.slot_of:
            leaks.append(f"slots are still mapped: {dict(snapshot.slot_of)}")
        holding = {key: pages.tolist() for key, pages in snapshot.pages.items()}
        if holding:
            leaks.append(f"page lists are left: {holding}")
        queued = {name: q.tolist() for name, q in snapshot.queues.items() if len(q)}
        if queued:
            leaks.append(f"queues are left: {queued}")
        for leak in leaks:
            self.findings.breach("P12", f"after the last request was gone {leak}", pages=missing[:16], found=leak)


def _rows_left(rows: Int32[ndarray, "slots pages"], positions: Int32[ndarray, " slots"]) -> list[str]:
    used = np.flatnonzero(rows.any(axis=1) | (positions != -1))
    return [f"slot {used[0]} is at position {positions[used[0]]} with a row that is not empty"] if len(used) else []


def _slot(slot: int | None) -> str:
    return "no slot" if slot is None else f"slot {slot}"


def _names(live: Live) -> frozenset[str]:
    """The queues in which a request of this state may be.

    A prefill whose last chunk is in flight may still be listed as one, and a sequence whose last row is in flight as
    running (or prefill) until it has given its slot back.
    """
    if live.state == "joining":
        return frozenset({"joining"} if live.first_outcome_seen else {"joining", "prefill"})
    if live.state == "draining" and live.admission is not None and not live.admission.released:
        return frozenset({"draining", "running" if live.admission.slot >= 0 else "prefill"})
    return frozenset({live.state})
