"""Calls of the parts under test, whose errors name the step and the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

from sim.cores.checked import CheckedCore, CoreFormError, raised
from sim.hang import HangError

A = TypeVarTuple("A")
T = TypeVar("T")


CRASH: Final = "crash"
"""Stands for an invariant's id where the core or the backend raised."""
HANG: Final = "hang"
"""Stands for an invariant's id where a call of the core did not return."""


class PartError(Exception):
    """The core or the backend raised where its protocol does not let it, or a call of the core did not return.

    The message says where and what.
    """

    @property
    def id(self) -> str:
        """HANG or CRASH."""
        return HANG if isinstance(self.__cause__, HangError) else CRASH

    @property
    def cause(self) -> str:
        """Of a crash the class of what was raised, of a hang the call that did not return."""
        error = self.__cause__ or self
        return error.call if isinstance(error, HangError) else type(error).__name__


def ask(step: int, call: Callable[[*A], T], *args: *A) -> T:
    """Call a part under test. PartError: it raised."""
    try:
        return call(*args)
    except Exception as error:
        raise part_error(step, call, error) from error


def part_error(step: int, call: Callable[..., object], error: Exception) -> PartError:
    """What `call` raised at this step, in words."""
    if isinstance(error, CoreFormError):
        return PartError(f"step {step}: {error}")
    part = getattr(call, "__self__", None)
    name = getattr(call, "__qualname__", repr(call))
    if isinstance(part, CheckedCore):
        name = f"{type(part.core).__name__}.{getattr(call, '__name__', call)}"
    return PartError(f"step {step}: {name}() raised {raised(error, part)}")
