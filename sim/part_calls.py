"""Calls of the parts under test, whose errors name the step and the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

A = TypeVarTuple("A")
T = TypeVar("T")


class PartError(Exception):
    """The core or the backend raised where its protocol does not let it; the message says where and what."""


def ask(step: int, call: Callable[[*A], T], *args: *A) -> T:
    """Call a part under test. PartError: it raised."""
    try:
        return call(*args)
    except Exception as error:
        name = getattr(call, "__qualname__", repr(call))
        raise PartError(f"step {step}: {name}() raised {type(error).__name__}: {error}") from error
