"""K7: a place that belongs to the right token and holds it wrongly: which part of the round trip broke."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from invariants.owners import KINDS, Decoder
from paged_attention.plan import WrongPlace

NARROWER = {
    "float32": ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"),
    "float16": ("bfloat16", "float8_e4m3fn", "float8_e5m2"),
    "bfloat16": ("float16", "float8_e4m3fn", "float8_e5m2"),
}
"""Types that values may have passed through on their way into a cache of another one."""


def codec_fault(place: WrongPlace, token: np.void, decoder: Decoder) -> str:
    """How the words found follow from the token that belongs there (an entry of the shadow); "": they do not."""
    if not token["id"]:
        return ""
    size = decoder.head_dim
    found, expected = place.found[:size], place.expected[:size]
    if found == expected:
        return f"the right values under scale {_scale(place.found, size)}, not {_scale(place.expected, size)}"
    if not any(found):
        return ""
    for kind in range(len(KINDS)):
        for head in range(decoder.heads):
            if (KINDS[kind], head) != (place.kind, place.head) and found == decoder.stream(place, token, kind, head):
                return f"the {KINDS[kind]} words of head {head} of the same token"
    if sorted(found) == sorted(expected):
        return "its own words in another order of lanes"
    return _rounded(np.array(found), np.array(expected), decoder.dtypes)


def _scale(words: tuple[int, ...], size: int) -> float:
    return float(np.array(words[size], np.uint32).view(np.float32))


def _rounded(found: NDArray[np.int64], expected: NDArray[np.int64], dtypes: list[str]) -> str:
    """Whether the values found are those expected after a detour through a narrower type."""
    for dtype in dtypes:
        for narrow in NARROWER.get(dtype, ()):
            kind = _numpy(dtype)
            word = np.dtype(f"uint{8 * kind.itemsize}")
            held, right = found.astype(word).view(kind), expected.astype(word).view(kind)
            # What does not fit becomes infinite, as it would on the way.
            with np.errstate(over="ignore", invalid="ignore"):
                detour = right.astype(_numpy(narrow)).astype(kind)
            if detour.tobytes() == held.tobytes():
                return f"its own values rounded to {narrow}"
    if (
        dtypes == ["int8"]
        and (
            abs(found.astype(np.uint8).view(np.int8) - expected.astype(np.uint8).view(np.int8).astype(np.int16)) <= 1
        ).all()
    ):
        return "its own values, rounded another way"
    return ""


def _numpy(name: str) -> np.dtype[np.generic]:
    return np.dtype(getattr(ml_dtypes, name, name))
