"""Named random streams: one generator per concern, so that a draw more in one shifts no draw in another."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, name: str) -> np.random.Generator:
    """The generator of the concern `name` under the scenario seed (0 or more); the same on every machine and run."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, key))))
