"""S8, O11: the rows that a step really ran with: their spans, where each is sampled, and with whose parameters."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from invariants.contents import dead_rows
from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.records import Flight
from paged_attention.plan import ModelRows, Request, StepInput

FAMILY = ("S8", "O11")


class InputJudge:
    """Compares a step's input on the device with its plan and the requests in it."""

    def __init__(self, ledger: Ledger, findings: Findings) -> None:
        self.ledger = ledger
        self.findings = findings
        self.on = findings.any_on(FAMILY)

    def judge(self, flight: Flight, ran: StepInput) -> None:
        """S8 and O11 of the newest step; rows whose sequence had ended on the device are as good as padding."""
        requests = self._requests(flight)
        if ran.step != flight.plan.step or requests is None:
            return
        alive = np.ones(len(requests), bool)
        alive[flight.first :] = ~dead_rows(self.ledger.eos[flight.slots], flight.start)
        rows = np.flatnonzero(alive)
        self._spans(flight, ran, rows)
        self._sampled(flight, ran, rows)
        for row in rows.tolist():
            self._params(requests[row], ran, ran.device_row.item(row))

    def judge_seeds(self, flight: Flight, rows: ModelRows) -> None:
        """O11 of the neutral rows: the token of a row is drawn with its request's seed."""
        requests = self._requests(flight)
        if requests is None:
            return
        self.findings.counts["O11"].add(len(requests), len(requests))
        for row, (request, seed) in enumerate(zip(requests, rows.token_seed.tolist(), strict=True)):
            if seed != request.seed & 0xFFFFFFFF:
                self._breach(
                    request, "seed", request.seed & 0xFFFFFFFF, seed, f"row {row} of step {self.findings.step}"
                )

    def _requests(self, flight: Flight) -> list[Request] | None:
        """Whose rows they are; None: strangers' are among them, and their judge has spoken."""
        found = [live.request for _, live, _, _, _ in flight.prefills]
        slots: list[int] = flight.slots.tolist()
        holders = [self.ledger.occupant[slot] for slot in slots]
        found += [live.request for live in holders if live is not None]
        return found if len(found) == flight.plan.num_rows else None

    # ---- S8

    def _spans(self, flight: Flight, ran: StepInput, rows: Int[ndarray, " alive"]) -> None:
        """Each row's tokens follow those of the rows before it; rows that are none have no tokens."""
        expected = np.zeros(len(ran.query_starts) - 1, np.int64)
        expected[ran.device_row[rows]] = flight.plan.count[rows]
        self.findings.counts["S8"].add(len(expected), len(rows))
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(expected)])
        wrong = np.flatnonzero(starts != ran.query_starts)
        if len(wrong):
            at = int(wrong[0])
            self.findings.breach(
                "S8",
                f"query start {at} of step {ran.step} is {ran.query_starts[at]} on the device, but the rows before it"
                f" have {starts[at]} tokens",
                requests=flight.plan.request.tolist(),
                expected=starts.tolist(),
                found=ran.query_starts.tolist(),
            )

    def _sampled(self, flight: Flight, ran: StepInput, rows: Int[ndarray, " alive"]) -> None:
        """A row that yields is read at the last token of its span."""
        rows = rows[flight.plan.samples[rows] == 1]
        at = ran.device_row[rows]
        self.findings.counts["S8"].add(len(rows), len(rows))
        right = ran.input_start[at] + flight.plan.count[rows] - 1
        wrong = np.flatnonzero(ran.sampled_row[at] != right)
        if len(wrong):
            row = int(rows[wrong[0]])
            expected, found = int(right[wrong[0]]), int(ran.sampled_row[at[wrong[0]]])
            request = int(flight.plan.request[row])
            self.findings.breach(
                "S8",
                f"the token of request {request} in step {ran.step} was sampled at row {found} of the input, but its"
                f" last token stands at row {expected}",
                requests=(request,),
                expected=f"input row {expected}",
                found=f"input row {found}",
            )

    # ---- O11

    def _params(self, request: Request, ran: StepInput, at: int) -> None:
        self.findings.counts["O11"].add(1, 1)
        own = {
            "temperature": float(np.float32(request.temperature)),
            "top_p": float(np.float32(request.top_p)),
            "max_tokens": request.max_tokens,
            "seed": request.seed & 0xFFFFFFFF,
        }
        for name, value in own.items():
            found = getattr(ran, name).item(at)
            if found != value:
                self._breach(request, name, value, found, f"step {ran.step} ran")

    def _breach(self, request: Request, name: str, expected: float, found: float, where: str) -> None:
        self.findings.breach(
            "O11",
            f"{where} with {name} {found} for request {request.id}, whose own is {expected}",
            requests=(request.id,),
            expected=f"{name} {expected}",
            found=f"{name} {found}",
        )
