"""What each step left in the places that it wrote, whatever the model: one 64-bit check sum for each place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, UInt64
from numpy import ndarray
from numpy.typing import NDArray

from backends.protocol import Backend, Pending
from paged_attention.plan import DUMMY_PAGE, Evidence, ModelRows, StepOutcome, StepPlan
from sim.backend_wrapper import BackendWrapper

NOBODY = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Places:
    """The places that a step wrote, row after row."""

    step: int
    request: Int32[ndarray, " places"]
    position: Int32[ndarray, " places"]
    page: Int32[ndarray, " places"]
    offset: Int32[ndarray, " places"]
    check: UInt64[ndarray, " places"]

    def of_live_rows(self, plan: StepPlan, outcome: StepOutcome) -> Places:
        """Without rows of sequences that had ended on the device: nothing is written for them."""
        dead = (plan.samples == 1) & (outcome.token < 0)
        if not dead.any():
            return self
        live = np.repeat(~dead, plan.count)
        columns = (self.request, self.position, self.page, self.offset, self.check)
        return Places(self.step, *(column[live] for column in columns))


class PlaceProbe(BackendWrapper):
    """Looks at what each step has written, directly after its dispatch."""

    def __init__(self, backend: Backend, page_size: int) -> None:
        """The backend is open already."""
        super().__init__(backend)
        self._page_size = page_size
        self.seen: dict[int, Places] = {}
        """By step, until somebody takes them."""

    def execute(self, plan: StepPlan, rows: ModelRows) -> Pending:
        """Execute, then look."""
        pending = self.backend.execute(plan, rows)
        row = np.repeat(np.arange(plan.num_rows), plan.count)
        first = np.repeat(np.cumsum(plan.count) - plan.count, plan.count)
        position = (plan.start[row] + np.arange(len(row)) - first).astype(np.int32)
        page, offset = plan.table[row, position // self._page_size], position % self._page_size
        which, where = np.unique(page, return_inverse=True)
        evidence = self.backend.evidence(NOBODY, which.astype(np.int32))
        if evidence is not None:
            check = _checks(evidence, where, offset)
            self.seen[plan.step] = Places(plan.step, plan.request[row], position, page, offset, check)
        return pending


def _checks(evidence: Evidence, where: NDArray[np.intp], offset: Int32[ndarray, " places"]) -> UInt64[ndarray, " n"]:
    """The sum of each place's raw words, each times an odd number of its own, modulo 2**64."""
    held = np.stack([evidence.keys[:, :, where, offset], evidence.values[:, :, where, offset]])
    words = np.moveaxis(held, 3, 0).reshape(len(where), -1).astype(np.uint64)
    factors = np.random.default_rng(1).integers(0, 2**63, words.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    return (words * factors).sum(axis=1, dtype=np.uint64)


def differing(a: Places, b: Places) -> Bool[ndarray, " places"] | None:
    """Which places of two runs' same step differ; None: the steps did not write for the same tokens."""
    same = np.array_equal(a.request, b.request) and np.array_equal(a.position, b.position)
    return (a.check != b.check) & (a.page != DUMMY_PAGE) if same else None
