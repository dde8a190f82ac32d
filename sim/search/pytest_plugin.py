"""The pytest plugin `kvproof`: fuzzes a core of your own.

    pytest -p kvproof --kvproof-core my.module:build

adds two tests: the state machine, and whole scenarios out of byte tapes. What breaks is shown as the shortest row of
calls, and as the smallest scenario.
"""

from __future__ import annotations

from typing import Any, cast

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this plugin."""
    group = parser.getgroup("kvproof")
    group.addoption("--kvproof-core", metavar="MODULE:FUNCTION", help="Fuzz the core that this function makes.")
    group.addoption(
        "--kvproof-hang-seconds",
        type=float,
        default=2.0,
        metavar="N",
        help="A call of the core that takes longer hangs [2]; 0: none does.",
    )
    group.addoption("--kvproof-examples", type=int, default=100, metavar="N", help="Examples for each test [100].")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the tests of the core that was named."""
    name = config.getoption("--kvproof-core")
    if name:
        for kind in ("stateful", "scenarios"):
            item: Any = CoreTest.from_parent(session, name=f"kvproof-{kind}[{name}]", kind=kind, core=str(name))
            items.append(item)


class CoreTest(pytest.Item):
    """One way of fuzzing the named core."""

    def __init__(self, *, kind: str, core: str, **rest: Any) -> None:
        super().__init__(**rest)
        self._kind, self._core = kind, core

    def runtest(self) -> None:
        """Fuzz. UsageError: the core cannot be loaded."""
        from sim.cores.registry import UnknownCoreError, core_factory

        try:
            factory = core_factory(self._core)
        except UnknownCoreError as error:
            raise pytest.UsageError(f"--kvproof-core: {error}") from None
        examples = cast("int", self.config.getoption("--kvproof-examples"))
        patience = cast("float", self.config.getoption("--kvproof-hang-seconds"))
        if self._kind == "stateful":
            from sim.search.stateful import kvproof_stateful

            kvproof_stateful(factory, max_examples=examples, hang_seconds=patience)("runTest").runTest()
        else:
            _whole_scenarios(self._core, examples, patience)

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """What broke and how to see it again; the way there only with --full-trace."""
        if self.config.getoption("fulltrace"):
            return super().repr_failure(excinfo, style)
        notes = "\n".join(getattr(excinfo.value, "__notes__", ()))
        return f"{excinfo.value}\n{notes}".rstrip()

    def reportinfo(self) -> tuple[str, None, str]:
        """Where the test stands in a report."""
        return self._core, None, self.name


def _whole_scenarios(core: str, examples: int, hang_seconds: float) -> None:
    """Whole scenarios out of byte tapes. BrokenError: one broke something; the message is the smallest that does."""
    from hypothesis import HealthCheck, Phase, given, reject, settings

    from sim.build import SetupError
    from sim.scenario import Scenario
    from sim.search.failure import failure_text
    from sim.search.probe import probe
    from sim.search.shrink import shrink
    from sim.search.stateful import BrokenError
    from sim.search.tape import scenarios

    broken: list[Scenario] = []

    @settings(
        max_examples=examples,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.reuse, Phase.generate),  # a scenario is shrunk as a scenario, not as bytes
        suppress_health_check=[HealthCheck.filter_too_much],  # a core may take few sizes
    )
    @given(scenarios())
    def every_scenario_holds(scenario: Scenario) -> None:
        for lag in (scenario.core.lag, 0):  # a core that plans nothing ahead refuses any other
            sizes = scenario.core.model_copy(update={"kind": core, "lag": lag})
            invariants = scenario.invariants.model_copy(update={"hang_seconds": hang_seconds})
            own = scenario.model_copy(update={"core": sizes, "invariants": invariants})
            try:
                finding = probe(own)
                break
            except SetupError:
                continue
        else:
            reject()
        if finding.id:
            broken.append(own)
            raise BrokenError(finding.message)

    try:
        every_scenario_holds()
    except BrokenError:
        text = failure_text(shrink(broken[-1]))
        raise BrokenError(
            f"save this as failure.yaml, and see it again: kvproof replay failure.yaml\n\n{text}"
        ) from None
