"""O9, D1, D3, D4: the same run again, later, in other processes, on other backends, and watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from sim.deep.bench import Bench, Twin
from sim.deep.tape import Tape
from sim.deep.world import Fault
from sim.scenario import dump_scenario
from sim.scenario.models import BackendSettings

HASH_SEEDS: Final = ("1", "2")
SECONDS_NS: Final = 10**9


def later(bench: Bench) -> None:
    """O9: every arrival and every timed fault comes later by one odd number of nanoseconds."""
    world = bench.world
    if not world.is_open_loop:
        return  # Nobody comes at a time.
    by = int(bench.random("shift").integers(SECONDS_NS, 2 * SECONDS_NS)) | 1
    changed = bench.changed(
        arrivals=tuple(arrival._replace(time_ns=arrival.time_ns + by) for arrival in world.arrivals),
        faults=tuple(_later(fault, by) for fault in world.faults),
    )
    twin = bench.play(changed, f"all arrivals {by} ns later")
    if twin is None:
        return
    steps = bench.same_steps("O9", twin)
    bench.count("O9", steps, steps)
    if twin.tape.digests == bench.base.digests:
        _same_times(bench, twin, by)


def _later(fault: Fault, by: int) -> Fault:
    at_ns = fault.at_ns
    return fault if at_ns is None else fault.model_copy(update={"at_seconds": (at_ns + by) / 1e9})


def _same_times(bench: Bench, twin: Twin, by: int) -> None:
    """Times of steps and of requests, moved by the shift and by nothing else."""
    shifted = bench.base.step_times + by
    bench.count("O9", shifted.size, shifted.size)
    if shifted.shape == twin.tape.step_times.shape and not np.array_equal(shifted, twin.tape.step_times):
        at = int((shifted != twin.tape.step_times).any(axis=0).argmax())
        bench.breach(
            "O9",
            f"completed step {at} runs at another time with {twin.change}, the shift allowed for",
            step=at,
            time_ns=int(shifted[0, at]),
            expected=f"{shifted[0, at]} .. {shifted[1, at]} ns",
            found=f"{twin.tape.step_times[0, at]} .. {twin.tape.step_times[1, at]} ns",
        )
    for request, mine in bench.base.times.items():
        for name in ("arrival_ns", "admitted_ns", "first_token_ns", "finish_ns"):
            before, after = mine[name], twin.tape.times[request][name]
            expected = before if before is None or before < 0 else before + by
            bench.count("O9", 1, 1)
            if after != expected:
                bench.breach(
                    "O9",
                    f"{name} of request {request} is not shifted with {twin.change}",
                    time_ns=expected or 0,
                    requests=(request,),
                    expected=expected,
                    found=after,
                )


def two_processes(bench: Bench) -> None:
    """D1: two processes with different hash seeds take the same steps, and both the steps of this one."""
    tapes = _in_processes(bench)
    bench.runs += len(tapes)
    pairs = zip(tapes, HASH_SEEDS, strict=True)
    one, other = (Twin(tape, f"PYTHONHASHSEED={seed} in a process of its own") for tape, seed in pairs)
    steps = bench.same_steps("D1", other, one.tape)
    if one.tape.digests == other.tape.digests:
        # The hash seed of this process is anybody's guess, and with it the step at which it would part from the others.
        steps += bench.same_steps("D1", one)
    bench.count("D1", steps, steps)


def _in_processes(bench: Bench) -> list[Tape]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        dump_scenario(bench.world.script, folder / "scenario.yaml")
        children = [_start(folder / "scenario.yaml", seed, stack) for seed in HASH_SEEDS]
        tapes = [_tape_of(child) for child in children]
    # A Ctrl-C ends the children, too, and that is no finding.
    bench.check_interrupt()
    return tapes


def _start(scenario: Path, hash_seed: str, stack: ExitStack) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", "sim.deep.process", str(scenario)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    stack.enter_context(child)
    # Whatever ends this run early ends its children: the first to leave is the last that came in.
    stack.callback(child.kill)
    return child


def _tape_of(child: subprocess.Popen[str]) -> Tape:
    output, errors = child.communicate()
    if child.returncode:
        last = errors.strip().splitlines()[-1:]
        return Tape(crash=f"the process ended with status {child.returncode}: {''.join(last)}")
    said = json.loads(output)
    return Tape(digests=bytes.fromhex(said["digests"]), trace_hash=said["trace_hash"], crash=said["crash"])


def other_backends(bench: Bench) -> None:
    """D3: planning alone and the slow oracle plan, yield and store what the scenario's backend does."""
    world, base = bench.world, bench.base
    mine = world.scenario.backend.kind
    kinds = [kind for kind in ("none", "numpy") if kind != mine]
    if world.scenario.model.kind not in {"echo", "reader"}:
        kinds = [kind for kind in kinds if kind != "none"]  # Only scripted tokens are known without a cache.
    for kind in kinds:
        scenario = world.scenario.model_copy(update={"backend": BackendSettings(kind=kind)})
        twin = bench.play(bench.changed(scenario=scenario), f"the backend {kind} in place of {mine}")
        if twin is None:
            continue
        bench.same_tokens("D3", twin)
        steps = bench.same_steps("D3", twin)
        bench.count("D3", steps, steps)
        both = base.cache_hash is not None and twin.tape.cache_hash is not None
        bench.count("D3", both, both)
        if both and base.cache_hash != twin.tape.cache_hash:
            bench.breach(
                "D3",
                f"the cache holds other bits at the end with {twin.change}",
                step=len(base.plans) - 1,
                expected=base.cache_hash,
                found=twin.tape.cache_hash,
            )


def watched(bench: Bench) -> None:
    """D4: auditor, event log and plan log look on, and the run is the same run."""
    twin = bench.play(bench.changed(observed=True), "auditor, event log and plan log looking on")
    if twin is not None:
        steps = bench.same_steps("D4", twin)
        bench.count("D4", steps, steps)
