"""K8, K10: as many cache arrays as at first, taken over from step to step, and each position on the right devices."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

from invariants.device import Device
from invariants.findings import Findings
from paged_attention.plan import CacheBuffers, ShardedArray

Box = tuple[tuple[int, int], ...]


class BufferJudge:
    """Compares the arrays that hold the cache with those of the first look."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.on = findings.any_on(("K8", "K10"))
        self.least: tuple[int, int] | None = None
        """The fewest arrays and bytes seen so far; what an earlier run of the process left may go at any time."""

    def judge(self, device: Device, *, shards: bool) -> None:
        """K8, and (`shards`) K10."""
        held = device.buffers()
        if held is None:
            return
        self._judge_buffers(held)
        if shards:
            for nth, array in enumerate(held.arrays):
                self._judge_shards(nth, array)

    def _judge_buffers(self, held: CacheBuffers) -> None:
        self.findings.counts["K8"].add(1, 0 if self.least is None else 1)
        found = held.num_buffers, held.num_bytes
        if held.num_not_donated:
            self.findings.breach(
                "K8",
                f"step {self.findings.step} left {held.num_not_donated} of the cache's arrays alive beside those that"
                " took their place: they were copied, not donated",
                expected="each array given to a step is gone afterwards",
                found=f"{held.num_not_donated} still alive",
            )
        least = self.least or found
        if found[0] > least[0] or found[1] > least[1]:
            self.findings.breach(
                "K8",
                f"{found[0]} arrays of the cache's shapes with {found[1]} bytes are alive, and {least[0]} with"
                f" {least[1]} were before",
                expected=f"{least[0]} arrays, {least[1]} bytes",
                found=f"{found[0]} arrays, {found[1]} bytes",
            )
        self.least = min(least[0], found[0]), min(least[1], found[1])

    def _judge_shards(self, nth: int, array: ShardedArray) -> None:
        self.findings.counts["K10"].add(1, 1 if len(array.boxes) > 1 else 0)
        wrong = shard_fault(array)
        if wrong:
            self.findings.breach(
                "K10",
                f"the shards of cache array {nth}, of shape {array.shape}, {wrong}",
                expected=f"each position on {array.num_copies} of {len(array.boxes)} devices",
                found=list(dict.fromkeys(array.boxes))[:4],
            )


def shard_fault(array: ShardedArray) -> str:
    """What is wrong with the boxes of an array; "": together they hold each position num_copies times."""
    copies = Counter(array.boxes)
    for box, count in copies.items():
        if len(box) != len(array.shape) or any(
            not 0 <= a < b <= n for (a, b), n in zip(box, array.shape, strict=False)
        ):
            return f"reach outside it: {box}"
        if count != array.num_copies:
            return f"hold {box} {count} times, not {array.num_copies}"
    for one, other in combinations(copies, 2):
        if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True)):
            return f"overlap: {one} and {other}"
    held = sum(math.prod(b - a for a, b in box) for box in copies)
    if held != math.prod(array.shape):
        return f"hold {held} of {math.prod(array.shape)} places"
    return ""
