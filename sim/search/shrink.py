"""Makes a failing scenario as small as it gets while the same statement breaks first.

    operations (requests, cancels, failed steps) -> their arguments -> sizes and policy of the core -> operations ...
    where all of that changes nothing: several changes at once that take one operation away (bold.py)
    where they do not either: operations again, but requests after those that go keep their ids

until a whole round changes nothing: the result is 1-minimal, that is, no single operation can be left out and no single
number made smaller (where the device compiles, sizes stay: a program for each would take seconds). A candidate counts
only where the first violation has the same id (a crash: where the same class was raised; a hang: where the same call
did not return), so that a shrink never slips from one bug to another (Zeller and Hildebrandt, "Simplifying and
Isolating Failure-Inducing Input", IEEE TSE 2002).

Every candidate that hangs costs the bound, so candidates get a shorter one; the result must hang for the whole bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from pydantic import ValidationError

from sim.build import SetupError
from sim.hang import Patience
from sim.mutants import find_mutant, planted
from sim.part_calls import HANG
from sim.scenario import Scenario
from sim.scenario.models import InvariantSettings
from sim.search.bold import Data, bold_moves, first_id_of, leave_out, operations_of, requests_of, step_of
from sim.search.probe import CoreMaker, Finding, probe

Probe = Callable[[Scenario], Finding]

DEVICE_KEYS: Final = frozenset({"layers", "kv_heads", "head_dim", "dtype"})
"""Keys of the cache that mean nothing without a device, and that a compiler's programs are made for."""

SIMPLEST: Final[tuple[tuple[tuple[str, str], tuple[Any, ...]], ...]] = (
    (("core", "lag"), (0, 1)),
    (("core", "mix"), ("mixed",)),
    (("core", "max_decode_wait"), (4,)),
    (("core", "max_prefill_wait"), (4,)),
    (("cache", "layers"), (1, 2)),
    (("cache", "kv_heads"), (1, 2)),
    (("cache", "dtype"), ("float32",)),
    (("invariants", "full_every"), (256,)),
)
"""Keys with the values to try, the simplest first."""

USUAL_HANG_SECONDS: Final = InvariantSettings(stop="first").hang_seconds

FIRST_ID: Final = ("workload", "first_request_id")

SIZES: Final = (
    ("core", "batch_size"),
    ("core", "prefill_chunk"),
    ("cache", "page_size"),
    ("cache", "num_pages"),
    ("cache", "max_sequence_length"),
    ("cache", "head_dim"),
)
"""Numbers to make smaller."""


class NothingToShrinkError(Exception):
    """The scenario breaks nothing."""


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest scenario found."""

    scenario: Scenario
    finding: Finding
    tried: int
    """Scenarios run on the way."""
    seconds: float
    """Wall time that it took."""
    kept: tuple[int, ...]
    """Which requests of the scenario that came in are left."""

    @property
    def num_requests(self) -> int:
        """Requests that are left."""
        return len(requests_of(self.scenario.model_dump(mode="python", by_alias=True)))

    @property
    def num_operations(self) -> int:
        """Requests, cancels and failed steps that are left."""
        return self.num_requests + len(self.scenario.faults)


def shrink(
    scenario: Scenario,
    *,
    core: CoreMaker | None = None,
    wanted: str | None = None,
    budget: int = 5000,
    progress: Callable[[int, int], None] = lambda tried, operations: None,
    is_planted: bool = False,
) -> Shrunk:
    """The smallest scenario in which the same statement breaks first; `scenario` is spelled out (`concrete`).

    `wanted` is the `pin` of what must break first (None: whatever does), `budget` bounds the runs, `is_planted` is as
    in `probe`. NothingToShrinkError: the scenario breaks nothing, or something else.
    """
    start = time.monotonic()
    with planted(find_mutant(scenario.plant) if scenario.plant and not is_planted else None):
        first = probe(scenario, core=core, is_planted=True)
        if not first.id:
            raise NothingToShrinkError(f"{scenario.name}: every invariant holds, so there is nothing to shrink")
        if wanted is not None and first.pin != wanted:
            raise NothingToShrinkError(
                f"{scenario.name}: {wanted} broke first, but with its requests placed by step it is {first.pin}"
            )
        search = _searched(scenario, first, core, budget, progress)
    tried, seconds = budget - search.left, time.monotonic() - start
    return Shrunk(search.best, search.finding, tried, seconds, tuple(search.kept))


def _searched(
    scenario: Scenario, first: Finding, core: CoreMaker | None, budget: int, progress: Callable[[int, int], None]
) -> _Search:
    """The search at its end; where a shorter bound took something slow for a hang, one with the whole bound."""
    patience = Patience(scenario.invariants.hang_seconds)
    if first.id == HANG:
        patience.hung()
    run = partial(probe, core=core, is_planted=True, hang_seconds=patience.seconds)
    search = _Search(scenario, first, run, budget, progress)
    search.go()
    if first.id != HANG:
        return search
    whole = partial(probe, core=core, is_planted=True)
    confirmed = whole(search.best)
    if confirmed.pin == first.pin:
        search.finding = confirmed
        return search
    search = _Search(scenario, first, whole, budget, progress)
    search.go()
    return search


class _Search:
    """The best scenario so far, and the passes that make it smaller."""

    def __init__(
        self, scenario: Scenario, finding: Finding, run: Probe, budget: int, progress: Callable[[int, int], None]
    ) -> None:
        self.best = scenario
        self.finding: Finding = finding
        self.left = budget
        self._run, self._budget, self._progress = run, budget, progress
        self._data: Data = scenario.model_dump(mode="python", by_alias=True)
        self._data["workload"]["arrivals"]["requests"] = list(requests_of(self._data))
        self._data["faults"] = list(self._data["faults"])
        self._seen: set[str] = set()
        self._compiles = scenario.backend.kind not in {"none", "numpy"}
        self.kept = list(range(len(requests_of(self._data))))

    def go(self) -> None:
        """Make it as small as it gets."""
        # Most looks at the core's whole state go first, where it breaks without: all that follows is quicker.
        self._set_to_simplest(("invariants", "full_every"), (256,))
        if self.finding.id != HANG:
            self._set_to_simplest(("invariants", "hang_seconds"), (USUAL_HANG_SECONDS,))
        while self.round() and self.left > 0:
            pass

    def round(self) -> bool:
        """All passes once; whether any of them made it smaller."""
        changed = self._cut_tail()
        changed |= self._drop_operations()
        changed |= self._shrink_arguments()
        changed |= self._simplify()
        return changed or self._be_bold() or self._drop_operations(keep_ids=True)

    def _try(self, data: Data) -> bool:
        """Take `data` where it is a scenario in which the same statement breaks first."""
        key = repr(data)
        if self.left <= 0 or key in self._seen:
            return False
        self._seen.add(key)
        try:
            candidate = Scenario.model_validate(data)
            self.left -= 1
            finding = self._run(candidate)
        except (ValidationError, SetupError):
            return False
        if finding.pin != self.finding.pin:
            return False
        self.best, self.finding, self._data = candidate, finding, data
        self._progress(self._budget - self.left, len(operations_of(data)))
        return True

    # ---- operations

    def _cut_tail(self) -> bool:
        """What comes after the violation cannot matter."""
        last = self.finding.step + 1
        data = self._data
        late = [at for at, operation in enumerate(operations_of(data)) if step_of(data, operation) > last]
        return bool(late) and self._try_without(late)

    def _drop_operations(self, *, keep_ids: bool = False) -> bool:
        """Leave out operations: halves first, then quarters, down to single ones."""
        changed = False
        size = max(1, len(operations_of(self._data)) // 2)
        while True:
            at = 0
            while at < (count := len(operations_of(self._data))) and self.left > 0:
                # From the end: an operation is more likely to matter to those after it.
                gone = list(range(max(0, count - at - size), count - at))
                if self._try_without(gone, keep_ids=keep_ids):
                    changed = True
                else:
                    at += size
            if size == 1 or self.left <= 0:
                return changed
            size //= 2

    def _try_without(self, gone: list[int], *, keep_ids: bool = False) -> bool:
        """`_try` without some operations; requests after those that go move up, or `keep_ids`: those before them."""
        data = deepcopy(self._data)
        first = first_id_of(data)
        if keep_ids:
            first += sum(kind == "request" for kind, _ in (operations_of(data)[at] for at in gone))
        kept = leave_out(data, gone, first_id=first)
        if not kept or not self._try(data):
            return False
        self.kept = [self.kept[at] for at in kept]
        return True

    def _be_bold(self) -> bool:
        """Moves that take an operation away together with something else, as long as there is one."""
        changed = False
        while self._first_bold_move():
            self._drop_operations()
            changed = True
        return changed

    def _first_bold_move(self) -> bool:
        for data, kept in bold_moves(self._data, sizes=not self._compiles):
            if self._try(data):
                self.kept = [self.kept[at] for at in kept]
                return True
        return False

    # ---- numbers

    def _shrink_arguments(self) -> bool:
        changed = False
        for number in range(len(requests_of(self._data))):
            for name, least in (("at_step", 0), ("prompt_tokens", 1), ("output_tokens", 1), ("eos_after", 1)):
                changed |= self._lower(("workload", "arrivals", "requests", number, name), least)
            changed |= self._no_eos(number)
        for number in range(len(self._data["faults"])):
            changed |= self._lower(("faults", number, "at_step"), 0)
        return changed

    def _no_eos(self, number: int) -> bool:
        """An end by max_tokens is simpler than one by EOS."""
        request = requests_of(self._data)[number]
        if request.get("eos_after") is None:
            return False
        data = deepcopy(self._data)
        requests_of(data)[number] = {**request, "eos_after": None, "output_tokens": request["eos_after"]}
        return self._try(data)

    def _simplify(self) -> bool:
        changed = self._lower(FIRST_ID, 0)
        kind = self._data["backend"]["kind"]
        for path, values in SIMPLEST:
            if kind == "numpy" or path[1] not in DEVICE_KEYS:
                changed |= self._set_to_simplest(path, values)
        for path in () if self._compiles else SIZES:
            if kind == "numpy" or path[1] not in DEVICE_KEYS:
                changed |= self._lower(path, 1)
        return changed

    def _set_to_simplest(self, path: tuple[str, str], values: tuple[Any, ...]) -> bool:
        """Set a key to the first of these values, the simplest first, that shows the same."""
        section, key = path
        for value in values:
            if self._data[section][key] == value:
                return False
            data = deepcopy(self._data)
            data[section][key] = value
            if self._try(data):
                return True
        return False

    def _lower(self, path: tuple[str | int, ...], least: int) -> bool:
        """Make one number smaller: the least first, then by halving the distance, then one by one."""
        changed = False
        value = _at(self._data, path)
        if value is None:
            return False
        low = least
        while low < value and self.left > 0:
            data = deepcopy(self._data)
            if path == FIRST_ID:
                leave_out(data, [], first_id=low)  # with what names a request
            else:
                _set(data, path, low)
            if self._try(data):
                value, low, changed = low, least, True
            else:
                low = low + max(1, (value - low) // 2)
        return changed


def _at(data: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def _set(data: Any, path: tuple[str | int, ...], value: Any) -> None:
    _at(data, path[:-1])[path[-1]] = value
