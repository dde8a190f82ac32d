"""What a host may do to a core at any time, and what must not matter to it: forks, looks, and requests sent twice."""

from __future__ import annotations

from invariants.auditor import Auditor
from paged_attention.plan import Effect, Request, StepPlan
from sim.cores.protocol import ServingCore
from sim.faults import FaultSchedule
from sim.part_calls import PartError, ask
from sim.record import Recorder
from sim.scenario.models import ResubmitFault


class Disturber:
    """Carries out the disturbances of a scenario, and lets the auditor judge what it sees on the way."""

    def __init__(self, faults: FaultSchedule, recorder: Recorder, auditor: Auditor | None) -> None:
        self._faults, self._recorder, self._auditor = faults, recorder, auditor
        self._requests: dict[int, Request] = {}
        """Those that will be submitted twice."""

    def submitted(self, request: Request) -> None:
        """A request is about to be submitted for the first time."""
        if request.id in self._faults.resubmitted:
            self._requests[request.id] = request

    def disturb(self, core: ServingCore, step: int, now_ns: int) -> tuple[ServingCore, frozenset[str]]:
        """Do what is due before `step` is planned: the core to go on with, and the kinds of what was due.

        PartError: the core raised.
        """
        due = self._faults.take_disturbances(step)
        for disturbance in due:
            if isinstance(disturbance, ResubmitFault):
                self._resubmit(core, disturbance.request, step, now_ns)
            elif disturbance.kind == "fork":
                core = _forked(core, step)
            elif disturbance.kind == "poll":
                self._look(core, step, now_ns)
        return core, frozenset(disturbance.kind for disturbance in due)

    def ask_again(self, core: ServingCore, step: int, now_ns: int) -> StepPlan | None:
        """Ask a core for a plan that has just said that it has none. PartError: it raised."""
        plan = ask(step, core.plan)
        if self._auditor is not None:
            self._auditor.asked_again(now_ns, plan)
        return plan

    def _look(self, core: ServingCore, step: int, now_ns: int) -> None:
        pending, snapshot = ask(step, core.pending), ask(step, core.snapshot)
        if self._auditor is not None:
            self._auditor.polled(now_ns, pending, snapshot)

    def _resubmit(self, core: ServingCore, number: int, step: int, now_ns: int) -> None:
        """A request that is gone might be taken in anew, so only an unfinished one is sent again."""
        request = self._requests.get(number)
        if request is None or not self._recorder.is_live(number):
            return
        effects: tuple[Effect, ...] = ()
        refusal = None
        try:
            effects = core.submit(request)
        except ValueError as error:
            refusal = str(error)
        except Exception as error:
            raise PartError(f"step {step}: submit({number}) once more: {type(error).__name__}: {error}") from error
        if self._auditor is not None:
            self._auditor.resubmitted(now_ns, request, effects, refusal)
        self._look(core, step, now_ns)


def _forked(core: ServingCore, step: int) -> ServingCore:
    """A fork to go on with; the original plans a step that never runs. A core that cannot fork goes on itself."""
    try:
        twin = core.fork()
    except NotImplementedError:
        return core
    except Exception as error:
        raise PartError(f"step {step}: fork() raised {type(error).__name__}: {error}") from error
    ask(step, core.plan)
    return twin
