"""From timed steps to a calibration: fit to three quarters of them, and judge by the rest."""

from __future__ import annotations

import os
import platform
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float, Int64

from sim.calibration.features import FEATURES, KINDS, Kind
from sim.calibration.file import Calibration, Deviation, FeatureRange, HeldOut, KindFit, Kinds
from sim.calibration.fit import fit_times
from sim.calibration.measure import CalibrationError, Samples, measure
from sim.run import package_versions
from sim.scenario import Scenario

HOLD_OUT_EVERY: Final = 4
MIN_STEPS: Final = 40
MAX_MEDIAN_ERROR: Final = 0.15
"""The target: half of the steps held out are off by no more."""
_PS_PER_NS: Final = 1000


def calibrate(scenario: Scenario, date: str, max_steps: int, repeats: int = 1) -> Calibration:
    """Measure the scenario's steps on the present device and fit a model; `date` is kept as YYYY-MM-DD.

    As `measure`; CalibrationError: fewer than MIN_STEPS steps.
    """
    return calibration_of(measure(scenario, max_steps, repeats), scenario, date)


def calibration_of(samples: Samples, scenario: Scenario, date: str) -> Calibration:
    """The model of timed steps."""
    if len(samples.kinds) < MIN_STEPS:
        raise CalibrationError(
            f"{scenario.name} has only {len(samples.kinds)} steps, and a fit wants {MIN_STEPS}; "
            "give it more requests: --set workload.num_requests=N"
        )
    held = held_out(samples.kinds)
    fits = {kind: _fit(samples, _of_kind(samples, kind), held) for kind in KINDS if kind in samples.kinds}
    modelled = np.array(
        [duration_ps(fits[kind], row) / _PS_PER_NS for kind, row in zip(samples.kinds, samples.features, strict=True)]
    )
    errors = np.abs(modelled - samples.times_ns) / samples.times_ns
    first, second = samples.times_ns
    measured = samples.times_ns[:, held].mean(axis=0).sum()
    return Calibration(
        date=date,
        scenario=scenario.name,
        device=samples.device,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        versions=package_versions(),
        sizes=_sizes(scenario),
        noise=Deviation(**_deviation(np.abs(second - first) / first)),
        held_out=HeldOut(
            **_deviation(errors[:, held]),
            steps=int(held.sum()),
            total=round(float(modelled[held].sum() / measured - 1), 4),
        ),
        kinds=Kinds(**{kind: fits.get(kind) for kind in KINDS}),
    )


def duration_ps(fit: KindFit, values: Any) -> int:
    """The time that a model gives to a step with these features, in ps."""
    return fit.base_ps + sum(per * int(value) for per, value in zip(fit.coefficients_ps, values, strict=True))


def held_out(kinds: list[Kind]) -> Bool[np.ndarray, " steps"]:
    """Which steps are kept from the fit: every fourth of each kind."""
    seen: dict[Kind, int] = {}
    held: list[bool] = []
    for kind in kinds:
        seen[kind] = seen.get(kind, 0) + 1
        held.append(seen[kind] % HOLD_OUT_EVERY == 0)
    return np.array(held, bool)


def _of_kind(samples: Samples, kind: Kind) -> Bool[np.ndarray, " steps"]:
    return np.array([other == kind for other in samples.kinds], bool)


def _fit(samples: Samples, mine: Bool[np.ndarray, " steps"], held: Bool[np.ndarray, " steps"]) -> KindFit:
    used = mine & ~held
    x = _with_base(samples.features[used])
    times = samples.times_ns[:, used].astype(np.float64)
    found = fit_times(np.concatenate([x, x]), times.reshape(-1))
    base, *per = (round(value * _PS_PER_NS) for value in found.tolist())
    low, high = samples.features[mine].min(axis=0), samples.features[mine].max(axis=0)
    ranges = {name: FeatureRange(min=int(low[n]), max=int(high[n])) for n, name in enumerate(FEATURES)}
    return KindFit(
        steps=int(mine.sum()),
        base_ps=base,
        per_prefill_token_ps=per[0],
        per_decode_ps=per[1],
        per_context_token_ps=per[2],
        per_prefill_pair_ps=per[3],
        **ranges,
    )


def _with_base(values: Int64[np.ndarray, "steps features"]) -> Float[np.ndarray, "steps base_and_features"]:
    return np.concatenate([np.ones((len(values), 1)), values.astype(np.float64)], axis=1)


def _deviation(shares: Float[np.ndarray, "..."]) -> dict[str, float]:
    median, p90 = np.percentile(shares, [50, 90]).tolist()
    return {"median": round(median, 4), "p90": round(p90, 4)}


def _sizes(scenario: Scenario) -> dict[str, int | str | bool | None]:
    core, cache, model = scenario.core, scenario.cache, scenario.model
    return {
        "batch_size": core.batch_size,
        "prefill_chunk": core.prefill_chunk,
        **cache.model_dump(mode="json"),
        "model": model.kind,
        "road": scenario.backend.road,
    }
