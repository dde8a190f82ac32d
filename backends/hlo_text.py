"""Reads optimised HLO text: which instructions make something as large as a whole page pool, and which communicate.

In place, as far as this text says, are updates of a slice or of scattered places, what only renames a value, and what
only calls other computations. Everything else whose result is as large as a pool has written a pool's worth of memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

ITEMSIZE: Final = {"pred": 1, "c64": 8, "c128": 16}
"""Bytes of the element types whose name does not end in its bits."""

COLLECTIVES: Final = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
    "send",
    "recv",
)

_RENAMES: Final = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "optimization-barrier",
    "add-dependency",
    "domain",
)
# What these call is judged by itself, be it on another core of the chip.
_CALLS: Final = ("while", "conditional", "call", "call-start", "call-done", "async-start", "async-update", "async-done")
_IN_PLACE: Final = frozenset((*_RENAMES, *_CALLS, "copy-done", "dynamic-update-slice", "scatter"))
_ARRAY: Final = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION: Final = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED: Final = re.compile(r"calls=%?([\w.-]+)")
_CYCLES: Final = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE: Final = 2**62
"""From here on, what stands in the place of an estimate is a negative number."""
_ALIAS: Final = re.compile(r"input_output_alias=\{ (.*?) \}, ")
_OP_NAME: Final = re.compile(r'op_name="([^"]*)"')


class Shape(NamedTuple):
    """An array's element type and the number of its elements."""

    dtype: str
    elements: int

    @property
    def num_bytes(self) -> int:
        """Bytes without padding; whole bytes also for types of less than one."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        return self.elements * (ITEMSIZE.get(self.dtype) or (max(1, int(bits[1]) // 8) if bits else 1))


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of its result; several where that is a tuple."""
    is_root: bool
    rest: str
    """Operands and attributes."""

    def __str__(self) -> str:
        where = _OP_NAME.search(self.rest)
        largest = max(self.shapes, key=lambda shape: shape.num_bytes, default=Shape("()", 0))
        source = f" from {where[1]}" if where else ""
        return f"{self.opcode} of {largest.elements:,} x {largest.dtype} ({self.name}{source})"


@dataclass(frozen=True, slots=True)
class HloText:
    """An optimised module: its computations by name, and those that are fused into one instruction of another."""

    computations: dict[str, list[Instruction]]
    fused: frozenset[str]
    aliased_outputs: frozenset[int]
    """Positions in the result whose memory is that of an argument."""

    @property
    def run(self) -> Iterator[Instruction]:
        """Every instruction that runs on its own, once each (also those in the body of a loop)."""
        for name, instructions in self.computations.items():
            if name not in self.fused:
                yield from instructions

    def cycles(self) -> int | None:
        """The compiler's estimates added up, a loop's body counted once; None: it gave none."""
        found = [int(cycles[1]) for each in self.run if (cycles := _CYCLES.search(each.rest))]
        known = [cycles for cycles in found if cycles < _NO_ESTIMATE]
        return sum(known) if known else None


def parse(text: str) -> HloText:
    """The instructions of an HLO module as `compiled.as_text()` prints it."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if line[:1] not in {" ", "}", ""} and line.endswith("{"):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
            current = computations.setdefault(name, [])
        elif match := _INSTRUCTION.match(line):
            root, name, result, opcode, rest = match.groups()
            current.append(Instruction(name, opcode, _shapes(result), root is not None, rest))
    fused = (
        _CALLED.search(each.rest)
        for instructions in computations.values()
        for each in instructions
        if each.opcode == "fusion"
    )
    alias = _ALIAS.search(text.split("\n", 1)[0])
    outputs = re.findall(r"\{(\d*)[^{}]*\}: \(", alias[1]) if alias else []
    return HloText(computations, frozenset(called[1] for called in fused if called), frozenset(map(_index, outputs)))


def whole_pool_copies(hlo: HloText, pools: Iterable[Shape]) -> list[Instruction]:
    """The instructions that write as much as a whole pool of these (per device), whatever they call it."""
    sizes = _PoolSizes(pools)
    return [each for each in hlo.run if sizes.any_of(_made(each)) and not _in_place(hlo, each, sizes)]


def collectives(hlo: HloText) -> list[Instruction]:
    """The instructions that exchange data with other devices; the start of a pair stands for both."""
    return [each for each in hlo.run if each.opcode.removesuffix("-start") in COLLECTIVES]


class _PoolSizes:
    def __init__(self, pools: Iterable[Shape]) -> None:
        self._pools = frozenset(pools)
        self._elements = {pool.elements for pool in self._pools}
        self._largest = {
            pool.dtype: max(other.elements for other in self._pools if other.dtype == pool.dtype)
            for pool in self._pools
        }

    def any_of(self, shapes: Sequence[Shape]) -> bool:
        return any(
            shape.elements in self._elements or shape.elements >= self._largest.get(shape.dtype, math.inf)
            for shape in shapes
        )


def _made(each: Instruction) -> tuple[Shape, ...]:
    # (destination, source, context): the source is no news.
    return each.shapes[:1] if each.opcode == "copy-start" else each.shapes


def _in_place(hlo: HloText, each: Instruction, sizes: _PoolSizes) -> bool:
    """Whether the instruction changes its pool in place. A fusion does if all it holds of a pool's size does."""
    if each.opcode == "custom-call":
        return "output_to_operand_aliasing" in each.rest
    if each.opcode != "fusion":
        return each.opcode in _IN_PLACE
    called = _CALLED.search(each.rest)
    inside = hlo.computations.get(called[1], []) if called else []
    return bool(inside) and all(_in_place(hlo, one, sizes) for one in inside if one.is_root or sizes.any_of(one.shapes))


def _shapes(result: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, math.prod(int(size) for size in dims.split(",") if size)) for dtype, dims in _ARRAY.findall(result)
    )


def _index(output: str) -> int:
    return int(output or 0)
