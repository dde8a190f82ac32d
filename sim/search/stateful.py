"""State machines for Hypothesis: point them at a core or a page manager of your own.

    TestMyCore = kvproof_stateful(my_module.build)      # a unittest.TestCase that pytest collects

Hypothesis finds the shortest rows of calls; its example database is a cache, not a corpus: what must be kept is a
scenario file (`kvproof fuzz`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from hypothesis import HealthCheck, Phase, reject, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from paged_attention.plan import DUMMY_PAGE
from sim.cores.checked import CheckedFactory
from sim.hang import HangWatch, Patience
from sim.part_calls import HANG
from sim.search.small_world import Action, CoreFactory, Scope, World, judge_end, move, new_world

MAX_DRAIN_STEPS = 2000

PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
"""No explanation: it would name lines of the judge, not of the core."""


class BrokenError(AssertionError):
    """An invariant broke, or the core raised; the message is the judge's."""


def kvproof_stateful(
    core_factory: CoreFactory, *, max_examples: int = 100, steps: int = 40, hang_seconds: float = 2.0
) -> type[Any]:
    """A TestCase that submits, plans, completes late, fails and cancels at will, and judges every step.

    `core_factory` takes a `CoreConfig` and makes a `ServingCore`. What it refuses with a ValueError is tried with lag 0
    in its place; sizes that it refuses then, too, are skipped. A call that takes longer than `hang_seconds` hangs; once
    one was seen, a shorter bound does, so that Hypothesis has time to find the shortest row. 0: none hangs.
    """

    class Machine(CoreMachine):
        factory = staticmethod(CheckedFactory(core_factory, getattr(core_factory, "__name__", "the core")))
        patience = Patience(hang_seconds)

    Machine.TestCase.settings = settings(
        max_examples=max_examples,
        stateful_step_count=steps,
        deadline=None,
        report_multiple_bugs=False,
        phases=PHASES,
        suppress_health_check=[HealthCheck.filter_too_much],  # a core may take few sizes
    )
    return Machine.TestCase


class CoreMachine(RuleBasedStateMachine):
    """A core and its judge; subclasses say how a core is made."""

    factory: Callable[..., Any]
    patience: Patience
    world: World
    scope: Scope

    @initialize(
        pages=st.integers(2, 8),
        page_size=st.integers(1, 4),
        slots=st.integers(1, 3),
        chunk=st.integers(1, 6),
        lag=st.integers(0, 2),
        mix=st.sampled_from(("mixed", "prefill_first", "decode_first")),
    )
    def build(self, pages: int, page_size: int, slots: int, chunk: int, lag: int, mix: str) -> None:
        """A core of any small size."""
        longest = max(2, pages * page_size)
        self.scope = Scope(
            requests=1000,
            pages=pages,
            page_size=page_size,
            slots=slots,
            max_prompt=(longest + 1) // 2,
            max_output=longest // 2,
            chunk=chunk,
            lag=lag,
            mix=mix,
        )
        try:
            self.world = new_world(self.scope, self.factory)
        except ValueError:
            self.scope = replace(self.scope, lag=0)
            try:
                self.world = new_world(self.scope, self.factory)
            except ValueError:
                reject()

    @rule(prompt=st.integers(1, 12), output=st.integers(1, 8))
    def submit(self, prompt: int, output: int) -> None:
        """Anybody may ask for anything; what can never fit is refused."""
        self._move(Action("submit", (prompt, output)))

    @precondition(lambda self: bool(self.world.asked))
    @rule(nth=st.integers(0, 5))
    def cancel(self, nth: int) -> None:
        """A user gives up: the n-th of those that wait for an answer."""
        asked = sorted(self.world.asked)
        self._move(Action("cancel", (asked[nth % len(asked)],)))

    @precondition(lambda self: len(self.world.flights) <= self.scope.lag)
    @rule(eos=st.sets(st.integers(0, 3), max_size=2))
    def plan(self, eos: set[int]) -> None:
        """The next step; who yields an EOS is drawn."""
        self._move(Action("plan", tuple(sorted(eos))))

    @precondition(lambda self: bool(self.world.asked) and len(self.world.flights) <= self.scope.lag)
    @rule()
    def fail(self) -> None:
        """A planned step that never runs."""
        self._move(Action("fail"))

    @precondition(lambda self: bool(self.world.flights))
    @rule()
    def complete(self) -> None:
        """The oldest step's outcome reaches the host."""
        self._move(Action("apply"))

    def teardown(self) -> None:
        """Chaos is over: everybody must finish, and everything must be back."""
        if not hasattr(self, "world") or self.world.crash or self.world.violations:
            return
        for _ in range(MAX_DRAIN_STEPS):
            if not self.world.asked and not self.world.flights:
                break
            if len(self.world.flights) <= self.scope.lag:
                self._move(Action("plan"))
            if self.world.flights:
                self._move(Action("apply"))
        else:
            raise BrokenError(f"not finished after {MAX_DRAIN_STEPS} steps: {dict(self.world.core.pending())}")
        with HangWatch(self.patience.seconds):
            judge_end(self.world)
        self._check()

    def _move(self, action: Action) -> None:
        with HangWatch(self.patience.seconds):
            move(self.world, action, all_eos=False)
        self._check()

    def _check(self) -> None:
        if self.world.crash_id == HANG:
            self.patience.hung()
        if self.world.crash:
            raise BrokenError(self.world.crash)
        if self.world.violations:
            raise BrokenError("\n".join(map(str, self.world.violations)))


class PageManager(Protocol):
    """What the page manager machine calls."""

    def alloc_hbm_pages(self, n: int) -> list[int]:
        """Exactly n pages, or none."""
        ...

    def free_hbm_pages(self, pages: list[int]) -> None:
        """Give pages back. ValueError: not owned, twice, or out of range."""
        ...


def page_manager_stateful(make: Callable[[int], PageManager], *, max_examples: int = 100, steps: int = 50) -> type[Any]:
    """A TestCase for a page manager; `make` takes the number of pages, the dummy included."""

    class Machine(PageManagerMachine):
        factory = staticmethod(make)

    Machine.TestCase.settings = settings(
        max_examples=max_examples, stateful_step_count=steps, deadline=None, report_multiple_bugs=False
    )
    return Machine.TestCase


class PageManagerMachine(RuleBasedStateMachine):
    """A page manager beside the obvious model: who owns which page."""

    factory: Callable[[int], PageManager]
    manager: PageManager
    num_pages: int
    owned: list[int]

    @initialize(num_pages=st.integers(2, 12))
    def build(self, num_pages: int) -> None:
        """A pool of any small size."""
        self.num_pages, self.owned = num_pages, []
        self.manager = self.factory(num_pages)

    @rule(n=st.integers(0, 6))
    def allocate(self, n: int) -> None:
        """Exactly n new pages, or none where fewer are free."""
        pages = self.manager.alloc_hbm_pages(n)
        room = self.num_pages - 1 - len(self.owned)
        if len(pages) != (n if n <= room else 0):
            raise BrokenError(f"asked for {n} pages while {room} were free, got {pages}")
        if len(set(pages)) != len(pages) or set(pages) & {*self.owned, DUMMY_PAGE}:
            raise BrokenError(f"got {pages} while {self.owned} were handed out")
        if any(not 0 < page < self.num_pages for page in pages):
            raise BrokenError(f"got {pages} from a pool of pages 1..{self.num_pages - 1}")
        self.owned += pages

    @precondition(lambda self: bool(self.owned))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """Owned pages go back, in any order."""
        pages = data.draw(st.lists(st.sampled_from(self.owned), min_size=1, unique=True))
        self.manager.free_hbm_pages(pages)
        self.owned = [page for page in self.owned if page not in pages]

    @rule(page=st.integers(-2, 15), twice=st.booleans())
    def free_what_is_not_owned(self, page: int, twice: bool) -> None:
        """A page that nobody owns, that is out of range, or that is named twice is refused; nothing changes."""
        if page == DUMMY_PAGE or (page in self.owned and not twice):
            return
        try:
            self.manager.free_hbm_pages([page, page] if page in self.owned else [page])
        except ValueError:
            return
        raise BrokenError(f"freeing page {page} was not refused, while {self.owned} were handed out")
