"""Ctrl-C during a run: the first asks the run to end after its step, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupt:
    """While it is open, the first SIGINT only sets `asked`; `check` raises for it.

    A KeyboardInterrupt raised wherever the signal arrives is lost where that is a callback of JAX. Nothing changes
    outside the main thread, or where somebody else handles or ignores the signal.
    """

    def __init__(self) -> None:
        self.asked = False
        """A SIGINT has arrived."""
        self._raised = False
        self._installed = False

    def __enter__(self) -> Interrupt:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._arrived)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """KeyboardInterrupt: a SIGINT arrived for which none was raised."""
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if error is None and not self._raised:
            self.check()

    def check(self) -> None:
        """KeyboardInterrupt: a SIGINT has arrived."""
        if self.asked:
            self._raised = True
            raise KeyboardInterrupt

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self._raised = True
            raise KeyboardInterrupt
        self.asked = True
