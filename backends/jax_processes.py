"""Makes this process one of several that share a mesh: each then sees the devices of all."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

from typing import Final

import jax

from backends.protocol import ProcessShare

MEET_SECONDS: Final = 60
"""How long processes wait for one another at the start; JAX then ends the process with SIGABRT."""


def join_processes(share: ProcessShare) -> None:
    """Meet the other processes; has to come before JAX shows its devices.

    Process 0 listens at the coordinator's address and at no other. Every process must then run the same steps in the
    same order: each executes its part of each program, and what is fetched lies on all of them.
    """
    jax.distributed.initialize(
        share.coordinator,
        share.count,
        share.index,
        initialization_timeout=MEET_SECONDS,
        coordinator_bind_address=share.coordinator,
    )
