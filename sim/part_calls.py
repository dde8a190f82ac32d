"""Calls of the parts under test, whose errors name the step and the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from sim.cores.checked import CheckedCore, CoreFormError, raised

A = TypeVarTuple("A")
T = TypeVar("T")


class PartError(Exception):
    """The core or the backend raised where its protocol does not let it; the message says where and what."""


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
