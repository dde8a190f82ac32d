"""Notices a call of the core that does not return: an alarm that looks now and then at what the main thread is doing.

    every quarter of the bound: is the same call of a core on the stack as at the last look?
        no, or none at all    nothing happens: whatever the simulator, the judge or the device do takes its time
        four times in a row   HangError is raised inside the call

A call costs nothing for it, and no clock is read: what a run shows does not depend on when the alarm rang.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Final

from sim.cores.checked import METHODS, CheckedCore, place_of

LOOKS: Final = 4
"""How often, after the first time, a call must be found still running."""
SHORTER: Final = 20
LEAST_SECONDS: Final = 0.05


class HangError(BaseException):
    """A call of the core did not return in time; no `except Exception` of the core takes it for an error of its own."""

    def __init__(self, call: str, core: object, seconds: float) -> None:
        """`call` is the method of `core` that was running for `seconds`."""
        super().__init__(call, core, seconds)
        self.call, self.core, self.seconds = call, core, seconds

    def __str__(self) -> str:
        part: Any = self.core.core if isinstance(self.core, CheckedCore) else self.core
        where = place_of(self, self.core)
        return f"{type(part).__name__}.{self.call}() did not return within {self.seconds:g} s{where}"


class HangWatch:
    """While it is open, HangError is raised in a call of a core that runs for longer than `seconds`; 0: in none.

    It needs POSIX interval timers and works in the main thread alone; elsewhere, and where somebody else has an alarm
    running (SIGALRM), nothing changes. Only code that comes back to Python's interpreter can be ended: Python's own,
    and waiting for locks, queues, sleeps and files.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._before: Any = None
        self._installed = False
        self._call: FrameType | None = None
        self._looks = 0

    def __enter__(self) -> HangWatch:
        if self._seconds and can_watch() and _is_free():
            self._before = signal.signal(signal.SIGALRM, self._look)
            signal.setitimer(signal.ITIMER_REAL, self._seconds / LOOKS, self._seconds / LOOKS)
            self._installed = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._installed:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, self._before)
        self._call = None

    def _look(self, number: int, frame: FrameType | None) -> None:
        """An alarm has rung; a process that was stopped meanwhile has heard one in place of many."""
        call = _running_call(frame)
        if call is None or call is not self._call:
            self._call, self._looks = call, 0
            return
        self._looks += 1
        if self._looks >= LOOKS:
            raise HangError(call.f_code.co_name, _owner(call), self._seconds)


def can_watch() -> bool:
    """Whether this is a thread on a platform where a call that does not return is noticed."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


class Patience:
    """How long a search waits for a call: less once one was seen to hang, since most of what follows hangs as well."""

    def __init__(self, seconds: float) -> None:
        """`seconds` is the whole bound; 0: none."""
        self._whole = self.seconds = seconds

    def hung(self) -> None:
        """A call was seen to hang for the whole bound."""
        self.seconds = min(self._whole, max(LEAST_SECONDS, self._whole / SHORTER))


def _is_free() -> bool:
    """Whether nobody else waits for an alarm."""
    return signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0.0


def _running_call(frame: FrameType | None) -> FrameType | None:
    """The outermost frame of a method of a serving core; None: the interpreter is busy elsewhere."""
    found = None
    while frame is not None:
        if frame.f_code.co_name in METHODS and _is_core(_owner(frame)):
            found = frame
        frame = frame.f_back
    return found


def _owner(frame: FrameType) -> object:
    """The first argument of a method."""
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def _is_core(value: object) -> bool:
    return all(callable(getattr(type(value), method, None)) for method in METHODS)
