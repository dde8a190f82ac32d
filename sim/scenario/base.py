"""What every section of a scenario has in common: strict, frozen, and no unknown keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_COUNT = 2**31 - 1
"""Ids, counts and positions are int32 everywhere."""


class Section(BaseModel):
    """A part of a scenario; equal sections have equal fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        defer_build=True,
    )


def _whole(value: Any) -> Any:
    """YAML reads 85e6 as a float; a float without a fraction is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Comes after the bounds of an Annotated int, so that they reach the JSON Schema."""

Count = Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE]
"""At least 1."""

Index = Annotated[int, Field(ge=0, le=MAX_COUNT), WHOLE]
"""At least 0."""

MAX_DURATION_NS = 10**15
"""About 11 days: no duration of a single thing is longer, so that thousands of them still add up within int64."""

Nanoseconds = Annotated[int, Field(ge=0, le=MAX_DURATION_NS), WHOLE]
"""A duration in simulated ns."""

Seconds = Annotated[float, Field(ge=0.0, le=1e9)]
"""Simulated time in s."""

Rate = Annotated[float, Field(gt=0.0, le=1e9)]
"""Requests per second."""


def seconds_to_ns(seconds: float) -> int:
    """The nearest whole nanosecond."""
    return round(seconds * 1e9)
