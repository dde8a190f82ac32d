"""How long a step takes in simulated time: a pure function of its plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from paged_attention.plan import StepPlan
from sim.calibration.features import Kind, features
from sim.calibration.file import Calibration, load_calibration
from sim.scenario.models import CostSettings, FixedCost, LinearCost, MeasuredCost, RooflineDevice, RooflineModel

BYTES_PER_WORD = 2
"""Weights and K/V in bfloat16."""


class CostModel(Protocol):
    """Gives every step a duration."""

    def duration_ns(self, plan: StepPlan) -> int:
        """Nanoseconds that the step takes, at least 1."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Every step takes `step_ns`."""

    step_ns: int

    def duration_ns(self, plan: StepPlan) -> int:
        """Nanoseconds that the step takes, at least 1."""
        return max(1, self.step_ns)


@dataclass(frozen=True, slots=True)
class Linear:
    """`base_ns` and `per_token_ns` for each token whose K/V the step writes."""

    base_ns: int
    per_token_ns: int

    def duration_ns(self, plan: StepPlan) -> int:
        """Nanoseconds that the step takes, at least 1."""
        return max(1, self.base_ns + self.per_token_ns * plan.num_tokens)


@dataclass(frozen=True, slots=True)
class Decoder:
    """The sizes of a dense decoder with grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    window: int = 0
    """Tokens that every second layer attends to; 0: all layers attend to everything."""

    @property
    def layer_weights(self) -> int:
        """Weights of one layer: Q and O, K and V, and the three matrices of the gated MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.hidden * self.vocabulary


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Peak figures of one chip."""

    flops: float
    """Dense bfloat16 FLOP/s."""
    bytes_per_second: float
    """HBM bandwidth."""


# Sizes from the published config.json of each model: num_hidden_layers, hidden_size, num_attention_heads,
# num_key_value_heads, head_dim, intermediate_size, vocab_size, sliding_window.
DECODERS: dict[RooflineModel, Decoder] = {
    # meta-llama/Meta-Llama-3-8B; "The Llama 3 Herd of Models" (arXiv 2407.21783), table 3.
    "llama-3-8b": Decoder(32, 4096, 32, 8, 128, 14_336, 128_256),
    # meta-llama/Meta-Llama-3-70B; same table.
    "llama-3-70b": Decoder(80, 8192, 64, 8, 128, 28_672, 128_256),
    # google/gemma-2-9b; "Gemma 2" (arXiv 2408.00118), table 1 (its 28,672 counts both halves of the gated MLP);
    # local attention over 4,096 tokens in every second layer.
    "gemma-2-9b": Decoder(42, 3584, 16, 8, 256, 14_336, 256_000, window=4096),
}

ACCELERATORS: dict[RooflineDevice, Accelerator] = {
    # Cloud TPU documentation, page "TPU v5e": 197 TFLOP/s bf16, 819 GB/s HBM per chip.
    "tpu-v5e": Accelerator(197e12, 819e9),
    # Cloud TPU documentation, page "TPU v5p": 459 TFLOP/s bf16, 2,765 GB/s HBM per chip.
    "tpu-v5p": Accelerator(459e12, 2765e9),
    # Cloud TPU documentation, page "TPU v6e": 918 TFLOP/s bf16, 1,600 GB/s HBM per chip.
    "tpu-v6e": Accelerator(918e12, 1600e9),
    # NVIDIA H100 datasheet, SXM: 1,979 TFLOP/s bf16 with sparsity, so 989.5 dense; 3.35 TB/s HBM3.
    "h100": Accelerator(989.5e12, 3.35e12),
    # NVIDIA H200 datasheet, SXM: 1,979 TFLOP/s bf16 with sparsity, so 989.5 dense; 4.8 TB/s HBM3e.
    "h200": Accelerator(989.5e12, 4.8e12),
}


@dataclass(frozen=True, slots=True)
class Roofline:
    """The larger of compute and memory time, both at peak (Williams, Waterman, Patterson: Roofline, CACM 2009).

    A lower bound: nothing overlaps worse than perfectly, and communication between devices is free.
    """

    decoder: Decoder
    accelerator: Accelerator
    devices: int
    overhead_ns: int

    def duration_ns(self, plan: StepPlan) -> int:
        """Nanoseconds that the step takes, at least 1."""
        compute = self.flops(plan) / (self.devices * self.accelerator.flops)
        memory = self.bytes_moved(plan) / (self.devices * self.accelerator.bytes_per_second)
        return max(1, self.overhead_ns + round(max(compute, memory) * 1e9))

    def flops(self, plan: StepPlan) -> int:
        """Two FLOP per weight and token, two per K and two per V word that a token attends to.

        The token at position p attends to p + 1 tokens, so a row attends to count * start + count (count + 1) / 2. In
        windowed layers each token attends to at most `window`.
        """
        model = self.decoder
        sampled = int(np.count_nonzero(plan.samples))
        weights = plan.num_tokens * model.layers * model.layer_weights + sampled * model.head_weights
        start, count = plan.start.astype(np.int64), plan.count.astype(np.int64)
        attended = model.layers * ((2 * int(count @ start) + int(count @ count) + plan.num_tokens) // 2)
        if model.window:
            hidden = _triangle(start + count - model.window) - _triangle(start - model.window)
            attended -= model.layers // 2 * int(hidden.sum())
        return 2 * weights + 4 * model.heads * model.head_dim * attended

    def bytes_moved(self, plan: StepPlan) -> int:
        """Each weight once, the K and V that each row reads once, and those that it writes."""
        model = self.decoder
        weights = model.layers * model.layer_weights + model.head_weights
        read = model.layers * (int(np.add.reduce(plan.start, dtype=np.int64)) + plan.num_tokens)
        if model.window:
            read -= model.layers // 2 * int(np.maximum(plan.start - (model.window - 1), 0).sum(dtype=np.int64))
        written = model.layers * plan.num_tokens
        return BYTES_PER_WORD * (weights + 2 * model.kv_heads * model.head_dim * (read + written))


def _triangle(n: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """1 + 2 + ... + n, and 0 below 1."""
    return np.maximum(n, 0) * (n + 1) // 2


@dataclass(slots=True)
class Measured:
    """What a device took for such steps, by the model of a calibration.

    A kind of step that was never measured takes as long as the slowest model of another kind says.
    """

    calibration: Calibration
    num_extrapolated: int = 0
    """Steps so far that lie outside what was measured."""
    _ranges: dict[Kind, tuple[tuple[int, int], ...]] = field(init=False)
    _coefficients: dict[Kind, tuple[int, ...]] = field(init=False)
    """In ps: the base, then one for each feature."""

    def __post_init__(self) -> None:
        fits = self.calibration.kinds.measured()
        self._ranges = {kind: tuple((r.min, r.max) for r in fit.ranges) for kind, fit in fits.items()}
        self._coefficients = {kind: (fit.base_ps, *fit.coefficients_ps) for kind, fit in fits.items()}

    def duration_ns(self, plan: StepPlan) -> int:
        """Nanoseconds that the step takes, at least 1; integers throughout, so that every machine gets the same."""
        kind, values = features(plan)
        ranges, own = self._ranges.get(kind), self._coefficients.get(kind)
        if ranges is None or not all(low <= v <= high for v, (low, high) in zip(values, ranges, strict=True)):
            self.num_extrapolated += 1
        used = self._coefficients.values() if own is None else (own,)
        return max(1, *(_rounded(c[0] + sum(map(int.__mul__, c[1:], values))) for c in used))


def _rounded(ps: int) -> int:
    """Whole ns."""
    return (ps + 500) // 1000


def num_extrapolated(cost: CostModel) -> int:
    """Steps that a measured model has been asked about and that nobody measured; 0 for all other models."""
    return cost.num_extrapolated if isinstance(cost, Measured) else 0


def cost_model(settings: CostSettings) -> CostModel:
    """The cost model that a scenario asks for. ScenarioError: its calibration file is wrong."""
    if isinstance(settings, FixedCost):
        return Fixed(settings.step_ns)
    if isinstance(settings, LinearCost):
        return Linear(settings.base_ns, settings.per_token_ns)
    if isinstance(settings, MeasuredCost):
        return Measured(load_calibration(settings.file))
    decoder, accelerator = DECODERS[settings.model], ACCELERATORS[settings.device]
    return Roofline(decoder, accelerator, settings.tensor_parallel, settings.overhead_ns)
