"""The bench on which relations are judged: the run as it is, played once, and what was found so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from invariants.findings import Findings
from sim.build import SetupError
from sim.deep.play import Checkpoint, play
from sim.deep.tape import Tape
from sim.deep.world import World
from sim.streams import stream
from sim.trace_hash import DIGEST_BYTES

MAX_BASE_PLANS: Final = 200_000
MAX_FINDINGS: Final = 4
"""Of one invariant in one pair of runs: the first ones say it all."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A second run, and what was changed for it, in words."""

    tape: Tape
    change: str


class Bench:
    """The base run and the findings; relations play their own second runs."""

    def __init__(self, world: World, base: Tape, findings: Findings, checkpoint: Checkpoint) -> None:
        self.world = world
        self.base = base
        self._findings = findings
        self._checkpoint = checkpoint
        self.runs = 1
        """Runs played so far."""

    def is_on(self, name: str) -> bool:
        """Whether an invariant is to be judged."""
        return name in self._findings.on

    def random(self, name: str) -> np.random.Generator:
        """The random stream of a relation: whom it drops, cancels or renumbers."""
        return stream(self.world.script.seed, f"deep {name}")

    def check_interrupt(self) -> None:
        """Raise what the checkpoint raises, after something that took long."""
        self._checkpoint()

    def play(self, world: World, change: str) -> Twin | None:
        """Play a changed world; None: core or backend cannot be built like that, so that there is nothing to judge."""
        self.runs += 1
        try:
            return Twin(play(world, 20 * len(self.base.plans) + 1000, self._checkpoint), change)
        except SetupError:
            return None

    def count(self, name: str, checked: int, nontrivial: int) -> None:
        """Count comparisons, and how many of them could have failed."""
        self._findings.counts[name].add(checked, nontrivial)

    def breach(
        self,
        name: str,
        message: str,
        *,
        step: int = -1,
        time_ns: int = 0,
        requests: Iterable[int] = (),
        pages: Iterable[int] = (),
        expected: object = "",
        found: object = "",
    ) -> None:
        """Record that an invariant does not hold."""
        self._findings.step, self._findings.time_ns = step, time_ns
        how = f"(again: kvproof run {self.world.script.name}.yaml --deep --set invariants.only=[{name}])"
        self._findings.breach(name, f"{message} {how}", requests=requests, pages=pages, expected=expected, found=found)

    # ---- what relations have in common

    def changed(self, **changes: Any) -> World:
        """The base world with other fields."""
        return replace(self.world, **{"keep_places": False, "keep_states": False, **changes})

    def same_tokens(self, name: str, twin: Twin, requests: Iterable[int] | None = None) -> int:
        """Compare the tokens and ends of requests (None: all) that both runs have; the number of tokens compared.

        Whom one of the runs cancelled is compared as far as both got; whom one refused is left out.
        """
        compared = 0
        base, other = self.base, twin.tape
        if other.crash is not None:
            self.breach(name, f"with {twin.change} the run breaks", step=len(other.plans) - 1, found=other.crash)
            return 0
        for request in sorted(base.tokens) if requests is None else requests:
            if request not in base.tokens or request not in other.tokens:
                continue
            compared += self._same_request(name, twin, request)
        return compared

    def _same_request(self, name: str, twin: Twin, request: int) -> int:
        mine, theirs = self.base.tokens[request], twin.tape.tokens[request]
        ends = self.base.ends.get(request, "unfinished"), twin.tape.ends.get(request, "unfinished")
        both = min(len(mine), len(theirs))
        at = next((i for i in range(both) if mine[i] != theirs[i]), None)
        if at is not None:
            self._other_token(name, twin, request, at)
        elif "cancelled" in ends:
            return both
        elif len(mine) != len(theirs) or ends[0] != ends[1]:
            step = twin.tape.token_steps[request][-1] if theirs else len(twin.tape.plans) - 1
            self.breach(
                name,
                f"request {request} ends otherwise with {twin.change}",
                step=step,
                requests=(request,),
                expected=f"{len(mine)} tokens, {ends[0]}",
                found=f"{len(theirs)} tokens, {ends[1]}",
            )
        return both

    def _other_token(self, name: str, twin: Twin, request: int, at: int) -> None:
        position = self.base.prompt_tokens[request] + at
        self.breach(
            name,
            f"request {request} yields another token at position {position} with {twin.change}",
            step=twin.tape.token_steps[request][at],
            requests=(request,),
            expected=self.base.tokens[request][at],
            found=twin.tape.tokens[request][at],
        )

    def same_steps(self, name: str, twin: Twin, first: Tape | None = None) -> int:
        """Compare the rolling hashes of a run and of `first` (None: the base run); the number of steps compared."""
        first, size = first or self.base, DIGEST_BYTES
        mine, theirs = first.digests, twin.tape.digests
        steps = range(0, min(len(mine), len(theirs)), size)
        parted = next((at // size for at in steps if mine[at : at + size] != theirs[at : at + size]), None)
        if parted is None and (len(mine), first.trace_hash) != (len(theirs), twin.tape.trace_hash):
            parted = len(steps)
        if parted is not None:
            at = slice(parted * size, (parted + 1) * size)
            self.breach(
                name,
                f"the run takes other steps with {twin.change}, from completed step {parted} on",
                step=parted,
                expected=mine[at].hex() or "no such step",
                found=twin.tape.crash or theirs[at].hex() or "no such step",
            )
        return len(steps)
