"""The rolling hash of a run: what was planned, what changed hands, what came out; never when.

    effects  --int64 words------------------+--> blake2b (8 bytes), one digest per step
    plan, outcome  --CRC-32 of the columns--+

Two runs are the same run when their digests agree; the first differing digest names the step at which they parted. A
CRC-32 sees every difference within 32 bits for certain, any other but for one in four billion, and costs a tenth.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b
from struct import Struct
from typing import Any, Final
from zlib import crc32

from paged_attention.plan import EFFECT_KINDS, Effect, StepOutcome, StepPlan

DIGEST_BYTES: Final = 8
WHOLE_TABLE_EVERY: Final = 8
"""Tables of more than FEW_ROWS rows go in at every n-th step only: see `TraceHash.plan`."""
FEW_ROWS: Final = 16

_KIND_CODE = {kind: code for code, kind in enumerate(EFFECT_KINDS)}
_PLAN, _OUTCOME, _ABANDONED, _REFUSED = range(4)
_HEAD = Struct("<Bqqq")
"""What comes, of which step or request, how many rows, and their CRC-32."""


def pack_effects(effects: Iterable[Effect]) -> bytes:
    """Effects as int64 words: kind, request, admission, slot, first page, length, reason, then the pages."""
    words: list[int] = []
    for kind, request, admission, slot, first_page, pages, reason in effects:
        reason_code = crc32(reason.encode()) if reason else 0
        words += (_KIND_CODE[kind], request, admission, slot, first_page, len(pages), reason_code, *pages)
    return array("q", words).tobytes()


def _check(columns: tuple[Any, ...]) -> int:
    """CRC-32 of all columns, one after the other."""
    try:
        return crc32(b"".join(columns))
    except (BufferError, TypeError):  # a foreign core may hand over a column with gaps
        return crc32(b"".join([column.tobytes() for column in columns]))


class TraceHash:
    """The rolling hash of one run; `step_digests` holds DIGEST_BYTES bytes for every completed step."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=DIGEST_BYTES)
        self._parts: list[bytes] = []
        """What has come in since the last digest: one long update is cheaper than many short ones."""
        self.step_digests = bytearray()

    def effects(self, effects: tuple[Effect, ...]) -> None:
        """Take in what submit, cancel, apply or abandon returned."""
        if effects:
            self._parts.append(pack_effects(effects))

    def refused(self, request: int) -> None:
        """Take in that a request was refused at submission (its wording is no part of the behaviour)."""
        self._parts.append(_HEAD.pack(_REFUSED, request, 0, 0))

    def plan(self, plan: StepPlan) -> None:
        """Take in a plan.

        The pages of each row follow from the effects and `num_pages`, which always go in; a core whose table shows
        other pages is the auditor's finding. So a big table, ten times the rest, goes in now and then only.
        """
        request, num_pages = plan.request, plan.num_pages
        columns = (plan.tokens, request, plan.admission, plan.slot, plan.start, plan.count, plan.samples, num_pages)
        if len(request) <= FEW_ROWS or plan.step % WHOLE_TABLE_EVERY == 0:
            # How far a table is padded is the core's own business.
            columns += (plan.table[:, : max(num_pages.tolist(), default=0)].copy(),)
        self._parts.append(_HEAD.pack(_PLAN, plan.step, len(request), _check(columns)))
        if plan.effects:
            self._parts.append(pack_effects(plan.effects))

    def outcome(self, outcome: StepOutcome) -> None:
        """Take in the tokens that a step yielded."""
        token = outcome.token
        self._parts.append(_HEAD.pack(_OUTCOME, outcome.step, len(token), _check((token, outcome.eos))))

    def abandoned(self, step: int, effects: tuple[Effect, ...]) -> None:
        """Take in that a planned step never ran."""
        self._parts.append(_HEAD.pack(_ABANDONED, step, 0, 0))
        self.effects(effects)

    def close_step(self) -> None:
        """Keep the digest as it is after a step has been applied."""
        self._hash.update(b"".join(self._parts))
        self._parts.clear()
        self.step_digests += self._hash.digest()

    @property
    def hexdigest(self) -> str:
        """The hash of everything taken in so far."""
        self._hash.update(b"".join(self._parts))
        self._parts.clear()
        return self._hash.hexdigest()


def first_difference(a: bytes | bytearray, b: bytes | bytearray) -> int | None:
    """The index of the first completed step whose digests differ; None where one run is a prefix of the other."""
    for offset in range(0, min(len(a), len(b)), DIGEST_BYTES):
        if a[offset : offset + DIGEST_BYTES] != b[offset : offset + DIGEST_BYTES]:
            return offset // DIGEST_BYTES
    return None
