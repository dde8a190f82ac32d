"""The backend that runs nothing: tokens come from the script, K/V is written nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt32

from backends.protocol import CacheSpec, DeviceSpec, ModelSpec, Words
from backends.scripted import TokenScript
from paged_attention.plan import CacheBuffers, Evidence, Ints, ModelRows, StepOutcome, StepPlan, WrongPlace


@dataclass(slots=True)
class DoneStep:
    """A step whose outcome is known already."""

    outcome: StepOutcome

    def result(self) -> StepOutcome:
        """What the step yielded."""
        return self.outcome


class NoneBackend:
    """Plans only: yields what an error-free run of the scripted model would. It holds no cache, so it shows none."""

    def open(self, cache: CacheSpec, model: ModelSpec, devices: DeviceSpec) -> None:
        """Take note of the lengths; the devices are not looked at. ValueError: a decoder is asked for."""
        if model.kind == "tiny":
            raise ValueError("the backend 'none' computes nothing, so it has no decoder; choose numpy or jax")
        self._script = TokenScript(cache.max_sequence_length, model.vocab_size)

    def execute(self, plan: StepPlan, rows: ModelRows) -> DoneStep:
        """The step's outcome, at once."""
        return DoneStep(self._script.outcome(plan, rows))

    def evidence(self, slots: Ints, pages: Ints) -> Evidence | None:
        """None: there is no cache."""
        return None

    def buffers(self) -> CacheBuffers | None:
        """None: there is no cache."""
        return None

    def verify(
        self, pages: Ints, offsets: Ints, kv_ids: UInt32[np.ndarray, " places"], limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """Nothing is wrong where nothing is."""
        return ()

    def verify_words(self, pages: Ints, offsets: Ints, words: Words, limit: int = 8) -> tuple[WrongPlace, ...]:
        """Nothing is wrong where nothing is."""
        return ()

    def poison(self, pages: Ints, how: Literal["nan", "big"]) -> None:
        """Nothing to poison."""

    def describe(self) -> Mapping[str, str]:
        """Name, platform and NumPy's version."""
        return {"name": "none", "platform": "none", "device_kind": "none", "numpy": np.__version__}

    def close(self) -> None:
        """Nothing to give back."""
