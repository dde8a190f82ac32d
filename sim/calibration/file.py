"""The calibration file: what was measured where, the coefficients, and how far off they are."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sim.calibration.features import FEATURES, Kind
from sim.scenario.base import WHOLE, Count, Section
from sim.scenario.errors import ScenarioError
from sim.scenario.explain import explain
from sim.scenario.source import read_source, yaml_engine

MAX_PS = 10**18
Picoseconds = Annotated[int, Field(ge=0, le=MAX_PS), WHOLE]
Measured = Annotated[int, Field(ge=0, lt=2**63), WHOLE]
Share = Annotated[float, Field(ge=0.0)]


class FeatureRange(Section):
    """Between which values a feature was measured."""

    min: Measured = Field(description="Smallest value of any measured step.")
    max: Measured = Field(description="Largest value of any measured step.")

    @model_validator(mode="after")
    def _ordered(self) -> FeatureRange:
        if self.min > self.max:
            text = f"min {self.min} is more than max {self.max}"
            raise PydanticCustomError("range_order", "{text}", {"text": text})
        return self


class KindFit(Section):
    """The model of one kind of steps: base_ps + each feature times its coefficient."""

    steps: Count = Field(description="Measured steps of this kind.")
    base_ps: Picoseconds = Field(description="What every step takes, in ps.")
    per_prefill_token_ps: Picoseconds = Field(description="What each token of a prefill adds, in ps.")
    per_decode_ps: Picoseconds = Field(description="What each decode row adds, in ps.")
    per_context_token_ps: Picoseconds = Field(description="What each token that a row reads adds, in ps.")
    per_prefill_pair_ps: Picoseconds = Field(description="What each token that a prefill token attends to adds, in ps.")
    prefill_tokens: FeatureRange = Field(description="Measured tokens of prefills in a step.")
    decodes: FeatureRange = Field(description="Measured decode rows in a step.")
    context_tokens: FeatureRange = Field(description="Measured tokens that the rows of a step read.")
    prefill_pairs: FeatureRange = Field(description="Measured pairs of a prefill token and one that it attends to.")

    @property
    def coefficients_ps(self) -> tuple[int, ...]:
        """Of each of FEATURES, in ps."""
        return (
            self.per_prefill_token_ps,
            self.per_decode_ps,
            self.per_context_token_ps,
            self.per_prefill_pair_ps,
        )

    @property
    def ranges(self) -> tuple[FeatureRange, ...]:
        """Of each of FEATURES."""
        return tuple(getattr(self, name) for name in FEATURES)


class Kinds(Section):
    """The model of each kind of steps that was measured."""

    prefill: KindFit | None = Field(default=None, description="Steps with a prefill alone.")
    decode: KindFit | None = Field(default=None, description="Steps with decodes alone.")
    mixed: KindFit | None = Field(default=None, description="Steps with both.")

    @model_validator(mode="after")
    def _some(self) -> Kinds:
        if not self.measured():
            raise PydanticCustomError("no_kinds", "no kind of step has a model: expected prefill, decode or mixed")
        return self

    def measured(self) -> dict[Kind, KindFit]:
        """Those that were measured."""
        found: dict[Kind, KindFit | None] = {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}
        return {kind: fit for kind, fit in found.items() if fit is not None}


class Deviation(Section):
    """How far times are from one another, as shares of the measured time."""

    median: Share = Field(description="Half of all steps are off by no more.")
    p90: Share = Field(description="Nine tenths of all steps are off by no more.")


class HeldOut(Deviation):
    """How far the model is from steps that it was not fitted to."""

    steps: Count = Field(description="Steps held out.")
    total: float = Field(description="(sum of modelled - sum of measured) / sum of measured; over 0: too slow.")


class Calibration(Section):
    """A step-time model of one device, as a file."""

    schema_: Literal["kvproof-calibration/v1"] = Field(
        default="kvproof-calibration/v1", alias="schema", description="Format of this file."
    )
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = Field(description="Day of the measurement.")
    scenario: str = Field(description="Name of the scenario whose steps were measured.")
    device: dict[str, str] = Field(description="What the backend says of itself.")
    machine: str = Field(description="System, processor and number of CPUs of the host.")
    versions: dict[str, str] = Field(description="Installed packages.")
    sizes: dict[str, int | str | bool | None] = Field(description="Sizes of cache, batch and model that were measured.")
    noise: Deviation = Field(description="The same steps timed twice, compared with each other.")
    held_out: HeldOut = Field(description="The model compared with steps that it was not fitted to.")
    kinds: Kinds = Field(description="The model.")


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration file. ScenarioError: one line `file:line:column: key.path: what is wrong` per problem."""
    source = read_source(Path(path), "calibration")
    try:
        return Calibration.model_validate(source.data)
    except ValidationError as error:
        problems = sorted(explain(error, source.data, Calibration), key=lambda problem: source.place(problem[0]))
        raise ScenarioError(source.problem(where, what) for where, what in problems) from None


def calibration_text(calibration: Calibration) -> str:
    """The calibration as YAML; equal calibrations give equal texts."""
    yaml = yaml_engine("safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    stream = StringIO()
    yaml.dump(calibration.model_dump(mode="json", by_alias=True, exclude_none=True), stream)
    return stream.getvalue()
