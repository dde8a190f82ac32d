"""The benchmark of devices: sections of rows, each measured beside a yardstick of the same run and held to a target.

A section is a function (seconds, tell) -> rows, entered in SECTIONS; what it needs of JAX it imports itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

Tell = Callable[[str], None]

MAX_RATIO: Final = {
    ("heads_first", "decode"): 6.0,
    ("heads_first", "prefill"): 3.0,
    ("pages_first", "decode"): 4.0,
    ("pages_first", "prefill"): 1.5,
}
"""What a write may cost, in memcpys of the bytes that it writes."""
DTYPES: Final = ("bfloat16", "float32", "float16", "float8_e4m3fn", "float8_e5m2", "int8_scales")
ROWS: Final[tuple[tuple[Literal["decode", "prefill"], int], ...]] = (("decode", 64), ("decode", 128), ("prefill", 1024))
"""Slots of a decode; tokens of a chunk: 16 pages of 64."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside its target."""

    name: str
    figure: float
    unit: str
    target: float | None
    """At most this much; None: no target."""
    details: dict[str, float]

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else self.figure <= self.target

    def line(self) -> str:
        """For the console."""
        verdict = {True: "met", False: "MISSED", None: "no target"}[self.met]
        wanted = "" if self.target is None else f"at most {self.target:g}: "
        details = ", ".join(f"{name} {value:,.1f}" for name, value in self.details.items())
        return f"{self.name:38} {self.figure:6.2f} {self.unit} ({wanted}{verdict}); {details}"


def write_paths(seconds: float, tell: Tell) -> Iterator[Row]:
    """Decode and prefill writes of each layout and dtype on one CPU device, in memcpys, without the call."""
    from backends.jax_write_bench import WriteCase, measure_write

    for layout, (part, rows) in ((layout, one) for layout in ("heads_first", "pages_first") for one in ROWS):
        for dtype in DTYPES:
            name = f"{layout} {dtype} {part} {rows}"
            tell(name)
            times = measure_write(WriteCase(layout, dtype, part, rows), seconds)
            yield Row(
                name,
                max(0.0, times.write - times.call) / times.memcpy,
                "memcpys",
                MAX_RATIO[layout, part],
                {
                    "write_us": times.write * 1e6,
                    "call_us": times.call * 1e6,
                    "memcpy_us": times.memcpy * 1e6,
                    "MiB": times.num_bytes / 2**20,
                    "with_call": times.write / times.memcpy,
                },
            )


def decoder_steps(seconds: float, tell: Tell) -> Iterator[Row]:
    """Steps of the small decoder by batch size, however long its scenarios take; see `sim.bench_decoder`."""
    from sim import bench_decoder

    for found in bench_decoder.decoder_steps(tell=tell):
        details = {"echo_us": found.echo_ns / 1e3, "context_tokens": found.context_tokens, "steps": float(found.steps)}
        yield Row(f"tiny decode {found.batch}", found.decoder_ns / 1e3, "us a step", None, details)


SECTIONS: Final[dict[str, Callable[[float, Tell], Iterator[Row]]]] = {
    "write_paths": write_paths,
    "decoder_steps": decoder_steps,
}
"""Every section, in the order of the report."""


def bench_devices(names: list[str], seconds: float, tell: Tell) -> dict[str, list[Row]]:
    """Measure the named sections, `seconds` a row (compiling comes on top)."""
    return {name: list(SECTIONS[name](seconds, lambda text, name=name: tell(f"{name}: {text}"))) for name in names}


def as_json(found: dict[str, list[Row]]) -> dict[str, Any]:
    """One object: {section: [{name, figure, unit, target, met, details}]}."""
    return {name: [{**asdict(row), "met": row.met} for row in rows] for name, rows in found.items()}
