"""What a decoder is fed where nothing but the pages stays on the device: rows of a plan name tokens not yet seen."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int32

from paged_attention.plan import UNKNOWN_TOKEN, StepOutcome, StepPlan


class FedTokens:
    """The newest token of every request, and who has drawn an EOS."""

    def __init__(self) -> None:
        self._newest: dict[int, int] = {}
        self._ended: set[tuple[int, int]] = set()

    def tokens(self, plan: StepPlan) -> Int32[np.ndarray, " tokens"]:
        """The plan's input tokens, each UNKNOWN_TOKEN replaced by its request's newest one."""
        if plan.tokens.min(initial=0) > UNKNOWN_TOKEN:
            return plan.tokens
        request = np.repeat(plan.request, plan.count)
        known = plan.tokens.copy()
        for at in np.flatnonzero(known == UNKNOWN_TOKEN).tolist():
            known[at] = self._newest.get(int(request[at]), UNKNOWN_TOKEN)
        return known

    def ended(self, plan: StepPlan) -> Bool[np.ndarray, " rows"]:
        """The rows whose admission has drawn an EOS in an earlier step."""
        admissions = zip(plan.request.tolist(), plan.admission.tolist(), strict=True)
        return np.array([admission in self._ended for admission in admissions], bool)

    def note(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Remember what a step yielded."""
        for row in np.flatnonzero(outcome.token != UNKNOWN_TOKEN).tolist():
            self._newest[int(plan.request[row])] = int(outcome.token[row])
            if outcome.eos[row]:
                self._ended.add((int(plan.request[row]), int(plan.admission[row])))
