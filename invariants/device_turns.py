"""What of the device is looked at after which step: places every time, rows and arrays by sample, all now and then."""

from __future__ import annotations

import numpy as np

from invariants.buffers import BufferJudge
from invariants.contents import ContentJudge
from invariants.device import Device
from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.lifecycle import LifeJudge
from invariants.records import Flight
from invariants.step_inputs import InputJudge
from invariants.tables import TableJudge

ROWS_EVERY = 16
LARGE_ROWS_EVERY = 64
"""A few rows of the device batch are compared at most once in so many steps (the second: beside a pool that is not
small), and at least once in twice as many: where a row was changed, if there is one."""

ROWS = 4


class DeviceJudge:
    """Looks at the device after each dispatched step, as far as it is that step's turn."""

    def __init__(
        self, ledger: Ledger, findings: Findings, tables: TableJudge, life: LifeJudge, *, full_every: int, every: int
    ) -> None:
        self.ledger = ledger
        self.tables = tables
        self.life = life
        self.contents = ContentJudge(ledger, findings)
        self.inputs = InputJudge(ledger, findings)
        self.buffers = BufferJudge(findings)
        self.full_every, self.every = full_every, every
        self.rows_on = findings.any_on(("T1", "T2", "T5", "T6"))
        self.on = self.contents.on or self.inputs.on or self.buffers.on or self.rows_on
        self.rows_every = ROWS_EVERY if self.contents.is_small else LARGE_ROWS_EVERY
        self.turn = 0
        self.looked = -self.rows_every

    def dispatched(self, flight: Flight, device: Device) -> None:
        """Judge what lies on the device after a step, before any later one is dispatched."""
        if not self.on or not self.contents.open(device):
            return
        turn = self.turn
        self.turn += 1
        full = turn % self.full_every == 0
        if self.contents.on:
            self.contents.dispatched(flight, device, check=turn % self.every == 0)
            if self.full_every == 1:
                self.contents.whole_pool(device)
            elif full:
                self.contents.full_look(device)
        waited = turn - self.looked
        if full or waited >= 2 * self.rows_every or (waited >= self.rows_every and self.life.changed):
            self.looked = turn
            self._look(flight, device, full=full)
        self.life.changed.clear()

    def finished(self, device: Device) -> None:
        """The run is over: compare the whole pool once more."""
        if self.contents.on and self.contents.open(device):
            self.contents.whole_pool(device)

    def _look(self, flight: Flight, device: Device, *, full: bool) -> None:
        changed = self.life.changed
        if self.rows_on or self.inputs.on:
            batch = len(self.ledger.occupant)
            some = min(ROWS, batch)
            first = self.turn // self.rows_every * some
            slots = (
                set(range(batch)) if full else {*sorted(changed)[:some], *((first + i) % batch for i in range(some))}
            )
            evidence = device.evidence(np.array(sorted(slots), np.int32), np.zeros(0, np.int32))
            if evidence is not None and self.rows_on:
                self.tables.judge_evidence(evidence, frozenset(flight.slots.tolist()), frozenset(changed))
            if evidence is not None and evidence.ran is not None and self.inputs.on:
                self.inputs.judge(flight, evidence.ran)
        if self.buffers.on:
            self.buffers.judge(device, shards=full)
