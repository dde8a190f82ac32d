"""What the scripted models yield where nothing is read: which rows are dead, which token, and where the EOS stands."""

from __future__ import annotations

from functools import cache

import numpy as np
from jaxtyping import Bool, Int32, UInt32
from numpy import add, bitwise_xor, multiply, remainder

from paged_attention.fingerprint import GOLDEN, mix32
from paged_attention.plan import EOS_TOKEN, UNKNOWN_TOKEN, ModelRows, StepOutcome, StepPlan

ONE, FACTOR = np.array(1, np.uint32), np.array(GOLDEN, np.uint32)

EVERY_ROW_SAMPLES = np.int32(1).tobytes()
"""Of one row: it yields a token."""

NO_EOS = np.int32(-1).tobytes()
"""Of one row: no EOS ends it."""


def dead_rows(plan: StepPlan, rows: ModelRows) -> Bool[np.ndarray, " rows"]:
    """The rows of ended sequences: their EOS, which the host may not have seen yet, stands at or before `start`."""
    return (rows.eos_position >= 0) & (plan.start >= rows.eos_position)


class TokenScript:
    """`fingerprint.token` for a whole step in a few array operations: what depends on the position is a table."""

    def __init__(self, max_sequence_length: int, vocab_size: int) -> None:
        positions = np.arange(max_sequence_length + 1, dtype=np.uint32)
        self._mixed_position: UInt32[np.ndarray, " positions"] = mix32(positions + np.uint32(GOLDEN))
        self._num_words = np.array(vocab_size - 1, np.uint32)
        self._endless: Int32[np.ndarray, " rows"] | None = None
        """EOS positions of rows that no EOS ends, as of the newest plan of that kind."""
        self._all_sample: Int32[np.ndarray, " rows"] | None = None
        """The `samples` of a plan whose every row yields a token."""

    def tokens(
        self, seed: UInt32[np.ndarray, " rows"], position: Int32[np.ndarray, " rows"]
    ) -> Int32[np.ndarray, " rows"]:
        """The token at each position of a request with this sampling seed."""
        # In place and with constants of rank 0: small arrays cost by the call, and this runs once a step. As an index,
        # int32 costs several times what intp does.
        x = self._mixed_position[position.astype(np.intp)]
        bitwise_xor(x, seed, x)
        multiply(x, FACTOR, x)
        remainder(x, self._num_words, x)
        add(x, ONE, x)
        return x.view(np.int32)

    def outcome(self, plan: StepPlan, rows: ModelRows) -> StepOutcome:
        """What the step yields when nothing that it reads is wrong."""
        position = plan.start + plan.count
        token = self.tokens(rows.token_seed, position)
        # Of a few dozen rows, comparing bytes costs a tenth of what a reduction does.
        if rows.eos_position is not self._endless:
            if rows.eos_position.tobytes() != NO_EOS * len(token):
                return self._with_ends(plan, rows, position, token)
            self._endless = rows.eos_position
        if plan.samples is not self._all_sample:
            if plan.samples.tobytes() == EVERY_ROW_SAMPLES * len(token):
                self._all_sample = plan.samples
            else:
                token[plan.samples == 0] = UNKNOWN_TOKEN
        token.setflags(write=False)
        return StepOutcome(plan.step, token, _no_ends(len(token)))

    def _with_ends(
        self, plan: StepPlan, rows: ModelRows, position: Int32[np.ndarray, " rows"], token: Int32[np.ndarray, " rows"]
    ) -> StepOutcome:
        eos = np.zeros(len(token), np.int32)
        ends = position == rows.eos_position
        token[ends] = EOS_TOKEN
        eos[ends] = 1
        silent = dead_rows(plan, rows) | (plan.samples == 0)
        token[silent] = UNKNOWN_TOKEN
        eos[silent] = 0
        return StepOutcome(plan.step, _read_only(token), _read_only(eos))


@cache
def _no_ends(rows: int) -> Int32[np.ndarray, " rows"]:
    """The `eos` of a step of so many rows in which nobody ends: nearly every step has one."""
    return _read_only(np.zeros(rows, np.int32))


def _read_only(array: Int32[np.ndarray, " rows"]) -> Int32[np.ndarray, " rows"]:
    array.setflags(write=False)
    return array
