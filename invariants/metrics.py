"""M: what the recorder counted is what happened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.records import Flight, Live
from invariants.series import SeriesLog

GAUGES: Final = (
    "prefill_tokens",
    "decode_tokens",
    "running",
    "waiting",
    "slots_used",
    "pages_owned",
    "pages_free",
    "pages_fenced",
    "live_tokens",
    "preemptions",
)
"""What a recorder writes down of each step when it is planned. Owned pages leave out fenced ones; `running` counts
admitted requests that have not ended; `live_tokens` have K/V in owned pages; preemptions are the plan's own."""

GAUGE_IDS: Final = {"prefill_tokens": "M7", "decode_tokens": "M7", "live_tokens": "M6"}
"""Whose business a gauge is; M3's, where it is not here."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What the run's recorder counted, judged at the end against the auditor's own books (M1, M2, M5).

    `scheduled_tokens`: tokens of all plans that were not abandoned. `live`: neither finished, cancelled nor rejected.
    `request_ns`: the recorder's integral of live requests over time (None: not measured); rejected ones are not in it.
    """

    scheduled_tokens: int
    arrived: int
    finished: int
    cancelled: int
    rejected: int
    live: int
    request_ns: int | None = None
    series: Mapping[str, NDArray[np.signedinteger]] | None = None
    """What plots are drawn from, one entry for each completed step (M8); None: nothing is drawn."""


class Said(NamedTuple):
    """The times and tokens of a request that is gone: as recorded, or as seen by the auditor."""

    arrival_ns: int
    admitted_ns: int | None
    first_token_ns: int | None
    finish_ns: int
    tokens: int


class Latency:
    """How often something was waited for, and how long in all."""

    def __init__(self) -> None:
        self.count = 0
        self.total_ns = 0

    def add(self, waited_ns: int) -> None:
        """One more wait."""
        self.count += 1
        self.total_ns += waited_ns

    def agrees(self, said: Mapping[str, float | int | None]) -> bool:
        """Whether a summary's count and mean (in s) are these."""
        if said["count"] != self.count:
            return False
        mean = said["mean"]
        return mean is None or math.isclose(mean * self.count * 1e9, self.total_ns, rel_tol=1e-9, abs_tol=0.5)


PAGES_OWNED, USAGE = GAUGES.index("pages_owned"), "kv_cache_usage_perc"

FIRST_TOKEN, WHOLE = "time_to_first_token_seconds", "e2e_request_latency_seconds"
"""Latencies that a summary quotes and the auditor adds up itself."""

REMEMBERED = 4096
"""Requests that are gone and whose `request_done` is still awaited."""


class MetricJudge:
    """Keeps its own totals."""

    def __init__(self, ledger: Ledger, findings: Findings) -> None:
        self.ledger = ledger
        self.findings = findings
        self.arrived = 0
        self.rejected = 0
        self.finished = 0
        self.cancelled = 0
        self.planned_tokens = 0
        self.sojourn_ns = 0
        self.gone: dict[int, tuple[Said, str]] = {}
        self.latencies = {FIRST_TOKEN: Latency(), WHOLE: Latency()}
        self.measures = self.padded = 0
        """Measurements since the counters were settled, and those of steps with padding."""
        self.series = SeriesLog(("step", "end_ns", *GAUGES))
        self.most_owned = 0
        """Pages owned in the fullest completed step."""

    def first_token(self, live: Live, now_ns: int) -> None:
        """The first token of a request has reached the host."""
        live.first_token_ns = now_ns
        self.latencies[FIRST_TOKEN].add(now_ns - live.submitted_ns)

    def retired(self, live: Live, how: str) -> None:
        """Called before the ledger forgets the request."""
        now = self.findings.time_ns
        tokens = self.ledger.applied_tokens(live)
        self.gone[live.id] = (Said(live.submitted_ns, live.admitted_ns, live.first_token_ns, now, tokens), how)
        if len(self.gone) > REMEMBERED:
            del self.gone[next(iter(self.gone))]
        self.sojourn_ns += now - live.submitted_ns
        if how == "ended":
            self.finished += 1
            self.latencies[WHOLE].add(now - live.submitted_ns)
        else:
            self.cancelled += 1

    def measured(self, gauges: tuple[int, ...], flight: Flight, preemptions: int) -> None:
        """M3, M6, M7: the recorder's gauges are the auditor's."""
        ledger, pool, plan = self.ledger, self.ledger.pool, flight.plan
        tokens = len(plan.tokens)
        prefill = tokens - (len(plan.request) - flight.first)
        waiting = len(ledger.waiting)
        mine = (
            prefill,
            tokens - prefill,
            len(ledger.live) - waiting,
            waiting,
            len(ledger.occupant) - ledger.num_free_slots,
            pool.num_owned,
            pool.num_free,
            pool.num_fenced,
            self.planned_tokens - ledger.released_tokens,
            preemptions,
        )
        flight.gauges = mine
        self.measures += 1
        self.padded += prefill % ledger.policy.prefill_chunk != 0
        if gauges != mine:
            self._wrong_gauges(gauges, mine)

    def _wrong_gauges(self, said: tuple[int, ...], mine: tuple[int, ...]) -> None:
        for name, a, b in zip(GAUGES, said, mine, strict=True):
            if a != b:
                self.findings.breach(
                    GAUGE_IDS.get(name, "M3"),
                    f"the record says {name} {a} in step {self.findings.step}, and the auditor's books say {b}",
                    expected=f"{name} {b}",
                    found=f"{name} {a}",
                )

    def judge_waste(self) -> None:
        """M6: no sequence holds a page that it does not need; all waste together is what is allocated and unused."""
        ledger, policy, total = self.ledger, self.ledger.policy, 0
        for live in ledger.live.values():
            admission = live.admission
            if admission is None or admission.released:
                continue
            done = ledger.computed(admission)
            held = len(admission.pages) * policy.page_size
            most = ledger.pages_for(max(done, admission.high) + policy.lookahead) * policy.page_size
            total += held - done
            self.findings.counts["M6"].add(1, 1)
            if not done <= held <= most:
                self.findings.breach(
                    "M6",
                    f"request {live.id}, admission {admission.number}, wastes {held - done} of {held} places",
                    requests=(live.id,),
                    pages=admission.pages,
                    expected=f"0 to {most - done}",
                    found=held - done,
                )
        gauge = ledger.pool.num_owned * policy.page_size - (self.planned_tokens - ledger.released_tokens)
        if total != gauge:
            self.findings.breach(
                "M6",
                f"all sequences together waste {total} places, but {gauge} are allocated and not used",
                expected=total,
                found=gauge,
            )

    def completed(self, flight: Flight) -> None:
        """The outcome of a step reached the host: its row of the series is final."""
        if flight.gauges:
            self.series.note((flight.plan.step, self.findings.time_ns, *flight.gauges))
            self.most_owned = max(self.most_owned, flight.gauges[PAGES_OWNED])

    def settle_counts(self) -> None:
        """Move the bulk counters into the counters."""
        counts, measures = self.findings.counts, self.measures
        counts["M3"].add(measures, measures)
        counts["M6"].add(measures, measures)
        counts["M7"].add(measures, self.padded)
        self.measures = self.padded = 0

    def request_done(self, said: Said, request: int, itl_sum_ns: int) -> None:
        """M4: times are in order, add up, and are those that the auditor saw."""
        self.findings.counts["M4"].add(1, 1)
        seen, how = self.gone.pop(request, (None, "unknown"))
        problems: list[str] = []
        times = [t for t in (said.arrival_ns, said.admitted_ns, said.first_token_ns, said.finish_ns) if t is not None]
        if times != sorted(times):
            problems.append(f"its times are out of order: {times}")
        if said.first_token_ns is not None and how == "ended":
            parts, whole = said.first_token_ns - said.arrival_ns + itl_sum_ns, said.finish_ns - said.arrival_ns
            if parts != whole:
                problems.append(f"its TTFT and gaps make {parts} ns, but it took {whole} ns")
        if seen is None:
            problems.append(f"it is {'live' if request in self.ledger.live else 'unknown'}")
        else:
            problems += _differences(said, seen)
        if problems:
            self.findings.breach(
                "M4",
                f"the record of request {request} is wrong: {'; '.join(problems)}",
                requests=(request,),
                expected=seen,
                found=said,
            )

    def summarised(self, figures: Mapping[str, Mapping[str, float | int | None]]) -> None:
        """M4: the latencies that are quoted count the requests, and add up to the waits, that were seen; M3: usage."""
        if self.series.rows:
            usage, said = self.most_owned / (self.ledger.policy.num_pages - 1), figures[USAGE]["max"]
            self.findings.counts["M3"].add(1, 1 if self.most_owned else 0)
            if said is None or not math.isclose(said, usage, rel_tol=1e-9):
                self.findings.breach(
                    "M3",
                    f"the summary's largest {USAGE} is {said}, but at most {self.most_owned} of"
                    f" {self.ledger.policy.num_pages - 1} pages were owned",
                    expected=usage,
                    found=said,
                )
        for name, seen in self.latencies.items():
            self.findings.counts["M4"].add(1, 1 if seen.count else 0)
            if not seen.agrees(figures[name]):
                mean = seen.total_ns / seen.count * 1e-9 if seen.count else None
                self.findings.breach(
                    "M4",
                    f"{name} of the summary is a mean of {figures[name]['mean']} s over {figures[name]['count']}"
                    f" requests, seen were {mean} s over {seen.count}",
                    expected=f"{seen.count} requests, mean {mean} s",
                    found=f"{figures[name]['count']} requests, mean {figures[name]['mean']} s",
                )

    def judge_totals(self, totals: Totals) -> None:
        """M1, M2, M5, M8 at the end of the run."""
        ledger, counts = self.ledger, self.findings.counts
        running = sum(
            ledger.computed(a) for x in ledger.live.values() if (a := x.admission) is not None and not a.released
        )
        computed = ledger.released_tokens + running
        counts["M1"].add(1, 1 if computed else 0)
        if not totals.scheduled_tokens == self.planned_tokens == computed:
            self.findings.breach(
                "M1",
                f"the record has {totals.scheduled_tokens} scheduled tokens, the plans had {self.planned_tokens}, and"
                f" all admissions together computed {computed}",
                expected=computed,
                found=totals.scheduled_tokens,
            )
        if totals.request_ns is not None and not ledger.live:
            counts["M2"].add(1, 1 if self.sojourn_ns else 0)
            if totals.request_ns != self.sojourn_ns:
                self.findings.breach(
                    "M2",
                    f"the integral of live requests over time is {totals.request_ns} ns, but their stays add up to"
                    f" {self.sojourn_ns} ns",
                    expected=self.sojourn_ns,
                    found=totals.request_ns,
                )
        if totals.series is not None and self.series.rows:
            counts["M8"].add(1, 1)
            difference = self.series.difference(totals.series)
            if difference:
                self.findings.breach(
                    "M8",
                    f"the recorded series {difference}",
                    expected="what was seen when each step was planned and completed",
                    found=difference,
                )
        mine = (self.arrived, self.finished, self.cancelled, self.rejected, len(ledger.live))
        said = (totals.arrived, totals.finished, totals.cancelled, totals.rejected, totals.live)
        counts["M5"].add(1, 1 if self.arrived else 0)
        if said != mine or said[0] != sum(said[1:]):
            names = "arrived, finished, cancelled, rejected, live"
            self.findings.breach(
                "M5",
                f"the record counts {said} ({names}), the auditor {mine}",
                expected=mine,
                found=said,
            )


def _differences(said: Said, seen: Said) -> list[str]:
    """What a record tells otherwise than it was seen; an arrival may lie before its submission."""
    pairs = (
        ("admission", said.admitted_ns, seen.admitted_ns),
        ("first token", said.first_token_ns, seen.first_token_ns),
        ("finish", said.finish_ns, seen.finish_ns),
    )
    problems = [f"its {what} was at {a} ns, seen at {b} ns" for what, a, b in pairs if a != b]
    if said.arrival_ns > seen.arrival_ns:
        problems.append(f"its arrival at {said.arrival_ns} ns is after its submission at {seen.arrival_ns} ns")
    if said.tokens != seen.tokens:
        problems.append(f"it has {said.tokens} tokens, seen were {seen.tokens}")
    return problems
