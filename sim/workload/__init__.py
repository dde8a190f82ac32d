"""Workloads: who asks for what and when, drawn from distributions or read from traces."""

from sim.workload.arrival import Arrival, Workload
from sim.workload.faults import concrete_faults
from sim.workload.generate import generate
from sim.workload.prompts import prompt_tokens
from sim.workload.readers import read_lengths, read_trace
from sim.workload.rows import TraceError
from sim.workload.writers import write_trace

__all__ = [
    "Arrival",
    "TraceError",
    "Workload",
    "concrete_faults",
    "generate",
    "prompt_tokens",
    "read_lengths",
    "read_trace",
    "write_trace",
]
