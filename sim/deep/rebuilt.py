"""D5 and S14: the core alone, asked again what it was asked in the run."""

from __future__ import annotations

from typing import Final
from zlib import crc32

from paged_attention.plan import StepPlan
from sim.build import build_core
from sim.cores.protocol import ServingCore
from sim.deep.bench import Bench
from sim.deep.tape import Call, plan_check, state_digests

PURITY_SAMPLES: Final = 64
"""Plans of a run whose purity is tried, evenly spread."""


def replayed(bench: Bench) -> None:
    """D5: a fresh core that is told what the first was told makes the same plans and has the same states."""
    core, plans = build_core(bench.world.scenario, bench.world.mutant), 0
    for call in bench.base.calls:
        try:
            planned = _repeat(core, call)
        except Exception as error:  # the core is under test: it may raise anything
            bench.breach(
                "D5",
                f"the core rebuilt by replay raises {type(error).__name__} where the first did not: {error}",
                step=plans - 1,
                expected=f"{call[0]} as before",
                found=error,
            )
            return
        if call[0] == "plan":
            plans += planned is not None
            if not _same_state(bench, core, call, planned, plans):
                return


def purity(bench: Bench) -> None:
    """S14: before some of its plans, forks of the core plan."""
    core, plans = build_core(bench.world.scenario, bench.world.mutant), 0
    every = max(1, len(bench.base.plans) // PURITY_SAMPLES)
    for call in bench.base.calls:
        try:
            if call[0] == "plan" and plans % every == 0:
                _judge_purity(bench, core, plans)
            plans += _repeat(core, call) is not None
        except Exception as error:  # the core is under test: it may raise anything
            bench.breach(
                "S14",
                f"after planning in forks the core raises {type(error).__name__}: {error}",
                step=plans - 1,
                expected=f"{call[0]} as in the run",
                found=error,
            )
            return


def _repeat(core: ServingCore, call: Call) -> StepPlan | None:
    kind, what = call
    if kind == "submit":
        try:
            core.submit(what)
        except ValueError:
            return None  # It was refused in the run, too: the next plans would show it if not.
    elif kind == "cancel":
        core.cancel(what)
    elif kind == "apply":
        core.apply(what)
    elif kind == "abandon":
        core.abandon(what)
    else:
        return core.plan()
    return None


def _same_state(bench: Bench, core: ServingCore, call: Call, planned: StepPlan | None, plans: int) -> bool:
    """D5: the plan is the recorded one, and so is the state, where it was recorded."""
    check = None if planned is None else plan_check(planned, None)
    bench.count("D5", 1, 1)
    if check != call[1]:
        bench.breach(
            "D5",
            f"the core rebuilt by replay makes another plan after {plans} plans",
            step=plans - 1,
            expected=_shown(call[1]),
            found=_shown(check),
        )
        return False
    recorded = bench.base.states.get(plans) if planned is not None else None
    if recorded is None:
        return True
    found = state_digests(core.snapshot())
    bench.count("D5", len(found), len(found))
    wrong = [part for part, digest in recorded.items() if found[part] != digest]
    if wrong:
        bench.breach(
            "D5",
            f"the state rebuilt by replay differs after {plans} plans in: {', '.join(wrong)}",
            step=plans - 1,
            expected=f"{wrong[0]} {recorded[wrong[0]]}",
            found=f"{wrong[0]} {found[wrong[0]]}",
        )
    return not wrong


def _judge_purity(bench: Bench, core: ServingCore, plans: int) -> None:
    """S14: two twins of the core make the same plan; one takes it back and makes it again; the core notices nothing."""
    before = state_digests(core.snapshot())
    try:
        one, other = core.fork(), core.fork()
    except NotImplementedError:
        return
    first, second = one.plan(), other.plan()
    checks = [None if plan is None else plan_check(plan, None) for plan in (first, second)]
    bench.count("S14", 1, first is not None)
    _impure(bench, plans, "two forks of one state plan differently", _shown(checks[0]), _shown(checks[1]))
    if first is not None and not any(effect.kind == "preempted" for effect in first.effects):
        # Whoever was preempted may be admitted again at once, so that the next plan is legally another one.
        one.abandon(first.step)
        again = one.plan()
        bench.count("S14", 1, 1)
        found = "no plan" if again is None else _rows(again)
        _impure(bench, plans, "a plan that was taken back is not made again", _rows(first), found)
    after = state_digests(core.snapshot())
    bench.count("S14", 1, 1)
    _impure(bench, plans, "what is planned in a fork changes the core itself", before, after)


def _impure(bench: Bench, plans: int, message: str, expected: object, found: object) -> None:
    if expected != found:
        bench.breach("S14", f"{message}, after {plans} plans", step=plans - 1, expected=expected, found=found)


def _rows(plan: StepPlan) -> str:
    """The rows of a plan, with a check sum of their tokens and pages; effects and step are its own."""
    columns = (plan.request, plan.admission, plan.slot, plan.start, plan.count, plan.samples, plan.num_pages)
    rows = [tuple(column.item(row) for column in columns) for row in range(plan.num_rows)]
    return f"{rows} {crc32(plan.table.tobytes(), crc32(plan.tokens.tobytes())):08x}"


def _shown(check: int | None) -> str:
    return "no plan" if check is None else f"plan {check:08x}"
