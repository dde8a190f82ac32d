"""The rolling hash of a run: what was planned, what changed hands, what came out; never when.

    submit, cancel, plan, outcome, apply, abandon  --packed int32/int64-->  blake2b (8 bytes), one digest per step

Two runs are the same run when their digests agree; the first differing digest names the step at which they parted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b
from zlib import crc32

from paged_attention.plan import EFFECT_KINDS, Effect, StepOutcome, StepPlan

DIGEST_BYTES = 8
_KIND_CODE = {kind: code for code, kind in enumerate(EFFECT_KINDS)}
_PLAN, _OUTCOME, _ABANDONED, _REFUSED = (bytes([code]) for code in range(4))


def pack_effects(effects: Iterable[Effect]) -> bytes:
    """Effects as int64 words: kind, request, admission, slot, first page, length, reason, then the pages."""
    words = array("q")
    for kind, request, admission, slot, first_page, pages, reason in effects:
        reason_code = crc32(reason.encode()) if reason else 0
        words.extend((_KIND_CODE[kind], request, admission, slot, first_page, len(pages), reason_code))
        words.extend(pages)
    return words.tobytes()


class TraceHash:
    """The rolling hash of one run; `step_digests` holds DIGEST_BYTES bytes for every completed step."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=DIGEST_BYTES)
        self.step_digests = bytearray()

    def effects(self, effects: tuple[Effect, ...]) -> None:
        """Take in what submit, cancel, apply or abandon returned."""
        if effects:
            self._hash.update(pack_effects(effects))

    def refused(self, request: int) -> None:
        """Take in that a request was refused at submission (its wording is no part of the behaviour)."""
        self._hash.update(_REFUSED + request.to_bytes(8, "little"))

    def plan(self, plan: StepPlan) -> None:
        """Take in a plan. Table and tokens go in as a CRC-32: they are by far the biggest parts (20 KiB a step)."""
        update = self._hash.update
        bulk = crc32(plan.tokens.tobytes(), crc32(plan.table.tobytes()))
        update(_PLAN + plan.step.to_bytes(8, "little") + plan.num_rows.to_bytes(4, "little"))
        update(
            b"".join(
                (
                    plan.request.tobytes(),
                    plan.admission.tobytes(),
                    plan.slot.tobytes(),
                    plan.start.tobytes(),
                    plan.count.tobytes(),
                    plan.samples.tobytes(),
                    plan.num_pages.tobytes(),
                    bulk.to_bytes(4, "little"),
                )
            )
        )
        self.effects(plan.effects)

    def outcome(self, outcome: StepOutcome) -> None:
        """Take in the tokens that a step yielded."""
        self._hash.update(_OUTCOME + outcome.token.tobytes() + outcome.eos.tobytes())

    def abandoned(self, step: int, effects: tuple[Effect, ...]) -> None:
        """Take in that a planned step never ran."""
        self._hash.update(_ABANDONED + step.to_bytes(8, "little"))
        self.effects(effects)

    def close_step(self) -> None:
        """Keep the digest as it is after a step has been applied."""
        self.step_digests += self._hash.digest()

    @property
    def hexdigest(self) -> str:
        """The hash of everything taken in so far."""
        return self._hash.hexdigest()


def first_difference(a: bytes | bytearray, b: bytes | bytearray) -> int | None:
    """The index of the first completed step whose digests differ; None where one run is a prefix of the other."""
    for offset in range(0, min(len(a), len(b)), DIGEST_BYTES):
        if a[offset : offset + DIGEST_BYTES] != b[offset : offset + DIGEST_BYTES]:
            return offset // DIGEST_BYTES
    return None
