"""How long a step of the small decoder takes, by how many sequences decode in it.

The steps are those of a scenario that was judged first; the same steps of the model that reads nothing are timed beside
them, so that what attention and the layers cost is told apart from the writes and the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from sim.calibration.features import FEATURES
from sim.calibration.measure import Samples, measure
from sim.scenario import Scenario

BATCHES: Final = (1, 8, 32)
FULL_STEPS: Final = 24
"""Steps in which all sequences of a batch decode."""
PROMPT: Final = 48


@dataclass(frozen=True, slots=True)
class StepTime:
    """The steps of one batch size: medians over steps, of the faster of two runs each."""

    batch: int
    steps: int
    decoder_ns: float
    echo_ns: float
    """Of the model that writes as many K and V, and reads none."""
    context_tokens: float
    """K/V positions that a step of the batch reads."""


def decoder_steps(
    batches: tuple[int, ...] = BATCHES, tell: Callable[[str], None] = lambda _: None
) -> Iterator[StepTime]:
    """Time full decode steps of each batch size on the CPU. CalibrationError: a step was wrong."""
    for batch in batches:
        tell(f"tiny decode {batch}")
        decoder, echo = (measure(scenario(batch, kind), max_steps=10_000) for kind in ("tiny", "echo"))
        full = full_steps(decoder, batch)
        context = decoder.features[full, FEATURES.index("context_tokens")]
        decoder_ns, echo_ns = (float(np.median(timed.times_ns.min(axis=0)[full])) for timed in (decoder, echo))
        yield StepTime(batch, len(full), decoder_ns, echo_ns, float(context.mean()))


def full_steps(samples: Samples, batch: int) -> list[int]:
    """The steps in which `batch` sequences decode, and nothing else runs."""
    decodes = samples.features[:, FEATURES.index("decodes")].tolist()
    return [n for n, kind in enumerate(samples.kinds) if kind == "decode" and decodes[n] == batch]


def scenario(batch: int, model: Literal["tiny", "echo"]) -> Scenario:
    """`batch` requests at once, which run long enough to have all of them decode together for FULL_STEPS steps."""
    output = batch + FULL_STEPS
    length = PROMPT + output
    return Scenario.model_validate(
        {
            "name": f"decoder-{batch}",
            "core": {"batch_size": batch, "prefill_chunk": PROMPT},
            "cache": {
                "page_size": 16,
                "num_pages": 1 + batch * -(-length // 16),
                "max_sequence_length": length,
                "layers": 2,
                "kv_heads": 2,
                "head_dim": 16,
            },
            "backend": {"kind": "jax"},
            "workload": {
                "arrivals": {"kind": "concurrent", "concurrency": batch},
                "prompt_tokens": {"kind": "fixed", "value": PROMPT},
                "output_tokens": {"kind": "fixed", "value": output},
                "num_requests": batch,
            },
            "model": {"kind": model, "vocab_size": 64},
            "cost": {"kind": "fixed", "step_ns": 1000},
        }
    )
